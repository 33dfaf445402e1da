"""Whether a spec can be acted on: what settings and cluster decide."""

from typing import Any

import pytest
from model_scenarios import PROFILES
from objects import DIGEST, subject

from phoenix_api import CONDITIONS, ConditionType, Reason
from phoenix_operator.desired.acceptance import Fault, faults
from phoenix_operator.desired.deployment import RESERVED_ENV
from phoenix_operator.kinds import DEPLOYMENT, HTTP_ROUTE, OPTIONAL, RESOURCE_CLAIM_TEMPLATE, SERVICE
from phoenix_operator.observed import Object, Observed, Refusal
from phoenix_operator.settings import Settings

HOST = {"networking": {"host": "models.example.com"}}
GATEWAY = {"kind": "HTTPRoute", "gateway": {"name": "web", "namespace": "gateways"}}


def found(spec: Object, settings: Object | None = None, **seen: Any) -> list[Fault]:
    read = Settings.model_validate(settings or {}, by_alias=True, by_name=False)
    return faults(subject(**spec), Observed(**{"served_kinds": OPTIONAL} | seen), read)


def only(spec: Object, settings: Object | None = None, **seen: Any) -> tuple[str, str]:
    (fault,) = found(spec, settings, **seen)
    assert fault.reason in CONDITIONS[ConditionType.ACCEPTED].otherwise
    return fault.reason, fault.message


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ({}, {}), ({"model": {"uri": "x", "sha256": DIGEST}}, {"requireDigest": True}),
        (HOST, {"routes": {"kind": "Ingress"}}), (HOST, {"routes": GATEWAY}),
        ({"runtime": {"accelerator": {}}}, {}), ({"runtime": {"accelerator": {"deviceClassName": "gpu"}}}, {}),
        ({"runtime": {"accelerator": {"profile": "nvidia-l4"}}}, {"acceleratorProfiles": PROFILES}),
        ({"pod": {"env": [{"name": "ANY", "value": "x"}, {"name": "PHOENIX_LOG_LEVEL", "value": "debug"}]}}, {}),
    ],
)  # fmt: skip
def test_what_can_be_done_is_accepted(spec: Object, settings: Object) -> None:
    assert found(spec, settings) == []


def test_digest_is_asked_for_where_the_cluster_does() -> None:
    reason, message = only({}, {"requireDigest": True})
    assert reason == "InvalidSpec"
    assert message.startswith("spec.model.sha256: ")


@pytest.mark.parametrize("name", RESERVED_ENV)
def test_variable_of_the_pods_own_wiring_is_refused(name: str) -> None:
    reason, message = only({"pod": {"env": [{"name": name, "value": "x"}, {"name": "OTHER", "value": "x"}]}})
    assert reason == "InvalidSpec"
    assert message.startswith(f"spec.pod.env: {name} belongs to the operator")


def test_variable_that_is_given_twice_is_refused() -> None:
    rows = [{"name": name, "value": "x"} for name in ("B", "A", "B", "A", "C")]
    assert only({"pod": {"env": rows}}) == ("InvalidSpec", "spec.pod.env: expected each name once, got A, B twice")


def test_profile_that_is_not_known_is_refused_with_those_that_are() -> None:
    reason, message = only({"runtime": {"accelerator": {"profile": "h100"}}}, {"acceleratorProfiles": PROFILES})
    assert reason == "InvalidSpec"
    assert "(nvidia-l4), got h100" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "name no route"), ({"routes": {"kind": "HTTPRoute"}}, "name no routes.gateway")],
)
def test_host_that_no_route_leads_to_is_refused(settings: Object, words: str) -> None:
    reason, message = only(HOST, settings)
    assert reason == "InvalidSpec"
    assert message.startswith("spec.networking.host: ")
    assert words in message


@pytest.mark.parametrize(
    ("spec", "settings", "kind", "field"),
    [
        (HOST, {"routes": GATEWAY}, HTTP_ROUTE, "spec.networking.host"),
        ({"runtime": {"accelerator": {"deviceClassName": "gpu"}}}, {}, RESOURCE_CLAIM_TEMPLATE,
         "spec.runtime.accelerator.deviceClassName"),
        ({"runtime": {"accelerator": {"profile": "x"}}}, {"acceleratorProfiles": {"x": {"deviceClassName": "gpu"}}},
         RESOURCE_CLAIM_TEMPLATE, "spec.runtime.accelerator.deviceClassName"),
    ],
)  # fmt: skip
def test_kind_that_the_cluster_lacks_is_named(spec: Object, settings: Object, kind: Any, field: str) -> None:
    reason, message = only(spec, settings, served_kinds=OPTIONAL - {kind})
    assert reason == "KindNotServed"
    assert message.startswith(f"{field}: the cluster does not serve {kind} ({kind.api_version})")


@pytest.mark.parametrize("kind", ["PodMonitor", "ServiceMonitor"])
def test_monitor_that_the_cluster_lacks_keeps_no_model_from_serving(kind: str) -> None:
    assert found({}, {"monitoring": {"kind": kind}}, served_kinds=frozenset()) == []


def test_gravest_reason_comes_first() -> None:
    every = found(
        {
            "runtime": {"accelerator": {"deviceClassName": "gpu"}},
            "autoscaling": {"maxReplicas": 2, "targetLatency": "1"},
        },
        {"requireDigest": True},
        foreign=[(DEPLOYMENT, "fraud"), (SERVICE, "fraud")],
        host_owner="other/fraud",
        refusals=[Refusal(SERVICE, "fraud", 422, "no"), Refusal(SERVICE, "x", 403, "quota", is_quota=True)],
        served_kinds=frozenset(),
    )
    assert [fault.reason for fault in every] == [
        "NameClash", "NameClash", "ObjectRefused", "InvalidSpec", "InvalidSpec", "KindNotServed",
    ]  # fmt: skip
    assert "Deployment ml/fraud, Service ml/fraud" in every[0].message


REDIS = {"name": "default", "kind": "redis", "adminSecretRef": {"name": "redis-admin"}}
KAFKA = {"name": "default", "kind": "kafka", "adminSecretRef": {"name": "kafka-admin"}}


@pytest.mark.parametrize(
    ("spec", "backends", "field", "known"),
    [
        ({"redis": {"backend": "default"}}, [], "redis", "none"),
        ({"redis": {"backend": "default"}}, [KAFKA], "redis", "none"),
        ({"kafka": {"backend": "defualt"}}, [REDIS, KAFKA, KAFKA | {"name": "other"}], "kafka", "default, other"),
    ],
)
def test_backend_that_the_settings_do_not_name_is_refused(
    spec: Object, backends: list[Object], field: str, known: str
) -> None:
    reason, message = only({"bindings": spec}, {"backends": backends})
    assert reason == "UnknownBackend"
    assert message.startswith(f"spec.bindings.{field}.backend: expected a backend of kind {field} ")
    assert f"({known}), got " in message


@pytest.mark.parametrize(
    ("kafka", "field"),
    [
        ({"events": {"topic": "phoenix.other.fraud.predictions"}}, "events.topic"),
        ({"events": {"topic": "phoenix.ml.fraud"}}, "events.topic"),
        ({"requests": {"topic": "phoenix.ml.fraud2.requests"}}, "requests.topic"),
        ({"requests": {"results": "results"}}, "requests.results"),
        ({"requests": {"deadLetterTopic": "dead"}}, "requests.deadLetterTopic"),
    ],
)
def test_topic_of_somebody_else_is_refused_on_a_backend_of_the_operator(kafka: Object, field: str) -> None:
    reason, message = only({"bindings": {"kafka": {"backend": "default"} | kafka}}, {"backends": [KAFKA]})
    assert reason == "InvalidSpec"
    assert message.startswith(f"spec.bindings.kafka.{field}: expected a topic that begins with phoenix.ml.fraud., ")
    assert found({"bindings": {"kafka": {"secretRef": {"name": "mine"}} | kafka}}) == []


def test_every_reason_of_the_condition_can_be_given() -> None:
    given = {Reason.INVALID_SPEC, Reason.NAME_CLASH, Reason.KIND_NOT_SERVED}
    given |= {Reason.UNKNOWN_BACKEND, Reason.OBJECT_REFUSED}
    unused = {Reason.NOT_SUPPORTED_YET}  # its page says so
    assert set(CONDITIONS[ConditionType.ACCEPTED].otherwise) == given | unused


SCALING = {"maxReplicas": 2, "targetLatency": "1"}


def test_autoscaling_needs_a_provider_of_the_settings() -> None:
    reason, message = only({"autoscaling": SCALING}, {})
    assert reason == "InvalidSpec"
    assert "spec.autoscaling: the operator's settings name no autoscaling.provider" in message
    assert found({"autoscaling": SCALING}, {"autoscaling": {"provider": "builtin"}}) == []


def test_only_keda_can_wake_a_model_from_no_replicas() -> None:
    kafka = {"kafka": {"secretRef": {"name": "mine"}, "requests": {}}}
    spec = {"autoscaling": SCALING | {"minReplicas": 0}, "bindings": kafka}
    reason, message = only(spec, {"autoscaling": {"provider": "builtin"}})
    assert reason == "InvalidSpec"
    assert "spec.autoscaling.minReplicas: expected at least 1, got 0" in message
