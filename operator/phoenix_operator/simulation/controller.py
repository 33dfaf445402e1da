"""One HPA's controller: a port of `reconcileAutoscaler` in Kubernetes' `horizontal.go` (v1.36.3).

Hides what the controller remembers between two looks at an HPA, and the order in which it decides. It takes the spec
as the API has it, so that a rendered HPA and a recorded one are fed alike. Left out: what needs an API server (a scale
that cannot be read or written, selectors) and ContainerResource metrics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phoenix_api.quantity import amount
from phoenix_operator.simulation import behavior as rules
from phoenix_operator.simulation import replica_calculator as calculator
from phoenix_operator.simulation.replica_calculator import Delays, MetricsError, Pod, PodMetric, Proposal, Tolerances

Spec = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of kube-controller-manager that matter, with its defaults, and one feature gate."""

    tolerance: float = 0.1
    downscale_stabilization_s: float = 300.0
    delays: Delays = field(default_factory=Delays)
    scale_to_zero: bool = False  # HPAScaleToZero, alpha and off in 1.36


@dataclass(frozen=True, slots=True)
class Target:
    """What the scale subresource and the list of pods say."""

    spec_replicas: int
    status_replicas: int
    pods: Sequence[Pod] = ()


@dataclass(frozen=True, slots=True)
class Metrics:
    """What the metrics APIs answer, in milli-units; a metric that is not in here is absent (404)."""

    objects: Mapping[str, int | None] = field(default_factory=dict)
    external: Mapping[str, Sequence[int] | None] = field(default_factory=dict)
    pods: Mapping[str, Mapping[str, PodMetric]] = field(default_factory=dict)
    resources: Mapping[str, Mapping[str, PodMetric]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of the HPA's status."""

    is_true: bool
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What one look at the HPA came to. `reason` is that of the event, empty where nothing was scaled.

    `usages` are the values of `status.currentMetrics` in the order of the spec, None for a metric that is absent.
    """

    replicas: int
    rescaled: bool
    reason: str
    conditions: Mapping[str, Condition]
    usages: tuple[int | None, ...] = ()
    error: str = ""


class _Failed(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def milli(quantity: str | int | float) -> int:
    """Return a quantity in milli-units, rounded up as `Quantity.MilliValue` is."""
    return math.ceil(amount(str(quantity)) * 1000)


class HorizontalController:
    """Decides for one HPA, step by step.

    Without a `history` it begins like a controller that has just started, whose first recommendation is what is there.
    """

    def __init__(self, flags: Flags | None = None, history: rules.History | None = None) -> None:
        self._flags = flags or Flags()
        self._is_new = history is None
        self.history = history or rules.History()
        self.conditions: dict[str, Condition] = {}

    def step(self, now_s: float, spec: Spec, target: Target, metrics: Metrics) -> Decision:
        """Look at the HPA once. `spec` is that of an autoscaling/v2 HPA; `now_s` never goes back."""
        current, most = target.spec_replicas, int(spec["maxReplicas"])
        least = 1 if spec.get("minReplicas") is None else int(spec["minReplicas"])
        self._set("AbleToScale", True, "SucceededGetScale")
        if self._is_new:
            self._is_new = False
            self.history.recommendations.append(rules.Recommendation(current, now_s))
        if current == 0 and not self._may_leave_zero(spec):
            self._set("ScalingActive", False, "ScalingDisabled", "the replica count of the target is zero")
            if not self._flags.scale_to_zero:
                self.conditions.pop("ScaledToZero", None)
            return self._decision(0, False, "")
        if current > most:
            return self._rescale(spec, now_s, current, most, "Current number of replicas above Spec.MaxReplicas")
        if 0 < current < least:
            return self._rescale(spec, now_s, current, least, "Current number of replicas below Spec.MinReplicas")
        return self._by_metrics(now_s, spec, target, metrics, least)

    def _by_metrics(self, now_s: float, spec: Spec, target: Target, metrics: Metrics, least: int) -> Decision:
        current, behavior = target.spec_replicas, rules.read_behavior(spec.get("behavior"))
        tolerances = Tolerances(self._flags.tolerance, self._flags.tolerance)
        if behavior is not None:
            tolerances = behavior.tolerances(self._flags.tolerance)
        proposed, name, failures = 0, "", 0
        usages: list[int | None] = []
        failure: _Failed | None = None
        for metric in spec.get("metrics") or _DEFAULT_METRICS:
            try:
                proposal, its_name = self._propose(now_s, metric, target, metrics, tolerances)
            except _Failed as error:
                failures += 1
                failure = failure or error
                usages.append(None)
                continue
            usages.append(proposal.usage)
            if proposed == 0 or proposal.replicas > proposed:
                proposed, name = proposal.replicas, its_name
        told = f"invalid metrics ({failures} invalid out of {len(usages)}), first error is: {failure}"
        if failure is not None and (failures == len(usages) or proposed < current):
            message = f"the HPA was unable to compute the replica count: {failure}"
            self._set("ScalingActive", False, failure.reason, message)
            return self._decision(current, False, "", tuple(usages), told)
        found = f"the HPA was able to successfully calculate a replica count from {name}"
        self._set("ScalingActive", True, "ValidMetricFound", found)
        proposed = max(proposed, 0)
        reason = f"{name} above target" if proposed > current else ""
        reason = "All metrics below target" if proposed < current else reason
        wish = rules.Wish(current, proposed, least, int(spec["maxReplicas"]))
        desired = self._normalize(wish, behavior, now_s)
        if current == 0 and desired < least and self._was_scaled_to_zero:
            desired, reason = least, reason or "Current number of replicas below Spec.MinReplicas"
        told = "" if failure is None else told
        if desired == current:
            return self._decision(current, False, "", tuple(usages), told)
        return self._rescale(spec, now_s, current, desired, reason, tuple(usages), told)

    def _normalize(self, wish: rules.Wish, behavior: rules.Behavior | None, now_s: float) -> int:
        """`normalizeDesiredReplicas` and `normalizeDesiredReplicasWithBehaviors`."""
        own_window_s = self._flags.downscale_stabilization_s
        if behavior is None:
            stable = rules.stabilize_down(self.history, wish.desired, window_s=own_window_s, now_s=now_s)
            because = rules.DOWN_STABILIZED
            verdict = rules.limit_without_behavior(_wanting(wish, stable))
        else:
            down_window_s = own_window_s if behavior.down.window_s is None else behavior.down.window_s
            steady = rules.stabilize(self.history, wish, behavior.up.window_s or 0, down_window_s, now_s)
            stable, because = steady.replicas, (steady.reason, steady.message)
            verdict = rules.limit(self.history, _wanting(wish, stable), behavior, now_s)
        if stable == wish.desired:
            because = ("ReadyForNewScale", "recommended size matches current size")
        self._set("AbleToScale", True, *because)
        self._set("ScalingLimited", verdict.replicas != stable, verdict.reason, verdict.message)
        return verdict.replicas

    def _propose(
        self, now_s: float, metric: Spec, target: Target, metrics: Metrics, tolerances: Tolerances
    ) -> tuple[Proposal, str]:
        """`computeReplicasForMetric`: the proposal of one metric and its name in events."""
        kind = metric["type"]
        try:
            match kind:
                case "Object":
                    source = metric["object"]
                    value = metrics.objects.get(source["metric"]["name"])
                    wanted = _for_one_value(value, source["target"], target, tolerances)
                    described = f"{source['describedObject']['kind']} metric {source['metric']['name']}"
                    # the controller calls a per-pod Object metric external, too
                    is_average = source["target"]["type"] == "AverageValue"
                    return wanted, _external_name(source) if is_average else described
                case "External":
                    source = metric["external"]
                    series = metrics.external.get(source["metric"]["name"])
                    value = None if series is None else calculator.sum_of_series(series)
                    return _for_one_value(value, source["target"], target, tolerances), _external_name(source)
                case "Pods":
                    source = metric["pods"]
                    of_pods = metrics.pods.get(source["metric"]["name"], {})
                    goal = milli(source["target"]["averageValue"])
                    proposal = calculator.pods_average(target.spec_replicas, of_pods, goal, target.pods, tolerances)
                    return proposal, f"pods metric {source['metric']['name']}"
                case "Resource":
                    return self._of_resource(now_s, metric["resource"], target, metrics, tolerances)
        except MetricsError as error:
            raise _Failed(f"FailedGet{kind}Metric", str(error)) from error
        raise _Failed("InvalidMetricSourceType", f"unknown metric source type {kind!r}")

    def _of_resource(
        self, now_s: float, source: Spec, target: Target, metrics: Metrics, tolerances: Tolerances
    ) -> tuple[Proposal, str]:
        name, goal = source["name"], source["target"]
        of_pods = metrics.resources.get(name, {})
        if "averageUtilization" not in goal:
            raise MetricsError("invalid resource metric source: only an average utilization target is ported")
        proposal = calculator.cpu_utilization(
            target.spec_replicas, of_pods, int(goal["averageUtilization"]), target.pods, tolerances,
            now_s=now_s, delays=self._flags.delays, is_cpu=name == "cpu",
        )  # fmt: skip
        return proposal, f"{name} resource utilization (percentage of request)"

    @property
    def _was_scaled_to_zero(self) -> bool:
        condition = self.conditions.get("ScaledToZero")
        return self._flags.scale_to_zero and condition is not None and condition.is_true

    def _may_leave_zero(self, spec: Spec) -> bool:
        """`shouldComputeMetricsForZeroReplicas`: only what the controller itself took to zero."""
        return self._was_scaled_to_zero and (spec.get("minReplicas") != 0 or _has_outer_metric(spec))

    def _rescale(
        self,
        spec: Spec,
        now_s: float,
        current: int,
        desired: int,
        reason: str,
        usages: tuple[int | None, ...] = (),
        error: str = "",
    ) -> Decision:
        self._set("AbleToScale", True, "SucceededRescale", f"the HPA controller updated the target scale to {desired}")
        rules.store_event(self.history, rules.read_behavior(spec.get("behavior")), current, desired, now_s)
        if self._flags.scale_to_zero:
            is_zero = current > 0 and desired == 0 and spec.get("minReplicas") == 0 and _has_outer_metric(spec)
            self._set("ScaledToZero", is_zero, "ScaledToZero" if is_zero else "NotScaledToZero")
        else:
            self.conditions.pop("ScaledToZero", None)
        return self._decision(desired, True, reason, usages, error)

    def _set(self, name: str, is_true: bool, reason: str, message: str = "") -> None:
        self.conditions[name] = Condition(is_true, reason, message)

    def _decision(
        self, replicas: int, rescaled: bool, reason: str, usages: tuple[int | None, ...] = (), error: str = ""
    ) -> Decision:
        return Decision(replicas, rescaled, reason, dict(self.conditions), usages, error)


# the API server's default for an HPA that names no metric
_DEFAULT_METRICS: tuple[Spec, ...] = (
    {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}},
)


def _wanting(wish: rules.Wish, desired: int) -> rules.Wish:
    return rules.Wish(wish.current, desired, wish.least, wish.most)


def _for_one_value(value: int | None, goal: Spec, target: Target, tolerances: Tolerances) -> Proposal:
    if goal["type"] == "Value":
        return calculator.object_value(target.spec_replicas, value, milli(goal["value"]), target.pods, tolerances)
    if goal["type"] == "AverageValue":
        return calculator.object_average(target.status_replicas, value, milli(goal["averageValue"]), tolerances)
    raise MetricsError("invalid metric source: neither a value target nor an average value target was set")


def _external_name(source: Spec) -> str:
    return f"external metric {source['metric']['name']}({source['metric'].get('selector') or 'nil'})"


def _has_outer_metric(spec: Spec) -> bool:
    return any(metric["type"] in ("Object", "External") for metric in spec.get("metrics") or ())
