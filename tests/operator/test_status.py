"""The status of a model in every state of its pods: exact conditions, reasons, and what the messages say."""

from datetime import timedelta
from typing import Any

import pytest
from objects import (
    DIGEST,
    EARLIER,
    NOW,
    STAMP,
    deployment,
    document,
    ended,
    evicted,
    loaded,
    loading,
    own_words,
    ready,
    seen,
    subject,
    waiting,
)
from status_cases import CASES, LATE, Case, alone, check, rows_of, status_of

from phoenix_api import Reason
from phoenix_operator.kinds import POD_DISRUPTION_BUDGET
from phoenix_operator.observed import Object, Observed, Refusal, Subject
from phoenix_operator.settings import RouteKind, Routes, Settings
from phoenix_operator.status import unreadable_status


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_conditions_are_those_of_the_table(case: Case) -> None:
    model, observed = case.seen()
    rows = rows_of(status_of(model, observed))
    assert rows.keys() == case.rows.keys()
    for kind, (status, reason, piece) in case.rows.items():
        assert rows[kind][:2] == (status, reason), kind
        assert piece in rows[kind][2], kind


def test_table_shows_every_reason_that_the_operator_can_give() -> None:
    shown = {reason for case in CASES for _, reason, _ in case.rows.values()}
    assert set(Reason) - {Reason.NOT_SUPPORTED_YET} == shown  # no field of this release is refused so


def test_what_the_autoscaler_reads_is_told_in_round_numbers() -> None:
    [case] = [case for case in CASES if case.id == "autoscaler-reads"]
    model, observed = case.seen()
    live = observed.autoscaler
    assert live is not None
    live["status"] |= {"currentReplicas": 3, "desiredReplicas": 2}
    assert status_of(model, observed)["autoscaling"] == {
        "concurrency": "3700m", "pressure": "0", "desiredReplicas": 2,
    }  # fmt: skip


# --- times -----------------------------------------------------------------------------------------------------------


def after(model: Subject, status: Object, **parts: Any) -> Subject:
    return subject(status=status, **parts)


def times(status: Object) -> dict[str, str]:
    return {row["type"]: row["lastTransitionTime"] for row in status["conditions"]}


def test_second_status_of_the_same_is_the_same_later() -> None:
    for case in CASES:
        model, observed = case.seen()
        first = status_of(model, observed)
        again = Subject(model.model, model.uid, model.generation, model.created, first)
        later = Observed(**{name: getattr(observed, name) for name in Observed.__slots__} | {"now": NOW + timedelta(1)})
        assert status_of(again, later) == first, case.id


def test_time_moves_only_with_the_status_of_its_condition() -> None:
    def observed(model: Subject, *pods: Any) -> Observed:
        return seen(model, pods, deployment=deployment(model, is_rolled_out=True))

    first = subject()
    status = status_of(first, observed(first, waiting(first, "ErrImagePull", "x")))
    status["conditions"] = [row | {"lastTransitionTime": EARLIER} for row in status["conditions"]]
    second = subject(status=status)
    crash = status_of(second, observed(second, ended(second)))
    assert rows_of(crash)["Available"][1] == "CrashLoop", "another reason"
    assert set(times(crash).values()) == {EARLIER}
    third = subject(status=crash)
    serving = times(status_of(third, observed(third, ready(third))))
    assert serving == {
        "Accepted": EARLIER, "Progressing": EARLIER, "ModelVerified": STAMP, "Available": STAMP, "Ready": STAMP,
    }  # fmt: skip


def test_conditions_speak_of_the_generation_that_was_looked_at() -> None:
    model = subject(generation=7)
    status = status_of(model, seen(model))
    assert {row["observedGeneration"] for row in status["conditions"]} == {7} == {status["observedGeneration"]}


# --- the other fields ------------------------------------------------------------------------------------------------


def test_replicas_and_selector_are_those_of_the_scale_subresource() -> None:
    model = subject(replicas=3)
    pods = [ready(model, "a"), ready(model, "b", template="before"), loading(model, "c"), evicted(model, "d")]
    status = status_of(model, seen(model, pods, deployment=deployment(model)))
    assert status["replicas"] == {"desired": 3, "ready": 2, "updated": 2, "summary": "2/3"}
    assert status["readyReplicas"] == 2
    assert status["selector"] == "phoenix-ml.io/model=fraud"


def test_loaded_model_is_that_of_the_new_version_once_it_is_ready() -> None:
    model = subject(model={"uri": "x", "version": "2"})
    pods = [ready(model, "old", template="before"), ready(model, "new")]
    told = {"uid-old": loaded(version="1"), "uid-new": loaded(version="2")}
    assert status_of(model, seen(model, pods, loaded=told))["model"]["version"] == "2"
    assert status_of(model, seen(model, pods[:1], loaded=told))["model"] == {
        "sha256": DIGEST, "version": "1", "provider": "CPUExecutionProvider",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    }  # fmt: skip
    assert "model" not in status_of(model, seen(model, pods))


@pytest.mark.parametrize(
    ("routes", "url"),
    [
        (Routes(), None),
        (Routes(kind=RouteKind.INGRESS), "http://m.example.com/v2/models/fraud"),
        (Routes(kind=RouteKind.INGRESS, tls_secret_name="tls"), "https://m.example.com/v2/models/fraud"),
        (Routes(kind=RouteKind.HTTP_ROUTE), "https://m.example.com/v2/models/fraud"),
    ],
)
def test_endpoints_are_those_of_the_service_and_the_route(routes: Routes, url: str | None) -> None:
    model = subject(networking={"host": "m.example.com"})
    endpoints = status_of(model, seen(model), Settings(routes=routes))["endpoints"]
    assert endpoints["rest"] == "http://fraud.ml.svc:8000"
    assert endpoints["grpc"] == "fraud.ml.svc:8001"
    assert endpoints.get("url") == url


def test_long_message_is_cut() -> None:
    status = status_of(*alone(ended(subject(), message="x" * 5000)))
    assert max(len(row["message"]) for row in status["conditions"]) == 2000
    assert rows_of(status)["Available"][2].endswith("…")


def test_first_failing_condition_in_the_tables_order_is_the_reason_of_ready() -> None:
    model = subject()
    late = deployment(model, conditions=[LATE])
    refused = [Refusal(POD_DISRUPTION_BUDGET, "fraud", 422, "no")]
    status = status_of(model, seen(model, [ended(model)], deployment=late, refusals=refused))
    failing = [row["reason"] for row in status["conditions"][:-1] if row["status"] == "False"]
    assert failing == ["ObjectRefused", "CrashLoop", "DeadlineExceeded"]
    assert rows_of(status)["Ready"][1] == "ObjectRefused"


def test_sidecar_of_somebody_else_does_not_speak_for_the_server() -> None:
    model = subject()
    meshed = ended(model, message=own_words("NotFound", "no file"))
    meshed.body["status"]["containerStatuses"].insert(
        0, {"name": "istio-proxy", "restartCount": 0, "state": {"running": {}}}
    )
    assert rows_of(status_of(*alone(meshed)))["ModelVerified"][1] == "NotFound"


# --- what cannot even be parsed --------------------------------------------------------------------------------------


def test_spec_that_cannot_be_parsed_fails_accepted_and_ready_and_leaves_the_rest() -> None:
    model = subject()
    before = status_of(*alone(ready(model), deployment=deployment(model, is_rolled_out=True)))
    status = unreadable_status(document(generation=2, status=before), "spec.replicas: expected 0 or more", STAMP)
    check(status)
    rows = rows_of(status)
    assert rows["Accepted"] == rows["Ready"] == ("False", "InvalidSpec", "spec.replicas: expected 0 or more")
    assert rows["Available"] == rows_of(before)["Available"]
    assert status["observedGeneration"] == 2
    assert {key: status[key] for key in ("replicas", "endpoints")} == {
        key: before[key] for key in ("replicas", "endpoints")
    }
    assert unreadable_status(document(generation=2, status=status), "spec.replicas: expected 0 or more", "x") == status


def test_new_object_that_cannot_be_parsed_has_two_conditions() -> None:
    status = unreadable_status(document(), "spec.model: expected a value", STAMP)
    check(status)
    assert list(rows_of(status)) == ["Accepted", "Ready"]
