"""What values of the Helm chart there are: names, types, defaults, and the words about them.

Schema, `values.yaml` and the chart's README are made of it (`tools/chart.py`). What the operator's settings say already
is taken from their types, and defaults that the install manifests have are taken from these.
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from phoenix_api import Quantity
from phoenix_api.fields import ApiObject, DnsLabel, DnsName, Flag, Labels, Passthrough, Whole
from phoenix_api.types import PhoenixModelSpec, Resources, Toleration
from phoenix_operator import install, install_metrics_api
from phoenix_operator.observed import Object
from phoenix_operator.settings import AutoscalingSettings, BackendSettings, Monitoring, SecretName, Settings

Port = Annotated[Whole, Field(ge=1, le=65535)]
# Those that the pod's own wiring depends on are left out.
ServerVariable = Annotated[
    str,
    Field(pattern="^(PHOENIX_(ACCESS|API|AUDIT|BODY|DATABASE|EVENTS|EXIT|FEATURE|GRPC_ENGINE|HEADER|KAFKA|KEEP|MAX|"
          "MEASURE|REDIS|TRUSTED)[A-Z_]*|OTEL_[A-Z_]+|AWS_[A-Z_]+)$"),
]  # fmt: skip
Annotations = Annotated[dict[str, str], Field(max_length=64)]


def _deployment(objects: list[Object]) -> Object:
    (found,) = (body for body in objects if body["kind"] == "Deployment")
    return found


_OPERATOR = _deployment(install.manifests())
_METRICS_API = _deployment(install_metrics_api.manifests())
_POD = _OPERATOR["spec"]["template"]["spec"]["securityContext"]


class PullPolicy(StrEnum):
    """When nodes pull an image."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class LogLevel(StrEnum):
    """The least severe lines that are logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class RulesKind(StrEnum):
    """How the recording rules come to Prometheus."""

    NONE = "none"
    PROMETHEUS_RULE = "PrometheusRule"
    CONFIG_MAP = "ConfigMap"


class Image(ApiObject):
    """An image. A digest wins over a tag."""

    repository: Annotated[str, Field(pattern=r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)*$", max_length=255)] = Field(
        description="Registry and name."
    )
    tag: Annotated[str, Field(pattern="^([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$")] = Field(
        "", description="Tag; empty: the chart's `appVersion`, with `-gpu` for `serverGpu`."
    )
    digest: Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64})?$")] = Field("", description="Digest.")


def _image(name: str, description: str) -> Any:
    return Field(default_factory=lambda: Image(repository=f"phoenix-ml/{name}"), description=description)


class Images(ApiObject):
    """The images, and how they are pulled. A digest wins over a tag."""

    operator: Image = _image("phoenix-operator", "Image of operator, metrics API and test.")
    server: Image = _image("phoenix-server", "Image of the inference server.")
    server_gpu: Image = _image("phoenix-server", "The same for models that ask for an accelerator.")
    pull_policy: PullPolicy = Field(PullPolicy.IF_NOT_PRESENT, description="When nodes pull them.")
    pull_secrets: Annotated[list[SecretName], Field(max_length=8)] = Field(
        default_factory=list,
        description="Secrets of this namespace with which the operator's own pods pull. "
        "Models name theirs in `spec.pod.imagePullSecrets`.",
    )


class Account(ApiObject):
    """The ServiceAccount."""

    annotations: Annotations = Field(default_factory=dict, description="Its annotations.")


class Affinity(ApiObject):
    """An affinity, as in Kubernetes."""

    node_affinity: Passthrough | None = Field(None, description="As in Kubernetes.")
    pod_affinity: Passthrough | None = Field(None, description="As in Kubernetes.")
    pod_anti_affinity: Passthrough | None = Field(
        None, description="As in Kubernetes; absent: the replicas keep to different nodes where they can."
    )


class SecretMount(ApiObject):
    """A Secret of this namespace that is mounted, for `caFile`, `bearerTokenFile` and `certificate.folder`."""

    name: DnsName = Field(description="Its name.")
    path: Annotated[str, Field(pattern="^/[A-Za-z0-9._/-]+$", max_length=255)] = Field(description="Folder in the pod.")


class Workload(ApiObject):
    """What both Deployments can be told."""

    replicas: Annotated[Whole, Field(ge=0, le=9)] = Field(description="Number of pods.")
    resources: Resources = Field(description="Requests and limits.")
    log_level: LogLevel = Field(LogLevel.INFO, description="The least severe lines that are logged.")
    service_account: Account = Field(default_factory=Account)
    pod_annotations: Annotations = Field(default_factory=dict, description="Annotations of the pods.")
    secret_mounts: Annotated[list[SecretMount], Field(max_length=8)] = Field(
        default_factory=list, description="Secrets of this namespace that are mounted."
    )
    node_selector: Labels = Field(default_factory=dict, description="Labels of the nodes that may run the pods.")
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(
        default_factory=list, description="Taints that the pods tolerate."
    )
    affinity: Affinity = Field(default_factory=Affinity)
    priority_class_name: DnsName | None = Field(None, description="PriorityClass of the pods.")


class Operator(Workload):
    """The operator: of its pods one leads, the others stand by."""

    enabled: Flag = Field(True, description="Install it, with its rights.")
    replicas: Annotated[Whole, Field(ge=0, le=9)] = Field(_OPERATOR["spec"]["replicas"], description="Number of pods.")
    resources: Resources = Field(
        default_factory=lambda: _resources(_OPERATOR), description="Requests and limits of a pod."
    )


class MetricsApi(Workload):
    """The server for `custom.metrics.k8s.io`, of which a cluster has one. Needs `autoscaling.prometheus.url`."""

    enabled: Flag = Field(False, description="Install it, for `autoscaling.provider: builtin`.")
    replicas: Annotated[Whole, Field(ge=0, le=9)] = Field(
        _METRICS_API["spec"]["replicas"], description="Number of pods; none of them leads."
    )
    resources: Resources = Field(
        default_factory=lambda: _resources(_METRICS_API), description="Requests and limits of a pod."
    )
    api_service_annotations: Annotations = Field(
        default_factory=dict, description="Annotations of the APIServices, for example for cert-manager's CA injector."
    )


def _resources(deployment: Object) -> Resources:
    return Resources.model_validate(deployment["spec"]["template"]["spec"]["containers"][0]["resources"])


ModelName = Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]


class Standalone(Workload):
    """A server of its own for models that are given here, without operator and CRD; for clusters that want no CRDs."""

    enabled: Flag = Field(False, description="Install it.")
    replicas: Annotated[Whole, Field(ge=0, le=100)] = Field(1, description="Number of pods; each serves all models.")
    resources: Resources = Field(
        default_factory=lambda: Resources(
            requests={"cpu": Quantity("250m"), "memory": Quantity("512Mi")}, limits={"memory": Quantity("512Mi")}
        ),
        description="Requests and limits of a pod.",
    )
    models: Annotated[dict[ModelName, PhoenixModelSpec], Field(max_length=64)] = Field(
        default_factory=dict,
        description="The `spec` of each model by its name: `docs/reference/phoenixmodel.md`. What needs the operator "
        "is refused: `resources`, `replicas`, `autoscaling`, `networking`, `rollout`, `pod`, `model.cache`, "
        "`runtime.image`, and models in volumes, images and ConfigMaps.",
    )
    environment: Annotated[dict[ServerVariable, str], Field(max_length=64)] = Field(
        default_factory=dict, description="Settings of the server: `docs/reference/settings.md`."
    )
    binding_secrets: Annotated[list[DnsName], Field(max_length=8)] = Field(
        default_factory=list, description="Secrets of this namespace in the Service Binding layout, for `bindings`."
    )
    drain_seconds: Annotated[Whole, Field(ge=0, le=600)] = Field(
        10, description="Time that a pod that ends goes on answering, while it says that it is not ready."
    )
    longest_request_seconds: Annotated[Whole, Field(ge=1, le=3600)] = Field(
        30, description="Time that a request in flight is given after that; the longest `limits.timeoutSeconds`."
    )


class Rules(ApiObject):
    """The recording rules for autoscaling."""

    kind: RulesKind = Field(
        RulesKind.NONE, description="`PrometheusRule`, `ConfigMap` (key `phoenix.rules.yaml`), or `none`."
    )


class ChartMonitoring(Monitoring):
    """How Prometheus scrapes models and operator, and gets the rules. The labels are those of all these objects."""

    rules: Rules = Field(default_factory=Rules)


class NetworkPolicies(ApiObject):
    """NetworkPolicies of operator and metrics API. Those of models are `settings.networkPolicies`."""

    enabled: Flag = Field(True, description="Make them.")
    backend_ports: Annotated[list[Port], Field(max_length=32)] = Field(
        list(install.BACKEND_PORTS), description="Ports of backends that the operator reaches, with `backends`."
    )
    prometheus_ports: Annotated[list[Port], Field(max_length=8)] = Field(
        list(install_metrics_api.PROMETHEUS_PORTS),
        description="Ports of Prometheus, as pods listen; 443 is open already.",
    )


class PodSecurity(ApiObject):
    """Whom the pods run as. With null the cluster decides, as OpenShift wants. All else passes `restricted`."""

    run_as_user: Annotated[Whole, Field(ge=1, le=2147483647)] = Field(_POD["runAsUser"], description="User.")
    run_as_group: Annotated[Whole, Field(ge=1, le=2147483647)] = Field(_POD["runAsGroup"], description="Group.")


class Crds(ApiObject):
    """The CustomResourceDefinition of PhoenixModel. Uninstalling keeps it, with all models."""

    install: Flag = Field(True, description="Install and upgrade it. One release of a cluster does.")


class Rbac(ApiObject):
    """Rights of people."""

    aggregate: Flag = Field(
        True, description="Extend the roles admin, edit and view to PhoenixModels, in a cluster-wide install."
    )


class Values(ApiObject):
    """All values of the chart."""

    images: Images = Field(default_factory=Images)
    namespaces: Annotated[list[DnsLabel], Field(max_length=256)] = Field(
        default_factory=list,
        description="Namespaces whose models are served, by Roles in each of them; they have to exist. "
        "Empty: the whole cluster.",
    )
    secrets: Annotated[list[DnsName], Field(max_length=256)] = Field(
        default_factory=list,
        description="With `namespaces`: Secrets there that the operator may read, of fetches and of bindings.",
    )
    operator: Operator = Field(default_factory=Operator)
    metrics_api: MetricsApi = Field(default_factory=MetricsApi)
    standalone: Standalone = Field(default_factory=Standalone)
    autoscaling: AutoscalingSettings = Field(default_factory=AutoscalingSettings)
    monitoring: ChartMonitoring = Field(default_factory=ChartMonitoring)
    backends: Annotated[list[BackendSettings], Field(max_length=32)] = Field(
        default_factory=list,
        description="What models can bind to by name. With any, the operator gets the rights that bindings need.",
    )
    settings: Settings = Field(
        default_factory=Settings,
        description="The operator's other settings: `docs/reference/operator-settings.md`. What has a value of its own "
        "here is not repeated: images, backends, autoscaling, monitoring and ports.",
    )
    network_policies: NetworkPolicies = Field(default_factory=NetworkPolicies)
    pod_security: PodSecurity = Field(default_factory=PodSecurity)
    crds: Crds = Field(default_factory=Crds)
    rbac: Rbac = Field(default_factory=Rbac)
