"""The alerts: when somebody should look, and the page in docs/runbooks that says what to do.

An alert speaks of what callers notice or will soon, never of what Kubernetes mends by itself; so each waits a while.
All read counters of the last minutes: an alert ends by itself when the cause does. `tools/generate.py` writes
`rules/phoenix.alerts.yaml` of them, in a group for each program, so that an installation loads those that it has.
tests/rules holds for each that it fires and that it stays quiet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import queries
import rule_files

RUNBOOKS = "https://phoenix-ml.io/docs/runbooks"
Group = Literal["phoenix-models", "phoenix-bindings", "phoenix-operator", "phoenix-metrics-api"]
GROUPS: tuple[Group, ...] = ("phoenix-models", "phoenix-bindings", "phoenix-operator", "phoenix-metrics-api")

# Shares of requests, or of rows, beyond which somebody is told.
FAILED_SHARE = 0.05
REFUSED_SHARE = 0.01
FEATURES_SHARE = 0.05
# Fewer than this in five minutes are no share of anything.
LEAST_REQUESTS = 5
# What a relay or a consumer works off in seconds.
SMALL_BACKLOG = 1000
STUCK_S = 60
# A certificate is replaced after two thirds of its life, of 90 days unless set otherwise.
CERTIFICATE_S = 3 * 86400

_MODEL = "namespace, model"
_TARGET = "namespace, job, instance"
# The audit belongs to a process. Its model is known where the operator made the PodMonitor.
_PROCESS = "namespace, job, phoenix_ml_io_model"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert. `wait`: how long the expression holds before it fires. `description` may use Prometheus' templates."""

    name: str
    group: Group
    expr: str
    wait: str
    severity: Literal["critical", "warning"]
    summary: str
    description: str

    @property
    def runbook_url(self) -> str:
        """Where it says what to do."""
        return f"{RUNBOOKS}/{self.name}.md"


def alerts() -> list[Alert]:
    """Return every alert, group by group."""
    return [*_models(), *_bindings(), *_operator(), *_metrics_api()]


def groups() -> list[dict[str, Any]]:
    """Return the alerts as groups of a rule file."""
    return [{"name": name, "rules": [_rule(alert) for alert in alerts() if alert.group == name]} for name in GROUPS]


def rule_file() -> str:
    """Return the alerts as a rule file of Prometheus."""
    return rule_files.rule_file(groups())


def prometheus_rule() -> str:
    """Return recording rules and alerts as one object of the Prometheus operator."""
    return rule_files.prometheus_rule("phoenix", [queries.group(queries.autoscaling_rules()), *groups()])


def table() -> str:
    """Return the alerts as a Markdown table, with links as from docs/runbooks."""
    rows = [
        f"| [{alert.name}]({alert.name}.md) | {alert.severity} | {alert.wait} | {alert.summary} |\n"
        for alert in alerts()
    ]
    return "| alert | severity | after | when |\n|---|---|---|---|\n" + "".join(rows)


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": rule_files.Block(f"{alert.expr}\n"),
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": alert.runbook_url,
        },
    }


def _models() -> Iterator[Alert]:
    # Targets that served a model within the hour and do not answer. What is no target any more was taken away.
    silent = (
        f"group by ({_MODEL}, job, instance) (count_over_time(inference_inflight_requests[1h]))\n"
        f"  and on ({_TARGET}) (up == 0)"
    )
    answering = f"group by ({_MODEL}) (inference_inflight_requests)"
    name = "{{ $labels.namespace }}/{{ $labels.model }}"
    yield Alert(
        "PhoenixModelDown",
        "phoenix-models",
        f"count by ({_MODEL}) (\n  {silent}\n)\nunless {answering}",
        "1m",
        "critical",
        "No pod of a model answers.",
        f"None of the {{{{ $value }}}} pods of {name} answers the scrape.",
    )
    yield Alert(
        "PhoenixPodDown",
        "phoenix-models",
        f"count by ({_MODEL}) (\n  {silent}\n)\nand {answering}",
        "5m",
        "warning",
        "Some pods of a model do not answer.",
        f"{{{{ $value }}}} pods of {name} have not answered the scrape for five minutes.",
    )
    yield Alert(
        "PhoenixLatencyOverObjective",
        "phoenix-models",
        f"{queries.RATIO} > 1",
        "10m",
        "warning",
        "A model is slower than its objective.",
        f"The latency of {name} is {{{{ $value | humanize }}}} times its targetLatency.",
    )
    yield Alert(
        "PhoenixRequestsFail",
        "phoenix-models",
        _share_of_requests("error|timeout", FAILED_SHARE),
        "5m",
        "critical",
        "Requests of a model fail or run out of time.",
        f"{{{{ $value | humanizePercentage }}}} of the requests of {name} fail or run out of time.",
    )
    yield Alert(
        "PhoenixRequestsRefused",
        "phoenix-models",
        _share_of_requests("shed", REFUSED_SHARE),
        "5m",
        "warning",
        "A model refuses requests: overload, or a binding that it cannot do without.",
        f"{{{{ $value | humanizePercentage }}}} of the requests of {name} are answered with 503.",
    )
    yield Alert(
        "PhoenixFeaturesMissing",
        "phoenix-models",
        f"sum by ({_MODEL}, reason) (rate(phoenix_features_missing_total[10m]))\n"
        f"/ on ({_MODEL}) group_left ()\n"
        f"sum by ({_MODEL}) (rate(inference_rows_total[10m])) > {FEATURES_SHARE}",
        "10m",
        "warning",
        "Rows are predicted, or refused, without all their features.",
        f"{{{{ $value | humanizePercentage }}}} of the rows of {name} lack features: {{{{ $labels.reason }}}}.",
    )


def _share_of_requests(outcomes: str, above: float) -> str:
    some = f'sum by ({_MODEL}) (increase(inference_requests_total{{outcome=~"{outcomes}"}}[5m]))'
    every = f"sum by ({_MODEL}) (increase(inference_requests_total[5m]))"
    return f"{some} / {every} > {above}\nand {some} >= {LEAST_REQUESTS}"


def _bindings() -> Iterator[Alert]:
    name = "{{ $labels.namespace }}/{{ $labels.model }}"
    lag = f"sum by ({_MODEL}) (phoenix_async_lag_records)"
    lag_before = f"sum by ({_MODEL}) (phoenix_async_lag_records offset 15m)"
    outbox = f"max by ({_PROCESS}) (phoenix_audit_outbox_rows)"  # of one table: each process says the same
    outbox_before = f"max by ({_PROCESS}) (phoenix_audit_outbox_rows offset 15m)"
    yield Alert(
        "PhoenixBindingDown",
        "phoenix-bindings",
        f"count by ({_MODEL}, kind) (phoenix_binding_up == 0)",
        "2m",
        "critical",
        "A backend service of a model does not answer.",
        f"{{{{ $labels.kind }}}} does not answer {{{{ $value }}}} pods of {name}.",
    )
    yield Alert(
        "PhoenixEventsDropped",
        "phoenix-bindings",
        f"sum by ({_MODEL}, reason) (increase(phoenix_events_dropped_total[10m])) > 0",
        "0m",
        "warning",
        "Prediction events are lost.",
        f"{{{{ $value | humanize }}}} events of {name} were lost in ten minutes: {{{{ $labels.reason }}}}.",
    )
    yield Alert(
        "PhoenixAuditRowsDropped",
        "phoenix-bindings",
        f"sum by ({_PROCESS}, reason) (increase(phoenix_audit_dropped_total[10m])) > 0",
        "0m",
        "critical",
        "Predictions are missing from the audit.",
        "{{ $value | humanize }} predictions of {{ $labels.job }} were not recorded in ten minutes: "
        "{{ $labels.reason }}.",
    )
    yield Alert(
        "PhoenixAuditOutboxGrows",
        "phoenix-bindings",
        f"{outbox} > {SMALL_BACKLOG}\nand {outbox} > {outbox_before}",
        "15m",
        "warning",
        "Events wait in the outbox of the audit, more and more of them.",
        "{{ $value }} events of {{ $labels.job }} wait for Kafka. At PHOENIX_AUDIT_OUTBOX_ROWS Durable answers 503.",
    )
    yield Alert(
        "PhoenixAsyncLagGrows",
        "phoenix-bindings",
        f"{lag} > {SMALL_BACKLOG}\nand {lag} > {lag_before}",
        "15m",
        "warning",
        "Requests over Kafka come faster than they are answered.",
        f"{{{{ $value }}}} requests of {name} wait in its topic, more than 15 minutes ago.",
    )
    # A reason that was never counted has no series: its first value has nothing that it could be an increase of.
    dead = "phoenix_async_dead_letters_total"
    yield Alert(
        "PhoenixAsyncDeadLetters",
        "phoenix-bindings",
        f"sum by ({_MODEL}, reason) (\n"
        f"  ({dead} unless last_over_time({dead}[1h] offset 15m))\n"
        f"  or increase({dead}[15m])\n) > 0",
        "0m",
        "warning",
        "Requests over Kafka could not be served and are dead letters.",
        f"{{{{ $value | humanize }}}} requests of {name} became dead letters in 15 minutes: {{{{ $labels.reason }}}}.",
    )


def _operator() -> Iterator[Alert]:
    where = "the operator in {{ $labels.namespace }}"
    leader = "phoenix_operator_leader"
    yield Alert(
        "PhoenixOperatorHasNoLeader",
        "phoenix-operator",
        f"sum by (namespace) ({leader}) != 1\n"
        f"or\n0 * (group by (namespace) (count_over_time({leader}[6h])) unless group by (namespace) ({leader}))",
        "1m",
        "critical",
        "No operator works, or two do.",
        "{{ $value }} pods of the operator in {{ $labels.namespace }} lead; it should be one.",
    )
    yield Alert(
        "PhoenixOperatorReconcilesFail",
        "phoenix-operator",
        "sum by (namespace) (phoenix_operator_failing_models) > 0",
        "10m",
        "warning",
        "The operator cannot reconcile some models.",
        f"The last reconcile of {{{{ $value }}}} models failed: {where}.",
    )
    yield Alert(
        "PhoenixOperatorQueueStuck",
        "phoenix-operator",
        f"max by (namespace) (phoenix_operator_queue_oldest_seconds) > {STUCK_S}",
        "2m",
        "warning",
        "A model waits for the operator.",
        f"A model has waited or been worked on for {{{{ $value | humanizeDuration }}}}: {where}.",
    )
    yield Alert(
        "PhoenixOperatorMissesEvents",
        "phoenix-operator",
        "sum by (namespace) (increase(phoenix_operator_missed_events_total[1h])) >= 5",
        "15m",
        "warning",
        "The operator's watches lose changes.",
        f"{{{{ $value | humanize }}}} changes in an hour were found by the second look only: {where}.",
    )
    yield Alert(
        "PhoenixOperatorReachesNoPods",
        "phoenix-operator",
        "sum by (namespace) (rate(phoenix_operator_state_failures_total[10m])) * 600 >= 5",
        "10m",
        "warning",
        "Pods that are ready do not tell the operator what they loaded.",
        f"{{{{ $value | humanize }}}} questions to pods failed in ten minutes: {where}.",
    )


def _metrics_api() -> Iterator[Alert]:
    calls = "phoenix_metrics_api_query_seconds_count"
    yield Alert(
        "PhoenixMetricsApiPrometheusFails",
        "phoenix-metrics-api",
        f'sum by (namespace) (rate({calls}{{result!="ok"}}[5m]))\n/ sum by (namespace) (rate({calls}[5m])) > 0.5',
        "5m",
        "critical",
        "The metrics API gets no answers from Prometheus, so nothing scales.",
        "{{ $value | humanizePercentage }} of the queries to Prometheus fail; replicas stay as they are.",
    )
    yield Alert(
        "PhoenixMetricsApiCertificateEnds",
        "phoenix-metrics-api",
        f"min by (namespace) (phoenix_metrics_api_certificate_expiry_timestamp_seconds) - time() < {CERTIFICATE_S}",
        "15m",
        "warning",
        "The serving certificate of the metrics API was not replaced in time.",
        "It ends in {{ $value | humanizeDuration }}; a negative time: it has ended, or there is none.",
    )
    yield Alert(
        "PhoenixScalingFrozen",
        "phoenix-metrics-api",
        'sum by (namespace, reason) (increase(phoenix_metrics_api_absent_total{reason!="no_model"}[5m])) > 0',
        "10m",
        "warning",
        "The autoscaler asks for values that are not there, and changes nothing.",
        "{{ $value | humanize }} values were not given in five minutes: {{ $labels.reason }}.",
    )
