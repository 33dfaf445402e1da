"""The settings file: read once, and every fault in it named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from phoenix_operator.settings import (
    AutoscalingProvider,
    MonitorKind,
    RouteKind,
    Routes,
    Settings,
    SettingsError,
    read_settings,
)


def written(folder: Path, values: Any) -> Path:
    file = folder / "settings.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return file


def backend(**values: Any) -> dict[str, Any]:
    return {"name": "default", "kind": "redis", "adminSecretRef": {"name": "redis-admin"}, **values}


def fault(folder: Path, values: Any) -> str:
    file = written(folder, values)
    with pytest.raises(SettingsError) as caught:
        read_settings(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n", "---\n"])
def test_file_that_says_nothing_leaves_every_default(tmp_path: Path, text: str) -> None:
    assert read_settings(written(tmp_path, text)) == read_settings(None) == Settings()


def test_file_is_read_in_the_spelling_of_the_api(tmp_path: Path) -> None:
    values = {
        "serverImage": "example.com/server:1",
        "defaultResources": {"requests": {"cpu": "2"}},
        "acceleratorProfiles": {"l4": {"resourceName": "nvidia.com/gpu", "nodeSelector": {"a": "b"}}},
        "routes": {"kind": "HTTPRoute", "gateway": {"name": "web", "namespace": "gateways"}},
        "monitoring": {"kind": "ServiceMonitor", "interval": "1m"},
        "networkPolicies": False,
        "requestTimeoutSeconds": 2.5,
        "workers": 4,
    }
    settings = read_settings(written(tmp_path, values))
    assert settings.server_image == "example.com/server:1"
    assert settings.default_resources.requests["cpu"] == "2"
    assert settings.accelerator_profiles["l4"].node_selector == {"a": "b"}
    assert settings.routes.kind is RouteKind.HTTP_ROUTE
    assert settings.monitoring.kind is MonitorKind.SERVICE_MONITOR
    assert (settings.network_policies, settings.request_timeout_seconds, settings.workers) == (False, 2.5, 4)


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"workers": 0}, "workers"), ({"workers": "many"}, "workers"), ({"workers": 1.5}, "workers"),
        ({"workers": True}, "workers"), ({"leaseSeconds": 4}, "leaseSeconds"),
        ({"requestTimeoutSeconds": 0}, "requestTimeoutSeconds"), ({"stateTimeoutSeconds": "2s"}, "stateTimeoutSeconds"),
        ({"httpPort": 65536}, "httpPort"), ({"resyncSeconds": 5}, "resyncSeconds"),
        ({"apiRequestsPerSecond": -1}, "apiRequestsPerSecond"), ({"imagePullPolicy": "Sometimes"}, "imagePullPolicy"),
        ({"networkPolicies": "yes"}, "networkPolicies"), ({"requireDigest": 1}, "requireDigest"),
        ({"routes": {"kind": "Route"}}, "routes.kind"), ({"routes": {"gateway": {"name": "x"}}}, "namespace"),
        ({"routes": {"ingressClassName": "no spaces"}}, "routes.ingressClassName"), ({"routes": []}, "routes"),
        ({"monitoring": {"interval": "often"}}, "monitoring.interval"), ({"serverImage": 5}, "serverImage"),
        ({"defaultResources": {"requests": {"cpu": "much"}}}, "defaultResources.requests.cpu"),
        ({"acceleratorProfiles": {"l4": {"tolerations": [{"tolerationSeconds": -1}]}}}, "tolerationSeconds"),
        ({"acceleratorProfiles": {"L4": {}}}, "L4"), ({"extraEgress": {}}, "extraEgress"),
        ({"server_image": "python spelling"}, "server_image"), ({"fromTheFuture": 1}, "fromTheFuture"),
        ({"routes": {"fromTheFuture": 1}}, "routes.fromTheFuture"), ({"backends": {}}, "backends"),
        ({"backends": [backend(kind="mysql")]}, "backends.0.kind"),
        ({"backends": [backend(name="")]}, "backends.0.name"),
        ({"backends": [{"name": "x", "kind": "redis"}]}, "backends.0.adminSecretRef"),
        ({"backends": [backend(password="p")]}, "backends.0.password"),
        ({"backends": [backend(timeoutSeconds=0)]}, "backends.0.timeoutSeconds"),
        ({"backends": [backend(replicationFactor=0)]}, "backends.0.replicationFactor"),
        ({"backends": [backend(capabilities={"manageUsers": "no"})]}, "backends.0.capabilities.manageUsers"),
        ({"autoscaling": {"provider": "hpa"}}, "autoscaling.provider"),
        ({"autoscaling": {"provider": "keda"}}, "autoscaling: expected prometheus.url"),
        ({"autoscaling": {"prometheus": {"url": "prometheus:9090"}}}, "autoscaling.prometheus.url"),
        ({"autoscaling": {"prometheus": {"url": "ftp://prometheus"}}}, "autoscaling.prometheus.url"),
        ({"autoscaling": {"prometheus": {"url": "http://prometheus:x"}}}, "autoscaling.prometheus.url"),
        ({"autoscaling": {"prometheus": {"url": "http://a b"}}}, "autoscaling.prometheus.url"),
        ({"autoscaling": {"prometheus": {"url": "http://p?query=x"}}}, "autoscaling.prometheus.url"),
        ({"autoscaling": {"prometheus": {"timeoutSeconds": 0}}}, "autoscaling.prometheus.timeoutSeconds"),
        ({"autoscaling": {"prometheus": {"bearerToken": "t"}}}, "autoscaling.prometheus.bearerToken"),
        ({"autoscaling": {"cacheSeconds": -1}}, "autoscaling.cacheSeconds"),
        ({"autoscaling": {"maxAgeSeconds": 5}}, "autoscaling.maxAgeSeconds"),
        ({"autoscaling": {"certificate": {"lifetimeDays": 0}}}, "autoscaling.certificate.lifetimeDays"),
        ({"backends": [backend(), backend()]}, "expected each kind and name once, got redis default twice"),
    ],
)  # fmt: skip
def test_wrong_field_is_named(tmp_path: Path, values: dict[str, Any], path: str) -> None:
    message = fault(tmp_path, values)
    assert path in message
    assert "; " not in message, "and no other"


def test_backends_of_different_kinds_may_share_a_name(tmp_path: Path) -> None:
    values = {"backends": [backend(), backend(kind="kafka", capabilities={"manageAcls": False})]}
    redis, kafka = read_settings(written(tmp_path, values)).backends
    assert (redis.kind, redis.capabilities.manage_acls, redis.admin_secret_ref.name) == ("redis", True, "redis-admin")
    assert (kafka.kind, kafka.capabilities.manage_acls, kafka.replication_factor) == ("kafka", False, -1)


def test_every_wrong_field_is_named_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, {"workers": 0, "leaseSeconds": 1, "more": True, "routes": {"kind": "x"}})
    assert message.count("; ") == 3
    assert all(f"{path}: " in message for path in ("workers", "leaseSeconds", "more", "routes.kind"))
    assert "got 0" in message


@pytest.mark.parametrize("text", ["a: [", "\tx: 1", "- 1\n- 2", "just words", "a: 1\n---\nb: 2\n"])
def test_file_that_holds_no_settings_is_told(tmp_path: Path, text: str) -> None:
    assert fault(tmp_path, text)


def test_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing\.yaml: cannot be read: No such file"):
        read_settings(tmp_path / "missing.yaml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        read_settings(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="is no YAML"):
        read_settings(tmp_path / "binary")


def test_long_value_is_shown_in_short(tmp_path: Path) -> None:
    assert len(fault(tmp_path, {"workers": "x" * 10_000})) < 300


@pytest.mark.parametrize(
    ("routes", "scheme"),
    [
        (Routes(), "http"), (Routes(kind=RouteKind.INGRESS), "http"),
        (Routes(kind=RouteKind.INGRESS, tls_secret_name="x"), "https"), (Routes(kind=RouteKind.HTTP_ROUTE), "https"),
    ],
)  # fmt: skip
def test_address_from_outside_is_https_where_tls_ends_at_the_route(routes: Routes, scheme: str) -> None:
    assert routes.url_scheme == scheme


def test_autoscaling_is_read_in_the_spelling_of_the_api(tmp_path: Path) -> None:
    values = {
        "provider": "prometheus-adapter",
        "prometheus": {"url": "https://thanos.example.com:9090/tenant/", "caFile": "/ca.crt", "timeoutSeconds": 2},
        "cacheSeconds": 0,
        "certificate": {"folder": "/certificate"},
    }
    autoscaling = read_settings(written(tmp_path, {"autoscaling": values})).autoscaling
    assert autoscaling.provider is AutoscalingProvider.PROMETHEUS_ADAPTER
    assert autoscaling.prometheus.url == "https://thanos.example.com:9090/tenant"
    assert (autoscaling.prometheus.ca_file, autoscaling.prometheus.bearer_token_file) == ("/ca.crt", None)
    assert (autoscaling.prometheus.timeout_seconds, autoscaling.cache_seconds) == (2, 0)
    assert autoscaling.certificate.folder == "/certificate"
    assert Settings().autoscaling.provider is None


@pytest.mark.parametrize("address", ["http://me:hunter2@prometheus", "ftp://me:hunter2@x", "http://me:hun/ter2@x"])
def test_password_in_an_address_is_refused_and_not_shown(tmp_path: Path, address: str) -> None:
    message = fault(tmp_path, {"autoscaling": {"prometheus": {"url": address}}})
    assert message.startswith("autoscaling.prometheus.url: expected an address")
    assert "ter2" not in message
