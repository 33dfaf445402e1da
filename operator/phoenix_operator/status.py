"""What the status of a PhoenixModel says: a pure function of what was asked and what was seen.

Each condition has one function. Each speaks of the wanted generation, so that the pods of a new version that cannot
load show in `ModelVerified` and `Progressing` while `Available` tells that the old version answers. Reasons of pods are
the server's own words where it left some (the termination message), else Kubernetes'.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phoenix_api import (
    CONDITIONS,
    Condition,
    ConditionStatus,
    ConditionType,
    Reason,
    Status,
)
from phoenix_api.status import Endpoints, LoadedModel, ReplicaCounts, TensorDescription
from phoenix_operator.desired import config
from phoenix_operator.desired.accelerator import ask
from phoenix_operator.desired.acceptance import Fault, prefers
from phoenix_operator.desired.deployment import is_in_place, is_withheld, template_hash
from phoenix_operator.desired.naming import GRPC_PORT, HTTP_PORT, MODEL, selector
from phoenix_operator.desired.network import path_prefix
from phoenix_operator.kinds import DEPLOYMENT
from phoenix_operator.observed import TEMPLATE, Failure, Loaded, Missing, Object, Observed, Pod, Reference, Subject
from phoenix_operator.settings import Settings

_REASONS = {str(reason): reason for reason in Reason}
_CPU = "CPUExecutionProvider"
_NOTHING_DONE = "nothing is done about a spec that is not accepted"
_NEXT_STEP = {
    Reason.DIGEST_MISMATCH: "check spec.model.sha256, and who changed the file",
    Reason.EXTERNAL_DATA_MISSING: "put it beside the model, or save the model as one file",
    Reason.INVALID_MODEL: "export and upload the model again",
    Reason.FETCH_FAILED: "check spec.model.uri, its store and the network policies",
    Reason.UNSUPPORTED_OPSET: "export with an older opset, or take a newer spec.runtime.image",
}
_ABOUT_QUOTA = "raise the quota, or ask for less"
_ABOUT_CLAIMS = "create the claim that spec.model names, or see why it is not bound: `kubectl describe pvc`"
_MESSAGE_LIMIT = 2000
_PULL_FAILURES = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_CONFIG_FAILURES = {"CreateContainerConfigError", "CreateContainerError"}
_VERIFIED_REASONS = frozenset(CONDITIONS[ConditionType.MODEL_VERIFIED].otherwise) - {Reason.LOADING}
_ACCELERATOR_REASONS = frozenset(CONDITIONS[ConditionType.ACCELERATOR_READY].otherwise) - {Reason.LOADING}
_AVAILABLE_REASONS = frozenset(CONDITIONS[ConditionType.AVAILABLE].otherwise)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition without its times."""

    status: ConditionStatus
    reason: Reason
    message: str


def _yes(reason: Reason, message: str) -> Verdict:
    return Verdict(ConditionStatus.TRUE, reason, message)


def _no(reason: Reason, message: str) -> Verdict:
    return Verdict(ConditionStatus.FALSE, reason, message)


def _unknown(message: str, reason: Reason = Reason.UNKNOWN) -> Verdict:
    return Verdict(ConditionStatus.UNKNOWN, reason, message)


def next_status(subject: Subject, observed: Observed, settings: Settings, faults: Sequence[Fault]) -> Object:
    """Return the whole status as plain JSON; times of conditions that did not change are kept.

    `observed.now` becomes `lastTransitionTime` of those that did.
    """
    view = _View(subject, observed, settings, tuple(faults))
    verdicts = view.verdicts()
    verdicts[ConditionType.READY] = _ready(verdicts, view)
    before = view.before
    now = observed.now.strftime("%Y-%m-%dT%H:%M:%SZ") if observed.now else "1970-01-01T00:00:00Z"
    status = Status(
        observed_generation=subject.generation,
        replicas=view.counts(),
        ready_replicas=len(view.ready),
        selector=",".join(f"{key}={value}" for key, value in selector(subject.name).items()),
        model=view.loaded_model(),
        endpoints=view.endpoints(),
        conditions=[_condition(kind, verdict, subject, before.get(kind), now) for kind, verdict in verdicts.items()],
    )
    dumped: Object = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dumped


def unreadable_status(document: Object, message: str, now: str) -> Object:
    """Return the status of an object whose spec cannot even be parsed. Everything else in it stays as it was."""
    generation = document["metadata"].get("generation", 0)
    old = document.get("status", {})
    before = {row["type"]: row for row in old.get("conditions", [])}
    for kind, verdict in (
        (ConditionType.ACCEPTED, _no(Reason.INVALID_SPEC, message)),
        (ConditionType.READY, _no(Reason.INVALID_SPEC, message)),
    ):
        row = Condition(
            type=kind,
            status=verdict.status,
            observed_generation=generation,
            last_transition_time=_since(before.get(kind), verdict, now),
            reason=verdict.reason,
            message=_shortened(verdict.message),
        )
        before[kind] = row.model_dump(mode="json", by_alias=True)
    ordered = [before[kind] for kind in ConditionType if kind in before]
    status: Object = old | {"observedGeneration": generation, "conditions": ordered}
    return status


def _condition(kind: ConditionType, verdict: Verdict, subject: Subject, before: Object | None, now: str) -> Condition:
    return Condition(
        type=kind,
        status=verdict.status,
        observed_generation=subject.generation,
        last_transition_time=_since(before, verdict, now),
        reason=verdict.reason,
        message=_shortened(verdict.message or verdict.reason.meaning),
    )


def _since(before: Object | None, verdict: Verdict, now: str) -> str:
    return str(before["lastTransitionTime"]) if before and before["status"] == verdict.status else now


def _shortened(message: str) -> str:
    return message if len(message) <= _MESSAGE_LIMIT else f"{message[: _MESSAGE_LIMIT - 1]}…"


def _ready(verdicts: dict[ConditionType, Verdict], view: "_View") -> Verdict:
    """The first condition that fails, in the order of the table; what is unknown fails only if nothing else does."""
    ranked = sorted(
        (verdict for verdict in verdicts.values() if verdict.status is not ConditionStatus.TRUE),
        key=lambda verdict: verdict.status is ConditionStatus.UNKNOWN,
    )
    if not ranked:
        return _yes(Reason.READY, f"version {view.subject.spec.model.version} answers")
    first = ranked[0]
    if len(ranked) == 1 and first.reason is Reason.FELL_BACK_TO_CPU and prefers(view.subject):
        return _yes(first.reason, first.message)
    return _no(first.reason, first.message)


class _View:
    """One model at one moment, with the pods sorted into those of the wanted version and the others."""

    def __init__(self, subject: Subject, observed: Observed, settings: Settings, faults: tuple[Fault, ...]) -> None:
        self.subject, self.observed, self.settings, self.faults = subject, observed, settings, faults
        self.before = {row["type"]: row for row in subject.status.get("conditions", [])}
        self._wanted = wanted = template_hash(subject, observed, settings)
        alive = [pod for pod in observed.pods if not pod.is_leaving]
        self.new = [pod for pod in alive if pod.template == wanted]
        self.old = [pod for pod in alive if pod.template != wanted]
        self.gone = [pod for pod in observed.pods if pod.is_leaving and pod.template == wanted]
        self.gone_old = [pod for pod in observed.pods if pod.is_leaving and pod.template != wanted]
        self.ready = [pod for pod in alive if pod.is_ready]
        self.new_ready = [pod for pod in self.new if pod.is_ready]

    @property
    def is_left_alone(self) -> bool:
        """Whether nothing is done about the spec. An object that is refused keeps no other from being applied."""
        return any(fault.reason is not Reason.OBJECT_REFUSED for fault in self.faults)

    def verdicts(self) -> dict[ConditionType, Verdict]:
        """Return every condition but `Ready`, in the order of the table."""
        found = {ConditionType.ACCEPTED: self._accepted(), ConditionType.MODEL_VERIFIED: self._model_verified()}
        if self.subject.spec.runtime.accelerator is not None:
            found[ConditionType.ACCELERATOR_READY] = self._accelerator_ready()
        found[ConditionType.AVAILABLE] = self._available()
        found[ConditionType.PROGRESSING] = self._progressing()
        return found

    def counts(self) -> ReplicaCounts:
        """Return how many pods there are."""
        desired, ready = self.subject.spec.replicas, len(self.ready)
        return ReplicaCounts(desired=desired, ready=ready, updated=len(self.new), summary=f"{ready}/{desired}")

    def loaded_model(self) -> LoadedModel | None:
        """Return what the pods that answer have loaded, the wanted version first."""
        loaded = self._loaded([*self.new_ready, *self.ready])
        if loaded is None:
            return None
        return LoadedModel(
            sha256=loaded.sha256,
            version=loaded.version,
            provider=loaded.provider,
            inputs=[TensorDescription.model_validate(row) for row in loaded.inputs],
            outputs=[TensorDescription.model_validate(row) for row in loaded.outputs],
        )

    def endpoints(self) -> Endpoints:
        """Return where the model answers."""
        subject, settings = self.subject, self.settings
        host = f"{subject.name}.{subject.namespace}.svc"
        outside, routes = subject.spec.networking.host, settings.routes
        url = f"{routes.url_scheme}://{outside}{path_prefix(subject)}" if outside and routes.kind else None
        return Endpoints(rest=f"http://{host}:{HTTP_PORT}", grpc=f"{host}:{GRPC_PORT}", url=url)

    # --- one function a condition ------------------------------------------------------------------------------------

    def _accepted(self) -> Verdict:
        if not self.faults:
            return _yes(Reason.SPEC_UNDERSTOOD, "every field is valid and supported")
        first = self.faults[0]
        return _no(first.reason, "; ".join(fault.message for fault in self.faults if fault.reason is first.reason))

    def _model_verified(self) -> Verdict:
        version = self.subject.spec.model.version
        before = self.before.get(ConditionType.MODEL_VERIFIED, {})
        was_verified = before.get("status") == "True" and before.get("observedGeneration") == self.subject.generation
        if self.new_ready:
            loaded = self._loaded(self.new_ready)
            digest = f", sha256 {loaded.sha256}" if loaded and loaded.sha256 else ""
            if was_verified and before["reason"] == Reason.SCHEMA_CHANGED:
                return _yes(Reason.SCHEMA_CHANGED, before["message"])
            if difference := self._schema_difference(loaded):
                return _yes(Reason.SCHEMA_CHANGED, f"version {version} is loaded{digest}; {difference}")
            return _yes(Reason.VERIFIED, f"version {version} is loaded{digest}")
        for pod in self.new:
            if (failure := pod.failure) and failure.is_own and failure.reason in _VERIFIED_REASONS:
                reason = _REASONS[failure.reason]
                step = f"; {_NEXT_STEP[reason]}" if reason in _NEXT_STEP else ""
                return _no(reason, f"version {version}: {failure.message}{step}{self._what_serves()}")
        for missing in self.observed.missing:
            if missing.field.startswith("spec.model."):
                return _no(_REASON_OF[missing.kind], _absent(missing))
        if was_verified:
            return _yes(_REASONS[before["reason"]], before["message"])  # that its pods ended since does not unmake it
        if self.is_left_alone:
            return _unknown(_NOTHING_DONE)
        return _unknown(f"no pod has loaded version {version} yet", Reason.LOADING)

    def _accelerator_ready(self) -> Verdict:
        asked = ask(self.subject, self.settings)
        assert asked is not None, "asked only for models with an accelerator"
        what = asked.what
        for pod in self.new:
            if (failure := pod.failure) and failure.is_own and failure.reason in _ACCELERATOR_REASONS:
                return _no(_REASONS[failure.reason], failure.message)
        if is_withheld(self.subject, self.observed, self.settings):
            return _no(
                Reason.FELL_BACK_TO_CPU,
                f"no node has {asked.count} of {what} to give, so pods run on the CPU (policy Prefer); "
                "when a device is free, change the spec to ask again",
            )
        if self.new_ready:
            loaded = self._loaded(self.new_ready)
            if loaded is None or loaded.provider is None:
                return _unknown("no ready pod has said yet which provider its session runs on")
            if loaded.provider == _CPU:
                return _no(
                    Reason.FELL_BACK_TO_CPU,
                    f"the session runs on the CPU although the pod has {asked.count} of {what}; "
                    "check driver, runtime class and the GPU variant of the server image",
                )
            return _yes(Reason.SESSION_ON_ACCELERATOR, f"sessions run on {loaded.provider}")
        if words := self._unschedulable():
            return _no(Reason.UNSCHEDULABLE, f"asked for {asked.count} of {what} per pod: {words}; free or add devices")
        if self.is_left_alone:
            return _unknown(_NOTHING_DONE)
        return _unknown(f"no pod runs on {what} yet", Reason.LOADING)

    def _available(self) -> Verdict:
        desired = self.subject.spec.replicas
        if self.ready:
            return _yes(Reason.REPLICAS_AVAILABLE, f"{len(self.ready)} of {desired} replicas answer{self._trouble()}")
        if desired == 0:
            return _no(Reason.SCALED_TO_ZERO, "spec.replicas is 0; scale it up to serve")
        if self.is_left_alone and self.observed.deployment is None:
            return _unknown(_NOTHING_DONE)
        return self._why_not_available()

    def _progressing(self) -> Verdict:
        deployment = self.observed.deployment
        version = self.subject.spec.model.version
        if self.is_left_alone and not self._is_rolled_out():
            return _unknown(f"{_NOTHING_DONE}{self._what_serves()}")
        if deployment is None:
            return _yes(Reason.ROLLING_OUT, f"version {version}: the Deployment is not there yet")
        row = _deployment_condition(deployment, "Progressing")
        why = self._why_new_pods_fail()
        if row.get("reason") == "ProgressDeadlineExceeded" and not self._is_rolled_out():
            seconds = self.subject.spec.rollout.progress_deadline_seconds
            return _no(
                Reason.DEADLINE_EXCEEDED,
                f"version {version} made no progress for {seconds} s{f': {why}' if why else ''}{self._what_serves()}",
            )
        if self._is_rolled_out():
            return _yes(Reason.ROLLED_OUT, f"every pod is of version {version}")
        count = f"{len(self.new_ready)} of {self.subject.spec.replicas} pods of version {version} are ready"
        hint = f"; {why}" if why else ""
        if not hint and not self.ready and is_in_place(self.subject) and self.old + self.gone_old:
            hint = "; rollout.strategy InPlace with one replica answers nothing meanwhile"
        return _yes(Reason.ROLLING_OUT, f"{count}{hint}{self._what_serves() if why else ''}")

    # --- what they are made of ---------------------------------------------------------------------------------------

    def _is_rolled_out(self) -> bool:
        deployment = self.observed.deployment
        if deployment is None or self.old:
            return False
        applied = deployment["spec"]["template"]["metadata"].get("annotations", {})
        return applied.get(TEMPLATE) == self._wanted and config.is_rolled_out(self.observed)

    def _loaded(self, pods: Iterable[Pod]) -> Loaded | None:
        return next((self.observed.loaded[pod.uid] for pod in pods if pod.uid in self.observed.loaded), None)

    def _schema_difference(self, loaded: Loaded | None) -> str:
        """Say which tensors differ from those of the version that the status still tells of."""
        known = self.subject.status.get("model", {})
        if loaded is None or known.get("version") in (None, loaded.version):
            return ""
        changed = [
            f"{side} were {_signature(before)} and are {_signature(after)}"
            for side, before, after in (
                ("inputs", known.get("inputs", []), loaded.inputs),
                ("outputs", known.get("outputs", []), loaded.outputs),
            )
            if before != after
        ]
        return f"unlike version {known['version']}: {'; '.join(changed)}; check its callers" if changed else ""

    def _unschedulable(self) -> str | None:
        words = next((pod.unschedulable for pod in self.new if pod.unschedulable is not None), None)
        if words is None:
            return None
        return f"{words}{f' ({self.observed.shortfall})' if self.observed.shortfall else ''}"

    def _what_serves(self) -> str:
        """Say that the old version goes on, where it does."""
        old = [pod for pod in self.old if pod.is_ready]
        if not old:
            return ""
        loaded = self._loaded(old)
        version = f"version {loaded.version}" if loaded and loaded.version else "the version before"
        return f"; {version} keeps serving"

    def _trouble(self) -> str:
        """Say what keeps the other replicas from answering, where something does."""
        if len(self.ready) >= self.subject.spec.replicas:
            return ""
        why = self._why_new_pods_fail()
        return f"; {why}" if why else ""

    def _why_new_pods_fail(self) -> str:
        """Return the failure of the wanted version in a few words; empty while it merely loads."""
        if self.new and all(pod.is_ready for pod in self.new) and len(self.new) >= self.subject.spec.replicas:
            return ""
        verdict = self._why_not_available()
        if verdict.reason is Reason.LOADING:
            return ""
        return f"{verdict.reason}: {verdict.message}"

    def _why_not_available(self) -> Verdict:
        waiting = [pod for pod in self.new if not pod.is_ready]
        for finding in (self._missing_configuration, self._pull_failure, self._ended, self._cannot_be_placed):
            if verdict := finding(waiting):
                return verdict
        if verdict := self._not_even_made():
            return verdict
        missing = next(iter(self.observed.missing), None)
        if missing is not None:
            return _no(Reason.CONFIGURATION_MISSING, _absent(missing))
        if evicted := next((pod.evicted for pod in self.gone if pod.evicted), None):
            return _no(Reason.LOADING, f"a pod was ended by its node and is made again: {evicted}")
        pods = f"`kubectl describe pods -l {MODEL}={self.subject.name}`"
        return _no(Reason.LOADING, f"pods are starting or loading the model; if that lasts, see {pods}")

    def _missing_configuration(self, pods: Sequence[Pod]) -> Verdict | None:
        for pod in pods:
            if pod.waiting and pod.waiting[0] in _CONFIG_FAILURES:
                state, words = pod.waiting
                advice = "; spec.pod.env refers to it: create it, and the pod starts by itself"
                is_advised = state == "CreateContainerConfigError"
                return _no(Reason.CONFIGURATION_MISSING, f"pod {pod.name}: {words}{advice if is_advised else ''}")
        return None

    def _pull_failure(self, pods: Sequence[Pod]) -> Verdict | None:
        for pod in pods:
            if pod.waiting and pod.waiting[0] in _PULL_FAILURES:
                whose = "spec.runtime.image" if self.subject.spec.runtime.image else "the operator's serverImage"
                uri = self.subject.spec.model.uri
                if uri.startswith("oci://") and uri[len("oci://") :].partition("#")[0] in pod.waiting[1]:
                    whose = "spec.model.uri"
                return _no(
                    Reason.IMAGE_PULL_FAILED, f"pod {pod.name}: {pod.waiting[1] or pod.waiting[0]}; check {whose}"
                )
        return None

    def _ended(self, pods: Sequence[Pod]) -> Verdict | None:
        for pod in pods:
            if (failure := pod.failure) is not None:
                return self._why_it_ended(pod, failure)
        return None

    def _why_it_ended(self, pod: Pod, failure: Failure) -> Verdict:
        if failure.reason == "OOMKilled":
            limit = self._memory_limit()
            return _no(
                Reason.OUT_OF_MEMORY,
                f"pod {pod.name} was ended for exceeding its memory limit{limit}; raise spec.resources.requests.memory "
                "and limits.memory, or lower batching.maxRows",
            )
        if failure.is_own and failure.reason in _AVAILABLE_REASONS:
            advice = "; correct it in spec.pod.env" if failure.reason == Reason.INVALID_SETTING else ""
            return _no(_REASONS[failure.reason], f"pod {pod.name}: {failure.message}{advice}")
        if failure.is_own:
            return _no(Reason.CRASH_LOOP, f"{failure.reason}: {failure.message} (pod {pod.name}, {_times(pod)})")
        code = "" if failure.exit_code is None else f" with exit code {failure.exit_code}"
        words = f": {failure.message}" if failure.message else ""
        return _no(
            Reason.CRASH_LOOP,
            f"pod {pod.name} ended{code}{words} ({_times(pod)}); see `kubectl logs {pod.name} --previous`",
        )

    def _cannot_be_placed(self, _: Sequence[Pod]) -> Verdict | None:
        words = self._unschedulable()
        if words is None:
            return None
        is_about_claim = "persistentvolumeclaim" in words.lower()
        step = _ABOUT_CLAIMS if is_about_claim else "free or add what is short, or ask for less"
        return _no(Reason.UNSCHEDULABLE, f"{words}; {step}")

    def _not_even_made(self) -> Verdict | None:
        for refusal in self.observed.refusals:
            if refusal.is_quota:
                return _no(Reason.QUOTA_EXCEEDED, f"{refusal.kind} {refusal.name}: {refusal.message}; {_ABOUT_QUOTA}")
        deployment = self.observed.deployment
        failure = _deployment_condition(deployment, "ReplicaFailure") if deployment else {}
        if failure.get("status") != "True":
            return None
        message = failure.get("message", "")
        if "exceeded quota" in message:
            return _no(Reason.QUOTA_EXCEEDED, f"{message}; {_ABOUT_QUOTA}")
        return _no(
            Reason.PODS_REFUSED,
            f"{message}; mend the spec, or the rule of the namespace that forbids such pods (LimitRange, Pod Security, "
            "a webhook)",
        )

    def _memory_limit(self) -> str:
        deployment = self.observed.deployment
        containers = deployment["spec"]["template"]["spec"]["containers"] if deployment else []
        limit = containers[0].get("resources", {}).get("limits", {}).get("memory") if containers else None
        return f" of {limit}" if limit else ""


def _signature(tensors: Sequence[Object]) -> str:
    return ", ".join(f"{row['name']} {row['datatype']} {row['shape']}" for row in tensors) or "none"


_REASON_OF = {Reference.SECRET: Reason.SECRET_MISSING, Reference.CONFIG_MAP: Reason.NOT_FOUND}


def _absent(missing: Missing) -> str:
    key = f" has no key {missing.key}" if missing.key else " does not exist"
    return f"{missing.field}: {missing.kind} {missing.name}{key}; create it, and pods start by themselves"


def _times(pod: Pod) -> str:
    return {0: "about to be restarted", 1: "restarted once"}.get(pod.restarts, f"restarted {pod.restarts} times")


def _deployment_condition(deployment: Object, kind: str) -> Object:
    assert deployment["kind"] == DEPLOYMENT.kind
    rows = deployment.get("status", {}).get("conditions", [])
    return next((row for row in rows if row["type"] == kind), {})
