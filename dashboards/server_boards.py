"""The boards of models: Overview, Model and Bindings."""

from collections.abc import Sequence

import alerts
import queries
from panels import (
    ANY,
    IN,
    MODEL,
    NAME,
    OF,
    WINDOW,
    Board,
    Panel,
    Query,
    Step,
    count,
    graph,
    limit,
    mean,
    quantile,
    rate,
    share,
    stat,
)

_PROCESS = "namespace, job, phoenix_ml_io_model"
_JOB = "{{namespace}}/{{job}}"
_RATIO_STEPS: tuple[Step, ...] = ((None, "green"), (queries.HOLD_FROM, "yellow"), (1, "red"))
_FIRING = 'ALERTS{alertname=~"Phoenix.*",alertstate="firing"}'


def overview() -> Board:
    """Return the board that one looks at first: all models, the worst of each."""
    rows = (
        (
            "Now",
            (
                stat("Models that serve", f"count(group by ({MODEL}) (phoenix_model_info{{{OF}}}))"),
                stat("Pods that answer", f"count(group by (namespace, job, instance) (phoenix_model_info{{{OF}}}))"),
                stat("Requests", rate("inference_requests_total", ""), "reqps"),
                stat(
                    "Failed or timed out",
                    share("error|timeout", ""),
                    "percentunit",
                    limit(alerts.FAILED_SHARE),
                    ["PhoenixRequestsFail"],
                ),
                stat(
                    "Refused",
                    share("shed", ""),
                    "percentunit",
                    limit(alerts.REFUSED_SHARE),
                    ["PhoenixRequestsRefused"],
                ),
                stat("Alerts that fire", f"count({_FIRING}) or vector(0)", steps=ANY),
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
                graph(
                    "Latency / objective",
                    "short",
                    Query(f"{queries.RATIO}{{{OF}}}", NAME),
                    steps=_RATIO_STEPS,
                    watched=["PhoenixLatencyOverObjective"],
                ),
                graph("Requests", "reqps", Query(rate("inference_requests_total", MODEL), NAME)),
                graph(
                    "Failed or timed out",
                    "percentunit",
                    Query(share("error|timeout", MODEL), NAME),
                    steps=limit(alerts.FAILED_SHARE),
                    watched=["PhoenixRequestsFail"],
                ),
                graph(
                    "Refused",
                    "percentunit",
                    Query(share("shed", MODEL), NAME),
                    steps=limit(alerts.REFUSED_SHARE),
                    watched=["PhoenixRequestsRefused"],
                ),
                graph("Requests at once", "short", Query(f"{queries.CONCURRENCY}{{{OF}}}", NAME)),
                graph(
                    "Pods",
                    "short",
                    Query(f"{queries.SCRAPED_PODS}{{{OF}}}", f"{NAME} answer"),
                    Query(f"{queries.MISSING_PODS}{{{OF}}}", f"{NAME} do not"),
                    watched=["PhoenixModelDown", "PhoenixPodDown"],
                ),
            ),
        ),
    )
    return Board("phoenix-overview", "Phoenix / Overview", "Every model: is it well?", rows)


def model() -> Board:
    """Return the board of one model: what its callers see, and which part of a request takes the time."""
    ok = f'{OF},outcome="ok"'
    percentiles = [
        Query(quantile(q, "inference_latency_seconds", MODEL, ok), f"{NAME} p{round(q * 100)}")
        for q in (0.5, 0.95, 0.99)
    ]
    refused = rate("phoenix_requests_rejected_total", "code, protocol", IN)
    unshared = rate("phoenix_rate_limit_unshared_total", MODEL, OF)
    rows = (
        (
            "Objective",
            (
                stat("Objective", f"min({queries.SLO}{{{OF}}})", "s"),
                stat("Latency at its percentile", f"max({queries.LATENCY}{{{OF}}})", "s"),
                stat("Latency / objective", f"max({queries.RATIO}{{{OF}}})", "short", _RATIO_STEPS),
                stat("Pressure on the autoscaler", f"max({queries.PRESSURE}{{{OF}}})", "short", _RATIO_STEPS),
                stat("Requests at once", f"sum({queries.CONCURRENCY}{{{OF}}})"),
                stat("Capacity of a pod", f"min(phoenix_model_capacity_concurrency{{{OF}}})"),
            ),
        ),
        (
            "What callers see",
            (
                Panel(
                    "Latency of good answers",
                    [*percentiles, Query(f"{queries.SLO}{{{OF}}}", f"{NAME} objective")],
                    "s",
                    alerts=["PhoenixLatencyOverObjective"],
                    description="From the body received to the body ready, queue included.",
                ),
                graph(
                    "Latency / objective",
                    "short",
                    Query(f"{queries.RATIO}{{{OF}}}", NAME),
                    Query(f"{queries.PRESSURE}{{{OF}}}", f"{NAME} pressure"),
                    steps=_RATIO_STEPS,
                    watched=["PhoenixLatencyOverObjective"],
                ),
                graph(
                    "Requests by outcome",
                    "reqps",
                    Query(rate("inference_requests_total", "outcome"), "{{outcome}}"),
                    watched=["PhoenixRequestsFail", "PhoenixRequestsRefused"],
                ),
                graph(
                    "Requests by protocol",
                    "reqps",
                    Query(rate("inference_requests_total", "protocol"), "{{protocol}}"),
                ),
                Panel(
                    "Refused before a model was found",
                    [Query(refused, "{{protocol}} {{code}}"), Query(unshared, "decided without Redis")],
                    "reqps",
                    description="Of all servers in the namespace: such a request has no model.",
                ),
                graph(
                    "Bytes",
                    "Bps",
                    Query(rate("inference_request_bytes_total", MODEL), f"{NAME} in"),
                    Query(rate("inference_response_bytes_total", MODEL), f"{NAME} out"),
                ),
            ),
        ),
        (
            "Where the time goes",
            (
                graph(
                    "p95 of the stages",
                    "s",
                    Query(quantile(0.95, "inference_queue_seconds", MODEL), f"{NAME} queue"),
                    Query(quantile(0.95, "inference_compute_seconds", MODEL), f"{NAME} compute"),
                    Query(quantile(0.95, "feature_lookup_seconds", MODEL), f"{NAME} features"),
                ),
                graph("Rows of a run", "short", Query(mean("inference_batch_rows", MODEL), NAME)),
                graph("Rows", "rowsps", Query(rate("inference_rows_total", MODEL), NAME)),
                graph(
                    "In flight",
                    "short",
                    Query(f"sum by ({MODEL}) (inference_inflight_requests{{{OF}}})", f"{NAME} requests"),
                    Query(f"sum by ({MODEL}) (inference_queued_rows{{{OF}}})", f"{NAME} rows in the queue"),
                ),
                graph(
                    "Processor",
                    "short",
                    Query(
                        f"sum by ({MODEL}) (rate(process_cpu_seconds_total{{{IN}}}{WINDOW})\n"
                        f"* on (namespace, job, instance) group_right ()\n"
                        f"group by ({MODEL}, job, instance) (phoenix_model_info{{{OF}}}))",
                        f"{NAME} cores",
                    ),
                ),
                graph(
                    "Age of the processes",
                    "s",
                    Query(
                        f"time() - process_start_time_seconds{{{IN}}}\n"
                        f"and on (namespace, job, instance) phoenix_model_info{{{OF}}}",
                        "{{instance}}",
                    ),
                ),
            ),
        ),
        (
            "What is loaded",
            (
                Panel("What is loaded", [Query(f"phoenix_model_info{{{OF}}}")], kind="table", width=16),
                graph("Time to load", "s", Query(f"max by ({MODEL}) (phoenix_model_load_seconds{{{OF}}})", NAME)),
            ),
        ),
    )
    return Board("phoenix-model", "Phoenix / Model", "One model: what its callers see and why.", rows)


def bindings() -> Board:
    """Return the board of features, events, audit and asynchronous inference."""
    by_reason = f"{NAME} {{{{reason}}}}"
    rows = (
        (
            "Backends",
            (
                graph(
                    "Pods that a backend does not answer",
                    "short",
                    Query(f"count by ({MODEL}, kind) (phoenix_binding_up{{{OF}}} == 0)", f"{NAME} {{{{kind}}}}"),
                    steps=ANY,
                    watched=["PhoenixBindingDown"],
                ),
                graph(
                    "Pods that it answers",
                    "short",
                    Query(f"sum by ({MODEL}, kind) (phoenix_binding_up{{{OF}}})", f"{NAME} {{{{kind}}}}"),
                ),
                graph(
                    "Rows without all features",
                    "rowsps",
                    Query(rate("phoenix_features_missing_total", f"{MODEL}, reason"), by_reason),
                    watched=["PhoenixFeaturesMissing"],
                ),
            ),
        ),
        (
            "Features and events",
            (
                graph(
                    "Look-up of features",
                    "s",
                    Query(quantile(0.5, "feature_lookup_seconds", MODEL), f"{NAME} p50"),
                    Query(quantile(0.95, "feature_lookup_seconds", MODEL), f"{NAME} p95"),
                ),
                graph("Events", "cps", Query(rate("phoenix_events_published_total", MODEL), NAME)),
                graph(
                    "Events lost",
                    "short",
                    Query(count("phoenix_events_dropped_total", f"{MODEL}, reason"), by_reason),
                    steps=ANY,
                    watched=["PhoenixEventsDropped"],
                ),
            ),
        ),
        ("Audit", _audit()),
        (
            "Requests over Kafka",
            (
                graph(
                    "Results",
                    "cps",
                    Query(rate("phoenix_async_results_total", MODEL), NAME),
                    Query(rate("phoenix_async_retries_total", MODEL), f"{NAME} tried again"),
                ),
                graph(
                    "Requests that wait",
                    "short",
                    Query(f"sum by ({MODEL}) (phoenix_async_lag_records{{{OF}}})", NAME),
                    steps=limit(alerts.SMALL_BACKLOG),
                    watched=["PhoenixAsyncLagGrows"],
                ),
                graph(
                    "Dead letters",
                    "short",
                    Query(count("phoenix_async_dead_letters_total", f"{MODEL}, reason"), by_reason),
                    steps=ANY,
                    watched=["PhoenixAsyncDeadLetters"],
                ),
                graph(
                    "Transactions",
                    "cps",
                    Query(rate("phoenix_async_transactions_total", f"{MODEL}, outcome"), f"{NAME} {{{{outcome}}}}"),
                ),
                graph(
                    "Producers given up",
                    "short",
                    Query(count("phoenix_async_producers_abandoned_total", MODEL), NAME),
                ),
            ),
        ),
    )
    return Board("phoenix-bindings", "Phoenix / Bindings", "Redis, Kafka and PostgreSQL behind the models.", rows)


def _audit() -> Sequence[Panel]:
    """Return what a process tells of its audit, which is one for all its models."""
    return (
        graph("Predictions recorded", "cps", Query(rate("phoenix_audit_rows_total", _PROCESS, IN), _JOB)),
        graph(
            "Predictions not recorded",
            "short",
            Query(count("phoenix_audit_dropped_total", f"{_PROCESS}, reason", IN), f"{_JOB} {{{{reason}}}}"),
            steps=ANY,
            watched=["PhoenixAuditRowsDropped"],
        ),
        graph(
            "p95 of a transaction",
            "s",
            Query(quantile(0.95, "phoenix_audit_commit_seconds", _PROCESS, IN), _JOB),
        ),
        graph(
            "Waiting to be written",
            "short",
            Query(f"sum by ({_PROCESS}) (phoenix_audit_queue_rows{{{IN}}})", _JOB),
        ),
        graph(
            "Outbox",
            "short",
            Query(f"max by ({_PROCESS}) (phoenix_audit_outbox_rows{{{IN}}})", _JOB),
            steps=limit(alerts.SMALL_BACKLOG),
            watched=["PhoenixAuditOutboxGrows"],
        ),
        graph(
            "Delivered from the outbox",
            "cps",
            Query(rate("phoenix_audit_events_delivered_total", _PROCESS, IN), _JOB),
        ),
        graph("Length of the hash chains", "short", Query(f"phoenix_audit_chain_length{{{IN}}}", "{{instance}}")),
    )
