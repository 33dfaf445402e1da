"""The recording rules in Python: values worked out by hand, and those that promtool gives for the rules themselves."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_operator.simulation import signals
from phoenix_operator.simulation.signals import ABSENT, Recorder, Scrape, histogram_quantile, pressure, rate

BOUNDS = (0.05, 0.07, 0.085, 0.1, 0.125, 0.15, 0.2, 0.4)  # seconds; the objective is 0.1


def recorded(
    steps: int, bucket: int | None, requests: float, each_s: float, inflight: float, *, every_s: float = 15.0
) -> Recorder:
    """A model that answers `requests` in every 15 s, all in one bucket, from a time on at which it had none."""
    recorder = Recorder(BOUNDS, 0.1)
    for step in range(steps + 1):
        counts = [0.0] * (len(BOUNDS) + 1)
        if bucket is not None:
            counts[bucket] = requests * step
        recorder.scrape(Scrape(step * every_s, counts, requests * each_s * step, inflight))
    return recorder


@pytest.mark.parametrize(
    ("recorder", "concurrency", "pressed"),
    [
        pytest.param(recorded(36, 0, 0, 0, 0), 0, 0, id="idle"),
        pytest.param(recorded(36, 0, 150, 0.03, 0.3), 0.3, 0, id="low"),
        pytest.param(recorded(36, 2, 150, 0.08, 0.8), 0.8, 1, id="hold"),
        pytest.param(recorded(36, 5, 150, 0.14, 1.4), 1.4, 1.4875, id="hot"),
        pytest.param(recorded(36, 7, 150, 0.39, 3), 3.9, 2, id="very hot"),
        pytest.param(recorded(36, 7, 1, 0.39, 0), 0.026, 0, id="too few to tell"),
        pytest.param(recorded(36, 0, 0, 0, 8), 8, 0, id="hung"),
    ],
)
def test_signals_are_those_of_the_rules(recorder: Recorder, concurrency: float, pressed: float) -> None:
    found = recorder.evaluate(36 * 15.0)
    assert found.concurrency == pytest.approx(concurrency, abs=1e-4)
    assert found.pressure == pytest.approx(pressed, abs=1e-4)


@pytest.mark.parametrize(("requests", "pressed"), [(2.49, 0), (2.51, 1.4875)])
def test_twenty_requests_in_two_minutes_are_enough_to_tell(requests: float, pressed: float) -> None:
    """Eight scrapes see seven gains, which are extrapolated to two minutes: 19.92 and 20.08."""
    assert recorded(36, 5, requests, 0.14, 0).evaluate(540.0).pressure == pytest.approx(pressed)


def test_signals_are_absent_once_nothing_is_scraped() -> None:
    recorder = recorded(20, 5, 150, 0.14, 1.4)
    assert recorder.evaluate(300 + 59).concurrency is not None
    assert recorder.evaluate(300 + 60) == ABSENT
    assert Recorder(BOUNDS, 0.1).evaluate(0.0) == ABSENT


def test_one_scrape_gives_the_gauge_alone() -> None:
    recorder = recorded(0, 5, 150, 0.14, 1.4)
    assert recorder.evaluate(0.0) == signals.Signals(1.4, 0.0, 0.0, None)


def test_percentile_is_that_of_the_manifest() -> None:
    recorder = Recorder(BOUNDS, 0.1, percentile=50)
    for step in range(10):
        recorder.scrape(Scrape(step * 15.0, [60.0 * step, 0, 0, 40.0 * step, 0, 0, 0, 0, 0], 0.0, 0.0))
    found = recorder.evaluate(135.0)
    assert found.latency_s == pytest.approx(0.05 * 50 / 60)
    assert found.ratio == pytest.approx(0.5 * 50 / 60)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (None, 0),
        (math.nan, 0),
        (0, 0),
        (0.6999, 0),
        (0.7, 1),
        (1.0, 1),
        (1.0001, 1.0001),
        (1.9, 1.9),
        (7, 2),
        (math.inf, 2),
    ],
)
def test_pressure_holds_raises_or_has_no_opinion(ratio: float | None, expected: float) -> None:
    assert pressure(ratio) == expected


@pytest.mark.parametrize(
    ("samples", "now_s", "window_s", "expected"),
    [
        pytest.param([], 60, 60, None, id="nothing"),
        pytest.param([(60, 5)], 60, 60, None, id="one sample"),
        # a gain of 30 in 45 s, with 15 s before the first sample: 40 in a minute
        pytest.param([(15, 100), (30, 110), (45, 120), (60, 130)], 60, 60, 40 / 60, id="to the start of the window"),
        # 5 s at the end and 10 s at the start are within 1.1 of the distance of samples
        pytest.param([(15, 100), (30, 110), (45, 120), (60, 130)], 65, 60, 40 / 60, id="to both ends"),
        # 30 s at the start are more: half a distance is added
        pytest.param([(30, 100), (45, 110), (60, 120)], 60, 60, 20 * 37.5 / 30 / 60, id="half a distance"),
        # a counter is not taken below 0: from 5 at 10 a 15 s it began 7.5 s before the first sample
        pytest.param([(15, 5), (30, 15), (45, 25), (60, 35)], 60, 60, 30 * 52.5 / 45 / 60, id="a young counter"),
        pytest.param([(15, 0), (30, 10), (45, 20), (60, 30)], 60, 60, 30 / 60, id="a counter that began at 0"),
        # 100 to 110, then from 0 to 4 and 9
        pytest.param([(15, 100), (30, 110), (45, 4), (60, 9)], 60, 60, 19 * 60 / 45 / 60, id="a reset"),
        pytest.param([(15, 7), (30, 7), (45, 7), (60, 7)], 60, 60, 0, id="no gain"),
    ],
)
def test_rate(samples: Sequence[tuple[float, float]], now_s: float, window_s: float, expected: float | None) -> None:
    found = rate(samples, now_s, window_s)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("share", "counts", "expected"),
    [
        pytest.param(0.5, [0.0] * 9, math.nan, id="nothing was counted"),
        pytest.param(0.5, [10.0] + [0.0] * 8, 0.025, id="the first bucket begins at 0"),
        pytest.param(0.95, [0.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 0.0], 0.1 + 0.025 * 0.95, id="within a bucket"),
        pytest.param(0.95, [90.0, 0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0], 0.1125, id="empty buckets between"),
        pytest.param(0.9, [90.0, 0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0], 0.05, id="the end of a bucket"),
        pytest.param(0.95, [0.0] * 8 + [3.0], 0.4, id="above all bounds: the highest"),
    ],
)
def test_quantile_of_a_histogram(share: float, counts: list[float], expected: float) -> None:
    assert histogram_quantile(share, BOUNDS, counts) == pytest.approx(expected, nan_ok=True)


@given(
    gains=st.lists(st.lists(st.floats(0, 1000), min_size=9, max_size=9), min_size=2, max_size=12),
    share=st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_rates_of_buckets_are_those_of_their_cumulative_series(gains: list[list[float]], share: float) -> None:
    scrapes, totals = [], [0.0] * 9
    for step, gain in enumerate(gains):
        totals = [total + more for total, more in zip(totals, gain, strict=True)]
        scrapes.append(Scrape(step * 15.0, totals, 0.0, 0.0))
    now_s = scrapes[-1].at_s
    seen = [scrape for scrape in scrapes if scrape.at_s > now_s - 120]
    found = signals.bucket_rates(seen, now_s, 120.0)
    assert found is not None
    for end in range(1, 10):
        series = [(scrape.at_s, sum(scrape.buckets[:end])) for scrape in seen]
        assert sum(found[:end]) == pytest.approx(rate(series, now_s, 120.0), rel=1e-6, abs=1e-6)
