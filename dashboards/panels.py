"""What the dashboards show: boards of rows of panels, as plain data. `boards` makes Grafana's JSON of it.

Expressions hold Grafana's variables: `$namespace` and `$model`, of which both may be several or all, and
`$__rate_interval`. Thresholds stand where the alerts have theirs, and a panel names the alerts that watch it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import alerts
import queries

Kind = Literal["timeseries", "stat", "table"]
Colour = Literal["green", "yellow", "red"]
# None: from the lowest value on.
Step = tuple[float | None, Colour]

_OF = 'namespace=~"$namespace",model=~"$model"'
_IN = 'namespace=~"$namespace"'
_RATE = "[$__rate_interval]"
_MODEL = "namespace, model"
_NAME = "{{namespace}}/{{model}}"
_PROCESS = "namespace, job, phoenix_ml_io_model"
_JOB = "{{namespace}}/{{job}}"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is Grafana's name of it; `width` of 24; `steps` colour the value, and are lines in a graph."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8
    steps: Sequence[Step] = ()
    alerts: Sequence[str] = ()
    description: str = ""
    is_from_zero: bool = True


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. `variables`: of `namespace` and `model`, those it has; `found_by` is the metric they come from."""

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    variables: Sequence[str] = ("namespace", "model")
    found_by: str = "phoenix_model_info"

    def panels(self) -> Iterator[Panel]:
        """Yield every panel."""
        for _, panels in self.rows:
            yield from panels


def boards() -> list[Board]:
    """Return every dashboard."""
    return [overview(), model(), bindings(), operator()]


def _graph(title: str, unit: str, *several: Query, steps: Sequence[Step] = (), watched: Sequence[str] = ()) -> Panel:
    return Panel(title, several, unit, steps=steps, alerts=watched)


def _stat(title: str, expr: str, unit: str = "short", steps: Sequence[Step] = (), watched: Sequence[str] = ()) -> Panel:
    return Panel(title, [Query(expr)], unit, "stat", 4, steps, watched)


def _rate(metric: str, by: str, selector: str = _OF) -> str:
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}{{{selector}}}{_RATE}))"


def _count(metric: str, by: str, selector: str = _OF) -> str:
    return f"sum by ({by}) (increase({metric}{{{selector}}}{_RATE}))"


def _quantile(quantile: float, histogram: str, by: str, selector: str = _OF) -> str:
    labels = ", ".join(name for name in (by, "le") if name)
    return f"histogram_quantile({quantile}, {_rate(f'{histogram}_bucket', labels, selector)})"


def _mean(histogram: str, by: str) -> str:
    return f"{_rate(f'{histogram}_sum', by)} / {_rate(f'{histogram}_count', by)}"


def _share(outcomes: str, by: str) -> str:
    some = _rate("inference_requests_total", by, f'{_OF},outcome=~"{outcomes}"')
    return f"{some} / {_rate('inference_requests_total', by)}"


def _limit(value: float) -> tuple[Step, Step]:
    return (None, "green"), (value, "red")


_ANY = _limit(1)
_RATIO_STEPS: tuple[Step, ...] = ((None, "green"), (queries.HOLD_FROM, "yellow"), (1, "red"))
_FIRING = 'ALERTS{alertname=~"Phoenix.*",alertstate="firing"}'


def overview() -> Board:
    """Return the board that one looks at first: all models, the worst of each."""
    rows = (
        (
            "Now",
            (
                _stat("Models that serve", f"count(group by ({_MODEL}) (phoenix_model_info{{{_OF}}}))"),
                _stat("Pods that answer", f"count(group by (namespace, job, instance) (phoenix_model_info{{{_OF}}}))"),
                _stat("Requests", _rate("inference_requests_total", ""), "reqps"),
                _stat(
                    "Failed or timed out",
                    _share("error|timeout", ""),
                    "percentunit",
                    _limit(alerts.FAILED_SHARE),
                    ["PhoenixRequestsFail"],
                ),
                _stat(
                    "Refused",
                    _share("shed", ""),
                    "percentunit",
                    _limit(alerts.REFUSED_SHARE),
                    ["PhoenixRequestsRefused"],
                ),
                _stat("Alerts that fire", f"count({_FIRING}) or vector(0)", steps=_ANY),
                Panel(
                    "Alerts that fire",
                    [Query(_FIRING)],
                    kind="table",
                    width=24,
                    description="Each has a runbook: docs/runbooks.",
                ),
            ),
        ),
        (
            "Models",
            (
                _graph(
                    "Latency / objective",
                    "short",
                    Query(f"{queries.RATIO}{{{_OF}}}", _NAME),
                    steps=_RATIO_STEPS,
                    watched=["PhoenixLatencyOverObjective"],
                ),
                _graph("Requests", "reqps", Query(_rate("inference_requests_total", _MODEL), _NAME)),
                _graph(
                    "Failed or timed out",
                    "percentunit",
                    Query(_share("error|timeout", _MODEL), _NAME),
                    steps=_limit(alerts.FAILED_SHARE),
                    watched=["PhoenixRequestsFail"],
                ),
                _graph(
                    "Refused",
                    "percentunit",
                    Query(_share("shed", _MODEL), _NAME),
                    steps=_limit(alerts.REFUSED_SHARE),
                    watched=["PhoenixRequestsRefused"],
                ),
                _graph("Requests at once", "short", Query(f"{queries.CONCURRENCY}{{{_OF}}}", _NAME)),
                _graph(
                    "Pods",
                    "short",
                    Query(f"{queries.SCRAPED_PODS}{{{_OF}}}", f"{_NAME} answer"),
                    Query(f"{queries.MISSING_PODS}{{{_OF}}}", f"{_NAME} do not"),
                    watched=["PhoenixModelDown", "PhoenixPodDown"],
                ),
            ),
        ),
    )
    return Board("phoenix-overview", "Phoenix / Overview", "Every model: is it well?", rows)


def model() -> Board:
    """Return the board of one model: what its callers see, and which part of a request takes the time."""
    ok = f'{_OF},outcome="ok"'
    percentiles = [
        Query(_quantile(q, "inference_latency_seconds", _MODEL, ok), f"{_NAME} p{round(q * 100)}")
        for q in (0.5, 0.95, 0.99)
    ]
    refused = _rate("phoenix_requests_rejected_total", "code, protocol", _IN)
    rows = (
        (
            "Objective",
            (
                _stat("Objective", f"min({queries.SLO}{{{_OF}}})", "s"),
                _stat("Latency at its percentile", f"max({queries.LATENCY}{{{_OF}}})", "s"),
                _stat("Latency / objective", f"max({queries.RATIO}{{{_OF}}})", "short", _RATIO_STEPS),
                _stat("Pressure on the autoscaler", f"max({queries.PRESSURE}{{{_OF}}})", "short", _RATIO_STEPS),
                _stat("Requests at once", f"sum({queries.CONCURRENCY}{{{_OF}}})"),
                _stat("Capacity of a pod", f"min(phoenix_model_capacity_concurrency{{{_OF}}})"),
            ),
        ),
        (
            "What callers see",
            (
                Panel(
                    "Latency of good answers",
                    [*percentiles, Query(f"{queries.SLO}{{{_OF}}}", f"{_NAME} objective")],
                    "s",
                    alerts=["PhoenixLatencyOverObjective"],
                    description="From the body received to the body ready, queue included.",
                ),
                _graph(
                    "Latency / objective",
                    "short",
                    Query(f"{queries.RATIO}{{{_OF}}}", _NAME),
                    Query(f"{queries.PRESSURE}{{{_OF}}}", f"{_NAME} pressure"),
                    steps=_RATIO_STEPS,
                    watched=["PhoenixLatencyOverObjective"],
                ),
                _graph(
                    "Requests by outcome",
                    "reqps",
                    Query(_rate("inference_requests_total", "outcome"), "{{outcome}}"),
                    watched=["PhoenixRequestsFail", "PhoenixRequestsRefused"],
                ),
                _graph(
                    "Requests by protocol",
                    "reqps",
                    Query(_rate("inference_requests_total", "protocol"), "{{protocol}}"),
                ),
                Panel(
                    "Refused before a model was found",
                    [Query(refused, "{{protocol}} {{code}}")],
                    "reqps",
                    description="Of all servers in the namespace: such a request has no model.",
                ),
                _graph(
                    "Bytes",
                    "Bps",
                    Query(_rate("inference_request_bytes_total", _MODEL), f"{_NAME} in"),
                    Query(_rate("inference_response_bytes_total", _MODEL), f"{_NAME} out"),
                ),
            ),
        ),
        (
            "Where the time goes",
            (
                _graph(
                    "p95 of the stages",
                    "s",
                    Query(_quantile(0.95, "inference_queue_seconds", _MODEL), f"{_NAME} queue"),
                    Query(_quantile(0.95, "inference_compute_seconds", _MODEL), f"{_NAME} compute"),
                    Query(_quantile(0.95, "feature_lookup_seconds", _MODEL), f"{_NAME} features"),
                ),
                _graph("Rows of a run", "short", Query(_mean("inference_batch_rows", _MODEL), _NAME)),
                _graph("Rows", "rowsps", Query(_rate("inference_rows_total", _MODEL), _NAME)),
                _graph(
                    "In flight",
                    "short",
                    Query(f"sum by ({_MODEL}) (inference_inflight_requests{{{_OF}}})", f"{_NAME} requests"),
                    Query(f"sum by ({_MODEL}) (inference_queued_rows{{{_OF}}})", f"{_NAME} rows in the queue"),
                ),
                _graph(
                    "Processor",
                    "short",
                    Query(
                        f"sum by ({_MODEL}) (rate(process_cpu_seconds_total{{{_IN}}}{_RATE})\n"
                        f"* on (namespace, job, instance) group_right ()\n"
                        f"group by ({_MODEL}, job, instance) (phoenix_model_info{{{_OF}}}))",
                        f"{_NAME} cores",
                    ),
                ),
                _graph(
                    "Age of the processes",
                    "s",
                    Query(
                        f"time() - process_start_time_seconds{{{_IN}}}\n"
                        f"and on (namespace, job, instance) phoenix_model_info{{{_OF}}}",
                        "{{instance}}",
                    ),
                ),
            ),
        ),
        (
            "What is loaded",
            (
                Panel("What is loaded", [Query(f"phoenix_model_info{{{_OF}}}")], kind="table", width=16),
                _graph("Time to load", "s", Query(f"max by ({_MODEL}) (phoenix_model_load_seconds{{{_OF}}})", _NAME)),
            ),
        ),
    )
    return Board("phoenix-model", "Phoenix / Model", "One model: what its callers see and why.", rows)


def bindings() -> Board:
    """Return the board of features, events, audit and asynchronous inference."""
    by_reason = f"{_NAME} {{{{reason}}}}"
    rows = (
        (
            "Backends",
            (
                _graph(
                    "Pods that a backend does not answer",
                    "short",
                    Query(f"count by ({_MODEL}, kind) (phoenix_binding_up{{{_OF}}} == 0)", f"{_NAME} {{{{kind}}}}"),
                    steps=_ANY,
                    watched=["PhoenixBindingDown"],
                ),
                _graph(
                    "Pods that it answers",
                    "short",
                    Query(f"sum by ({_MODEL}, kind) (phoenix_binding_up{{{_OF}}})", f"{_NAME} {{{{kind}}}}"),
                ),
                _graph(
                    "Rows without all features",
                    "rowsps",
                    Query(_rate("phoenix_features_missing_total", f"{_MODEL}, reason"), by_reason),
                    watched=["PhoenixFeaturesMissing"],
                ),
            ),
        ),
        (
            "Features and events",
            (
                _graph(
                    "Look-up of features",
                    "s",
                    Query(_quantile(0.5, "feature_lookup_seconds", _MODEL), f"{_NAME} p50"),
                    Query(_quantile(0.95, "feature_lookup_seconds", _MODEL), f"{_NAME} p95"),
                ),
                _graph("Events", "cps", Query(_rate("phoenix_events_published_total", _MODEL), _NAME)),
                _graph(
                    "Events lost",
                    "short",
                    Query(_count("phoenix_events_dropped_total", f"{_MODEL}, reason"), by_reason),
                    steps=_ANY,
                    watched=["PhoenixEventsDropped"],
                ),
            ),
        ),
        ("Audit", _audit()),
        (
            "Requests over Kafka",
            (
                _graph(
                    "Results",
                    "cps",
                    Query(_rate("phoenix_async_results_total", _MODEL), _NAME),
                    Query(_rate("phoenix_async_retries_total", _MODEL), f"{_NAME} tried again"),
                ),
                _graph(
                    "Requests that wait",
                    "short",
                    Query(f"sum by ({_MODEL}) (phoenix_async_lag_records{{{_OF}}})", _NAME),
                    steps=_limit(alerts.SMALL_BACKLOG),
                    watched=["PhoenixAsyncLagGrows"],
                ),
                _graph(
                    "Dead letters",
                    "short",
                    Query(_count("phoenix_async_dead_letters_total", f"{_MODEL}, reason"), by_reason),
                    steps=_ANY,
                    watched=["PhoenixAsyncDeadLetters"],
                ),
                _graph(
                    "Transactions",
                    "cps",
                    Query(_rate("phoenix_async_transactions_total", f"{_MODEL}, outcome"), f"{_NAME} {{{{outcome}}}}"),
                ),
                _graph(
                    "Producers given up",
                    "short",
                    Query(_count("phoenix_async_producers_abandoned_total", _MODEL), _NAME),
                ),
            ),
        ),
    )
    return Board("phoenix-bindings", "Phoenix / Bindings", "Redis, Kafka and PostgreSQL behind the models.", rows)


def _audit() -> Sequence[Panel]:
    """Return what a process tells of its audit, which is one for all its models."""
    return (
        _graph("Predictions recorded", "cps", Query(_rate("phoenix_audit_rows_total", _PROCESS, _IN), _JOB)),
        _graph(
            "Predictions not recorded",
            "short",
            Query(_count("phoenix_audit_dropped_total", f"{_PROCESS}, reason", _IN), f"{_JOB} {{{{reason}}}}"),
            steps=_ANY,
            watched=["PhoenixAuditRowsDropped"],
        ),
        _graph(
            "p95 of a transaction",
            "s",
            Query(_quantile(0.95, "phoenix_audit_commit_seconds", _PROCESS, _IN), _JOB),
        ),
        _graph(
            "Waiting to be written",
            "short",
            Query(f"sum by ({_PROCESS}) (phoenix_audit_queue_rows{{{_IN}}})", _JOB),
        ),
        _graph(
            "Outbox",
            "short",
            Query(f"max by ({_PROCESS}) (phoenix_audit_outbox_rows{{{_IN}}})", _JOB),
            steps=_limit(alerts.SMALL_BACKLOG),
            watched=["PhoenixAuditOutboxGrows"],
        ),
        _graph(
            "Delivered from the outbox",
            "cps",
            Query(_rate("phoenix_audit_events_delivered_total", _PROCESS, _IN), _JOB),
        ),
        _graph("Length of the hash chains", "short", Query(f"phoenix_audit_chain_length{{{_IN}}}", "{{instance}}")),
    )


def operator() -> Board:
    """Return the board of the operator and its metrics API."""
    prefix, where = "phoenix_operator_", "{{namespace}}"
    rows = (
        (
            "Now",
            (
                _stat(
                    "Leaders",
                    f"sum({prefix}leader{{{_IN}}})",
                    steps=((None, "red"), (1, "green"), (2, "red")),
                    watched=["PhoenixOperatorHasNoLeader"],
                ),
                _stat("Models", f"sum({prefix}models{{{_IN}}})"),
                _stat(
                    "Models that fail",
                    f"sum({prefix}failing_models{{{_IN}}})",
                    steps=_ANY,
                    watched=["PhoenixOperatorReconcilesFail"],
                ),
                _stat("Models that wait", f"sum({prefix}queue_depth{{{_IN}}})"),
                _stat(
                    "Longest wait",
                    f"max({prefix}queue_oldest_seconds{{{_IN}}})",
                    "s",
                    _limit(alerts.STUCK_S),
                    ["PhoenixOperatorQueueStuck"],
                ),
                _stat("Lag of the event loop", f"max({prefix}event_loop_lag_seconds{{{_IN}}})", "s", _limit(1)),
            ),
        ),
        ("Operator", _operator_work(prefix)),
        ("Metrics API", _metrics_api(where)),
    )
    return Board(
        "phoenix-operator",
        "Phoenix / Operator",
        "The operator, and what answers the autoscaler.",
        rows,
        variables=("namespace",),
        found_by="phoenix_operator_leader",
    )


def _operator_work(prefix: str) -> Sequence[Panel]:
    return (
        _graph(
            "Reconciles",
            "cps",
            Query(_rate(f"{prefix}reconcile_seconds_count", "result", _IN), "{{result}}"),
            watched=["PhoenixOperatorReconcilesFail"],
        ),
        _graph(
            "p95 of a reconcile", "s", Query(_quantile(0.95, f"{prefix}reconcile_seconds", "result", _IN), "{{result}}")
        ),
        _graph(
            "Longest wait",
            "s",
            Query(f"max by (namespace) ({prefix}queue_oldest_seconds{{{_IN}}})", "{{namespace}}"),
            steps=_limit(alerts.STUCK_S),
            watched=["PhoenixOperatorQueueStuck"],
        ),
        _graph(
            "Requests to the API server",
            "reqps",
            Query(_rate(f"{prefix}api_requests_total", "verb, code", _IN), "{{verb}} {{code}}"),
        ),
        _graph(
            "p95 of a request to the API server",
            "s",
            Query(_quantile(0.95, f"{prefix}api_request_seconds", "verb", _IN), "{{verb}}"),
        ),
        _graph(
            "p95 of a call to a backend",
            "s",
            Query(_quantile(0.95, f"{prefix}backend_call_seconds", "kind, result", _IN), "{{kind}} {{result}}"),
        ),
        _graph("Messages of the watches", "cps", Query(_rate(f"{prefix}watch_events_total", "kind", _IN), "{{kind}}")),
        _graph(
            "Changes that a watch lost",
            "short",
            Query(_count(f"{prefix}missed_events_total", "kind", _IN), "{{kind}}"),
            steps=_ANY,
            watched=["PhoenixOperatorMissesEvents"],
        ),
        _graph(
            "Not told",
            "short",
            Query(_count(f"{prefix}state_failures_total", "namespace", _IN), "by pods"),
            Query(_count(f"{prefix}events_dropped_total", "namespace", _IN), "as Kubernetes events"),
            watched=["PhoenixOperatorReachesNoPods"],
        ),
    )


def _metrics_api(where: str) -> Sequence[Panel]:
    prefix = "phoenix_metrics_api_"
    return (
        _graph("Answers", "reqps", Query(_rate(f"{prefix}requests_total", "code", _IN), "{{code}}")),
        _graph(
            "Values not given",
            "short",
            Query(_count(f"{prefix}absent_total", "reason", _IN), "{{reason}}"),
            watched=["PhoenixScalingFrozen"],
        ),
        _graph(
            "Queries to Prometheus",
            "reqps",
            Query(_rate(f"{prefix}query_seconds_count", "result", _IN), "{{result}}"),
            watched=["PhoenixMetricsApiPrometheusFails"],
        ),
        _graph(
            "p95 of an answer and a query",
            "s",
            Query(_quantile(0.95, f"{prefix}request_seconds", "", _IN), "answer"),
            Query(_quantile(0.95, f"{prefix}query_seconds", "", _IN), "query"),
        ),
        _graph(
            "Requests to the API server",
            "reqps",
            Query(_rate(f"{prefix}kubernetes_requests_total", "verb, code", _IN), "{{verb}} {{code}}"),
        ),
        Panel(
            "Until the certificate ends",
            [Query(f"min by (namespace) ({prefix}certificate_expiry_timestamp_seconds{{{_IN}}}) - time()", where)],
            "s",
            steps=((None, "red"), (alerts.CERTIFICATE_S, "green")),
            alerts=["PhoenixMetricsApiCertificateEnds"],
            is_from_zero=False,
        ),
    )
