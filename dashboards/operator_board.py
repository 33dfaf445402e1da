"""The board of the operator and of its metrics API."""

from collections.abc import Sequence

import alerts
from panels import ANY, IN, Board, Panel, Query, count, graph, limit, quantile, rate, stat


def operator() -> Board:
    """Return the board of the operator and its metrics API."""
    prefix, where = "phoenix_operator_", "{{namespace}}"
    rows = (
        (
            "Now",
            (
                stat(
                    "Leaders",
                    f"sum({prefix}leader{{{IN}}})",
                    steps=((None, "red"), (1, "green"), (2, "red")),
                    watched=["PhoenixOperatorHasNoLeader"],
                ),
                stat("Models", f"sum({prefix}models{{{IN}}})"),
                stat(
                    "Models that fail",
                    f"sum({prefix}failing_models{{{IN}}})",
                    steps=ANY,
                    watched=["PhoenixOperatorReconcilesFail"],
                ),
                stat("Models that wait", f"sum({prefix}queue_depth{{{IN}}})"),
                stat(
                    "Longest wait",
                    f"max({prefix}queue_oldest_seconds{{{IN}}})",
                    "s",
                    limit(alerts.STUCK_S),
                    ["PhoenixOperatorQueueStuck"],
                ),
                stat("Lag of the event loop", f"max({prefix}event_loop_lag_seconds{{{IN}}})", "s", limit(1)),
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
        graph(
            "Reconciles",
            "cps",
            Query(rate(f"{prefix}reconcile_seconds_count", "result", IN), "{{result}}"),
            watched=["PhoenixOperatorReconcilesFail"],
        ),
        graph(
            "p95 of a reconcile", "s", Query(quantile(0.95, f"{prefix}reconcile_seconds", "result", IN), "{{result}}")
        ),
        graph(
            "Longest wait",
            "s",
            Query(f"max by (namespace) ({prefix}queue_oldest_seconds{{{IN}}})", "{{namespace}}"),
            steps=limit(alerts.STUCK_S),
            watched=["PhoenixOperatorQueueStuck"],
        ),
        graph(
            "Requests to the API server",
            "reqps",
            Query(rate(f"{prefix}api_requests_total", "verb, code", IN), "{{verb}} {{code}}"),
        ),
        graph(
            "p95 of a request to the API server",
            "s",
            Query(quantile(0.95, f"{prefix}api_request_seconds", "verb", IN), "{{verb}}"),
        ),
        graph(
            "p95 of a call to a backend",
            "s",
            Query(quantile(0.95, f"{prefix}backend_call_seconds", "kind, result", IN), "{{kind}} {{result}}"),
        ),
        graph("Messages of the watches", "cps", Query(rate(f"{prefix}watch_events_total", "kind", IN), "{{kind}}")),
        graph(
            "Changes that a watch lost",
            "short",
            Query(count(f"{prefix}missed_events_total", "kind", IN), "{{kind}}"),
            steps=ANY,
            watched=["PhoenixOperatorMissesEvents"],
        ),
        graph(
            "Not told",
            "short",
            Query(count(f"{prefix}state_failures_total", "namespace", IN), "by pods"),
            Query(count(f"{prefix}events_dropped_total", "namespace", IN), "as Kubernetes events"),
            watched=["PhoenixOperatorReachesNoPods"],
        ),
    )


def _metrics_api(where: str) -> Sequence[Panel]:
    prefix = "phoenix_metrics_api_"
    return (
        graph("Answers", "reqps", Query(rate(f"{prefix}requests_total", "code", IN), "{{code}}")),
        graph(
            "Values not given",
            "short",
            Query(count(f"{prefix}absent_total", "reason", IN), "{{reason}}"),
            watched=["PhoenixScalingFrozen"],
        ),
        graph(
            "Queries to Prometheus",
            "reqps",
            Query(rate(f"{prefix}query_seconds_count", "result", IN), "{{result}}"),
            watched=["PhoenixMetricsApiPrometheusFails"],
        ),
        graph(
            "p95 of an answer and a query",
            "s",
            Query(quantile(0.95, f"{prefix}request_seconds", "", IN), "answer"),
            Query(quantile(0.95, f"{prefix}query_seconds", "", IN), "query"),
        ),
        graph(
            "Requests to the API server",
            "reqps",
            Query(rate(f"{prefix}kubernetes_requests_total", "verb, code", IN), "{{verb}} {{code}}"),
        ),
        Panel(
            "Until the certificate ends",
            [Query(f"min by (namespace) ({prefix}certificate_expiry_timestamp_seconds{{{IN}}}) - time()", where)],
            "s",
            steps=((None, "red"), (alerts.CERTIFICATE_S, "green")),
            alerts=["PhoenixMetricsApiCertificateEnds"],
            is_from_zero=False,
        ),
    )
