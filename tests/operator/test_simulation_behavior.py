"""What becomes of a proposal: the cases of Kubernetes' horizontal_test.go (v1.36.3), as data."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_operator.simulation import behavior as rules
from phoenix_operator.simulation.behavior import (
    DEFAULT_DOWN,
    DEFAULT_UP,
    Behavior,
    History,
    RatePolicy,
    Recommendation,
    ScaleEvent,
    ScalingRules,
    Wish,
)  # fmt: skip

NOW_S = 1_000_000.0
MINUTE = 60.0


def scaling(pods: int, pods_s: int, percent: int, percent_s: int, window_s: int = 0) -> ScalingRules:
    policies = [RatePolicy("Pods", pods, pods_s)] if pods else []
    policies += [RatePolicy("Percent", percent, percent_s)] if percent else []
    # an API server would not take rules without policies
    return ScalingRules(window_s, tuple(policies))


def spread(changes: Sequence[int], period_s: int) -> list[ScaleEvent]:
    """Events in the middles of equal parts of the last `period_s`."""
    part = period_s / len(changes)
    return [
        ScaleEvent(change, NOW_S - int(period_s - part * (index + 1) + part / 2))
        for index, change in enumerate(changes)
    ]


def case(
    current: int, desired: int, least: int, most: int, replicas: int, reason: str, **given: Any
) -> tuple[Wish, tuple[int, str], Behavior, History]:
    behavior = Behavior(given.get("up", DEFAULT_UP), given.get("down", DEFAULT_DOWN))
    history = History(ups=spread(given["ups"], 120) if "ups" in given else [])
    history.downs = spread(given["downs"], 120) if "downs" in given else []
    return Wish(current, desired, least, most), (replicas, reason), behavior, history


IN_RANGE, TOO_FEW, TOO_MANY = "DesiredWithinRange", "TooFewReplicas", "TooManyReplicas"
UP_LIMIT, DOWN_LIMIT = "ScaleUpLimit", "ScaleDownLimit"
LIMITS = {
    "within range": case(5, 7, 3, 8, 7, IN_RANGE),
    "under the minimum": case(3, 1, 2, 8, 2, TOO_FEW),
    "to zero": case(1, 0, 0, 10, 0, IN_RANGE),
    "the maximum is under the limit": case(20, 1000, 1, 10, 10, TOO_MANY),
    "over the maximum": case(100, 1000, 100, 150, 150, TOO_MANY),
    "the limit is under the maximum": case(3, 1000, 1, 2000, 4, UP_LIMIT, up=scaling(0, 0, 1, 60)),
    "the limit is over the minimum": case(1000, 3, 3, 2000, 980, DOWN_LIMIT, down=scaling(20, 60, 0, 0)),
    "up by default": case(10, 50, 1, 1000, 20, UP_LIMIT),
    "up: more pods than percent": case(10, 500, 1, 1000, 110, UP_LIMIT, up=scaling(100, 60, 100, 60)),
    "up: more percent than pods": case(10, 500, 1, 1000, 20, UP_LIMIT, up=scaling(2, 60, 100, 60)),
    "up: many pods allowed": case(10, 50, 1, 1000, 50, IN_RANGE, up=scaling(100, 60, 0, 0)),
    "up: very many pods allowed": case(10, 50, 1, 1000, 50, IN_RANGE, up=scaling(10000, 60, 0, 0)),
    "up: limited by pods": case(10, 50, 1, 1000, 40, UP_LIMIT, up=scaling(30, 60, 0, 0)),
    "up: limited by percent": case(10, 50, 1, 1000, 30, UP_LIMIT, up=scaling(0, 0, 200, 60)),
    "down: more pods than percent": case(100, 2, 1, 1000, 80, DOWN_LIMIT, down=scaling(20, 60, 1, 60)),
    "down: fewer pods": case(100, 2, 1, 1000, 98, DOWN_LIMIT, down=scaling(2, 60, 1, 60)),
    "down: to the minimum by pods": case(10, 0, 1, 1000, 1, TOO_FEW, down=scaling(100, 60, 0, 0)),
    "down: to the minimum by percent": case(10, 2, 5, 1000, 5, TOO_FEW, down=scaling(0, 0, 100, 60)),
    "down: limited by pods": case(10, 2, 1, 1000, 5, DOWN_LIMIT, down=scaling(5, 60, 0, 0)),
    "down: just allowed by percent": case(10, 5, 1, 1000, 5, IN_RANGE, down=scaling(0, 0, 50, 60)),
    "up after ups: over the maximum by pods": case(
        100, 500, 1, 200, 200, TOO_MANY, up=scaling(300, 60, 0, 0), ups=[1, 5, 9]
    ),
    "up after ups: over the maximum by percent": case(
        100, 500, 1, 200, 200, TOO_MANY, up=scaling(0, 0, 10000, 60), ups=[1, 5, 9]
    ),
    "up after more ups than are allowed": case(
        100, 500, 1, 1000, 100, UP_LIMIT, up=scaling(5, 120, 0, 0), ups=[1, 5, 9]
    ),
    "up after ups: by pods": case(100, 500, 1, 1000, 235, UP_LIMIT, up=scaling(150, 120, 0, 0), ups=[1, 5, 9]),
    "up after ups: by percent": case(100, 500, 1, 1000, 255, UP_LIMIT, up=scaling(0, 0, 200, 120), ups=[1, 5, 9]),
    "up after ups and downs": case(6, 24, 1, 1000, 16, UP_LIMIT, up=scaling(0, 0, 300, 300), ups=[4], downs=[2]),
    "down after downs by default": case(10, 5, 1, 1000, 5, IN_RANGE, downs=[1, 5, 9]),
    "down after downs: to one": case(100, 0, 1, 1000, 1, TOO_FEW, down=scaling(115, 120, 0, 0), downs=[1, 5, 9]),
    "down after downs: to the minimum by pods": case(
        100, 0, 5, 1000, 5, TOO_FEW, down=scaling(130, 120, 0, 0), downs=[1, 5, 9]
    ),
    "down after downs: to the minimum by percent": case(
        100, 2, 5, 1000, 5, TOO_FEW, down=scaling(0, 0, 100, 120), downs=[1, 5, 9]
    ),
    "down after downs: by pods": case(100, 2, 1, 1000, 100, DOWN_LIMIT, down=scaling(5, 120, 0, 0), downs=[1, 5, 9]),
    "down after downs: by percent": case(100, 0, 1, 1000, 56, DOWN_LIMIT, down=scaling(0, 0, 50, 120), downs=[2, 4, 6]),
    "down after ups and downs": case(10, 1, 1, 1000, 6, DOWN_LIMIT, down=scaling(0, 0, 50, 180), ups=[2], downs=[4]),
    "down after more downs than are allowed": case(
        100, 0, 1, 1000, 100, DOWN_LIMIT, down=scaling(0, 0, 10, 120), downs=[10, 10, 10]
    ),
    "down: a limit under zero": case(10, 5, 1, 1000, 5, IN_RANGE, down=scaling(0, 0, 1000, 120), downs=[10, 10, 10]),
    "up: old events do not count": case(
        100, 200, 1, 1000, 200, IN_RANGE, up=scaling(1000, 60, 0, 0), ups=[8, 12, 9, 11]
    ),
    "up: two periods": case(100, 200, 1, 1000, 200, IN_RANGE, up=scaling(1000, 120, 100, 60), ups=[8, 12, 9, 11]),
    "up: two short periods": case(100, 200, 1, 1000, 200, IN_RANGE, up=scaling(1000, 30, 100, 60), ups=[8, 12, 9, 11]),
    "down: old events do not count": case(
        100, 5, 1, 1000, 5, IN_RANGE, down=scaling(1000, 60, 0, 0), downs=[8, 12, 9, 11]
    ),
    "down: two periods": case(100, 5, 1, 1000, 5, IN_RANGE, down=scaling(1000, 120, 100, 60), downs=[8, 12, 9, 11]),
    "down: two short periods": case(
        100, 5, 1, 1000, 5, IN_RANGE, down=scaling(1000, 30, 100, 60), downs=[8, 12, 9, 11]
    ),
}


@pytest.mark.parametrize("row", LIMITS.values(), ids=LIMITS)
def test_limits_of_policies(row: tuple[Wish, tuple[int, str], Behavior, History]) -> None:
    wish, expected, behavior, history = row
    verdict = rules.limit(history, wish, behavior, NOW_S)
    assert (verdict.replicas, verdict.reason) == expected


MIN_OF_BOTH = ScalingRules(300, (RatePolicy("Pods", 2, 60), RatePolicy("Percent", 50, 60)), "Min")


def test_the_smaller_change_is_taken_where_asked() -> None:
    assert rules.up_limit(1, History(), MIN_OF_BOTH, NOW_S) == 2
    assert rules.down_limit(5, History(), MIN_OF_BOTH, NOW_S) == 3


def test_a_direction_that_is_disabled_changes_nothing() -> None:
    disabled = ScalingRules(0, DEFAULT_UP.policies, "Disabled")
    behavior = Behavior(disabled, disabled)
    assert rules.limit(History(), Wish(5, 9, 1, 10), behavior, NOW_S) == rules.Verdict(5, *rules._UP_LIMIT)
    assert rules.limit(History(), Wish(5, 2, 1, 10), behavior, NOW_S) == rules.Verdict(5, *rules._DOWN_LIMIT)


WITHOUT_BEHAVIOR = {
    "within range": (Wish(5, 7, 3, 8), 7, IN_RANGE),
    "under the minimum": (Wish(3, 1, 2, 8), 2, TOO_FEW),
    "to zero": (Wish(1, 0, 0, 10), 0, IN_RANGE),
    "over the maximum": (Wish(20, 1000, 1, 10), 10, TOO_MANY),
    "twice as many": (Wish(3, 1000, 1, 2000), 6, UP_LIMIT),
    "four at least": (Wish(1, 1000, 1, 2000), 4, UP_LIMIT),
}


@pytest.mark.parametrize("row", WITHOUT_BEHAVIOR.values(), ids=WITHOUT_BEHAVIOR)
def test_limits_without_behavior(row: tuple[Wish, int, str]) -> None:
    wish, replicas, reason = row
    verdict = rules.limit_without_behavior(wish)
    assert (verdict.replicas, verdict.reason) == (replicas, reason)


def recommended(*rows: tuple[int, float]) -> History:
    return History([Recommendation(replicas, NOW_S - minutes * MINUTE) for replicas, minutes in rows])


DOWN_WINDOWS = {
    "nothing before": ((), 3, 3, 1),
    "higher before": (((4, 2), (5, 1)), 3, 5, 3),
    "lower before": (((1, 2), (2, 1)), 3, 3, 3),
    "only old ones": (((10, 10), (9, 9)), 3, 3, 2),
    "old and new": (((10, 10), (4, 1), (5, 2), (9, 9)), 3, 5, 4),
    "as old as the window: still counts": (((9, 5),), 3, 9, 2),
}


@pytest.mark.parametrize("row", DOWN_WINDOWS.values(), ids=DOWN_WINDOWS)
def test_window_without_behavior(row: tuple[tuple[tuple[int, float], ...], int, int, int]) -> None:
    before, desired, stable, kept = row
    history = recommended(*before)
    assert rules.stabilize_down(history, desired, window_s=300, now_s=NOW_S) == stable
    assert len(history.recommendations) == kept


WINDOWS = {
    # before (replicas, minutes ago), current, desired, windows up and down in seconds, wanted, kept
    "nothing before": ((), 100, 5, 0, 0, 5, [5]),
    "down": (((4, 2), (5, 1)), 100, 3, 0, 180, 5, [4, 5, 3]),
    "up": (((4, 2), (5, 1)), 1, 7, 300, 0, 4, [4, 5, 7]),
    "down without a window": (((1, 2), (2, 1)), 100, 3, 300, 0, 3, [1, 2, 3]),
    "up without a window": (((4, 2), (5, 1)), 1, 3, 0, 300, 3, [4, 5, 3]),
    "down, an old one is overwritten": (((10, 10), (9, 9)), 100, 3, 0, 0, 3, [10, 3]),
    "up, an old one is overwritten": (((10, 10), (9, 9)), 1, 100, 0, 0, 100, [10, 100]),
    "down, the last old one is overwritten": (
        ((10, 10), (4, 1), (5, 2), (9, 9)), 100, 3, 0, 180, 5, [10, 4, 5, 3],
    ),
    "up, the only old one is overwritten": (
        ((10, 100), (6, 1), (5, 2), (9, 3)), 1, 100, 300, 0, 5, [100, 6, 5, 9],
    ),
    "down, as old as the window: no longer counts, not yet overwritten": (((9, 5),), 100, 3, 0, 300, 3, [9, 3]),
    "up, as old as the window: no longer counts, not yet overwritten": (((2, 5),), 3, 8, 300, 0, 8, [2, 8]),
    "both, does not rise on the way down": (((2, 100), (3, 3)), 2, 1, 300, 300, 2, [1, 3]),
    "both, does not fall on the way up": (((2, 100), (1, 3)), 2, 3, 300, 300, 2, [3, 1]),
}  # fmt: skip


@pytest.mark.parametrize("row", WINDOWS.values(), ids=WINDOWS)
def test_windows(row: tuple[tuple[tuple[int, float], ...], int, int, int, int, int, list[int]]) -> None:
    before, current, desired, up_s, down_s, wanted, kept = row
    history = recommended(*before)
    verdict = rules.stabilize(history, Wish(current, desired, 0, 1000), up_s, down_s, NOW_S)
    assert verdict.replicas == wanted
    assert verdict.reason == ("ScaleUpStabilized" if desired >= current else "ScaleDownStabilized")
    assert [row.replicas for row in history.recommendations] == kept


EVENTS = {
    # before (change, seconds ago), rules, change of the last minute, after (change, outdated)
    "without behavior": ((), None, 0, []),
    "the first": ((), scaling(10, 60, 100, 60), 0, [(5, False)]),
    "without behavior, old ones stay": (((7, 61),), None, 0, [(7, False)]),
    "an old one is overwritten": (((7, 61),), scaling(10, 60, 100, 60), 0, [(5, False)]),
    "a young one stays": (((7, 58),), scaling(10, 60, 100, 60), 7, [(7, False), (5, False)]),
    "one of two": (((7, 61), (6, 59)), scaling(10, 60, 0, 0), 6, [(5, False), (6, False)]),
    "the last of the old ones": (
        ((8, 29), (6, 59), (7, 61), (9, 61)), scaling(10, 60, 100, 30), 14,
        [(8, False), (6, False), (7, True), (5, False)],
    ),
    "as old as the period: no longer counts, not yet overwritten": (
        ((7, 60),), scaling(10, 60, 0, 0), 0, [(7, False), (5, False)],
    ),
    "both are young": (
        ((7, 58), (6, 59)), scaling(10, 120, 100, 30), 13, [(7, False), (6, False), (5, False)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("row", EVENTS.values(), ids=EVENTS)
def test_events_are_kept_for_as_long_as_policies_look(
    row: tuple[tuple[tuple[int, float], ...], ScalingRules | None, int, list[tuple[int, bool]]], is_up: bool
) -> None:
    before, asked, change, after = row
    history = History()
    events = history.ups if is_up else history.downs
    events += [ScaleEvent(each, NOW_S - seconds) for each, seconds in before]
    assert rules.change_within(events, 60, NOW_S) == change
    behavior = None if asked is None else Behavior(*((asked, DEFAULT_DOWN) if is_up else (DEFAULT_UP, asked)))
    rules.store_event(history, behavior, 10, 15 if is_up else 5, NOW_S)
    assert [(event.change, event.is_outdated) for event in events] == after
    assert not (history.downs if is_up else history.ups)


def test_behavior_is_filled_up_as_the_api_server_does() -> None:
    assert rules.read_behavior(None) is None
    assert rules.read_behavior({}) == Behavior(DEFAULT_UP, DEFAULT_DOWN)
    read = rules.read_behavior(
        {
            "scaleUp": {"stabilizationWindowSeconds": 30, "tolerance": "50m"},
            "scaleDown": {
                "selectPolicy": "Min",
                "policies": [{"type": "Percent", "value": 25, "periodSeconds": 60}],
            },
        }
    )
    assert read == Behavior(
        ScalingRules(30, DEFAULT_UP.policies, "Max", 0.05),
        ScalingRules(None, (RatePolicy("Percent", 25, 60),), "Min"),
    )
    assert read.tolerances(0.1) == rules.Tolerances(down=0.1, up=0.05)


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"scaleUp": {"selectPolicy": "Most"}}, "selectPolicy: expected one of Max, Min, Disabled, got 'Most'"),
        (
            {"scaleDown": {"policies": [{"type": "Share", "value": 1, "periodSeconds": 60}]}},
            "policies.type: expected Pods or Percent, got 'Share'",
        ),
    ],
)
def test_unknown_words_are_refused(document: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        rules.read_behavior(document)
    assert str(error.value) == told


policies = st.lists(
    st.builds(RatePolicy, st.sampled_from(["Pods", "Percent"]), st.integers(1, 300), st.integers(1, 300)),
    min_size=1,
    max_size=3,
).map(tuple)
scaling_rules = st.builds(ScalingRules, st.integers(0, 600), policies, st.sampled_from(["Max", "Min", "Disabled"]))


@given(
    wishes=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 120)), min_size=1, max_size=30),
    bounds=st.tuples(st.integers(1, 20), st.integers(20, 60)),
    behavior=st.builds(Behavior, scaling_rules, scaling_rules),
)
def test_no_behavior_leaves_the_bounds_or_goes_the_wrong_way(
    wishes: list[tuple[int, int]], bounds: tuple[int, int], behavior: Behavior
) -> None:
    least, most = bounds
    history, current, now_s = History(), least, NOW_S
    for desired, pause_s in wishes:
        now_s += pause_s
        wish = Wish(current, desired, least, most)
        steady = rules.stabilize(history, wish, behavior.up.window_s or 0, behavior.down.window_s or 0, now_s)
        verdict = rules.limit(history, Wish(current, steady.replicas, least, most), behavior, now_s)
        assert least <= verdict.replicas <= most
        if verdict.replicas > current:
            assert desired >= verdict.replicas
        if verdict.replicas < current:
            assert desired <= max(verdict.replicas, least)
        if verdict.replicas != current:
            rules.store_event(history, behavior, current, verdict.replicas, now_s)
        current = verdict.replicas
