"""What becomes of a proposal: a port of the normalisation in Kubernetes' `horizontal.go` (v1.36.3).

Hides stabilisation windows, rate policies, the history that both need, and the limits of an HPA without `behavior`.
Functions carry the controller's names in their docstrings. Times are in seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from phoenix_api.quantity import amount
from phoenix_operator.simulation.replica_calculator import MAX_INT32, Tolerances

_MIN_INT32 = -(2**31)
Select = Literal["Max", "Min", "Disabled"]
_SELECTS = ("Max", "Min", "Disabled")


@dataclass(frozen=True, slots=True)
class RatePolicy:
    """Pods, or percent of the pods at the start of the period, that may come or go in one period."""

    kind: str  # Pods or Percent
    value: int
    period_s: int


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """The rules of one direction. A window of None is the controller's own, `tolerance` of None too."""

    window_s: int | None
    policies: tuple[RatePolicy, ...]
    select: Select = "Max"
    tolerance: float | None = None

    @property
    def longest_period_s(self) -> int:
        """The longest period of its policies."""
        return max((policy.period_s for policy in self.policies), default=0)


DEFAULT_UP = ScalingRules(0, (RatePolicy("Pods", 4, 15), RatePolicy("Percent", 100, 15)))
DEFAULT_DOWN = ScalingRules(None, (RatePolicy("Percent", 100, 15),))


@dataclass(frozen=True, slots=True)
class Behavior:
    """`spec.behavior` of an HPA, complete."""

    up: ScalingRules = DEFAULT_UP
    down: ScalingRules = DEFAULT_DOWN

    def tolerances(self, default: float) -> Tolerances:
        """Return the tolerances of both directions."""
        return Tolerances(
            down=default if self.down.tolerance is None else self.down.tolerance,
            up=default if self.up.tolerance is None else self.up.tolerance,
        )


def read_behavior(document: Mapping[str, Any] | None) -> Behavior | None:
    """Read `spec.behavior`, filled up with the API server's defaults. Raises `ValueError` for unknown words."""
    if document is None:
        return None
    return Behavior(
        _read_rules(document.get("scaleUp"), DEFAULT_UP), _read_rules(document.get("scaleDown"), DEFAULT_DOWN)
    )


def _read_rules(document: Mapping[str, Any] | None, default: ScalingRules) -> ScalingRules:
    rules = default
    if document is None:
        return rules
    if (select := document.get("selectPolicy")) is not None:
        if select not in _SELECTS:
            raise ValueError(f"selectPolicy: expected one of {', '.join(_SELECTS)}, got {select!r}")
        rules = replace(rules, select=select)
    if (window := document.get("stabilizationWindowSeconds")) is not None:
        rules = replace(rules, window_s=int(window))
    if (policies := document.get("policies")) is not None:
        rules = replace(rules, policies=tuple(_read_policy(row) for row in policies))
    if (tolerance := document.get("tolerance")) is not None:
        rules = replace(rules, tolerance=float(amount(str(tolerance))))
    return rules


def _read_policy(row: Mapping[str, Any]) -> RatePolicy:
    if row["type"] not in ("Pods", "Percent"):
        raise ValueError(f"policies.type: expected Pods or Percent, got {row['type']!r}")
    return RatePolicy(row["type"], int(row["value"]), int(row["periodSeconds"]))


@dataclass(slots=True)
class Recommendation:
    """What the metrics proposed at a time."""

    replicas: int
    at_s: float


@dataclass(slots=True)
class ScaleEvent:
    """How many replicas came or went at a time; an outdated one is overwritten."""

    change: int
    at_s: float
    is_outdated: bool = False


@dataclass(slots=True)
class History:
    """What the controller remembers of an HPA. The order within the lists has no meaning: entries are reused."""

    recommendations: list[Recommendation] = field(default_factory=list)
    ups: list[ScaleEvent] = field(default_factory=list)
    downs: list[ScaleEvent] = field(default_factory=list)

    def record(self, replicas: int, now_s: float, reused: int | None) -> None:
        """Keep a recommendation, in the place of an old one where there is one."""
        if reused is None:
            self.recommendations.append(Recommendation(replicas, now_s))
        else:
            self.recommendations[reused] = Recommendation(replicas, now_s)


@dataclass(frozen=True, slots=True)
class Wish:
    """Replicas that are and that are wanted, and the bounds of the HPA."""

    current: int
    desired: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Replicas, with the reason and the message of the condition that tells of it."""

    replicas: int
    reason: str
    message: str


WITHIN_RANGE = ("DesiredWithinRange", "the desired count is within the acceptable range")
TOO_FEW = ("TooFewReplicas", "the desired replica count is less than the minimum replica count")
TOO_MANY = ("TooManyReplicas", "the desired replica count is more than the maximum replica count")
_UP_LIMIT = ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate")
_DOWN_LIMIT = ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate")
_UP_STABILIZED = (
    "ScaleUpStabilized",
    "recent recommendations were lower than current one, applying the lowest recent recommendation",
)
DOWN_STABILIZED = (
    "ScaleDownStabilized",
    "recent recommendations were higher than current one, applying the highest recent recommendation",
)


def stabilize_down(history: History, desired: int, *, window_s: float, now_s: float) -> int:
    """Return the highest recommendation of the window, for an HPA without `behavior` (`stabilizeRecommendation`)."""
    cutoff, highest, reused = now_s - window_s, desired, None
    for index, row in enumerate(history.recommendations):
        if row.at_s < cutoff:
            reused = index
        else:
            highest = max(highest, row.replicas)
    history.record(desired, now_s, reused)
    return highest


def stabilize(history: History, wish: Wish, up_window_s: float, down_window_s: float, now_s: float) -> Verdict:
    """Keep replicas within what was recommended in both windows (`stabilizeRecommendationWithBehaviors`)."""
    up_cutoff, down_cutoff = now_s - up_window_s, now_s - down_window_s
    lowest = highest = wish.desired
    reused = None
    for index, row in enumerate(history.recommendations):
        if row.at_s > up_cutoff:
            lowest = min(lowest, row.replicas)
        if row.at_s > down_cutoff:
            highest = max(highest, row.replicas)
        if row.at_s < up_cutoff and row.at_s < down_cutoff:
            reused = index
    replicas = min(max(wish.current, lowest), highest)
    history.record(wish.desired, now_s, reused)
    return Verdict(replicas, *(_UP_STABILIZED if wish.desired >= wish.current else DOWN_STABILIZED))


def limit(history: History, wish: Wish, behavior: Behavior, now_s: float) -> Verdict:
    """Hold a stabilised wish to the rate policies and the bounds (`convertDesiredReplicasWithBehaviorRate`)."""
    if wish.desired > wish.current:
        allowed = max(wish.current, up_limit(wish.current, history, behavior.up, now_s))
        most, because = (allowed, _UP_LIMIT) if wish.most > allowed else (wish.most, TOO_MANY)
        if wish.desired > most:
            return Verdict(most, *because)
    elif wish.desired < wish.current:
        allowed = min(wish.current, down_limit(wish.current, history, behavior.down, now_s))
        least, because = (allowed, _DOWN_LIMIT) if wish.least < allowed else (wish.least, TOO_FEW)
        if wish.desired < least:
            return Verdict(least, *because)
    return Verdict(wish.desired, *WITHIN_RANGE)


def limit_without_behavior(wish: Wish) -> Verdict:
    """Hold a wish to the bounds, and to twice the replicas or 4 (`convertDesiredReplicasWithRules`)."""
    allowed = max(2 * wish.current, 4)
    most, because = (allowed, _UP_LIMIT) if wish.most > allowed else (wish.most, TOO_MANY)
    if wish.desired < wish.least:
        return Verdict(wish.least, *TOO_FEW)
    if wish.desired > most:
        return Verdict(most, *because)
    return Verdict(wish.desired, *WITHIN_RANGE)


def up_limit(current: int, history: History, rules: ScalingRules, now_s: float) -> int:
    """Return the most replicas that the policies allow now (`calculateScaleUpLimitWithScalingRules`)."""
    if rules.select == "Disabled":
        return current
    proposed = []
    for policy in rules.policies:
        start = _at_period_start(current, history, policy.period_s, now_s)
        # rounded up: a small percentage of few would never add one
        proposed.append(
            start + policy.value if policy.kind == "Pods" else math.ceil(float(start) * (1 + float(policy.value) / 100))
        )
    return min(proposed, default=MAX_INT32) if rules.select == "Min" else max(proposed, default=_MIN_INT32)


def down_limit(current: int, history: History, rules: ScalingRules, now_s: float) -> int:
    """Return the fewest replicas that the policies allow now (`calculateScaleDownLimitWithBehaviors`)."""
    if rules.select == "Disabled":
        return current
    proposed = []
    for policy in rules.policies:
        start = _at_period_start(current, history, policy.period_s, now_s)
        proposed.append(
            start - policy.value if policy.kind == "Pods" else int(float(start) * (1 - float(policy.value) / 100))
        )
    # the smallest change is the highest count
    return max(proposed, default=_MIN_INT32) if rules.select == "Min" else min(proposed, default=MAX_INT32)


def _at_period_start(current: int, history: History, period_s: int, now_s: float) -> int:
    return current - change_within(history.ups, period_s, now_s) + change_within(history.downs, period_s, now_s)


def change_within(events: Sequence[ScaleEvent], period_s: float, now_s: float) -> int:
    """Return by how much replicas changed within the period (`getReplicasChangePerPeriod`)."""
    cutoff = now_s - period_s
    return sum(event.change for event in events if event.at_s > cutoff)


def store_event(history: History, behavior: Behavior | None, before: int, after: int, now_s: float) -> None:
    """Remember a rescale for the policies (`storeScaleEvent`); without `behavior` nobody would read it."""
    if behavior is None:
        return
    events, rules = (history.ups, behavior.up) if after > before else (history.downs, behavior.down)
    cutoff, reused = now_s - rules.longest_period_s, None
    for index, event in enumerate(events):
        if event.at_s < cutoff:
            event.is_outdated = True
        if event.is_outdated:
            reused = index
    if reused is None:
        events.append(ScaleEvent(abs(after - before), now_s))
    else:
        events[reused] = ScaleEvent(abs(after - before), now_s)
