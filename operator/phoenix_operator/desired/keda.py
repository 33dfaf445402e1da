"""The ScaledObject of a model that KEDA scales: the same signals, and Kafka's lag, which wakes a model from nothing.

KEDA makes the HorizontalPodAutoscaler itself, so there is never one of ours beside it. It asks Prometheus for the
recorded series, and Kafka with the model's own login.
"""

from typing import Any

from phoenix_api import ScalingMetric
from phoenix_operator.desired.autoscaling import behavior, concurrency_target
from phoenix_operator.desired.bindings import asked, group, topics
from phoenix_operator.desired.naming import owned
from phoenix_operator.kinds import DEPLOYMENT, SCALED_OBJECT, TRIGGER_AUTHENTICATION
from phoenix_operator.observed import Object, Observed, Subject
from phoenix_operator.settings import AutoscalingProvider, Settings

_POLL_S = 15
_FAILURES = 4  # polls that fail before KEDA falls back: a minute
_LAG = 100  # requests that wait for each replica
_SASL = {"PLAIN": "plaintext", "SCRAM-SHA-256": "scram_sha256", "SCRAM-SHA-512": "scram_sha512"}
_KAFKA = "kafka"


def is_keda(subject: Subject, settings: Settings) -> bool:
    """Whether KEDA scales the model."""
    return subject.spec.autoscaling is not None and settings.autoscaling.provider is AutoscalingProvider.KEDA


def scaled_object(subject: Subject, observed: Observed, settings: Settings) -> Object | None:
    """Return the ScaledObject; None where another or nobody scales the model."""
    scaling = subject.spec.autoscaling
    if scaling is None or not is_keda(subject, settings):
        return None
    pace = behavior(subject, observed)
    triggers = _triggers(subject, observed, settings)
    spec: Object = {
        "scaleTargetRef": {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.kind, "name": subject.name},
        "minReplicaCount": scaling.min_replicas,
        "maxReplicaCount": scaling.max_replicas,
        "pollingInterval": _POLL_S,
        "cooldownPeriod": max(scaling.scale_down_stabilization_seconds, _POLL_S),  # from one replica to none
        "advanced": {
            "restoreToOriginalReplicaCount": False,
            **({"horizontalPodAutoscalerConfig": {"behavior": pace}} if pace else {}),
        },
        "triggers": triggers,
    }
    if any(trigger["metricType"] == "AverageValue" for trigger in triggers):  # KEDA refuses it for others
        spec["fallback"] = {
            "failureThreshold": _FAILURES,
            "replicas": max(1, scaling.min_replicas),
            "behavior": "currentReplicasIfHigher",
        }
    return owned(subject, SCALED_OBJECT, subject.name, {"spec": spec})


def trigger_authentication(subject: Subject, observed: Observed, settings: Settings) -> Object | None:
    """Return what KEDA logs in to Kafka with: the model's own Secret; None where it asks no Kafka or needs no login."""
    if not is_keda(subject, settings) or not _asks_kafka(subject):
        return None
    keys = _keys(observed)
    if not keys:
        return None
    [secret] = [each.secret for each in asked(subject) if each.kind == _KAFKA]
    rows = [{"parameter": parameter, "name": secret, "key": key} for parameter, key in keys]
    return owned(subject, TRIGGER_AUTHENTICATION, _authentication_name(subject), {"spec": {"secretTargetRef": rows}})


def _triggers(subject: Subject, observed: Observed, settings: Settings) -> list[Object]:
    scaling = subject.spec.autoscaling
    assert scaling is not None
    address = settings.autoscaling.prometheus.url

    def asks(name: str, series: str, kind: str, threshold: str) -> Object:
        query = f'{series}{{namespace="{subject.namespace}",model="{subject.name}"}}'
        metadata = {
            "serverAddress": address,
            "query": query,
            "threshold": threshold,
            "activationThreshold": "0",
            # what is not there is no idle model, unless there are no pods that could tell
            "ignoreNullValues": str(scaling.min_replicas == 0).lower(),
        }
        return {"type": "prometheus", "name": name, "metricType": kind, "metadata": metadata}

    found: list[Object] = []
    if scaling.metric is ScalingMetric.LATENCY:
        target = str(float(scaling.target_latency))
        found.append(asks("latency", "phoenix:inference_latency_seconds", "Value", target))
    else:
        if (concurrency := concurrency_target(subject, observed)) is not None:
            found.append(asks("concurrency", "phoenix:inference_concurrency", "AverageValue", str(float(concurrency))))
        found.append(asks("pressure", "phoenix:inference_slo_pressure", "Value", "1"))
    return [*found, *_lag(subject, observed)]


def _lag(subject: Subject, observed: Observed) -> list[Object]:
    """Return the trigger of the requests that wait; the one that is there while the binding cannot be looked at."""
    if not _asks_kafka(subject):
        return []
    access = _access(observed)
    if not access:
        live = observed.scaled_object
        return [row for row in (live or {}).get("spec", {}).get("triggers", []) if row.get("type") == _KAFKA]
    protocol = access["security-protocol"]
    metadata: dict[str, Any] = {
        "bootstrapServers": access["bootstrap-servers"],
        "consumerGroup": access.get("group-id") or group(subject),
        "topic": topics(subject)["spec.bindings.kafka.requests.topic"],
        "lagThreshold": str(_LAG),
        "activationLagThreshold": "0",
        "offsetResetPolicy": "earliest",
        "tls": "enable" if protocol.endswith("SSL") else "disable",
        "sasl": _SASL.get(access.get("sasl-mechanism", ""), "none") if protocol.startswith("SASL") else "none",
    }
    trigger: Object = {"type": _KAFKA, "name": "lag", "metricType": "AverageValue", "metadata": metadata}
    if _keys(observed):
        trigger["authenticationRef"] = {"name": _authentication_name(subject)}
    return [trigger]


def _asks_kafka(subject: Subject) -> bool:
    bindings = subject.spec.bindings
    return bindings is not None and bindings.kafka is not None and bindings.kafka.requests is not None


def _access(observed: Observed) -> dict[str, str]:
    seen = observed.bindings.get(_KAFKA)
    return dict(seen.access) if seen is not None else {}


def _keys(observed: Observed) -> list[tuple[str, str]]:
    """Return the parameters of KEDA's Kafka trigger that come from the Secret, and their keys in it."""
    access = _access(observed)
    protocol = access.get("security-protocol", "")
    found = [("username", "username"), ("password", "password")] if protocol.startswith("SASL") else []
    if protocol.endswith("SSL") and "certificates" in access:
        found.append(("ca", "certificates"))
    return found


def _authentication_name(subject: Subject) -> str:
    return f"{subject.name}-{_KAFKA}"
