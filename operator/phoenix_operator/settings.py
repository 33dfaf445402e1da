"""What the one who runs the operator decides: images, routes, accelerator profiles, pace. Read once, from one file.

The file is YAML in the spelling of the API (camelCase). An unknown or wrong field is an error that names it; so is a
file that is not there. Pure modules get `Settings` as an argument and read nothing themselves.
"""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from phoenix_api import Quantity
from phoenix_api.fields import ApiObject, DnsLabel, DnsName, Flag, Labels, Number, Passthrough, Whole
from phoenix_api.types import Resources, Toleration
from phoenix_operator import __version__


class SettingsError(Exception):
    """Settings that cannot be used; the message lists every fault with its path."""


class RouteKind(StrEnum):
    """What `spec.networking.host` becomes."""

    INGRESS = "Ingress"
    HTTP_ROUTE = "HTTPRoute"


class MonitorKind(StrEnum):
    """How Prometheus learns of the pods."""

    POD_MONITOR = "PodMonitor"
    SERVICE_MONITOR = "ServiceMonitor"


class BackendKind(StrEnum):
    """What a backend is; also the type of its bindings."""

    REDIS = "redis"
    KAFKA = "kafka"
    POSTGRESQL = "postgresql"


class AutoscalingProvider(StrEnum):
    """Who answers the autoscaler's questions about `inference_latency_seconds`."""

    BUILTIN = "builtin"
    PROMETHEUS_ADAPTER = "prometheus-adapter"
    KEDA = "keda"


class AcceleratorProfile(ApiObject):
    """What `spec.runtime.accelerator.profile` stands for, so that model authors need not know the nodes."""

    resource_name: str | None = Field(None, description="Extended resource, for example `nvidia.com/gpu`.")
    device_class_name: DnsName | None = Field(None, description="DeviceClass (DRA), instead of resourceName.")
    node_selector: Labels = Field(default_factory=dict, description="Labels of the nodes that have it.")
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(
        default_factory=list, description="Taints of these nodes."
    )
    runtime_class_name: DnsName | None = Field(None, description="RuntimeClass that the devices need.")


class Gateway(ApiObject):
    """The Gateway that HTTPRoutes attach to."""

    name: DnsName = Field(description="Its name.")
    namespace: DnsLabel = Field(description="Its namespace.")
    section_name: DnsName | None = Field(None, description="Its listener; absent: all.")


class Routes(ApiObject):
    """How models are reached from outside."""

    kind: RouteKind | None = Field(None, description="Absent: `spec.networking.host` is refused with the reason.")
    ingress_class_name: DnsName | None = Field(None, description="Class of Ingresses; absent: the cluster's default.")
    gateway: Gateway | None = Field(None, description="Gateway of HTTPRoutes.")
    tls_secret_name: DnsName | None = Field(None, description="TLS Secret of Ingresses, in the model's namespace.")
    controller_namespace: DnsLabel | None = Field(None, description="Namespace from which routed requests come.")

    @property
    def url_scheme(self) -> str:
        """`https` where TLS ends at the route; a Gateway's listeners decide for themselves and are taken to do so."""
        return "https" if self.kind is RouteKind.HTTP_ROUTE or self.tls_secret_name else "http"


class Monitoring(ApiObject):
    """How pods are scraped."""

    kind: MonitorKind | None = Field(None, description="Object made for each model; absent: none.")
    labels: Labels = Field(default_factory=dict, description="Labels by which Prometheus selects it.")
    namespace: DnsLabel | None = Field(None, description="Namespace from which Prometheus scrapes.")
    interval: Annotated[str, Field(pattern="^[0-9]+(ms|s|m)$", max_length=16)] = Field(
        "15s", description="Time between two scrapes."
    )


class SecretName(ApiObject):
    """A Secret in the operator's namespace."""

    name: DnsName = Field(description="Its name.")


class Capabilities(ApiObject):
    """What the operator may do on a backend. What is off is done by somebody else, before the model comes."""

    manage_topics: Flag = Field(True, description="Kafka: make, widen and delete topics.")
    manage_acls: Flag = Field(True, description="Kafka: give each login rights on its model's topics and group.")
    manage_users: Flag = Field(
        True, description="Make a login for each model. Off: every model gets the credentials of the admin Secret."
    )
    manage_schemas: Flag = Field(True, description="PostgreSQL: make and drop a schema for each model.")


def _http_address(value: str) -> str:
    """Return an address as others append paths to it."""
    try:
        parts = urlsplit(value)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or any(character.isspace() for character in value):
        raise PydanticCustomError("rule", "expected an address http://HOST:PORT or https://HOST:PORT")
    if parts.username is not None or parts.query or parts.fragment:
        raise PydanticCustomError(
            "rule", "expected an address without user, query and fragment (for a token there is bearerTokenFile)"
        )
    return value.rstrip("/")


class Prometheus(ApiObject):
    """The Prometheus that evaluates the recording rules, or what speaks its query API."""

    url: Annotated[str, Field(max_length=2048), AfterValidator(_http_address)] | None = Field(
        None, description="Its address, for example `http://prometheus-operated.monitoring.svc:9090`."
    )
    ca_file: str | None = Field(
        None, description="File with the authorities that sign its certificate; absent: the system's."
    )
    bearer_token_file: str | None = Field(
        None, description="File with a token that is sent along; read again for each query."
    )
    timeout_seconds: Number = Field(5, gt=0, le=60, description="Deadline of a query.")


class ServingCertificate(ApiObject):
    """What the API server knows the metrics API by."""

    folder: str | None = Field(
        None,
        description="Folder with `tls.crt` and `tls.key` that somebody else makes and renews, for example cert-manager,"
        " and whose authority stands in the APIServices; absent: the metrics API makes its own.",
    )
    lifetime_days: Whole = Field(
        90, ge=1, le=825, description="Lifetime of one that it makes; replaced after two thirds of it."
    )


class AutoscalingSettings(ApiObject):
    """How models are scaled, and what `phoenix-operator metrics-api` answers from."""

    provider: AutoscalingProvider | None = Field(
        None,
        description="Who answers: `builtin` is the metrics API of this program; absent: nobody, models are not scaled.",
    )
    prometheus: Prometheus = Field(
        default_factory=Prometheus, description="The Prometheus that evaluates the recording rules."
    )
    cache_seconds: Number = Field(
        5, ge=0, le=60, description="How long an answer of Prometheus is used again; less than its rule interval."
    )
    max_age_seconds: Number = Field(
        60, ge=10, le=300, description="Age at which a sample is taken for absent: twice the rule interval or more."
    )
    certificate: ServingCertificate = Field(
        default_factory=ServingCertificate, description="The serving certificate of the metrics API."
    )
    https_port: Whole = Field(8443, ge=0, le=65535, description="Port of the metrics API.")

    @model_validator(mode="after")
    def _has_an_address(self) -> Self:
        if self.provider is AutoscalingProvider.KEDA and self.prometheus.url is None:
            raise PydanticCustomError("rule", "expected prometheus.url, which KEDA is to ask, with the provider keda")
        return self


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("rule", "expected -1 or at least 1")
    return value


class BackendSettings(ApiObject):
    """A Redis, Kafka or PostgreSQL that models may bind to by its name."""

    name: DnsLabel = Field(description="What `spec.bindings.*.backend` says.")
    kind: BackendKind = Field(description="What it is.")
    admin_secret_ref: SecretName = Field(
        description="Secret in the operator's namespace with address and credentials, in the Service Binding layout."
    )
    capabilities: Capabilities = Field(default_factory=Capabilities, description="What the operator may do on it.")
    timeout_seconds: Number = Field(10, gt=0, le=120, description="Deadline of each call to it.")
    replication_factor: Annotated[Whole, AfterValidator(_not_zero)] = Field(
        -1, ge=-1, le=32, description="Kafka: replicas of new topics; -1 is the broker's own default."
    )
    connection_limit: Whole = Field(50, ge=1, le=10_000, description="PostgreSQL: connections of one login.")


def _distinct_backends(backends: list[BackendSettings]) -> list[BackendSettings]:
    names = [(backend.kind, backend.name) for backend in backends]
    twice = {f"{kind} {name}" for kind, name in names if names.count((kind, name)) > 1}
    if twice:
        raise PydanticCustomError("rule", f"expected each kind and name once, got {', '.join(sorted(twice))} twice")
    return backends


def _default_resources() -> Resources:
    return Resources(requests={"cpu": Quantity("250m"), "memory": Quantity("512Mi")}, limits={})


class Settings(ApiObject):
    """Everything the operator's settings file may say. Durations are in seconds."""

    server_image: str = Field(f"phoenix-ml/phoenix-server:{__version__}", description="Image of the inference server.")
    server_gpu_image: str = Field(
        f"phoenix-ml/phoenix-server:{__version__}-gpu", description="The same for models that ask for an accelerator."
    )
    image_pull_policy: Annotated[str, Field(pattern="^(Always|IfNotPresent|Never)$")] = Field(
        "IfNotPresent", description="Pull policy of both."
    )
    require_digest: Flag = Field(False, description="Refuse models without `spec.model.sha256`.")
    default_resources: Resources = Field(
        default_factory=_default_resources,
        description="Requests of pods whose model names none. The memory limit follows the request.",
    )
    accelerator_profiles: dict[DnsLabel, AcceleratorProfile] = Field(
        default_factory=dict, description="Accelerator profiles by name."
    )
    routes: Routes = Field(default_factory=Routes, description="How models are reached from outside.")
    monitoring: Monitoring = Field(default_factory=Monitoring, description="How pods are scraped.")
    autoscaling: AutoscalingSettings = Field(default_factory=AutoscalingSettings, description="How models are scaled.")
    network_policies: Flag = Field(True, description="Make a default-deny NetworkPolicy for each model.")
    extra_egress: Annotated[list[Passthrough], Field(max_length=32)] = Field(
        default_factory=list, description="NetworkPolicyEgressRules added for every model, for example a proxy."
    )
    backends: Annotated[list[BackendSettings], Field(max_length=32), AfterValidator(_distinct_backends)] = Field(
        default_factory=list, description="What models can bind to by name."
    )
    binding_check_seconds: Whole = Field(
        60, ge=5, le=3600, description="Time after which the pods of a model with bindings are asked how these do."
    )
    workers: Whole = Field(32, ge=1, le=64, description="Models that are reconciled at the same time.")
    resync_seconds: Whole = Field(600, ge=10, le=86_400, description="Time after which each model is looked at again.")
    # more than one process can send: the API server's own priority and fairness sets the pace, by 429 and Retry-After
    api_requests_per_second: Whole = Field(
        2000, ge=1, le=10_000, description="Highest pace of requests to the API server."
    )
    request_timeout_seconds: Number = Field(30, gt=0, le=300, description="Deadline of a request to the API server.")
    state_timeout_seconds: Number = Field(2, gt=0, le=60, description="Deadline of a question to a pod.")
    lease_seconds: Whole = Field(15, ge=5, le=300, description="Time after which a silent leader is replaced.")
    http_port: Whole = Field(8080, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics.")


def read_settings(file: Path | None) -> Settings:
    """Read the settings; without a file all are at their defaults. Raises `SettingsError`."""
    if file is None:
        return Settings()
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: is no YAML: {' '.join(str(error).split())}") from error
    try:
        return Settings.model_validate({} if values is None else values, by_alias=True, by_name=False)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg']}, got {_shown(fault['input'])}"
            for fault in error.errors(include_url=False)
        ]
        raise SettingsError(f"{file}: " + "; ".join(faults)) from error


def _shown(value: object) -> str:
    """Return a value for a message: in short, and without the password of an address."""
    return re.sub(r"//\S*@", "//***@", repr(value))[:80]
