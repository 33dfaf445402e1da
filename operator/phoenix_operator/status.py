"""What the status of a PhoenixModel says: a pure function of what was asked and what was seen.

Each condition has one function. Each speaks of the wanted generation, so that the pods of a new version that cannot
load show in `ModelVerified` and `Progressing` while `Available` tells that the old version answers. Reasons of pods are
the server's own words where it left some (the termination message), else Kubernetes'.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from phoenix_api import (
    CONDITIONS,
    Condition,
    ConditionStatus,
    ConditionType,
    Quantity,
    Reason,
    Status,
)
from phoenix_api.status import Endpoints, LoadedModel, ReplicaCounts, ScalingStatus, TensorDescription
from phoenix_operator.desired import config
from phoenix_operator.desired.accelerator import ask, prefers
from phoenix_operator.desired.acceptance import Fault, is_left_alone
from phoenix_operator.desired.autoscaling import (
    CONCURRENCY,
    LATENCY,
    PRESSURE,
    current_values,
    is_autoscaled,
    is_guard_off,
    replicas,
)
from phoenix_operator.desired.bindings import asked as asked_bindings
from phoenix_operator.desired.deployment import is_in_place, is_withheld, template_hash
from phoenix_operator.desired.keda import is_keda
from phoenix_operator.desired.naming import GRPC_PORT, HTTP_PORT, selector
from phoenix_operator.desired.network import path_prefix
from phoenix_operator.observed import TEMPLATE, Loaded, Object, Observed, Pod, Subject, stamp
from phoenix_operator.settings import Settings
from phoenix_operator.trouble import (
    REASON_OF,
    REASONS,
    Trouble,
    absent,
    deployment_condition,
    trouble_of,
    unschedulable,
)

_CPU = "CPUExecutionProvider"
_NOTHING_DONE = "nothing is done about a spec that is not accepted"
_NEXT_STEP = {
    Reason.DIGEST_MISMATCH: "check spec.model.sha256, and who changed the file",
    Reason.EXTERNAL_DATA_MISSING: "put it beside the model, or save the model as one file",
    Reason.INVALID_MODEL: "export and upload the model again",
    Reason.FETCH_FAILED: "check spec.model.uri, its store and the network policies",
    Reason.UNSUPPORTED_OPSET: "export with an older opset, or take a newer spec.runtime.image",
}
_MESSAGE_LIMIT = 2000
_VERIFIED_REASONS = frozenset(CONDITIONS[ConditionType.MODEL_VERIFIED].otherwise) - {Reason.LOADING}
_ACCELERATOR_REASONS = frozenset(CONDITIONS[ConditionType.ACCELERATOR_READY].otherwise) - {Reason.LOADING}


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
    now = stamp(observed.now) if observed.now else "1970-01-01T00:00:00Z"
    status = Status(
        observed_generation=subject.generation,
        replicas=view.counts(),
        ready_replicas=len(view.ready),
        selector=",".join(f"{key}={value}" for key, value in selector(subject.name).items()),
        model=view.loaded_model(),
        endpoints=view.endpoints(),
        autoscaling=view.scaling(),
        conditions=[
            _condition(kind, verdict, subject.generation, before.get(kind), now) for kind, verdict in verdicts.items()
        ],
    )
    dumped: Object = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dumped


def unreadable_status(document: Object, message: str, now: str) -> Object:
    """Return the status of an object whose spec cannot even be parsed. Everything else in it stays as it was."""
    generation = document["metadata"].get("generation", 0)
    verdict = _no(Reason.INVALID_SPEC, message)
    conditions = _with(document, (ConditionType.ACCEPTED, ConditionType.READY), verdict, now)
    status: Object = document.get("status", {}) | {"observedGeneration": generation, "conditions": conditions}
    return status


def blocked_status(document: Object, unreleased: Sequence[str], now: str) -> Object:
    """Return the status of an object that cannot be let go yet. Everything else in it stays as it was."""
    metadata = document["metadata"]
    verdict = _blocked(unreleased, metadata["name"], metadata["namespace"])
    conditions = _with(document, (ConditionType.BINDINGS_READY, ConditionType.READY), verdict, now)
    generation = metadata.get("generation", 0)  # deletion makes a new one
    status: Object = document.get("status", {}) | {"observedGeneration": generation, "conditions": conditions}
    return status


def _blocked(unreleased: Sequence[str], name: str, namespace: str) -> Verdict:
    command = f"kubectl annotate phx {name} -n {namespace} phoenix-ml.io/force-delete=true"
    words = f"{'; '.join(unreleased)}; it is tried again by itself, or let go at once with `{command}`"
    return _no(Reason.DELETION_BLOCKED, words)


def _with(document: Object, kinds: Sequence[ConditionType], verdict: Verdict, now: str) -> list[Object]:
    """Return the conditions of a document with this verdict for these kinds."""
    generation = document["metadata"].get("generation", 0)
    before = {row["type"]: row for row in document.get("status", {}).get("conditions", [])}
    for kind in kinds:
        row = _condition(kind, verdict, generation, before.get(kind), now)
        before[kind] = row.model_dump(mode="json", by_alias=True)
    return [before[kind] for kind in ConditionType if kind in before]


def _condition(kind: ConditionType, verdict: Verdict, generation: int, before: Object | None, now: str) -> Condition:
    return Condition(
        type=kind,
        status=verdict.status,
        observed_generation=generation,
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
        self.is_left_alone = is_left_alone(faults)
        self.before = {row["type"]: row for row in subject.status.get("conditions", [])}
        self._wanted = wanted = template_hash(subject, observed, settings)
        alive = [pod for pod in observed.pods if not pod.is_leaving]
        self.new = [pod for pod in alive if pod.template == wanted]
        self.old = [pod for pod in alive if pod.template != wanted]
        self.gone = [pod for pod in observed.pods if pod.is_leaving and pod.template == wanted]
        self.gone_old = [pod for pod in observed.pods if pod.is_leaving and pod.template != wanted]
        self.ready = [pod for pod in alive if pod.is_ready]
        self.new_ready = [pod for pod in self.new if pod.is_ready]
        self.desired = replicas(subject, observed)

    def verdicts(self) -> dict[ConditionType, Verdict]:
        """Return every condition but `Ready`, in the order of the table."""
        found = {ConditionType.ACCEPTED: self._accepted(), ConditionType.MODEL_VERIFIED: self._model_verified()}
        if self.subject.spec.runtime.accelerator is not None:
            found[ConditionType.ACCELERATOR_READY] = self._accelerator_ready()
        if asked_bindings(self.subject) or self.observed.unreleased:
            found[ConditionType.BINDINGS_READY] = self._bindings_ready()
        if is_autoscaled(self.subject):
            found[ConditionType.AUTOSCALING_READY] = self._autoscaling_ready()
        found[ConditionType.AVAILABLE] = self._available()
        found[ConditionType.PROGRESSING] = self._progressing()
        return found

    def counts(self) -> ReplicaCounts:
        """Return how many pods there are."""
        desired, ready = self.desired, len(self.ready)
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
                reason = REASONS[failure.reason]
                step = f"; {_NEXT_STEP[reason]}" if reason in _NEXT_STEP else ""
                return _no(reason, f"version {version}: {failure.message}{step}{self._what_serves()}")
        for missing in self.observed.missing:
            if missing.field.startswith("spec.model."):
                return _no(REASON_OF[missing.kind], absent(missing))
        if was_verified:
            return _yes(REASONS[before["reason"]], before["message"])  # that its pods ended since does not unmake it
        if self.is_left_alone:
            return _unknown(_NOTHING_DONE)
        return _unknown(f"no pod has loaded version {version} yet", Reason.LOADING)

    def _accelerator_ready(self) -> Verdict:
        asked = ask(self.subject, self.settings)
        assert asked is not None, "asked only for models with an accelerator"
        what = asked.what
        for pod in self.new:
            if (failure := pod.failure) and failure.is_own and failure.reason in _ACCELERATOR_REASONS:
                return _no(REASONS[failure.reason], failure.message)
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
        if words := unschedulable(self.observed, self.new):
            return _no(Reason.UNSCHEDULABLE, f"asked for {asked.count} of {what} per pod: {words}; free or add devices")
        if self.is_left_alone:
            return _unknown(_NOTHING_DONE)
        return _unknown(f"no pod runs on {what} yet", Reason.LOADING)

    def _bindings_ready(self) -> Verdict:
        seen = self.observed.bindings
        asked = [each.kind for each in asked_bindings(self.subject)]
        if any(kind not in seen for kind in asked):
            return _unknown(_NOTHING_DONE if self.is_left_alone else "the bindings have not been looked at yet")
        faults = [seen[kind] for kind in asked if seen[kind].reason is not Reason.BOUND]
        if faults:
            first = faults[0].reason
            return _no(first, "; ".join(fault.message for fault in faults if fault.reason is first))
        for pod in self.new_ready or self.ready:
            loaded = self.observed.loaded.get(pod.uid)
            for kind in asked:
                if loaded is not None and (words := loaded.bindings.get(kind)):
                    return _no(_reason_of(words), f"{kind}: pod {pod.name} cannot use it: {words}")
        if self.observed.unreleased:
            return _blocked(self.observed.unreleased, self.subject.name, self.subject.namespace)
        return _yes(Reason.BOUND, "; ".join(seen[kind].message for kind in asked))

    def _autoscaling_ready(self) -> Verdict:
        if is_keda(self.subject, self.settings):
            return self._keda_ready()
        live = self.observed.autoscaler
        if live is None:
            return _unknown(_NOTHING_DONE if self.is_left_alone else "there is no HorizontalPodAutoscaler yet")
        rows = {row["type"]: row for row in live.get("status", {}).get("conditions") or []}
        for kind in ("AbleToScale", "ScalingActive"):
            row = rows.get(kind, {})
            if row.get("status") == "False" and row.get("reason") != "ScalingDisabled":
                return _no(
                    Reason.METRICS_UNAVAILABLE,
                    f"the HPA keeps {self.desired} replicas: {row.get('message') or row.get('reason')}; see that "
                    "Prometheus and the metrics API run",
                )
        if "ScalingActive" not in rows:
            return _unknown("the HPA has not read its metrics yet")
        scaling = self.subject.spec.autoscaling
        assert scaling is not None
        if is_guard_off(self.subject, self.observed):
            return _no(
                Reason.TARGET_BELOW_SERVICE_TIME,
                f"the latency is over spec.autoscaling.targetLatency ({scaling.target_latency}) though no replica has "
                "more than one request at once: more replicas cannot help, so only concurrency adds them; raise it, "
                "or make the model faster",
            )
        limited = rows.get("ScalingLimited", {})
        if limited.get("status") == "True" and limited.get("reason") == "TooManyReplicas":
            return _no(
                Reason.SCALING_LIMITED,
                f"the HPA would have more than the {scaling.max_replicas} replicas of spec.autoscaling.maxReplicas; "
                "raise it if there is room",
            )
        return _yes(Reason.METRICS_READ, f"the HPA reads {', '.join(sorted(current_values(live))) or 'its metrics'}")

    def _keda_ready(self) -> Verdict:
        live = self.observed.scaled_object
        if live is None:
            return _unknown(_NOTHING_DONE if self.is_left_alone else "there is no ScaledObject yet")
        rows = {row["type"]: row for row in live.get("status", {}).get("conditions") or []}
        told = rows.get("Ready", {})
        if told.get("status") == "False":
            words = told.get("message") or told.get("reason")
            return _no(Reason.METRICS_UNAVAILABLE, f"KEDA does not scale: {words}; see `kubectl describe scaledobject`")
        if rows.get("Fallback", {}).get("status") == "True":
            return _no(
                Reason.METRICS_UNAVAILABLE,
                "KEDA cannot read a metric and has fallen back to replicas that are there; see that Prometheus answers",
            )
        if told.get("status") != "True":
            return _unknown("KEDA has not looked at the ScaledObject yet")
        return _yes(Reason.METRICS_READ, "KEDA reads its triggers")

    def scaling(self) -> ScalingStatus | None:
        """Return what the autoscaler last read and wants; rounded, or each look would be another status."""
        live = self.observed.autoscaler
        if not is_autoscaled(self.subject) or live is None:
            return None
        values, status = current_values(live), live.get("status", {})
        concurrency = values.get(CONCURRENCY)
        if concurrency is not None:
            concurrency *= int(status.get("currentReplicas") or 0)  # the HPA tells it for each replica
        latency = values.get(LATENCY)
        if latency is None and self.observed.latency_s is not None:
            latency = Decimal(self.observed.latency_s)
        return ScalingStatus(
            concurrency=_rounded(concurrency),
            latency_p95=_rounded(latency),
            pressure=_rounded(values.get(PRESSURE)),
            desired_replicas=status.get("desiredReplicas"),
        )

    def _available(self) -> Verdict:
        desired = self.desired
        if self.ready:
            return _yes(Reason.REPLICAS_AVAILABLE, f"{len(self.ready)} of {desired} replicas answer{self._trouble()}")
        if desired == 0:
            return _no(Reason.SCALED_TO_ZERO, "spec.replicas is 0; scale it up to serve")
        if self.is_left_alone and self.observed.deployment is None:
            return _unknown(_NOTHING_DONE)
        return _no(*self._trouble_of_new_pods())

    def _progressing(self) -> Verdict:
        deployment = self.observed.deployment
        version = self.subject.spec.model.version
        if self.is_left_alone and not self._is_rolled_out():
            return _unknown(f"{_NOTHING_DONE}{self._what_serves()}")
        if deployment is None:
            return _yes(Reason.ROLLING_OUT, f"version {version}: the Deployment is not there yet")
        row = deployment_condition(deployment, "Progressing")
        why = self._why_new_pods_fail()
        if row.get("reason") == "ProgressDeadlineExceeded" and not self._is_rolled_out():
            seconds = self.subject.spec.rollout.progress_deadline_seconds
            return _no(
                Reason.DEADLINE_EXCEEDED,
                f"version {version} made no progress for {seconds} s{f': {why}' if why else ''}{self._what_serves()}",
            )
        if self._is_rolled_out():
            return _yes(Reason.ROLLED_OUT, f"every pod is of version {version}")
        count = f"{len(self.new_ready)} of {self.desired} pods of version {version} are ready"
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
        if len(self.ready) >= self.desired:
            return ""
        why = self._why_new_pods_fail()
        return f"; {why}" if why else ""

    def _why_new_pods_fail(self) -> str:
        """Return the failure of the wanted version in a few words; empty while it merely loads."""
        if self.new and all(pod.is_ready for pod in self.new) and len(self.new) >= self.desired:
            return ""
        reason, message = self._trouble_of_new_pods()
        return "" if reason is Reason.LOADING else f"{reason}: {message}"

    def _trouble_of_new_pods(self) -> Trouble:
        return trouble_of(self.subject, self.observed, new=self.new, gone=self.gone)


def _rounded(value: Decimal | None) -> Quantity | None:
    """Return a quantity of two significant digits."""
    if value is None:
        return None
    thousandths = int(value * 1000)
    step = 10 ** max(len(str(thousandths)) - 2, 0)
    thousandths = round(thousandths / step) * step
    return Quantity(str(thousandths // 1000) if thousandths % 1000 == 0 else f"{thousandths}m")


def _reason_of(words: str) -> Reason:
    """Return whether a server was refused or got no answer, by the words of Redis, Kafka and PostgreSQL."""
    lowered = words.lower()
    is_refused = any(sign in lowered for sign in ("wrongpass", "noauth", "noperm", "denied", "authenticat", "authoriz"))
    return Reason.ACCESS_DENIED if is_refused else Reason.BACKEND_UNREACHABLE


def _signature(tensors: Sequence[Object]) -> str:
    return ", ".join(f"{row['name']} {row['datatype']} {row['shape']}" for row in tensors) or "none"
