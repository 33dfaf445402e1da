"""Why pods of the wanted version do not serve: one cause, the most telling one, with the next step.

Causes are looked for from the surest to the vaguest: what the container says, how it ended, that no node has room, that
no pod is made at all. `LOADING` stands where nothing is wrong yet. Pure, like `status`, which asks.
"""

from collections.abc import Sequence
from typing import NamedTuple

from phoenix_api import CONDITIONS, ConditionType, Reason
from phoenix_operator.desired.naming import MODEL
from phoenix_operator.kinds import DEPLOYMENT
from phoenix_operator.observed import Failure, Missing, Object, Observed, Pod, Reference, Subject

REASONS = {str(reason): reason for reason in Reason}
REASON_OF = {Reference.SECRET: Reason.SECRET_MISSING, Reference.CONFIG_MAP: Reason.NOT_FOUND}
_ABOUT_QUOTA = "raise the quota, or ask for less"
_ABOUT_CLAIMS = "create the claim that spec.model names, or see why it is not bound: `kubectl describe pvc`"
_PULL_FAILURES = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_CONFIG_FAILURES = {"CreateContainerConfigError", "CreateContainerError"}
_AVAILABLE_REASONS = frozenset(CONDITIONS[ConditionType.AVAILABLE].otherwise)


class Trouble(NamedTuple):
    """A cause: its reason, and words that name the next step."""

    reason: Reason
    message: str


def trouble_of(subject: Subject, observed: Observed, *, new: Sequence[Pod], gone: Sequence[Pod]) -> Trouble:
    """Return why `new` pods do not all serve; `gone` are those of the same version that are leaving or ended."""
    waiting = [pod for pod in new if not pod.is_ready]
    found = (
        _missing_configuration(waiting)
        or _pull_failure(subject, waiting)
        or _ended(observed, waiting)
        or _cannot_be_placed(observed, new)
        or _not_even_made(observed)
    )
    if found is not None:
        return found
    if missing := next(iter(observed.missing), None):
        return Trouble(Reason.CONFIGURATION_MISSING, absent(missing))
    if evicted := next((pod.evicted for pod in gone if pod.evicted), None):
        return Trouble(Reason.LOADING, f"a pod was ended by its node and is made again: {evicted}")
    pods = f"`kubectl describe pods -l {MODEL}={subject.name}`"
    return Trouble(Reason.LOADING, f"pods are starting or loading the model; if that lasts, see {pods}")


def absent(missing: Missing) -> str:
    """Say what is not there, and what to do."""
    key = f" has no key {missing.key}" if missing.key else " does not exist"
    return f"{missing.field}: {missing.kind} {missing.name}{key}; create it, and pods start by themselves"


def unschedulable(observed: Observed, pods: Sequence[Pod]) -> str | None:
    """Return the scheduler's words about the first pod that no node has room for, with what is short."""
    words = next((pod.unschedulable for pod in pods if pod.unschedulable is not None), None)
    if words is None:
        return None
    return f"{words}{f' ({observed.shortfall})' if observed.shortfall else ''}"


def deployment_condition(deployment: Object, kind: str) -> Object:
    """Return a condition of a Deployment; empty if it has none of that type."""
    assert deployment["kind"] == DEPLOYMENT.kind
    rows = deployment.get("status", {}).get("conditions", [])
    return next((row for row in rows if row["type"] == kind), {})


def _missing_configuration(pods: Sequence[Pod]) -> Trouble | None:
    for pod in pods:
        if pod.waiting and pod.waiting[0] in _CONFIG_FAILURES:
            state, words = pod.waiting
            advice = "; spec.pod.env refers to it: create it, and the pod starts by itself"
            is_advised = state == "CreateContainerConfigError"
            return Trouble(Reason.CONFIGURATION_MISSING, f"pod {pod.name}: {words}{advice if is_advised else ''}")
    return None


def _pull_failure(subject: Subject, pods: Sequence[Pod]) -> Trouble | None:
    for pod in pods:
        if pod.waiting and pod.waiting[0] in _PULL_FAILURES:
            usual = "serverGpuImage" if subject.spec.runtime.accelerator else "serverImage"
            whose = "spec.runtime.image" if subject.spec.runtime.image else f"the operator's {usual}"
            uri = subject.spec.model.uri
            if uri.startswith("oci://") and uri[len("oci://") :].partition("#")[0] in pod.waiting[1]:
                whose = "spec.model.uri"
            return Trouble(
                Reason.IMAGE_PULL_FAILED, f"pod {pod.name}: {pod.waiting[1] or pod.waiting[0]}; check {whose}"
            )
    return None


def _ended(observed: Observed, pods: Sequence[Pod]) -> Trouble | None:
    for pod in pods:
        if (failure := pod.failure) is not None:
            return _why_it_ended(observed, pod, failure)
    return None


def _why_it_ended(observed: Observed, pod: Pod, failure: Failure) -> Trouble:
    if failure.reason == "OOMKilled":
        limit = _memory_limit(observed)
        return Trouble(
            Reason.OUT_OF_MEMORY,
            f"pod {pod.name} was ended for exceeding its memory limit{limit}; raise spec.resources.requests.memory "
            "and limits.memory, or lower batching.maxRows",
        )
    if failure.is_own and failure.reason in _AVAILABLE_REASONS:
        advice = "; correct it in spec.pod.env" if failure.reason == Reason.INVALID_SETTING else ""
        return Trouble(REASONS[failure.reason], f"pod {pod.name}: {failure.message}{advice}")
    if failure.is_own:
        return Trouble(Reason.CRASH_LOOP, f"{failure.reason}: {failure.message} (pod {pod.name}, {_times(pod)})")
    code = "" if failure.exit_code is None else f" with exit code {failure.exit_code}"
    words = f": {failure.message}" if failure.message else ""
    return Trouble(
        Reason.CRASH_LOOP,
        f"pod {pod.name} ended{code}{words} ({_times(pod)}); see `kubectl logs {pod.name} --previous`",
    )


def _cannot_be_placed(observed: Observed, pods: Sequence[Pod]) -> Trouble | None:
    words = unschedulable(observed, pods)
    if words is None:
        return None
    is_about_claim = "persistentvolumeclaim" in words.lower()
    step = _ABOUT_CLAIMS if is_about_claim else "free or add what is short, or ask for less"
    return Trouble(Reason.UNSCHEDULABLE, f"{words}; {step}")


def _not_even_made(observed: Observed) -> Trouble | None:
    for refusal in observed.refusals:
        if refusal.is_quota:
            return Trouble(Reason.QUOTA_EXCEEDED, f"{refusal.kind} {refusal.name}: {refusal.message}; {_ABOUT_QUOTA}")
    deployment = observed.deployment
    failure = deployment_condition(deployment, "ReplicaFailure") if deployment else {}
    if failure.get("status") != "True":
        return None
    message = failure.get("message", "")
    if "exceeded quota" in message:
        return Trouble(Reason.QUOTA_EXCEEDED, f"{message}; {_ABOUT_QUOTA}")
    return Trouble(
        Reason.PODS_REFUSED,
        f"{message}; mend the spec, or the rule of the namespace that forbids such pods (LimitRange, Pod Security, "
        "a webhook)",
    )


def _memory_limit(observed: Observed) -> str:
    deployment = observed.deployment
    containers = deployment["spec"]["template"]["spec"]["containers"] if deployment else []
    limit = containers[0].get("resources", {}).get("limits", {}).get("memory") if containers else None
    return f" of {limit}" if limit else ""


def _times(pod: Pod) -> str:
    return {0: "about to be restarted", 1: "restarted once"}.get(pod.restarts, f"restarted {pod.restarts} times")
