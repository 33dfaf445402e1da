"""Whether a spec can be acted on: what the API server cannot know, because settings and cluster decide it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phoenix_api import Reason
from phoenix_operator.desired.accelerator import ask
from phoenix_operator.desired.bindings import asked as asked_bindings
from phoenix_operator.desired.bindings import topic_prefix, topics
from phoenix_operator.desired.deployment import RESERVED_ENV
from phoenix_operator.kinds import HTTP_ROUTE, RESOURCE_CLAIM_TEMPLATE, SCALED_OBJECT, Kind
from phoenix_operator.observed import Observed, Subject
from phoenix_operator.settings import AutoscalingProvider, RouteKind, Settings


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a spec is not acted on."""

    reason: Reason
    message: str


def faults(subject: Subject, observed: Observed, settings: Settings) -> list[Fault]:
    """Return every fault, the gravest reason first; an empty list accepts the model."""
    found = [*_clashes(subject, observed), *_refused(observed)]
    found += [*_invalid(subject, settings), *_unscaled(subject, observed, settings)]
    found += [*_unknown(subject, observed, settings), *_unbound(subject, settings)]
    return found


def is_left_alone(faults: Iterable[Fault]) -> bool:
    """Whether nothing is done about the spec. An object that is refused keeps no other from being applied."""
    return any(fault.reason is not Reason.OBJECT_REFUSED for fault in faults)


def _invalid(subject: Subject, settings: Settings) -> Iterator[Fault]:
    spec = subject.spec
    if settings.require_digest and spec.model.sha256 is None:
        yield Fault(Reason.INVALID_SPEC, "spec.model.sha256: this cluster asks for a digest; add the model's SHA-256")
    reserved = [row.name for row in spec.pod.env if row.name in RESERVED_ENV]
    if reserved:
        yield Fault(
            Reason.INVALID_SPEC, f"spec.pod.env: {', '.join(reserved)} belongs to the operator; remove it from the list"
        )
    names = [row.name for row in spec.pod.env]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield Fault(Reason.INVALID_SPEC, f"spec.pod.env: expected each name once, got {', '.join(twice)} twice")


def _unknown(subject: Subject, observed: Observed, settings: Settings) -> Iterator[Fault]:
    accelerator = subject.spec.runtime.accelerator
    if accelerator and accelerator.profile and accelerator.profile not in settings.accelerator_profiles:
        known = ", ".join(sorted(settings.accelerator_profiles)) or "none"
        yield Fault(
            Reason.INVALID_SPEC,
            f"spec.runtime.accelerator.profile: expected a profile of the operator's settings ({known}), "
            f"got {accelerator.profile}",
        )
    asked = ask(subject, settings)
    if asked and asked.device_class_name:
        yield from _missing_kind(RESOURCE_CLAIM_TEMPLATE, observed, "spec.runtime.accelerator.deviceClassName")
    if subject.spec.networking.host is not None:
        routes = settings.routes
        if routes.kind is None:
            yield Fault(
                Reason.INVALID_SPEC,
                "spec.networking.host: the operator's settings name no route (routes.kind: Ingress or HTTPRoute)",
            )
        elif routes.kind is RouteKind.HTTP_ROUTE:
            if routes.gateway is None:
                yield Fault(Reason.INVALID_SPEC, "spec.networking.host: the operator's settings name no routes.gateway")
            yield from _missing_kind(HTTP_ROUTE, observed, "spec.networking.host")


def _unbound(subject: Subject, settings: Settings) -> Iterator[Fault]:
    for each in asked_bindings(subject):
        if each.backend is None:
            continue
        known = {backend.name for backend in settings.backends if backend.kind == each.kind}
        if each.backend not in known:
            yield Fault(
                Reason.UNKNOWN_BACKEND,
                f"{each.field}.backend: expected a backend of kind {each.kind} of the operator's settings "
                f"({', '.join(sorted(known)) or 'none'}), got {each.backend}",
            )
        if each.kind == "kafka":
            # rights are given by prefix: a topic of another model would be open to this one
            prefix = topic_prefix(subject)
            for field, topic in topics(subject).items():
                if not topic.startswith(prefix):
                    yield Fault(
                        Reason.INVALID_SPEC,
                        f"{field}: expected a topic that begins with {prefix}, because spec.bindings.kafka.backend "
                        f"gives access to no others, got {topic}; take secretRef for topics of your own",
                    )


def _unscaled(subject: Subject, observed: Observed, settings: Settings) -> Iterator[Fault]:
    scaling, provider = subject.spec.autoscaling, settings.autoscaling.provider
    if scaling is None:
        return
    if provider is None:
        yield Fault(
            Reason.INVALID_SPEC,
            "spec.autoscaling: the operator's settings name no autoscaling.provider; remove it, or have one named",
        )
    elif provider is AutoscalingProvider.KEDA:
        yield from _missing_kind(SCALED_OBJECT, observed, "spec.autoscaling")
    elif scaling.min_replicas == 0:
        yield Fault(
            Reason.INVALID_SPEC,
            "spec.autoscaling.minReplicas: expected at least 1, got 0; only the provider keda can wake a model again",
        )


def _missing_kind(kind: Kind, observed: Observed, field: str) -> Iterator[Fault]:
    if kind not in observed.served_kinds:
        yield Fault(
            Reason.KIND_NOT_SERVED, f"{field}: the cluster does not serve {kind} ({kind.api_version}); install it"
        )


def _clashes(subject: Subject, observed: Observed) -> Iterator[Fault]:
    if observed.foreign:
        names = ", ".join(f"{kind} {subject.namespace}/{name}" for kind, name in observed.foreign)
        yield Fault(
            Reason.NAME_CLASH, f"{names} belongs to somebody else and is left alone; rename the model or the object"
        )
    if observed.host_owner is not None:
        yield Fault(
            Reason.NAME_CLASH,
            f"spec.networking.host: {subject.spec.networking.host} with this model's path belongs to the older model "
            f"{observed.host_owner}; take another host or name",
        )


def _refused(observed: Observed) -> Iterator[Fault]:
    for refusal in observed.refusals:
        if not refusal.is_quota:
            yield Fault(
                Reason.OBJECT_REFUSED, f"the API server refuses {refusal.kind} {refusal.name}: {refusal.message}"
            )
