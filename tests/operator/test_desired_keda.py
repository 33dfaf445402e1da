"""The ScaledObject of a model that KEDA scales: its triggers, what they log in with, and when it falls back."""

from typing import Any

import pytest
from objects import by_place, deployment, loaded, ready, rendered, seen, subject
from test_desired_autoscaling import around

from phoenix_operator.desired import keda
from phoenix_operator.desired.bindings import access_of
from phoenix_operator.kinds import HORIZONTAL_POD_AUTOSCALER, OPTIONAL, SCALED_OBJECT
from phoenix_operator.observed import BindingSeen, Object, Observed, Subject
from phoenix_operator.settings import Settings

KEDA = Settings.model_validate(
    {
        "autoscaling": {"provider": "keda", "prometheus": {"url": "http://prometheus.monitoring:9090"}},
        "backends": [{"name": "default", "kind": "kafka", "adminSecretRef": {"name": "kafka-admin"}}],
    },
    by_alias=True,
)
SCALING: Object = {"maxReplicas": 8, "targetLatency": "200m"}
REQUESTS: Object = {"kafka": {"backend": "default", "requests": {}}}
OPEN = {"bootstrap-servers": "a:9092,b:9092", "security-protocol": "PLAINTEXT", "group-id": "phoenix.ml.fraud"}


def scaled(*, is_async: bool = False, **scaling: Any) -> Subject:
    more = {"bindings": REQUESTS} if is_async else {}
    return subject(autoscaling=SCALING | scaling, **more)


def spec_of(model: Subject, observed: Observed) -> Object:
    body = keda.scaled_object(model, observed, KEDA)
    assert body is not None
    return dict(body["spec"])


def with_kafka(**access: str) -> Observed:
    return Observed(bindings={"kafka": BindingSeen("kafka", digest="d", access=access)}, served_kinds=OPTIONAL)


def test_keda_has_its_own_autoscaler_and_there_is_none_of_ours() -> None:
    kinds = {kind for kind, _ in by_place(rendered(scaled(), settings=KEDA))}
    assert SCALED_OBJECT in kinds
    assert HORIZONTAL_POD_AUTOSCALER not in kinds
    kinds = {kind for kind, _ in by_place(rendered(scaled()))}
    assert SCALED_OBJECT not in kinds
    assert keda.scaled_object(subject(), Observed(), KEDA) is None


def test_signals_are_asked_for_as_they_are_recorded_and_silence_is_no_idleness() -> None:
    model = scaled()
    concurrency, pressure = spec_of(model, around(model, loaded(capacity=10)))["triggers"]
    assert concurrency == {
        "type": "prometheus", "name": "concurrency", "metricType": "AverageValue",
        "metadata": {
            "serverAddress": "http://prometheus.monitoring:9090",
            "query": 'phoenix:inference_concurrency{namespace="ml",model="fraud"}',
            "threshold": "7.0", "activationThreshold": "0", "ignoreNullValues": "false",
        },
    }  # fmt: skip
    assert pressure["metricType"] == "Value"
    assert pressure["metadata"]["query"] == 'phoenix:inference_slo_pressure{namespace="ml",model="fraud"}'
    assert pressure["metadata"]["threshold"] == "1"


def test_plain_latency_is_the_one_signal_where_asked_for() -> None:
    [trigger] = spec_of(scaled(metric="Latency"), Observed())["triggers"]
    assert trigger["metadata"]["threshold"] == "0.2"
    assert trigger["metadata"]["query"] == 'phoenix:inference_latency_seconds{namespace="ml",model="fraud"}'
    assert trigger["metricType"] == "Value"


def test_keda_falls_back_upwards_only_and_only_where_it_may() -> None:
    model = scaled(minReplicas=2)
    spec = spec_of(model, around(model, loaded(capacity=10)))
    assert spec["fallback"] == {"failureThreshold": 4, "replicas": 2, "behavior": "currentReplicasIfHigher"}
    assert "fallback" not in spec_of(model, Observed()), "KEDA refuses one without a trigger of AverageValue"


def test_lag_wakes_a_model_from_nothing() -> None:
    model = scaled(is_async=True, minReplicas=0)
    spec = spec_of(model, with_kafka(**OPEN))
    assert (spec["minReplicaCount"], spec["cooldownPeriod"]) == (0, 300)
    [lag] = [row for row in spec["triggers"] if row["type"] == "kafka"]
    assert lag["metadata"] == {
        "bootstrapServers": "a:9092,b:9092", "consumerGroup": "phoenix.ml.fraud",
        "topic": "phoenix.ml.fraud.requests", "lagThreshold": "100", "activationLagThreshold": "0",
        "offsetResetPolicy": "earliest", "tls": "disable", "sasl": "none",
    }  # fmt: skip
    assert "authenticationRef" not in lag
    assert keda.trigger_authentication(model, with_kafka(**OPEN), KEDA) is None
    others = [row for row in spec["triggers"] if row["type"] == "prometheus"]
    assert {row["metadata"]["ignoreNullValues"] for row in others} == {"true"}, "no pods, no series"


@pytest.mark.parametrize(
    ("mechanism", "sasl"),
    [("PLAIN", "plaintext"), ("SCRAM-SHA-256", "scram_sha256"), ("SCRAM-SHA-512", "scram_sha512")],
)
def test_keda_logs_in_with_the_secret_of_the_model(mechanism: str, sasl: str) -> None:
    model = scaled(is_async=True)
    access = OPEN | {"security-protocol": "SASL_SSL", "sasl-mechanism": mechanism, "certificates": ""}
    [lag] = [row for row in spec_of(model, with_kafka(**access))["triggers"] if row["type"] == "kafka"]
    assert (lag["metadata"]["tls"], lag["metadata"]["sasl"]) == ("enable", sasl)
    body = keda.trigger_authentication(model, with_kafka(**access), KEDA)
    assert body is not None
    assert lag["authenticationRef"] == {"name": body["metadata"]["name"]}
    assert body["spec"]["secretTargetRef"] == [
        {"parameter": "username", "name": "fraud-kafka", "key": "username"},
        {"parameter": "password", "name": "fraud-kafka", "key": "password"},
        {"parameter": "ca", "name": "fraud-kafka", "key": "certificates"},
    ]


def test_lag_is_still_watched_while_the_binding_cannot_be_looked_at() -> None:
    model = scaled(is_async=True)
    live = keda.scaled_object(model, with_kafka(**OPEN), KEDA)
    assert live is not None
    unseen = Observed(children={(SCALED_OBJECT, "fraud"): live}, served_kinds=OPTIONAL)
    assert spec_of(model, unseen)["triggers"] == live["spec"]["triggers"]


def test_no_secret_is_written_where_everybody_may_read() -> None:
    values = OPEN | {"username": "u", "password": "s3cret", "certificates": "PEM", "sasl-mechanism": "PLAIN"}
    access = access_of("kafka", values)
    assert access == OPEN | {"sasl-mechanism": "PLAIN", "certificates": ""}
    assert access_of("redis", {"host": "h", "password": "s3cret", "uri": "redis://:s3cret@h"}) == {}


def test_cluster_without_keda_is_told() -> None:
    from phoenix_operator.desired.acceptance import faults

    [fault] = faults(scaled(), Observed(served_kinds=OPTIONAL - {SCALED_OBJECT}), KEDA)
    assert (fault.reason, fault.message) == (
        "KindNotServed", "spec.autoscaling: the cluster does not serve ScaledObject (keda.sh/v1alpha1); install it",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("conditions", "status", "reason", "words"),
    [
        (None, "Unknown", "Unknown", "there is no ScaledObject yet"),
        ([], "Unknown", "Unknown", "KEDA has not looked"),
        (
            [("Ready", "False", "no such trigger")],
            "False",
            "MetricsUnavailable",
            "KEDA does not scale: no such trigger",
        ),
        ([("Ready", "True", ""), ("Fallback", "True", "")], "False", "MetricsUnavailable", "has fallen back"),
        ([("Ready", "True", ""), ("Fallback", "False", "")], "True", "MetricsRead", "KEDA reads its triggers"),
    ],
)
def test_condition_tells_what_keda_tells(conditions: Any, status: str, reason: str, words: str) -> None:
    from status_cases import rows_of, status_of

    model = scaled()
    observed = seen(model, [ready(model)], deployment=deployment(model, is_rolled_out=True))
    children = {place: body for place, body in observed.children.items() if place[0] is not HORIZONTAL_POD_AUTOSCALER}
    if conditions is not None:
        live = keda.scaled_object(model, observed, KEDA)
        assert live is not None
        rows = [{"type": kind, "status": value, "message": message} for kind, value, message in conditions]
        children[SCALED_OBJECT, "fraud"] = live | {"status": {"conditions": rows}}
    found = rows_of(status_of(model, Observed(children=children, pods=observed.pods, served_kinds=OPTIONAL), KEDA))
    assert found["AutoscalingReady"][:2] == (status, reason)
    assert words in found["AutoscalingReady"][2]
