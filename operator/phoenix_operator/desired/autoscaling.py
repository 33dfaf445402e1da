"""How many replicas there are, and the HorizontalPodAutoscaler that decides where `spec.autoscaling` asks for one.

Two signals from one histogram: concurrency, which grows with the load and so says how many replicas it needs, and
pressure (the latency against its objective), which can only hold or raise that number. The HPA takes the larger
proposal. It targets the Deployment, so that the PhoenixModel stays what the user wrote.
"""

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from statistics import median
from typing import Any

from phoenix_api import ScalingMetric
from phoenix_api.quantity import amount
from phoenix_operator.desired.naming import owned, spec_hash
from phoenix_operator.kinds import DEPLOYMENT, HORIZONTAL_POD_AUTOSCALER, PHOENIX_MODEL
from phoenix_operator.observed import GUARD_OFF, Object, Observed, Subject
from phoenix_operator.settings import AutoscalingProvider, Settings

CONCURRENCY = "inference_latency_seconds_concurrency"
PRESSURE = "inference_latency_seconds_pressure"
LATENCY = "inference_latency_seconds"
TARGET_SHARE = Decimal("0.7")  # of the measured capacity: the rest is for the time until new pods answer
_STEADY = Decimal("0.25")  # a measurement that differs by less changes nothing
# A pod that does not answer any more is counted as missing after a minute, with scrape, rules and the HPA's own pace
# after less than two; until then its load is missing, and the HPA has to look back for longer than that.
_SHORTEST_WINDOW_S, _LONGEST_WINDOW_S, _WINDOW_STEP_S = 120, 3600, 10
_STEP_S = 60  # of the policies: no more than this much change in such a time
_DIRECTIONS = ("scaleUp", "scaleDown")
# Latency of pods that start, or of a number of replicas that has just changed, says nothing about the target.
_SETTLED_S = 180


def is_autoscaled(subject: Subject) -> bool:
    """Whether somebody else than the spec decides on the number of replicas."""
    return subject.spec.autoscaling is not None


def first_replicas(subject: Subject) -> int:
    """Return how many replicas a Deployment is made with: at least one, so that the model is verified."""
    scaling = subject.spec.autoscaling
    return subject.spec.replicas if scaling is None else max(1, scaling.min_replicas)


def replicas(subject: Subject, observed: Observed) -> int:
    """Return how many replicas there should be now: what the spec says, or what the autoscaler has last set."""
    current = observed.deployment
    if not is_autoscaled(subject) or current is None:
        return first_replicas(subject)
    return int(current["spec"].get("replicas", 1))


def autoscaler(subject: Subject, observed: Observed, settings: Settings) -> Object | None:
    """Return the HorizontalPodAutoscaler; None where the spec asks for none, or KEDA makes its own."""
    scaling = subject.spec.autoscaling
    if scaling is None or settings.autoscaling.provider in (None, AutoscalingProvider.KEDA):
        return None
    is_off = scaling.metric is ScalingMetric.SLO and is_guard_off(subject, observed)
    spec: Object = {
        "scaleTargetRef": {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.kind, "name": subject.name},
        "minReplicas": scaling.min_replicas,
        "maxReplicas": scaling.max_replicas,
        "metrics": _metrics(subject, observed, is_guarded=not is_off),
    }
    if pace := behavior(subject, observed):
        spec["behavior"] = pace
    annotations = {GUARD_OFF: spec_hash(subject)} if is_off else None
    return owned(subject, HORIZONTAL_POD_AUTOSCALER, subject.name, {"spec": spec}, annotations=annotations)


def _metrics(subject: Subject, observed: Observed, *, is_guarded: bool) -> list[Object]:
    scaling = subject.spec.autoscaling
    assert scaling is not None
    if scaling.metric is ScalingMetric.LATENCY:
        return [_metric(subject, LATENCY, {"type": "Value", "value": _milli(scaling.target_latency.value)})]
    target = concurrency_target(subject, observed)
    found = []
    if target is not None:
        found.append(_metric(subject, CONCURRENCY, {"type": "AverageValue", "averageValue": _milli(target)}))
    if is_guarded or target is None:
        found.append(_metric(subject, PRESSURE, {"type": "Value", "value": "1"}))
    return found


def _metric(subject: Subject, name: str, target: Object) -> Object:
    described = {"apiVersion": PHOENIX_MODEL.api_version, "kind": PHOENIX_MODEL.kind, "name": subject.name}
    return {"type": "Object", "object": {"describedObject": described, "metric": {"name": name}, "target": target}}


def behavior(subject: Subject, observed: Observed) -> Object:
    """Return how fast replicas come and go: the spec's own behavior whole, else up fast and down slowly.

    Of the spec's own what is null or empty is left out: the API server puts its defaults there, which would never be as
    wanted.

    Load must be low for twice the time that a pod takes to load before one is removed that would have to come back.
    """
    scaling = subject.spec.autoscaling
    assert scaling is not None
    if scaling.behavior is not None:
        return _without_nothing(scaling.behavior)
    load_s = max((loaded.load_s for loaded in observed.loaded.values()), default=0.0)
    # in steps, so that pods that load a little faster or slower do not change the HPA
    twice_s = -int(-2 * load_s // _WINDOW_STEP_S) * _WINDOW_STEP_S
    before = _live_window(observed)
    window_s = max(scaling.scale_down_stabilization_seconds, twice_s, before, _SHORTEST_WINDOW_S)
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "selectPolicy": "Max",
            "policies": [
                {"type": "Percent", "value": 100, "periodSeconds": _STEP_S},
                {"type": "Pods", "value": 4, "periodSeconds": _STEP_S},
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": min(window_s, _LONGEST_WINDOW_S),
            "selectPolicy": "Max",
            "policies": [{"type": "Percent", "value": 25, "periodSeconds": _STEP_S}],
        },
    }


def _without_nothing(body: Mapping[str, Any]) -> Object:
    kept = {key: _without_nothing(value) if isinstance(value, dict) else value for key, value in body.items()}
    return {key: value for key, value in kept.items() if value is not None and (value != {} or key not in _DIRECTIONS)}


def concurrency_target(subject: Subject, observed: Observed) -> Decimal | None:
    """Return the requests that one replica is to serve at once; None while nobody said and none is measured."""
    scaling = subject.spec.autoscaling
    assert scaling is not None
    if scaling.concurrency_per_replica is not None:
        return Decimal(scaling.concurrency_per_replica)
    capacities = [loaded.capacity for loaded in observed.loaded.values() if loaded.capacity]
    before = _live_target(observed)
    if not capacities:
        return before
    measured = TARGET_SHARE * Decimal(median(capacities))
    return before if before is not None and abs(measured - before) <= _STEADY * before else measured


def is_guard_off(subject: Subject, observed: Observed) -> bool:
    """Whether the objective cannot be met by more replicas: one request alone takes longer than it allows.

    Doubling replicas for it would go on to the maximum. It is decided once pods and their number have settled, and
    stands until the spec changes: without the pressure its cause cannot be seen any more.
    """
    live = observed.autoscaler
    if live is None:
        return False
    if live["metadata"].get("annotations", {}).get(GUARD_OFF) == spec_hash(subject):
        return True
    values = current_values(live)
    concurrency, pressure = values.get(CONCURRENCY), values.get(PRESSURE)
    if concurrency is None or pressure is None or pressure <= 1 or not 0 < concurrency <= 1:
        return False
    moments = [pod.ready_since for pod in observed.pods if pod.is_ready]
    last_scaled = live.get("status", {}).get("lastScaleTime")
    return observed.has_passed(_SETTLED_S, *moments, last_scaled)


def current_values(live: Object) -> dict[str, Decimal]:
    """Return what an HPA last read, by metric: concurrency for each replica, everything else as it is."""
    found = {}
    for row in live.get("status", {}).get("currentMetrics") or []:
        read = row.get("object", {})
        current = read.get("current", {})
        text = current.get("averageValue", current.get("value"))
        if text is not None:
            found[str(read["metric"]["name"])] = amount(str(text))
    return found


def _live_target(observed: Observed) -> Decimal | None:
    for row in _live_spec(observed).get("metrics", []):
        read = row.get("object", {})
        if read.get("metric", {}).get("name") == CONCURRENCY and "averageValue" in read.get("target", {}):
            return amount(str(read["target"]["averageValue"]))
    return None


def _live_window(observed: Observed) -> int:
    """Return the window of the live HPA while no pod says how long it took to load: the last measurement stands."""
    if any(loaded.load_s for loaded in observed.loaded.values()):
        return 0
    down = _live_spec(observed).get("behavior", {}).get("scaleDown", {})
    return int(down.get("stabilizationWindowSeconds") or 0)


def _live_spec(observed: Observed) -> dict[str, Any]:
    live = observed.autoscaler
    return {} if live is None else live["spec"]


def _milli(value: Decimal) -> str:
    """Write a quantity of whole thousandths as the API server does: `1500m`, `2`, `3k`."""
    amount, suffix = int((value * 1000).to_integral_value(ROUND_CEILING)), "m"
    for larger in ("", "k", "M", "G", "T", "P", "E"):
        if amount == 0 or amount % 1000:
            break
        amount, suffix = amount // 1000, larger
    return f"{amount}{suffix}" if amount else "0"
