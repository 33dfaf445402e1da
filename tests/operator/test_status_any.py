"""Any combination of what can be seen gives a valid status, and never an exception."""

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from objects import (
    NOW,
    SETTINGS,
    bound,
    by_place,
    deployment,
    ended,
    evicted,
    hpa,
    loaded,
    loading,
    own_words,
    pod,
    ready,
    rendered,
    subject,
    unplaced,
    waiting,
)
from specs import GOOD
from status_cases import rows_of, status_of

from phoenix_api import Reason
from phoenix_operator.desired import autoscaling
from phoenix_operator.desired.autoscaling import is_autoscaled
from phoenix_operator.desired.deployment import template_hash
from phoenix_operator.kinds import CHILDREN, OPTIONAL
from phoenix_operator.observed import Missing, Object, Observed, Pod, Reference, Refusal, Subject

WORDS = st.text(max_size=40) | st.just("x" * 3000) | st.just('{"reason": 1}') | st.just("[]") | st.just("null")
REASONS = st.sampled_from([*map(str, Reason), "FromTheFuture", ""])
BINDING_REASONS = [
    Reason.BOUND, Reason.BACKEND_UNREACHABLE, Reason.ACCESS_DENIED, Reason.SECRET_MISSING, Reason.TOPIC_MISMATCH,
]  # fmt: skip
SPECS = [case.spec for case in GOOD]


def makers(words: str, reason: str) -> list[Any]:
    """Every way in which a pod can be made."""
    return [
        ready,
        loading,
        evicted,
        pod,
        lambda model, name, **parts: waiting(model, reason, words, name, **parts),
        lambda model, name, **parts: waiting(model, "ImagePullBackOff", words, name, **parts),
        lambda model, name, **parts: waiting(model, "CreateContainerConfigError", words, name, **parts),
        lambda model, name, **parts: ended(model, name, message=words, **parts),
        lambda model, name, **parts: ended(model, name, message=own_words(reason, words), exit_code=None, **parts),
        lambda model, name, **parts: ended(model, name, reason="OOMKilled", **parts),
        lambda model, name, **parts: unplaced(model, words, name, **parts),
        lambda model, name, **parts: Pod({"metadata": {"name": name, "uid": name}}),
        lambda model, name, **parts: Pod({"metadata": {"name": name, "uid": name}, "status": {}}),
    ]


@st.composite
def pods(draw: st.DrawFn, model: Subject, observed: Observed) -> list[Pod]:
    found = []
    for number in range(draw(st.integers(0, 4))):
        make = draw(st.sampled_from(makers(draw(WORDS), draw(REASONS))))
        template = draw(st.sampled_from([template_hash(model, observed, SETTINGS), "old", ""]))
        made = make(model, f"pod-{number}", template=template)
        if draw(st.booleans()):
            made.body["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"
        found.append(made)
    return found


@st.composite
def live_deployments(draw: st.DrawFn, model: Subject) -> Object | None:
    conditions = [
        {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"},
        {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
        {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: small"},
        {"type": "ReplicaFailure", "status": "True"},
    ]
    if draw(st.booleans()):
        return None
    return deployment(
        model, is_rolled_out=draw(st.booleans()), conditions=draw(st.lists(st.sampled_from(conditions), max_size=2))
    )


@st.composite
def live_autoscalers(draw: st.DrawFn, model: Subject) -> Object:
    reasons = ["FailedGetScale", "FailedGetObjectMetric", "ScalingDisabled", "TooManyReplicas", "ValidMetricFound"]
    kinds = ["AbleToScale", "ScalingActive", "ScalingLimited", "New"]
    rows = st.tuples(st.sampled_from(kinds), st.sampled_from(["True", "False", "Unknown"]), st.sampled_from(reasons))
    names = [autoscaling.CONCURRENCY, autoscaling.PRESSURE, autoscaling.LATENCY, "another"]
    values = st.dictionaries(st.sampled_from(names), st.sampled_from(["0", "1", "900m", "1500m", "123456789", "1e3"]))
    return hpa(
        model, conditions=draw(st.lists(rows, max_size=4)), values=draw(values), replicas=draw(st.integers(0, 9))
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[Subject, Observed]:
    """A model with the cluster around it."""
    model = subject(generation=draw(st.integers(0, 3)), **draw(st.sampled_from(SPECS)))
    children = by_place(rendered(model))
    live = draw(live_deployments(model))
    children = {place: body for place, body in children.items() if body["kind"] != "Deployment"}
    if live is not None:
        children |= by_place([live])
    if is_autoscaled(model) and draw(st.booleans()):
        children |= by_place([draw(live_autoscalers(model))])
    bare = Observed(children=children)
    kinds = st.sampled_from(CHILDREN)
    seen = draw(pods(model, bare))
    return model, Observed(
        children=children,
        pods=seen,
        loaded={each.uid: draw(st.sampled_from([loaded(), loaded("CUDAExecutionProvider", "0")])) for each in seen[:2]},
        served_kinds=draw(st.sampled_from([frozenset(), OPTIONAL])),
        missing=draw(
            st.lists(
                st.builds(
                    Missing,
                    st.sampled_from(Reference),
                    st.just("name"),
                    st.sampled_from(["spec.model.uri", "spec.pod.env"]),
                    st.sampled_from([None, "key"]),
                ),
                max_size=2,
            )
        ),
        refusals=draw(st.lists(st.builds(Refusal, kinds, st.just("fraud"), st.just(403), WORDS, st.booleans()))),
        foreign=draw(st.lists(st.tuples(kinds, st.just("fraud")), max_size=2)),
        bindings={
            kind: replace(row, reason=draw(st.sampled_from(BINDING_REASONS)), message=draw(WORDS))
            for kind, row in bound(model).items()
            if draw(st.booleans())
        },
        unreleased=draw(st.lists(WORDS, max_size=2)),
        host_owner=draw(st.sampled_from([None, "other/fraud"])),
        shortfall=draw(WORDS),
        now=draw(st.sampled_from([None, NOW])),
    )


any_situation = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@any_situation
@given(situations())
def test_any_situation_gives_a_valid_status_that_stays(situation: tuple[Subject, Observed]) -> None:
    model, observed = situation
    first = status_of(model, observed)
    again = Subject(model.model, model.uid, model.generation, model.created, first)
    assert status_of(again, observed) == first


@any_situation
@given(situations())
def test_ready_is_true_only_if_nothing_else_fails(situation: tuple[Subject, Observed]) -> None:
    model, observed = situation
    rows = rows_of(status_of(model, observed))
    ready_row = rows.pop("Ready")
    failing = {kind for kind, row in rows.items() if row[0] != "True"}
    if ready_row[0] == "True":
        assert failing <= {"AcceleratorReady"}
        assert any(pod.is_ready for pod in observed.pods)
    else:
        assert failing


@any_situation
@given(situations(), st.sampled_from(SPECS))
def test_status_of_another_spec_follows_without_a_trace(situation: tuple[Subject, Observed], spec: Object) -> None:
    """A change of the spec, for example away from an accelerator, takes conditions with it that no longer apply."""
    model, observed = situation
    before = status_of(model, observed)
    after = subject(generation=model.generation + 1, status=before, **spec)
    rows = rows_of(status_of(after, observed))
    assert ("AcceleratorReady" in rows) is (after.spec.runtime.accelerator is not None)
