"""The table of states of a model's pods, with the conditions that tell of them; and what every status obeys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
from objects import (
    DIGEST,
    EARLIER,
    NOW,
    SETTINGS,
    STAMP,
    bound,
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
    seen,
    subject,
    unplaced,
    waiting,
)

from phoenix_api import CONDITIONS, ConditionType, Reason, Status
from phoenix_api.crd import custom_resource_definition
from phoenix_operator.desired.acceptance import faults
from phoenix_operator.kinds import DEPLOYMENT, HORIZONTAL_POD_AUTOSCALER, POD_DISRUPTION_BUDGET, SERVICE
from phoenix_operator.observed import TEMPLATE, Missing, Object, Observed, Reference, Refusal, Subject
from phoenix_operator.settings import Settings
from phoenix_operator.status import next_status

Row = tuple[str, str, str]  # status, reason, a piece of the message
SCHEMA = jsonschema.Draft202012Validator(
    custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
)


def status_of(model: Subject, observed: Observed, settings: Settings = SETTINGS) -> Object:
    """Return the status, which is always a valid one."""
    status = next_status(model, observed, settings, faults(model, observed, settings))
    check(status)
    return status


def check(status: Object) -> None:
    """The schema of the CRD takes it, the types read it back, and every reason belongs to its condition."""
    SCHEMA.validate(status)
    again = Status.model_validate(status, by_alias=True, by_name=False)
    assert again.model_dump(mode="json", by_alias=True, exclude_none=True) == status
    kinds = [row["type"] for row in status["conditions"]]
    assert kinds == [kind for kind in ConditionType if kind in kinds], "each once, in the order of the table"
    for row in status["conditions"]:
        table = CONDITIONS[ConditionType(row["type"])]
        allowed = table.when_true if row["status"] == "True" else table.otherwise
        if row["type"] == ConditionType.READY and row["status"] != "True":
            allowed = tuple(reason for other in CONDITIONS.values() for reason in other.otherwise)
        if row["status"] != "True":
            allowed = (*allowed, Reason.UNKNOWN)
        assert row["reason"] in allowed, row
        assert row["message"]


def rows_of(status: Object) -> dict[str, Row]:
    return {row["type"]: (row["status"], row["reason"], row["message"]) for row in status["conditions"]}


# --- the table -------------------------------------------------------------------------------------------------------

Seen = tuple[Subject, Observed]


@dataclass(frozen=True)
class Case:
    """What is seen, and what the conditions then are. Those that are not named are as `loading` has them."""

    id: str
    seen: Callable[[], Seen]
    rows: Mapping[str, Row]


CASES: list[Case] = []
LOADING: dict[str, Row] = {
    "Accepted": ("True", "SpecUnderstood", "every field is valid"),
    "ModelVerified": ("Unknown", "Loading", "no pod has loaded version 1 yet"),
    "Available": ("False", "Loading", "pods are starting or loading"),
    "Progressing": ("True", "RollingOut", "0 of 1 pods of version 1 are ready"),
}
NOTHING_DONE: Row = ("Unknown", "Unknown", "nothing is done about a spec that is not accepted")
LEFT_ALONE: dict[str, Row] = dict.fromkeys(("ModelVerified", "Available", "Progressing"), NOTHING_DONE)


def case(id: str, ready: Row, **rows: Row) -> Callable[[Callable[[], Seen]], None]:
    def add(seen: Callable[[], Seen]) -> None:
        CASES.append(Case(id, seen, LOADING | rows | {"Ready": ready}))

    return add


def alone(*pods: Any, **others: Any) -> Seen:
    """A model of one replica and these pods; its Deployment was applied."""
    model = subject()
    return model, seen(model, pods, deployment=others.pop("deployment", deployment(model)), **others)


def failing(reason: str, message: str) -> dict[str, Row]:
    """Conditions of a model whose only pod fails: the cause shows in `Available` and `Progressing`."""
    return {
        "Available": ("False", reason, message),
        "Progressing": ("True", "RollingOut", f"0 of 1 pods of version 1 are ready; {reason}: "),
    }


@case(
    "nothing-applied-yet",
    ("False", "Loading", "pods are starting"),
    Progressing=("True", "RollingOut", "the Deployment is not there yet"),
)
def _() -> Seen:
    model = subject()
    return model, Observed(now=NOW)


@case("deployment-without-pods", ("False", "Loading", "pods are starting"))
def _() -> Seen:
    return alone()


@case("loading", ("False", "Loading", "pods are starting"))
def _() -> Seen:
    return alone(loading(subject()))


@case("container-being-created", ("False", "Loading", "pods are starting"))
def _() -> Seen:
    return alone(waiting(subject(), "ContainerCreating"))


@case(
    "serving",
    ("True", "Ready", "version 1 answers"),
    ModelVerified=("True", "Verified", f"version 1 is loaded, sha256 {DIGEST}"),
    Available=("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    Progressing=("True", "RolledOut", "every pod is of version 1"),
)
def _() -> Seen:
    model = subject()
    return alone(ready(model), deployment=deployment(model, is_rolled_out=True), loaded={"uid-fraud-1": loaded()})


@case(
    "serving-but-not-asked-yet",
    ("True", "Ready", "version 1 answers"),
    ModelVerified=("True", "Verified", "version 1 is loaded"),
    Available=("True", "ReplicasAvailable", "1 of 1"),
    Progressing=("True", "RolledOut", ""),
)
def _() -> Seen:
    model = subject()
    return alone(ready(model), deployment=deployment(model, is_rolled_out=True))


@case(
    "one-of-three",
    ("True", "Ready", "version 1 answers"),
    ModelVerified=("True", "Verified", "version 1 is loaded"),
    Available=("True", "ReplicasAvailable", "1 of 3 replicas answer; CrashLoop: pod b ended with exit code 1"),
    Progressing=("True", "RollingOut", "1 of 3 pods of version 1 are ready; CrashLoop: pod b ended"),
)
def _() -> Seen:
    model = subject(replicas=3)
    return model, seen(model, [ready(model, "a"), ended(model, "b")], deployment=deployment(model))


for word, message in (
    ("ErrImagePull", "manifest unknown"), ("ImagePullBackOff", "Back-off pulling image"),
    ("InvalidImageName", "couldn't parse image"), ("ErrImageNeverPull", ""), ("RegistryUnavailable", "timeout"),
):  # fmt: skip
    said = message or word

    @case(f"image-{word}", ("False", "ImagePullFailed", said), **failing("ImagePullFailed", said))
    def _(word: str = word, message: str = message) -> Seen:
        return alone(waiting(subject(), word, message))


@case(
    "image-of-the-user",
    ("False", "ImagePullFailed", "check spec.runtime.image"),
    **failing("ImagePullFailed", "check spec.runtime.image"),
)
def _() -> Seen:
    model = subject(runtime={"image": "example.com/mine:1"})
    return model, seen(model, [waiting(model, "ErrImagePull", "not found")], deployment=deployment(model))


@case(
    "crash-loop",
    ("False", "CrashLoop", "ended with exit code 139: Segmentation fault (restarted 3 times)"),
    **failing("CrashLoop", "see `kubectl logs fraud-1 --previous`"),
)
def _() -> Seen:
    return alone(ended(subject(), message="Segmentation fault", exit_code=139))


@case(
    "crash-loop-that-just-began",
    ("False", "CrashLoop", "ended with exit code 1 (restarted once)"),
    **failing("CrashLoop", "exit code 1"),
)
def _() -> Seen:
    return alone(ended(subject(), restarts=1))


@case(
    "crash-loop-without-exit-code",
    ("False", "CrashLoop", "pod fraud-1 ended (restarted 3 times)"),
    **failing("CrashLoop", "pod fraud-1 ended"),
)
def _() -> Seen:
    return alone(ended(subject(), exit_code=None))


@case("container-that-ended-now", ("False", "CrashLoop", "exit code 2"), **failing("CrashLoop", "exit code 2"))
def _() -> Seen:
    terminated = {"terminated": {"reason": "Error", "exitCode": 2}}
    return alone(pod(subject(), container={"state": terminated}))


@case("clean-end", ("False", "Loading", "pods are starting"))
def _() -> Seen:
    return alone(ended(subject(), reason="Completed", exit_code=0))


for reason in CONDITIONS[ConditionType.MODEL_VERIFIED].otherwise:
    if reason is Reason.LOADING:  # nothing that a server ends with
        continue
    said = f"words about {reason}"

    @case(
        f"model-{reason}",
        ("False", reason, f"version 1: {said}"),
        ModelVerified=("False", reason, f"version 1: {said}"),
        **failing("CrashLoop", f"{reason}: {said} (pod fraud-1, restarted 3 times)"),
    )
    def _(reason: str = reason, said: str = said) -> Seen:
        return alone(ended(subject(), message=own_words(reason, said)))


for reason in (Reason.INVALID_SETTING, Reason.PORT_IN_USE, Reason.OUT_OF_MEMORY):

    @case(f"server-{reason}", ("False", reason, "pod fraud-1: words"), **failing(reason, "pod fraud-1: words"))
    def _(reason: str = reason) -> Seen:
        return alone(ended(subject(), message=own_words(reason, "words")))


@case(
    "server-with-a-reason-that-is-new",
    ("False", "CrashLoop", "FromTheFuture: words (pod fraud-1"),
    **failing("CrashLoop", "FromTheFuture: words"),
)
def _() -> Seen:
    return alone(ended(subject(), message=own_words("FromTheFuture", "words")))


@case(
    "out-of-memory",
    ("False", "OutOfMemory", "exceeding its memory limit of 512Mi; raise spec.resources"),
    **failing("OutOfMemory", "lower batching.maxRows"),
)
def _() -> Seen:
    return alone(ended(subject(), reason="OOMKilled", exit_code=137))


@case(
    "unschedulable",
    ("False", "Unschedulable", "1 Insufficient cpu. (node a: cpu asked 4, free 1 of 2)"),
    **failing("Unschedulable", "0/1 nodes are available"),
)
def _() -> Seen:
    return alone(
        unplaced(subject(), "0/1 nodes are available: 1 Insufficient cpu."),
        shortfall="node a: cpu asked 4, free 1 of 2",
    )


@case("unschedulable-without-words", ("False", "Loading", "pods are starting"))
def _() -> Seen:
    return alone(pod(subject(), conditions=[{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]))


for word in ("CreateContainerConfigError", "CreateContainerError"):

    @case(
        f"container-{word}",
        ("False", "ConfigurationMissing", 'pod fraud-1: secret "x" not found'),
        **failing("ConfigurationMissing", 'secret "x" not found'),
    )
    def _(word: str = word) -> Seen:
        return alone(waiting(subject(), word, 'secret "x" not found'))


@case(
    "evicted",
    ("False", "Loading", "made again: Evicted: The node was low on resource: memory."),
    Available=("False", "Loading", "a pod was ended by its node"),
)
def _() -> Seen:
    return alone(evicted(subject()))


@case("evicted-and-replaced", ("False", "Loading", "Evicted"), Available=("False", "Loading", "Evicted"))
def _() -> Seen:
    return alone(evicted(subject()), loading(subject(), "fraud-2"))


QUOTA = 'pods "fraud-1" is forbidden: exceeded quota: small, requested: pods=1, used: pods=5, limited: pods=5'


def with_replica_failure(message: str) -> Seen:
    model = subject()
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    return alone(deployment=deployment(model, conditions=[condition]))


@case(
    "quota-for-pods",
    ("False", "QuotaExceeded", "exceeded quota: small"),
    **failing("QuotaExceeded", "raise the quota, or ask for less"),
)
def _() -> Seen:
    return with_replica_failure(QUOTA)


@case(
    "pod-security", ("False", "PodsRefused", "violates PodSecurity"), **failing("PodsRefused", "violates PodSecurity")
)
def _() -> Seen:
    return with_replica_failure('pods "fraud-1" is forbidden: violates PodSecurity "restricted:latest"')


@case("replica-failure-that-is-over", ("False", "Loading", "pods are starting"))
def _() -> Seen:
    model = subject()
    condition = {"type": "ReplicaFailure", "status": "False", "message": QUOTA}
    return alone(deployment=deployment(model, conditions=[condition]))


@case(
    "quota-for-objects",
    ("False", "QuotaExceeded", "Service fraud: exceeded quota"),
    Available=("False", "QuotaExceeded", "Service fraud: exceeded quota"),
    Progressing=("True", "RollingOut", "QuotaExceeded"),
)
def _() -> Seen:
    return alone(refusals=[Refusal(SERVICE, "fraud", 403, "exceeded quota: small", is_quota=True)])


LATE = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}


@case(
    "deadline-exceeded",
    ("False", "CrashLoop", "exit code 1"),
    Available=("False", "CrashLoop", "exit code 1"),
    Progressing=("False", "DeadlineExceeded", "version 1 made no progress for 1200 s: CrashLoop: pod fraud-1"),
)
def _() -> Seen:
    model = subject()
    return alone(ended(model), deployment=deployment(model, conditions=[LATE]))


@case(
    "deadline-exceeded-without-a-cause",
    ("False", "Loading", "pods are starting"),
    Progressing=("False", "DeadlineExceeded", "version 1 made no progress for 1200 s"),
)
def _() -> Seen:
    return alone(deployment=deployment(subject(), conditions=[LATE]))


def bad_version_2(*conditions: Object) -> Seen:
    model = subject(generation=2, model={"uri": "fraud/model.onnx", "version": "2"})
    pods = [ready(model, "old", template="before"), ended(model, "new", message=own_words("InvalidModel", "no ONNX"))]
    live = deployment(model, conditions=conditions)
    return model, seen(model, pods, deployment=live, loaded={"uid-old": loaded(version="1")})


@case(
    "bad-new-version",
    ("False", "InvalidModel", "version 2: no ONNX; export and upload the model again; version 1 keeps serving"),
    ModelVerified=(
        "False",
        "InvalidModel",
        "version 2: no ONNX; export and upload the model again; version 1 keeps serving",
    ),
    Available=("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    Progressing=(
        "True",
        "RollingOut",
        "0 of 1 pods of version 2 are ready; CrashLoop: InvalidModel: no ONNX (pod new, restarted 3 times); "
        "version 1 keeps serving",
    ),
)
def _() -> Seen:
    return bad_version_2()


@case(
    "bad-new-version-for-long",
    ("False", "InvalidModel", "version 1 keeps serving"),
    ModelVerified=(
        "False",
        "InvalidModel",
        "version 2: no ONNX; export and upload the model again; version 1 keeps serving",
    ),
    Available=("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    Progressing=("False", "DeadlineExceeded", "version 2 made no progress for 1200 s: CrashLoop: InvalidModel"),
)
def _() -> Seen:
    return bad_version_2(LATE)


@case(
    "new-version-loading",
    ("False", "Loading", "no pod has loaded version 2 yet"),
    ModelVerified=("Unknown", "Loading", "no pod has loaded version 2 yet"),
    Available=("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    Progressing=("True", "RollingOut", "0 of 1 pods of version 2 are ready"),
)
def _() -> Seen:
    model = subject(generation=2, model={"uri": "fraud/model.onnx", "version": "2"})
    pods = [ready(model, "old", template="before"), loading(model, "new")]
    return model, seen(model, pods, deployment=deployment(model))


@case(
    "new-version-ready-before-the-old-one-left",
    ("True", "Ready", "version 1 answers"),
    ModelVerified=("True", "Verified", "version 1 is loaded"),
    Available=("True", "ReplicasAvailable", "2 of 1 replicas answer"),
    Progressing=("True", "RollingOut", "1 of 1 pods of version 1 are ready"),
)
def _() -> Seen:
    model = subject()
    return alone(ready(model, "old", template="before"), ready(model, "new"))


@case(
    "old-pod-leaving",
    ("True", "Ready", "version 1 answers"),
    ModelVerified=("True", "Verified", "version 1 is loaded"),
    Available=("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    Progressing=("True", "RolledOut", "every pod is of version 1"),
)
def _() -> Seen:
    model = subject()
    leaving = ready(model, "old", template="before")
    leaving.body["metadata"]["deletionTimestamp"] = STAMP
    return alone(leaving, ready(model), deployment=deployment(model, is_rolled_out=True))


@case(
    "scaled-to-zero",
    ("False", "ScaledToZero", "spec.replicas is 0; scale it up to serve"),
    Available=("False", "ScaledToZero", "spec.replicas is 0"),
    Progressing=("True", "RolledOut", "every pod is of version 1"),
)
def _() -> Seen:
    model = subject(replicas=0)
    return model, seen(model, deployment=deployment(model, is_rolled_out=True))


VERIFIED_BEFORE = {
    "type": "ModelVerified", "status": "True", "reason": "Verified", "message": "version 1 is loaded, sha256 abc",
    "observedGeneration": 1, "lastTransitionTime": EARLIER,
}  # fmt: skip


@case(
    "verified-once-and-scaled-to-zero",
    ("False", "ScaledToZero", "spec.replicas is 0"),
    ModelVerified=("True", "Verified", "version 1 is loaded, sha256 abc"),
    Available=("False", "ScaledToZero", "spec.replicas is 0"),
    Progressing=("True", "RolledOut", ""),
)
def _() -> Seen:
    model = subject(replicas=0, status={"conditions": [VERIFIED_BEFORE]})
    return model, seen(model, deployment=deployment(model, is_rolled_out=True))


@case("verified-in-another-generation", ("False", "Loading", "pods are starting"))
def _() -> Seen:
    model = subject(generation=2, status={"conditions": [VERIFIED_BEFORE]})
    return model, seen(model, deployment=deployment(model))


@case(
    "new-version-with-another-signature",
    ("True", "Ready", "version 2 answers"),
    ModelVerified=(
        "True",
        "SchemaChanged",
        "unlike version 1: inputs were x FP32 [-1, 3] and are x FP32 [-1, 4]; check its callers",
    ),
    Available=("True", "ReplicasAvailable", "1 of 1"),
    Progressing=("True", "RolledOut", "every pod is of version 2"),
)
def _() -> Seen:
    now, then = loaded(version="2"), {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    before = {"model": {"version": "1", "inputs": [then], "outputs": now.outputs}}
    model = subject(generation=2, model={"uri": "fraud/model.onnx", "version": "2"}, status=before)
    live = deployment(model, is_rolled_out=True)
    return model, seen(model, [ready(model)], deployment=live, loaded={"uid-fraud-1": now})


@case(
    "one-replica-in-place",
    ("False", "Loading", "pods are starting"),
    Progressing=("True", "RollingOut", "rollout.strategy InPlace with one replica answers nothing meanwhile"),
)
def _() -> Seen:
    model = subject(rollout={"strategy": "InPlace"})
    leaving = ready(model, "old", template="before")
    leaving.body["metadata"]["deletionTimestamp"] = STAMP
    return model, seen(model, [leaving, loading(model, "new")], deployment=deployment(model))


# --- what the user or the cluster must mend


@case(
    "foreign-object",
    ("False", "NameClash", "Deployment ml/fraud belongs to somebody else"),
    Accepted=("False", "NameClash", "rename the model or the object"),
    **LEFT_ALONE,
)
def _() -> Seen:
    model = subject()
    return model, Observed(foreign=[(DEPLOYMENT, "fraud")], now=NOW)


@case(
    "host-of-an-older-model",
    ("False", "NameClash", "belongs to the older model other/fraud"),
    Accepted=("False", "NameClash", "spec.networking.host: models.example.com"),
    **(LEFT_ALONE | {"Available": LOADING["Available"]}),
)
def _() -> Seen:
    model = subject(networking={"host": "models.example.com"})
    return model, seen(model, deployment=deployment(model), host_owner="other/fraud (models.example.com/v2)")


@case(
    "object-refused",
    ("False", "ObjectRefused", "refuses PodDisruptionBudget fraud: no"),
    Accepted=("False", "ObjectRefused", "the API server refuses PodDisruptionBudget fraud: no; the API server"),
)
def _() -> Seen:
    return alone(refusals=[Refusal(POD_DISRUPTION_BUDGET, "fraud", 403, "no"), Refusal(SERVICE, "fraud", 422, "port")])


# --- autoscaling -----------------------------------------------------------------------------------------------------

SERVES: dict[str, Row] = {
    "ModelVerified": ("True", "Verified", "version 1 is loaded"),
    "Available": ("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    "Progressing": ("True", "RolledOut", "every pod is of version 1"),
}
ACTIVE = (("AbleToScale", "True", "ReadyForNewScale"), ("ScalingActive", "True", "ValidMetricFound"))


def autoscaled(*conditions: tuple[str, str, str], is_there: bool = True, **parts: Any) -> Seen:
    """A model of one replica that answers, and its HPA in this state."""
    model = subject(autoscaling={"maxReplicas": 3, "targetLatency": "200m"})
    observed = seen(model, [ready(model, since=EARLIER)], deployment=deployment(model, is_rolled_out=True))
    children = {place: body for place, body in observed.children.items() if place[0] is not HORIZONTAL_POD_AUTOSCALER}
    if is_there:
        children[HORIZONTAL_POD_AUTOSCALER, model.name] = hpa(model, conditions=conditions, **parts)
    return model, replace(observed, children=children, loaded={"uid-fraud-1": loaded(capacity=10)})


@case(
    "autoscaler-not-there-yet",
    ("False", "Unknown", "there is no HorizontalPodAutoscaler yet"),
    AutoscalingReady=("Unknown", "Unknown", "there is no HorizontalPodAutoscaler yet"),
    **SERVES,
)
def _() -> Seen:
    return autoscaled(is_there=False)


@case(
    "autoscaler-has-read-nothing-yet",
    ("False", "Unknown", "the HPA has not read its metrics yet"),
    AutoscalingReady=("Unknown", "Unknown", "the HPA has not read its metrics yet"),
    **SERVES,
)
def _() -> Seen:
    return autoscaled()


@case(
    "autoscaler-reads",
    ("True", "Ready", "version 1 answers"),
    AutoscalingReady=("True", "MetricsRead", "the HPA reads inference_latency_seconds_concurrency, "),
    **SERVES,
)
def _() -> Seen:
    values = {"inference_latency_seconds_concurrency": "1234m", "inference_latency_seconds_pressure": "0"}
    return autoscaled(*ACTIVE, ("ScalingLimited", "True", "TooFewReplicas"), values=values)


@case(
    "metrics-are-gone",
    ("False", "MetricsUnavailable", "words about FailedGetObjectMetric"),
    AutoscalingReady=("False", "MetricsUnavailable", "the HPA keeps 1 replicas: words about FailedGetObjectMetric"),
    **SERVES,
)
def _() -> Seen:
    return autoscaled(ACTIVE[0], ("ScalingActive", "False", "FailedGetObjectMetric"))


@case(
    "scale-cannot-be-read",
    ("False", "MetricsUnavailable", "words about FailedGetScale"),
    AutoscalingReady=("False", "MetricsUnavailable", "words about FailedGetScale"),
    **SERVES,
)
def _() -> Seen:
    return autoscaled(("AbleToScale", "False", "FailedGetScale"))


@case(
    "most-replicas-are-too-few",
    ("False", "ScalingLimited", "spec.autoscaling.maxReplicas"),
    AutoscalingReady=("False", "ScalingLimited", "more than the 3 replicas of spec.autoscaling.maxReplicas"),
    **SERVES,
)
def _() -> Seen:
    return autoscaled(*ACTIVE, ("ScalingLimited", "True", "TooManyReplicas"))


@case(
    "objective-is-below-the-service-time",
    ("False", "TargetBelowServiceTime", "more replicas cannot help"),
    AutoscalingReady=("False", "TargetBelowServiceTime", "over spec.autoscaling.targetLatency (200m)"),
    **SERVES,
)
def _() -> Seen:
    values = {"inference_latency_seconds_concurrency": "300m", "inference_latency_seconds_pressure": "1400m"}
    return autoscaled(*ACTIVE, values=values)


@case(
    "kind-not-served",
    ("False", "KindNotServed", "does not serve ResourceClaimTemplate (resource.k8s.io/v1)"),
    Accepted=("False", "KindNotServed", "install it"),
    AcceleratorReady=NOTHING_DONE,
    **LEFT_ALONE,
)
def _() -> Seen:
    return subject(runtime={"accelerator": {"deviceClassName": "gpu"}}), Observed(now=NOW)


@case(
    "invalid-for-these-settings",
    ("False", "InvalidSpec", "spec.runtime.accelerator.profile: expected a profile"),
    Accepted=("False", "InvalidSpec", "(none), got l4"),
    AcceleratorReady=NOTHING_DONE,
    **LEFT_ALONE,
)
def _() -> Seen:
    return subject(runtime={"accelerator": {"profile": "l4"}}), Observed(now=NOW)


@case(
    "secret-missing",
    ("False", "SecretMissing", "Secret s3-reader does not exist; create it"),
    ModelVerified=("False", "SecretMissing", "spec.model.credentials.secretRef: Secret s3-reader"),
    **failing("ConfigurationMissing", "Secret s3-reader does not exist"),
)
def _() -> Seen:
    missing = Missing(Reference.SECRET, "s3-reader", "spec.model.credentials.secretRef")
    return alone(waiting(subject(), "ContainerCreating"), missing=[missing])


@case(
    "key-of-a-secret-missing",
    ("False", "SecretMissing", "Secret s3-reader has no key token"),
    ModelVerified=("False", "SecretMissing", "has no key token"),
    **failing("ConfigurationMissing", "has no key token"),
)
def _() -> Seen:
    missing = Missing(Reference.SECRET, "s3-reader", "spec.model.credentials.secretRef", key="token")
    return alone(waiting(subject(), "ContainerCreating"), missing=[missing])


@case(
    "config-map-missing",
    ("False", "NotFound", "spec.model.uri: ConfigMap fraud-onnx does not exist"),
    ModelVerified=("False", "NotFound", "ConfigMap fraud-onnx does not exist; create it"),
    **failing("ConfigurationMissing", "ConfigMap fraud-onnx does not exist"),
)
def _() -> Seen:
    missing = Missing(Reference.CONFIG_MAP, "fraud-onnx", "spec.model.uri")
    return alone(waiting(subject(), "ContainerCreating"), missing=[missing])


# --- accelerators

NO_GPU = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


def accelerated(policy: str, *pods: Callable[[Subject], Any], is_rolled_out: bool = False, **others: Any) -> Seen:
    model = subject(runtime={"accelerator": {"policy": policy}})
    live = others.pop("deployment", None) or deployment(model, is_rolled_out=is_rolled_out)
    return model, seen(model, [make(model) for make in pods], deployment=live, **others)


GOOD = {
    "ModelVerified": ("True", "Verified", "version 1 is loaded"),
    "Available": ("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    "Progressing": ("True", "RolledOut", "every pod is of version 1"),
}


@case(
    "on-the-accelerator",
    ("True", "Ready", "version 1 answers"),
    AcceleratorReady=("True", "SessionOnAccelerator", "sessions run on CUDAExecutionProvider"),
    **GOOD,
)
def _() -> Seen:
    return accelerated(
        "Require", ready, is_rolled_out=True, loaded={"uid-fraud-1": loaded(provider="CUDAExecutionProvider")}
    )


@case(
    "accelerator-not-known-yet",
    ("False", "Unknown", "no ready pod has said yet"),
    AcceleratorReady=("Unknown", "Unknown", "no ready pod has said yet"),
    **GOOD,
)
def _() -> Seen:
    return accelerated("Require", ready, is_rolled_out=True)


@case(
    "no-device-left",
    ("False", "Unschedulable", "asked for 1 of nvidia.com/gpu per pod: 0/1 nodes"),
    AcceleratorReady=("False", "Unschedulable", NO_GPU),
    **failing("Unschedulable", NO_GPU),
)
def _() -> Seen:
    return accelerated("Require", lambda model: unplaced(model, NO_GPU))


@case(
    "provider-unavailable",
    ("False", "ProviderUnavailable", "no CUDA driver"),
    AcceleratorReady=("False", "ProviderUnavailable", "no CUDA driver"),
    **failing("CrashLoop", "ProviderUnavailable: no CUDA driver"),
)
def _() -> Seen:
    return accelerated(
        "Require", lambda model: ended(model, message=own_words("ProviderUnavailable", "no CUDA driver"))
    )


@case(
    "required-device-not-used",
    ("False", "FellBackToCPU", "check driver, runtime class and the GPU variant"),
    AcceleratorReady=("False", "FellBackToCPU", "although the pod has 1 of nvidia.com/gpu"),
    **GOOD,
)
def _() -> Seen:
    return accelerated("Require", ready, is_rolled_out=True, loaded={"uid-fraud-1": loaded()})


@case(
    "preferred-device-not-used",
    ("True", "FellBackToCPU", "although the pod has 1 of nvidia.com/gpu"),
    AcceleratorReady=("False", "FellBackToCPU", "the session runs on the CPU"),
    **GOOD,
)
def _() -> Seen:
    return accelerated("Prefer", ready, is_rolled_out=True, loaded={"uid-fraud-1": loaded()})


def withheld(*pods: Any) -> Seen:
    """The Deployment goes without the device that the model would prefer."""
    model = subject(runtime={"accelerator": {"policy": "Prefer"}})
    before = seen(model, [unplaced(model, NO_GPU)], deployment=deployment(model))
    (live,) = (body for body in rendered(model, before) if body["kind"] == "Deployment")
    live["metadata"]["generation"] = 1
    live["status"] = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
    template = live["spec"]["template"]["metadata"]["annotations"][TEMPLATE]
    return model, seen(model, [make(model, template=template) for make in pods], deployment=live)


@case(
    "device-withheld",
    ("True", "FellBackToCPU", "no node has 1 of nvidia.com/gpu to give"),
    AcceleratorReady=("False", "FellBackToCPU", "when a device is free, change the spec to ask again"),
    **GOOD,
)
def _() -> Seen:
    return withheld(ready)


@case(
    "device-withheld-and-loading",
    ("False", "FellBackToCPU", "no node has 1 of nvidia.com/gpu to give"),
    AcceleratorReady=("False", "FellBackToCPU", "policy Prefer"),
    Progressing=("True", "RollingOut", "0 of 1"),
)
def _() -> Seen:
    model, observed = withheld(loading)
    live = observed.deployment
    assert live is not None
    live["status"]["readyReplicas"] = 0
    return model, observed


# --- bindings

OWN_SECRET: Object = {"redis": {"secretRef": {"name": "my-redis"}}}
SERVING: dict[str, Row] = {
    "ModelVerified": ("True", "Verified", "version 1 is loaded"),
    "Available": ("True", "ReplicasAvailable", "1 of 1 replicas answer"),
    "Progressing": ("True", "RolledOut", "every pod is of version 1"),
}


def with_bindings(*, reason: Reason | None = None, message: str = "", told: str = "", **others: Any) -> Seen:
    """A model with a Secret of its own that serves; `told` is what its pod says of Redis."""
    model = subject(bindings=OWN_SECRET)
    bindings = bound(model)
    if reason is not None:
        bindings["redis"] = replace(bindings["redis"], reason=reason, message=message)
    said = replace(loaded(), bindings={"redis": told} if told else {})
    live = deployment(model, is_rolled_out=True)
    return model, seen(
        model, [ready(model)], deployment=live, loaded={"uid-fraud-1": said}, bindings=bindings, **others
    )


@case("bound", ("True", "Ready", "version 1 answers"), BindingsReady=("True", "Bound", "redis: bound"), **SERVING)
def _() -> Seen:
    return with_bindings()


for _reason in CONDITIONS[ConditionType.BINDINGS_READY].otherwise:
    if _reason is not Reason.DELETION_BLOCKED:
        CASES.append(
            Case(
                f"binding-{_reason}",
                lambda reason=_reason: with_bindings(reason=reason, message="in the backend's words"),  # type: ignore[misc]
                LOADING
                | SERVING
                | {
                    "BindingsReady": ("False", _reason, "in the backend's words"),
                    "Ready": ("False", _reason, "in the backend's words"),
                },
            )
        )


@case(
    "server-cannot-use-its-binding",
    ("False", "BackendUnreachable", "redis: pod fraud-1 cannot use it: timed out"),
    BindingsReady=("False", "BackendUnreachable", "timed out"),
    **SERVING,
)
def _() -> Seen:
    return with_bindings(told="timed out")


@case(
    "server-cannot-log-in",
    ("False", "AccessDenied", "WRONGPASS"),
    BindingsReady=("False", "AccessDenied", "redis: pod fraud-1 cannot use it: WRONGPASS"),
    **SERVING,
)
def _() -> Seen:
    return with_bindings(told="WRONGPASS invalid username-password pair")


@case(
    "access-that-cannot-be-taken-away",
    ("False", "DeletionBlocked", "kubectl annotate phx fraud -n ml phoenix-ml.io/force-delete=true"),
    BindingsReady=("False", "DeletionBlocked", "access to kafka backend default is still there: it is down;"),
    **SERVING,
)
def _() -> Seen:
    return with_bindings(unreleased=["access to kafka backend default is still there: it is down"])


@case(
    "bindings-not-looked-at",
    ("False", "Loading", "pods are starting"),
    BindingsReady=("Unknown", "Unknown", "have not been looked at yet"),
    Progressing=("True", "RollingOut", "the Deployment is not there yet"),
)
def _() -> Seen:
    model = subject(bindings=OWN_SECRET)
    return model, Observed(now=NOW)


@case(
    "unknown-backend",
    ("False", "UnknownBackend", "spec.bindings.redis.backend: expected a backend of kind redis"),
    Accepted=("False", "UnknownBackend", "(none), got default"),
    BindingsReady=NOTHING_DONE,
    **LEFT_ALONE,
)
def _() -> Seen:
    return subject(bindings={"redis": {"backend": "default"}}), Observed(now=NOW)
