"""Every metric of the server, declared once, and the statistics of the protocol's own extension.

One observation of the hot path is a bisection and a few additions on plain numbers, all on the event loop's thread;
prometheus-client is only asked at scrape time, through a collector on the injected registry. (Its own `Histogram`
costs some microseconds an observation.) Every label set exists from the moment a model loads.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from phoenix_server.binding_state import BindingState
from phoenix_server.errors import Outcome

Protocol = Literal["rest", "grpc", "kafka"]
PROTOCOLS: tuple[Protocol, ...] = ("rest", "grpc", "kafka")
# Why an event was lost: the queue or the client's buffer was full; larger than the broker takes; not allowed; no such
# topic; not delivered in time; still waiting when the process ended; the file could not be written; anything else.
EVENT_LOSSES = ("queue_full", "too_large", "denied", "no_topic", "timeout", "shutdown", "file", "failed")
# 0.5 ms … 10 s, about 1-2-5 with the steps between that a p95 needs.
LATENCY_BOUNDS_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0,
)  # fmt: skip
# Multiples of the SLO that make both zones of the autoscaling rule exact.
_SLO_MULTIPLES = (0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 4.0)
_STAGE_BOUNDS_S = (0.00001, 0.00005, 0.0001, 0.00025, 0.0005, *LATENCY_BOUNDS_S[1:])
# Why a prediction was not recorded: the queue was full, the database refused the row, the process ended first.
AUDIT_LOSSES = ("queue_full", "refused", "shutdown")
_ROWS_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


def latency_bounds_s(slo_s: float | None) -> tuple[float, ...]:
    """Return the latency buckets for a model with that SLO in seconds, or without one."""
    own = () if slo_s is None else tuple(round(slo_s * multiple, 9) for multiple in _SLO_MULTIPLES)
    return tuple(sorted({*LATENCY_BOUNDS_S, *own}))


# Why rows had not all their features, or not fresh ones: labels of phoenix_features_missing_total.
FEATURES_MISSING = ("missing", "unparsable", "stale", "unavailable")


class Histogram:
    """Counts per bucket and a sum. `bounds` are inclusive upper limits, as Prometheus' `le`."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulative counts as prometheus-client wants them."""
        cumulative, total = [], 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            cumulative.append((bound, float(total)))
        return cumulative


@dataclass(slots=True)
class Stage:
    """Count and cumulative nanoseconds, as the statistics extension reports each stage."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Add `count` events that took `ns` each."""
        self.count += count
        self.ns += ns * count


@dataclass(slots=True)
class BatchStages:
    """The stages of all runs with one number of rows."""

    compute_input: Stage = field(default_factory=Stage)
    compute_infer: Stage = field(default_factory=Stage)
    compute_output: Stage = field(default_factory=Stage)


@dataclass(slots=True)
class Tally:
    """What one (outcome, protocol) pair of a model has seen."""

    requests: int = 0
    rows: int = 0
    request_bytes: int = 0
    response_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Objective:
    """What a manifest promises: that share of the requests, in percent, takes no longer than these seconds."""

    slo_s: float
    percentile: int


class EventCounts:
    """What became of a model's events. Each number is written by one thread only, so no lock is needed."""

    def __init__(self) -> None:
        self.published = 0
        self.dropped = dict.fromkeys(EVENT_LOSSES, 0)


class RequestCounts:
    """What became of a model's requests over Kafka. Each number is written by one thread only."""

    def __init__(self) -> None:
        self.results = 0
        self.dead_letters: dict[str, int] = {}
        self.retries = 0
        self.transactions = {"committed": 0, "failed": 0}
        self.producers_abandoned = 0
        self.lag_records: int | None = None


class ModelMetrics:
    """All numbers of one model version. Written on the event loop only, so no lock is needed."""

    def __init__(self, model: str, version: str, objective: Objective | None = None) -> None:
        self.labels = [model, version]
        self.objective = objective
        bounds = latency_bounds_s(self.slo_s)
        self.latency = {outcome: Histogram(bounds) for outcome in Outcome}
        self.tallies = {(outcome, protocol): Tally() for outcome in Outcome for protocol in PROTOCOLS}
        self.queue = Histogram(_STAGE_BOUNDS_S)
        self.compute = Histogram(_STAGE_BOUNDS_S)
        self.batch_rows = Histogram(_ROWS_BOUNDS)
        self.feature_lookup = Histogram(_STAGE_BOUNDS_S)
        self.features_missing = dict.fromkeys(FEATURES_MISSING, 0)
        self.unshared_limits = 0
        self.inflight = 0
        self.queued_rows: Callable[[], int] = lambda: 0
        self.provider = ""
        self.digest = ""
        self.load_s = 0.0
        self.capacity_concurrency: float | None = None
        self.last_inference_ms = 0
        self.inference_count = 0
        self.batch_stats: dict[int, BatchStages] = {}
        self.request_stages = BatchStages()

    @property
    def slo_s(self) -> float | None:
        """The latency objective in seconds; None without one."""
        return self.objective.slo_s if self.objective else None

    def observe_request(
        self, outcome: Outcome, protocol: Protocol, seconds: float, sizes: tuple[int, int, int]
    ) -> None:
        """Count one answered request. `sizes`: rows, bytes of the request body, bytes of the response body."""
        self.latency[outcome].observe(seconds)
        tally = self.tallies[outcome, protocol]
        rows, request_bytes, response_bytes = sizes
        tally.requests += 1
        tally.rows += rows
        tally.request_bytes += request_bytes
        tally.response_bytes += response_bytes
        if outcome is Outcome.OK:
            self.last_inference_ms = time.time_ns() // 1_000_000
            self.inference_count += rows

    def observe_record(self, outcome: Outcome, sizes: tuple[int, int, int]) -> None:
        """Count one request that came over Kafka. Its latency is left out: a backlog must not count against the SLO."""
        tally = self.tallies[outcome, "kafka"]
        rows, request_bytes, response_bytes = sizes
        tally.requests += 1
        tally.rows += rows
        tally.request_bytes += request_bytes
        tally.response_bytes += response_bytes

    def observe_batch(self, rows: int, requests: int, stages_ns: tuple[int, int, int]) -> None:
        """Count one run of the model. `stages_ns`: gathering inputs, computing, splitting outputs."""
        self.compute.observe(stages_ns[1] * 1e-9)
        self.batch_rows.observe(rows)
        of_size = self.batch_stats.get(rows)
        if of_size is None:
            of_size = self.batch_stats[rows] = BatchStages()
        of_requests = self.request_stages
        of_size.compute_input.add(stages_ns[0])
        of_size.compute_infer.add(stages_ns[1])
        of_size.compute_output.add(stages_ns[2])
        of_requests.compute_input.add(stages_ns[0], requests)
        of_requests.compute_infer.add(stages_ns[1], requests)
        of_requests.compute_output.add(stages_ns[2], requests)

    @property
    def execution_count(self) -> int:
        """How often the model was run."""
        return self.batch_rows.count

    def stages(self) -> dict[str, Stage]:
        """Return the request stages of the statistics extension, by its own names."""
        failed = [self.latency[outcome] for outcome in Outcome if outcome is not Outcome.OK]
        done = self.latency[Outcome.OK]
        return {
            "success": Stage(done.count, int(done.sum * 1e9)),
            "fail": Stage(sum(h.count for h in failed), int(sum(h.sum for h in failed) * 1e9)),
            "queue": Stage(self.queue.count, int(self.queue.sum * 1e9)),
            "compute_input": self.request_stages.compute_input,
            "compute_infer": self.request_stages.compute_infer,
            "compute_output": self.request_stages.compute_output,
            "cache_hit": Stage(),
            "cache_miss": Stage(),
        }


class AuditMetrics:
    """The numbers of the audit, which one writer of the process keeps for all models."""

    def __init__(self) -> None:
        self.rows = 0
        self.dropped = dict.fromkeys(AUDIT_LOSSES, 0)
        self.commit = Histogram(_STAGE_BOUNDS_S)
        self.queue_rows: Callable[[], int] = lambda: 0
        self.chain_length = 0
        self.outbox_rows = 0
        self.delivered = 0

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        yield CounterMetricFamily("phoenix_audit_rows", "Predictions committed to the audit.", value=self.rows)
        dropped = CounterMetricFamily(
            "phoenix_audit_dropped", "Predictions that `BestEffort` lost, and why.", labels=["reason"]
        )
        for reason, count in self.dropped.items():
            dropped.add_metric([reason], count)
        yield dropped
        commit = HistogramMetricFamily("phoenix_audit_commit_seconds", "Time of one transaction of the audit.")
        commit.add_metric([], self.commit.buckets(), self.commit.sum)
        yield commit
        for name, text, value in (
            ("phoenix_audit_queue_rows", "Predictions that wait to be written.", self.queue_rows()),
            ("phoenix_audit_chain_length", "Rows in this process's hash chain.", self.chain_length),
            ("phoenix_audit_outbox_rows", "Events that wait in the outbox.", self.outbox_rows),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily(
            "phoenix_audit_events_delivered", "Events that this process took from the outbox and delivered.",
            value=self.delivered,
        )  # fmt: skip


class Metrics:
    """The server's metrics: one `ModelMetrics` per loaded version, exposed through one registry."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.models: dict[tuple[str, str], ModelMetrics] = {}
        self.rejected: dict[tuple[str, str], int] = {}
        self.bindings: list[BindingState] = []
        self.audit = AuditMetrics()
        self.events: dict[str, EventCounts] = {}
        self.async_requests: dict[str, RequestCounts] = {}
        self.started_s = time.time()
        self.registry.register(self)

    def model(self, name: str, version: str, objective: Objective | None = None) -> ModelMetrics:
        """Return the numbers of that version; they go on counting when a version is loaded again."""
        known = self.models.get((name, version))
        if known is None or known.slo_s != (objective and objective.slo_s):  # the buckets follow the SLO
            known = self.models[name, version] = ModelMetrics(name, version, objective)
        known.objective = objective
        return known

    def forget(self, name: str, version: str) -> None:
        """Drop the series of a version that is gone."""
        self.models.pop((name, version), None)
        if not any(model == name for model, _ in self.models):
            for binding in self.bindings:
                binding.models.discard(name)

    def reject(self, protocol: Protocol, code: str) -> None:
        """Count a request that was refused before it reached a model."""
        self.rejected[protocol, code] = self.rejected.get((protocol, code), 0) + 1

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return the metrics page and its content type, in the format that `accept` prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield every family; called by prometheus-client at each scrape."""
        by_model = ["model", "version"]
        models = list(self.models.values())
        yield from self._histograms(models, by_model)
        yield from self._tallies(models, by_model)
        missing = CounterMetricFamily(
            "phoenix_features_missing",
            "Rows whose features were missing, unparsable, stale or unavailable.",
            labels=[*by_model, "reason"],
        )
        for model in models:
            for reason, count in model.features_missing.items():
                missing.add_metric([*model.labels, reason], count)
        yield missing
        unshared = CounterMetricFamily(
            "phoenix_rate_limit_unshared",
            "Requests that this replica's own part of the rate limit decided, because Redis did not answer.",
            labels=by_model,
        )
        for model in models:
            unshared.add_metric(model.labels, model.unshared_limits)
        yield unshared
        gauges: tuple[tuple[str, str, Callable[[ModelMetrics], float | None]], ...] = (
            ("inference_inflight_requests", "Requests received and not yet answered.", lambda m: m.inflight),
            ("inference_queued_rows", "Rows that wait for a run.", lambda m: m.queued_rows()),
            (
                "phoenix_model_capacity_concurrency",
                "Measured concurrency beyond which throughput stops growing.",
                lambda m: m.capacity_concurrency,
            ),
            ("phoenix_model_load_seconds", "Time from the fetch to the end of the warm-up.", lambda m: m.load_s),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=by_model)
            for model in models:
                number = value(model)
                if number is not None:
                    gauge.add_metric(model.labels, number)
            yield gauge
        yield self._objectives(models, by_model)
        info = GaugeMetricFamily(
            "phoenix_model_info", "What is loaded; always 1.", labels=[*by_model, "provider", "digest"]
        )
        for model in models:
            info.add_metric([*model.labels, model.provider, model.digest], 1)
        yield info
        up = GaugeMetricFamily(
            "phoenix_binding_up", "Whether the backend service answers this process.", labels=["model", "kind"]
        )
        for binding in self.bindings:
            if binding.is_up is not None:
                for name in sorted(binding.models):
                    up.add_metric([name, binding.kind], binding.is_up)
        yield up
        yield from self.audit.collect()
        yield from self._events()
        yield from self._async_requests()
        rejected = CounterMetricFamily(
            "phoenix_requests_rejected", "Requests refused before they reached a model.", labels=["protocol", "code"]
        )
        for labels, count in self.rejected.items():
            rejected.add_metric(list(labels), count)
        yield rejected
        yield GaugeMetricFamily(
            "process_start_time_seconds", "Start time of the process since the epoch.", value=self.started_s
        )
        yield CounterMetricFamily("process_cpu_seconds", "User and system CPU time.", value=time.process_time())

    def _events(self) -> Iterator[Metric]:
        published = CounterMetricFamily(
            "phoenix_events_published",
            "Events that the broker acknowledged, or that are in the file.",
            labels=["model"],
        )
        dropped = CounterMetricFamily("phoenix_events_dropped", "Events that were lost.", labels=["model", "reason"])
        for model, counts in list(self.events.items()):
            published.add_metric([model], counts.published)
            for reason, count in counts.dropped.items():
                dropped.add_metric([model, reason], count)
        yield published
        yield dropped

    def _async_requests(self) -> Iterator[Metric]:
        by_model = list(self.async_requests.items())
        counters: tuple[tuple[str, str, str, Callable[[RequestCounts], dict[str, int]]], ...] = (
            ("phoenix_async_results", "Results of asynchronous inference, committed.", "", lambda c: {"": c.results}),
            ("phoenix_async_dead_letters", "Requests that could not be served.", "reason", lambda c: c.dead_letters),
            (
                "phoenix_async_retries",
                "Inferences to try again after a fault that passes.",
                "",
                lambda c: {"": c.retries},
            ),
            ("phoenix_async_transactions", "Transactions, by how they ended.", "outcome", lambda c: c.transactions),
            (
                "phoenix_async_producers_abandoned",
                "Producers given up because a call outlasted its deadline.",
                "",
                lambda c: {"": c.producers_abandoned},
            ),
        )
        for name, text, label, numbers in counters:
            family = CounterMetricFamily(name, text, labels=["model", label] if label else ["model"])
            for model, counts in by_model:
                for value, count in list(numbers(counts).items()):
                    family.add_metric([model, value] if label else [model], count)
            yield family
        lag = GaugeMetricFamily(
            "phoenix_async_lag_records", "Requests in this process's partitions not yet answered.", labels=["model"]
        )
        for model, counts in by_model:
            if counts.lag_records is not None:
                lag.add_metric([model], counts.lag_records)
        yield lag

    @staticmethod
    def _histograms(models: list[ModelMetrics], by_model: list[str]) -> Iterator[Metric]:
        latency = HistogramMetricFamily(
            "inference_latency_seconds",
            "From the request body received to the response body ready, queue included.",
            labels=[*by_model, "outcome"],
        )
        for model in models:
            for outcome, histogram in model.latency.items():
                latency.add_metric([*model.labels, outcome], histogram.buckets(), histogram.sum)
        yield latency
        histograms: tuple[tuple[str, str, Callable[[ModelMetrics], Histogram]], ...] = (
            ("inference_queue_seconds", "Time a request waited for its run.", lambda m: m.queue),
            ("inference_compute_seconds", "Time of one run of the model.", lambda m: m.compute),
            ("inference_batch_rows", "Rows of one run of the model.", lambda m: m.batch_rows),
            ("feature_lookup_seconds", "Time to complete a request with features.", lambda m: m.feature_lookup),
        )
        for name, text, of in histograms:
            family = HistogramMetricFamily(name, text, labels=by_model)
            for model in models:
                family.add_metric(model.labels, of(model).buckets(), of(model).sum)
            yield family

    @staticmethod
    def _objectives(models: list[ModelMetrics], by_model: list[str]) -> Metric:
        """The percentile is a label, since recording rules select by it which quantile they compute."""
        family = GaugeMetricFamily(
            "phoenix_model_slo_seconds",
            "The latency objective of the manifest, for that percentile of the requests.",
            labels=[*by_model, "percentile"],
        )
        for model in models:
            if model.objective is not None:
                family.add_metric([*model.labels, str(model.objective.percentile)], model.objective.slo_s)
        return family

    @staticmethod
    def _tallies(models: list[ModelMetrics], by_model: list[str]) -> Iterator[Metric]:
        for name, text, attribute in (
            ("inference_requests", "Requests answered.", "requests"),
            ("inference_rows", "Rows in answered requests.", "rows"),
            ("inference_request_bytes", "Bytes of request bodies.", "request_bytes"),
            ("inference_response_bytes", "Bytes of response bodies.", "response_bytes"),
        ):
            family = CounterMetricFamily(name, text, labels=[*by_model, "outcome", "protocol"])
            for model in models:
                for (outcome, protocol), tally in model.tallies.items():
                    family.add_metric([*model.labels, outcome, protocol], getattr(tally, attribute))
            yield family
