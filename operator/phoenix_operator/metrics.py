"""The metrics of the operator and of its metrics API, each declared once; the only importer of prometheus_client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RECONCILE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and gauges in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.queue_depth = Gauge("phoenix_operator_queue_depth", "Models that wait for a worker", registry=registry)
        self.queue_oldest = Gauge(
            "phoenix_operator_queue_oldest_seconds",
            "Longest time that a model waits or is worked on",
            registry=registry,
        )
        self.retries = Gauge("phoenix_operator_failing_models", "Models whose last reconcile failed", registry=registry)
        self.reconcile_seconds = Histogram(
            "phoenix_operator_reconcile_seconds",
            "Duration of a reconcile, by result",
            ["result"],
            buckets=_RECONCILE_BUCKETS,
            registry=registry,
        )
        self.api_requests = Counter(
            "phoenix_operator_api_requests_total",
            "Requests to the API server, by verb and HTTP code (0: no answer)",
            ["verb", "code"],
            registry=registry,
        )
        self.api_seconds = Histogram(
            "phoenix_operator_api_request_seconds",
            "Duration of requests to the API server",
            ["verb"],
            registry=registry,
        )
        self.watch_events = Counter(
            "phoenix_operator_watch_events_total",
            "Messages of the watches, by kind and type",
            ["kind", "type"],
            registry=registry,
        )
        self.missed_events = Counter(
            "phoenix_operator_missed_events_total",
            "Changes that a list showed and the watch had not",
            ["kind"],
            registry=registry,
        )
        self.backend_seconds = Histogram(
            "phoenix_operator_backend_call_seconds",
            "Duration of calls to backends, by kind and result",
            ["kind", "result"],
            registry=registry,
        )
        self.state_failures = Counter(
            "phoenix_operator_state_failures_total", "Ready pods that did not say what they loaded", registry=registry
        )
        self.events_dropped = Counter(
            "phoenix_operator_events_dropped_total", "Kubernetes events that could not be written", registry=registry
        )
        self.models = Gauge("phoenix_operator_models", "PhoenixModels that are known", registry=registry)
        self.leader = Gauge("phoenix_operator_leader", "1 while this process holds the lease", registry=registry)
        self.loop_lag = Gauge("phoenix_operator_event_loop_lag_seconds", "Lag of the event loop", registry=registry)
        for result in ("ok", "refused", "error"):
            self.reconcile_seconds.labels(result)

    def on_request(self, verb: str, code: int, seconds: float) -> None:
        """Count a request to the API server."""
        self.api_requests.labels(verb, str(code)).inc()
        self.api_seconds.labels(verb).observe(seconds)

    def render(self) -> bytes:
        """Return the Prometheus text format."""
        return generate_latest(self.registry)


class MetricsApiMetrics:
    """Those of `phoenix-operator metrics-api`, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "phoenix_metrics_api_requests_total",
            "Requests that were answered, by HTTP code",
            ["code"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "phoenix_metrics_api_request_seconds",
            "Time from a request to its answer",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.absences = Counter(
            "phoenix_metrics_api_absent_total",
            "Values that were not given, by reason; the autoscaler changes nothing meanwhile",
            ["reason"],
            registry=registry,
        )
        self.query_seconds = Histogram(
            "phoenix_metrics_api_query_seconds",
            "Duration of queries to Prometheus, by result",
            ["result"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.api_requests = Counter(
            "phoenix_metrics_api_kubernetes_requests_total",
            "Requests to the API server, by verb and HTTP code (0: no answer)",
            ["verb", "code"],
            registry=registry,
        )
        self.certificate_expiry = Gauge(
            "phoenix_metrics_api_certificate_expiry_timestamp_seconds",
            "When the serving certificate ends, in Unix time; 0: none is served",
            registry=registry,
        )
        for reason in ("no_model", "no_series", "several_series", "not_finite", "negative", "too_large"):
            self.absences.labels(reason)
        for result in ("ok", "unreachable", "timeout", "refused", "malformed", "credentials"):
            self.query_seconds.labels(result)

    def on_request(self, verb: str, code: int, seconds: float) -> None:
        """Count a request to the API server."""
        self.api_requests.labels(verb, str(code)).inc()

    def on_query(self, result: str, seconds: float) -> None:
        """Count a query to Prometheus."""
        self.query_seconds.labels(result).observe(seconds)

    def render(self) -> bytes:
        """Return the Prometheus text format."""
        return generate_latest(self.registry)
