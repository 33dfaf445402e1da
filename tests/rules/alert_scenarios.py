"""For each alert what Prometheus holds when it fires, with the words that it sends, and what it holds when it is quiet.

Values are in promtool's notation, one a minute: `0+10x30` grows by 10 thirty times, `_` is a scrape that found nothing,
`stale` the end of a series.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Series = Mapping[str, str]
MODEL = 'namespace="ml",model="fraud"'
_POD = f'{MODEL},job="models",instance'
_OPERATOR = 'namespace="phoenix-system"'


@dataclass(frozen=True, slots=True)
class Fires:
    """`labels` are those of the alert beside its severity; `description` is what people read."""

    alert: str
    series: Series
    labels: Mapping[str, str]
    description: str
    minute: int = 30


@dataclass(frozen=True, slots=True)
class Quiet:
    """`why` says what the alert must not take for its cause."""

    alert: str
    why: str
    series: Series
    minute: int = 30


def _up(values: str, instance: str = "a") -> Series:
    return {f'up{{namespace="ml",job="models",instance="{instance}"}}': values}


def _inflight(values: str, instance: str = "a") -> Series:
    return {f'inference_inflight_requests{{{_POD}="{instance}"}}': values}


def _requests(**outcomes: str) -> Series:
    return {f'inference_requests_total{{{MODEL},outcome="{name}"}}': values for name, values in outcomes.items()}


def _leaders(first: str, second: str) -> Series:
    return {
        f'phoenix_operator_leader{{{_OPERATOR},pod="{pod}"}}': values
        for pod, values in zip("ab", (first, second), strict=True)
    }


def _outbox(values: str) -> Series:
    # two pods, one table
    at = 'namespace="ml",job="models",phoenix_ml_io_model="fraud",instance'
    return {f'phoenix_audit_outbox_rows{{{at}="{instance}"}}': values for instance in "ab"}


def _prometheus(ok: str, timeout: str) -> Series:
    name = f"phoenix_metrics_api_query_seconds_count{{{_OPERATOR},result="
    return {f'{name}"ok"}}': ok, f'{name}"timeout"}}': timeout}


_EACH_THIRD_MINUTE = " ".join(str(minute // 3) for minute in range(60))
_FRAUD = {"namespace": "ml", "model": "fraud"}
_SYSTEM = {"namespace": "phoenix-system"}
_AUDIT = {"namespace": "ml", "job": "models", "phoenix_ml_io_model": "fraud"}
_DEAD = f'phoenix_async_dead_letters_total{{{MODEL},reason="invalid"}}'
_DROPPED = (
    'phoenix_audit_dropped_total{namespace="ml",job="models",phoenix_ml_io_model="fraud",reason="queue_full",pod="a"}'
)
_LOST = f'phoenix_events_dropped_total{{{MODEL},reason="timeout",pod="a"}}'
_MISSED = f'phoenix_operator_missed_events_total{{{_OPERATOR},kind="Deployment"}}'
_EXPIRY = f"phoenix_metrics_api_certificate_expiry_timestamp_seconds{{{_OPERATOR}}}"
_ABSENT = f"phoenix_metrics_api_absent_total{{{_OPERATOR},reason="

FIRES = (
    Fires(
        "PhoenixModelDown",
        _up("1x10 0x40") | _inflight("3x10 stale"),
        _FRAUD,
        "None of the 1 pods of ml/fraud answers the scrape.",
        13,
    ),
    Fires(
        "PhoenixPodDown",
        _up("1x10 0x40") | _inflight("3x10 stale") | _up("1x50", "b") | _inflight("3x50", "b"),
        _FRAUD,
        "1 pods of ml/fraud have not answered the scrape for five minutes.",
        17,
    ),
    Fires(
        "PhoenixLatencyOverObjective",
        {f"phoenix:inference_slo_ratio{{{MODEL}}}": "1.5x60"},
        _FRAUD,
        "The latency of ml/fraud is 1.5 times its targetLatency.",
    ),
    Fires(
        "PhoenixRequestsFail",
        _requests(ok="0+80x60", error="0+10x60", timeout="0+10x60"),
        _FRAUD,
        "20% of the requests of ml/fraud fail or run out of time.",
    ),
    Fires(
        "PhoenixRequestsRefused",
        _requests(ok="0+95x60", shed="0+5x60"),
        _FRAUD,
        "5% of the requests of ml/fraud are answered with 503.",
    ),
    Fires(
        "PhoenixFeaturesMissing",
        {
            f'phoenix_features_missing_total{{{MODEL},reason="stale"}}': "0+10x60",
            f'phoenix_features_missing_total{{{MODEL},reason="missing"}}': "0+1x60",
            f'inference_rows_total{{{MODEL},outcome="ok"}}': "0+40x60",
        },
        _FRAUD | {"reason": "stale"},
        "25% of the rows of ml/fraud lack features: stale.",
    ),
    Fires(
        "PhoenixBindingDown",
        {f'phoenix_binding_up{{{MODEL},kind="redis",pod="{pod}"}}': "1x9 0x50" for pod in "ab"},
        _FRAUD | {"kind": "redis"},
        "redis does not answer 2 pods of ml/fraud.",
        13,
    ),
    Fires(
        "PhoenixEventsDropped",
        {_LOST: "0x25 10x30"},
        _FRAUD | {"reason": "timeout"},
        "10 events of ml/fraud were lost in ten minutes: timeout.",
    ),
    Fires(
        "PhoenixAuditRowsDropped",
        {_DROPPED: "0x25 9x30"},
        _AUDIT | {"reason": "queue_full"},
        "9 predictions of models were not recorded in ten minutes: queue_full.",
    ),
    Fires(
        "PhoenixAuditOutboxGrows",
        _outbox("0+100x90"),
        _AUDIT,
        "6000 events of models wait for Kafka. At PHOENIX_AUDIT_OUTBOX_ROWS Durable answers 503.",
        60,
    ),
    Fires(
        "PhoenixAsyncLagGrows",
        {f'phoenix_async_lag_records{{{MODEL},pod="{pod}"}}': "0+50x90" for pod in "ab"},
        _FRAUD,
        "6000 requests of ml/fraud wait in its topic, more than 15 minutes ago.",
        60,
    ),
    Fires(  # the first of its reason, so that its series begins with it
        "PhoenixAsyncDeadLetters",
        {_DEAD: "_x25 2x60"},
        _FRAUD | {"reason": "invalid"},
        "2 requests of ml/fraud became dead letters in 15 minutes: invalid.",
    ),
    Fires(
        "PhoenixAsyncDeadLetters",
        {_DEAD: "7x100 21x60"},
        _FRAUD | {"reason": "invalid"},
        "14 requests of ml/fraud became dead letters in 15 minutes: invalid.",
        105,
    ),
    Fires(
        "PhoenixOperatorHasNoLeader",
        _leaders("1x9 0x60", "0x60"),
        _SYSTEM,
        "0 pods of the operator in phoenix-system lead; it should be one.",
        12,
    ),
    Fires(  # taken away, or not scraped
        "PhoenixOperatorHasNoLeader",
        _leaders("1x9 stale", "0x9 stale"),
        _SYSTEM,
        "0 pods of the operator in phoenix-system lead; it should be one.",
        13,
    ),
    Fires(
        "PhoenixOperatorHasNoLeader",
        _leaders("1x60", "0x9 1x50"),
        _SYSTEM,
        "2 pods of the operator in phoenix-system lead; it should be one.",
        12,
    ),
    Fires(
        "PhoenixOperatorReconcilesFail",
        {f'phoenix_operator_failing_models{{{_OPERATOR},pod="a"}}': "2x60"},
        _SYSTEM,
        "The last reconcile of 2 models failed: the operator in phoenix-system.",
    ),
    Fires(
        "PhoenixOperatorQueueStuck",
        {f'phoenix_operator_queue_oldest_seconds{{{_OPERATOR},pod="a"}}': "0+60x60"},
        _SYSTEM,
        "A model has waited or been worked on for 5m 0s: the operator in phoenix-system.",
        5,
    ),
    Fires(
        "PhoenixOperatorMissesEvents",
        {_MISSED: "0+1x120"},
        _SYSTEM,
        "60 changes in an hour were found by the second look only: the operator in phoenix-system.",
        90,
    ),
    Fires(
        "PhoenixOperatorReachesNoPods",
        {f"phoenix_operator_state_failures_total{{{_OPERATOR}}}": "0+2x60"},
        _SYSTEM,
        "20 questions to pods failed in ten minutes: the operator in phoenix-system.",
    ),
    Fires(
        "PhoenixMetricsApiPrometheusFails",
        _prometheus(ok="0+1x60", timeout="0+3x60"),
        _SYSTEM,
        "75% of the queries to Prometheus fail; replicas stay as they are.",
    ),
    Fires(
        "PhoenixMetricsApiCertificateEnds",
        {_EXPIRY: "86400x60"},
        _SYSTEM,
        "It ends in 23h 30m 0s; a negative time: it has ended, or there is none.",
    ),
    Fires(
        "PhoenixScalingFrozen",
        {f'{_ABSENT}"no_series"}}': "0+4x60"},
        _SYSTEM | {"reason": "no_series"},
        "20 values were not given in five minutes: no_series.",
    ),
)

QUIET = (
    Quiet("PhoenixModelDown", "another pod answers", FIRES[1].series, 17),
    Quiet("PhoenixModelDown", "the model was taken away", _up("1x10 stale") | _inflight("3x10 stale"), 13),
    Quiet("PhoenixModelDown", "the server serves it no more", _up("1x50") | _inflight("3x10 stale"), 13),
    Quiet("PhoenixModelDown", "a pod is starting and never served", _up("0x50")),
    Quiet(
        "PhoenixPodDown",
        "a rollout replaced it",
        _up("1x10 stale") | _inflight("3x10 stale") | _up("1x50", "b") | _inflight("3x50", "b"),
        17,
    ),
    Quiet(
        "PhoenixPodDown",
        "it answers again within minutes",
        _up("1x10 0x2 1x40") | _inflight("3x10 stale _x2 3x40") | _up("1x50", "b") | _inflight("3x50", "b"),
        13,
    ),
    Quiet("PhoenixLatencyOverObjective", "below", {f"phoenix:inference_slo_ratio{{{MODEL}}}": "0.99x60"}),
    Quiet("PhoenixLatencyOverObjective", "for minutes only", {f"phoenix:inference_slo_ratio{{{MODEL}}}": "0.5x22 2x9"}),
    Quiet("PhoenixRequestsFail", "the caller's own mistakes", _requests(ok="0+10x60", client_error="0+90x60")),
    Quiet("PhoenixRequestsFail", "one of a thousand", _requests(ok="0+999x60", error="0+1x60")),
    Quiet("PhoenixRequestsFail", "a few at night", _requests(ok="0x60", error=_EACH_THIRD_MINUTE)),
    Quiet("PhoenixRequestsRefused", "one of a thousand", _requests(ok="0+4995x60", shed="0+5x60")),
    Quiet("PhoenixRequestsRefused", "idle", _requests(ok="9x60", shed="9x60")),
    Quiet(
        "PhoenixFeaturesMissing",
        "a few rows",
        {
            f'phoenix_features_missing_total{{{MODEL},reason="stale"}}': "0+1x60",
            f'inference_rows_total{{{MODEL},outcome="ok"}}': "0+40x60",
        },
    ),
    Quiet(
        "PhoenixBindingDown",
        "a restart of the backend",
        {f'phoenix_binding_up{{{MODEL},kind="redis"}}': "1x28 0 1x9"},
        29,
    ),
    Quiet("PhoenixEventsDropped", "long ago", {_LOST: "0x9 10x60"}),
    Quiet("PhoenixAuditRowsDropped", "long ago", {_DROPPED: "0x9 10x60"}),
    Quiet("PhoenixAuditOutboxGrows", "it gets less", _outbox("9000-100x60"), 60),
    Quiet("PhoenixAuditOutboxGrows", "a little more", _outbox("0+10x60"), 60),
    Quiet("PhoenixAsyncLagGrows", "it gets less", {f"phoenix_async_lag_records{{{MODEL}}}": "9000-100x60"}, 60),
    Quiet(
        "PhoenixAsyncLagGrows",
        "partitions move to another pod",
        {
            f'phoenix_async_lag_records{{{MODEL},pod="a"}}': "4000x29 0x60",
            f'phoenix_async_lag_records{{{MODEL},pod="b"}}': "0x29 4000x60",
        },
        40,
    ),
    Quiet("PhoenixAsyncDeadLetters", "long ago", {_DEAD: "_x25 2x90"}, 60),
    Quiet("PhoenixOperatorHasNoLeader", "a handover", _leaders("1x9 0x60", "0x9 1x60"), 10),
    Quiet("PhoenixOperatorHasNoLeader", "there is no operator", _up("1x60")),
    Quiet("PhoenixOperatorReconcilesFail", "none", {f"phoenix_operator_failing_models{{{_OPERATOR}}}": "0x60"}),
    Quiet("PhoenixOperatorReconcilesFail", "one try", {f"phoenix_operator_failing_models{{{_OPERATOR}}}": "0x25 1x9"}),
    Quiet("PhoenixOperatorQueueStuck", "busy", {f"phoenix_operator_queue_oldest_seconds{{{_OPERATOR}}}": "30x60"}),
    Quiet("PhoenixOperatorMissesEvents", "one watch broke", {_MISSED: "0x9 3x120"}, 60),
    Quiet(
        "PhoenixOperatorReachesNoPods",
        "a pod that ended",
        {f"phoenix_operator_state_failures_total{{{_OPERATOR}}}": "0x25 2x60"},
    ),
    Quiet("PhoenixMetricsApiPrometheusFails", "one in ten", _prometheus(ok="0+9x60", timeout="0+1x60")),
    Quiet("PhoenixMetricsApiCertificateEnds", "ten days left", {_EXPIRY: "864000x60"}),
    Quiet("PhoenixScalingFrozen", "models that are not there", {f'{_ABSENT}"no_model"}}': "0+4x60"}),
    Quiet("PhoenixScalingFrozen", "a pod that starts", {f'{_ABSENT}"no_series"}}': "0x21 4+4x60"}),
)
