"""The PhoenixModel that users write: metadata and the whole of `spec`, field by field.

The only source of the API: CRD, editor schema and reference page are generated from these types (`crd`, `schema`,
`reference`). Descriptions are written for users. A default becomes part of every stored object and can never change,
so a field has one only where the choice is stable.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field

from phoenix_api.fields import (
    ApiObject,
    DnsLabel,
    DnsName,
    Flag,
    FreeText,
    Labels,
    LabelValue,
    NullIsAbsent,
    Number,
    Passthrough,
    Topic,
    Whole,
    text,
)
from phoenix_api.quantity import Quantity
from phoenix_api.status import Status

GROUP = "phoenix-ml.io"
VERSION = "v1alpha1"
API_VERSION: Literal["phoenix-ml.io/v1alpha1"] = "phoenix-ml.io/v1alpha1"
KIND: Literal["PhoenixModel"] = "PhoenixModel"

# not \s, which regular expressions of Go, Rust and Python understand differently
Image = Annotated[str, text("^[!-~]+$", "an image reference in ASCII without spaces", max_length=1024)]
EnvName = Annotated[str, text("^[A-Za-z_][A-Za-z0-9_]*$", "the name of an environment variable", max_length=128)]
TensorName = Annotated[str, Field(min_length=1, max_length=256)]
RedisField = Annotated[str, Field(min_length=1, max_length=128)]
Amounts = Annotated[dict[str, Quantity], Field(max_length=16), NullIsAbsent]


class AcceleratorPolicy(StrEnum):
    """What happens when the accelerator is not there."""

    REQUIRE = "Require"
    PREFER = "Prefer"


class Provider(StrEnum):
    """The execution providers of ONNX Runtime, by their short names."""

    CUDA = "CUDA"
    TENSORRT = "TensorRT"
    ROCM = "ROCm"
    MIGRAPHX = "MIGraphX"
    OPENVINO = "OpenVINO"


class ScalingMetric(StrEnum):
    """What the autoscaler looks at."""

    SLO = "SLO"
    LATENCY = "Latency"


class OnMissing(StrEnum):
    """What happens to a request when features are missing."""

    REJECT = "Reject"
    DEFAULT = "Default"


class OnStale(StrEnum):
    """What happens to a request when features are too old."""

    USE = "Use"
    REJECT = "Reject"


class AuditMode(StrEnum):
    """How firmly predictions are recorded."""

    DURABLE = "Durable"
    BEST_EFFORT = "BestEffort"
    OFF = "Off"


class DeletionPolicy(StrEnum):
    """What happens to data in the backends when the PhoenixModel is deleted."""

    RETAIN = "Retain"
    DELETE = "Delete"


class RateLimitScope(StrEnum):
    """Whose requests are counted together."""

    CLIENT = "Client"
    MODEL = "Model"


class RolloutStrategy(StrEnum):
    """How pods are replaced."""

    AUTO = "Auto"
    SURGE = "Surge"
    IN_PLACE = "InPlace"


class LocalReference(ApiObject):
    """An object in the namespace of the PhoenixModel."""

    name: DnsName = Field(description="Its name.")


class Credentials(ApiObject):
    """Where the fetch of the model finds its credentials."""

    secret_ref: LocalReference = Field(
        description="Secret whose keys become environment variables of the fetch, and of nothing else."
    )


class ModelCache(ApiObject):
    """Where fetched models are kept."""

    persistent_volume_claim: DnsName = Field(description="Claim that pods share, so that a model is fetched once.")


class ModelSource(ApiObject):
    """The ONNX model and where it comes from."""

    uri: Annotated[
        str,
        text(r"^[^\x00-\x20\\\x7f]+$", "a relative path or a URI, without spaces and backslashes", max_length=1024),
    ] = Field(
        description="Where the model is: a path beside the manifest, in the folder around its folder, or under the "
        "model store (`iris/model.onnx`), `file:///absolute/path`, `https://…`, `s3://bucket/key`, `gs://bucket/key`, "
        "`az://container/key`, `pvc://claim/path`, `oci://registry/repository@sha256:…#path`, or "
        "`configmap://name/key` (under 1 MiB)."
    )
    sha256: Annotated[str, text("^[0-9a-f]{64}$", "64 hex digits (0-9, a-f)", max_length=64)] | None = Field(
        None,
        description="Digest of the model file, checked on every load; with external data, of the manifest of all "
        "files. A model with another digest is never loaded.",
    )
    version: Annotated[
        str,
        text("^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", "a version (A-Z, a-z, 0-9, -, _ and .)", max_length=63),
    ] = Field("1", description="Version in the Open Inference Protocol. Quote it: it is a string.")
    credentials: Credentials | None = Field(None, description="Credentials for the fetch; absent: none.")
    cache: ModelCache | None = Field(None, description="Shared cache; absent: an emptyDir per pod.")


class Accelerator(ApiObject):
    """The accelerator that sessions run on."""

    policy: AcceleratorPolicy = Field(
        AcceleratorPolicy.REQUIRE,
        description="`Require` refuses to serve without it; `Prefer` serves on the CPU then, and says so.",
    )
    resource_name: (
        Annotated[
            str,
            text(
                r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
                "an extended resource such as nvidia.com/gpu",
                max_length=317,
            ),
        ]
        | None
    ) = Field(
        None,
        description="Extended resource to ask for, for example `nvidia.com/mig-1g.10gb`. Absent, with neither "
        "deviceClassName nor profile: the usual one of the provider's vendor.",
    )
    count: Whole = Field(1, ge=1, le=16, description="Devices per pod.")
    provider: Provider = Field(Provider.CUDA, description="Execution provider of ONNX Runtime.")
    provider_options: Annotated[dict[str, FreeText], Field(max_length=32), NullIsAbsent] = Field(
        default_factory=dict, description="Options of the execution provider, handed on as they are."
    )
    device_class_name: DnsName | None = Field(
        None, description="DeviceClass of a ResourceClaimTemplate (DRA), instead of resourceName."
    )
    profile: DnsLabel | None = Field(
        None,
        description="Accelerator profile of the operator's settings, which knows resource, node selector and "
        "tolerations; instead of resourceName and deviceClassName.",
    )


class Runtime(ApiObject):
    """How sessions run."""

    accelerator: Accelerator | None = Field(None, description="Accelerator; absent: CPU.")
    threads: Whole = Field(0, ge=0, le=512, description="Intra-op threads; 0: the CPU request, rounded up.")
    instances: Whole = Field(1, ge=1, le=64, description="Sessions in one pod.")
    image: Image | None = Field(
        None, description="Server image; absent: the operator's, in its GPU variant when an accelerator is asked."
    )


class Batching(ApiObject):
    """How requests are joined into batches. What queued while the last batch ran is the next one."""

    max_rows: Whole = Field(32, ge=1, le=65536, description="Most rows in a batch; 1 switches batching off.")
    max_delay_milliseconds: Whole = Field(
        0, ge=0, le=60000, description="How long a batch waits for more rows when the session is free."
    )


class Warmup(ApiObject):
    """What runs before the model counts as ready."""

    iterations: Whole = Field(3, ge=0, le=1000, description="Inferences; 0: none.")
    rows: Whole = Field(1, ge=1, le=65536, description="Rows of each.")


class Limits(ApiObject):
    """What the server refuses."""

    max_request_bytes: Quantity = Field(Quantity("64Mi"), description="Largest request body, at most 2Gi.")
    max_queued_rows: Whole = Field(
        1024, ge=1, le=10_000_000, description="Rows that may wait; more are refused at once as overload."
    )
    timeout_seconds: Whole = Field(30, ge=1, le=3600, description="Longest time that a request may take.")


class Resources(ApiObject):
    """Compute resources of a pod, as in Kubernetes."""

    requests: Amounts = Field(default_factory=dict, description="What the scheduler sets aside.")
    limits: Amounts = Field(
        default_factory=dict, description="What a pod may not exceed. Give memory the same value as in requests."
    )


class Autoscaling(ApiObject):
    """Scaling on the histogram inference_latency_seconds."""

    min_replicas: Whole = Field(
        1, ge=0, le=1000, description="Fewest replicas; 0 only with asynchronous requests over Kafka."
    )
    max_replicas: Whole = Field(ge=1, le=1000, description="Most replicas.")
    target_latency: Quantity = Field(
        description="The latency objective in seconds, as a quantity: `200m` is 200 milliseconds."
    )
    percentile: Whole = Field(95, ge=50, le=99, description="Share of requests in percent that meets the objective.")
    concurrency_per_replica: Whole | None = Field(
        None, ge=1, le=100_000, description="Requests that one replica serves at once; absent: from measured capacity."
    )
    metric: ScalingMetric = Field(
        ScalingMetric.SLO,
        description="`SLO` scales on concurrency and guards the objective; `Latency` on the plain percentile.",
    )
    scale_down_stabilization_seconds: Whole = Field(
        300, ge=0, le=3600, description="How long load must be low before replicas are removed."
    )
    behavior: Passthrough | None = Field(
        None, description="HorizontalPodAutoscalerBehavior (autoscaling/v2), handed on whole."
    )


class Features(ApiObject):
    """Completion of a request from the online feature store."""

    entity_parameter: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        "entity_id",
        description="Request parameter that names the entity: a string, or a JSON list with one per row.",
    )
    key_template: Annotated[
        str, text(r"^[^{}]*\{entity\}[^{}]*$", "a key that contains {entity} once", max_length=256)
    ] = Field(description="Key of the Redis hash under the binding's prefix, for example `user:{entity}`.")
    input: TensorName = Field(description="Input of the model to fill, row by row.")
    names: Annotated[list[RedisField], Field(min_length=1, max_length=256)] = Field(
        description="Fields of the hash, in the order of the columns."
    )
    defaults: Annotated[dict[str, Number], Field(max_length=256), NullIsAbsent] = Field(
        default_factory=dict, description="Values of fields that are missing of an entity that is known."
    )
    on_missing: OnMissing = Field(
        OnMissing.REJECT,
        description="`Reject` answers 400 with the entity and the fields; `Default` takes the defaults, also for an "
        "unknown entity and while Redis is down.",
    )
    max_age_seconds: Whole = Field(
        86400, ge=1, le=315_360_000, description="Age at which features are stale, by the hash field `_updated`."
    )
    on_stale: OnStale = Field(OnStale.USE, description="What happens to a request whose features are stale.")


class Binding(ApiObject):
    """A backend service that the model uses: one that the operator knows, or one with its own Secret."""

    backend: DnsLabel | None = Field(
        None, description="Backend of the operator's settings; the operator provisions access to it."
    )
    secret_ref: LocalReference | None = Field(
        None, description="Secret in the layout of the Service Binding specification; nothing is provisioned."
    )


class RedisBinding(Binding):
    """Redis, for online features."""


class KafkaEvents(ApiObject):
    """One event for each prediction."""

    topic: Topic = Field("", description="Topic; empty: `phoenix.<namespace>.<name>.predictions`.")
    sample_percent: Whole = Field(100, ge=0, le=100, description="Share of predictions that become events.")
    include_tensors: Flag = Field(True, description="Whether events carry inputs and outputs.")


class KafkaRequests(ApiObject):
    """Asynchronous inference over Kafka."""

    topic: Topic = Field("", description="Topic of requests; empty: `phoenix.<namespace>.<name>.requests`.")
    dead_letter_topic: Topic = Field(
        "", description="Topic of requests that cannot be served; empty: `phoenix.<namespace>.<name>.dead-letters`."
    )
    results: Topic = Field("", description="Topic of results; empty: `phoenix.<namespace>.<name>.results`.")


class KafkaBinding(Binding):
    """Kafka, for prediction events and asynchronous inference."""

    events: KafkaEvents = Field(default_factory=KafkaEvents, description="Prediction events.")
    requests: KafkaRequests | None = Field(None, description="Asynchronous inference; absent: off.")
    partitions: Whole = Field(3, ge=1, le=1000, description="Partitions of topics that the operator creates.")
    retention_hours: Whole = Field(168, ge=1, le=87_600, description="Retention of topics that the operator creates.")


class Audit(ApiObject):
    """The record of predictions."""

    mode: AuditMode = Field(
        AuditMode.DURABLE,
        description="`Durable` answers after the row is committed; `BestEffort` may lose rows and counts them.",
    )
    include_tensors: Flag = Field(True, description="Whether rows hold inputs and outputs.")


class PostgresBinding(Binding):
    """PostgreSQL, for model metadata and the audit."""

    audit: Audit = Field(default_factory=Audit, description="The record of predictions.")


class Bindings(ApiObject):
    """Backend services. On a laptop files take their place, and the manifest stays the same."""

    redis: RedisBinding | None = Field(None, description="Online features; absent: none.")
    kafka: KafkaBinding | None = Field(None, description="Events and asynchronous inference; absent: none.")
    postgres: PostgresBinding | None = Field(None, description="Metadata and audit; absent: none.")
    deletion_policy: DeletionPolicy = Field(
        DeletionPolicy.RETAIN, description="What happens to topics, keys and schema on deletion. Credentials always go."
    )


class RateLimit(ApiObject):
    """How many requests are let through."""

    requests_per_second: Whole = Field(ge=1, le=1_000_000, description="Steady rate.")
    burst: Whole | None = Field(None, ge=1, le=1_000_000, description="Short-time excess; absent: one second's worth.")
    per: RateLimitScope = Field(RateLimitScope.CLIENT, description="Whose requests are counted together.")


class Networking(ApiObject):
    """Who reaches the model, and how."""

    host: DnsName | None = Field(
        None, description="Host of an HTTPRoute or Ingress for `/v2/models/<name>`; absent: reachable in the cluster."
    )
    rate_limit: RateLimit | None = Field(None, description="Rate limit; absent: none.")
    allow_from: Annotated[list[Passthrough], Field(max_length=32)] = Field(
        default_factory=list,
        description="NetworkPolicyPeers that may connect; empty: the namespace, the route controller, the operator "
        "and monitoring.",
    )


class Rollout(ApiObject):
    """How a new version replaces the old one."""

    strategy: RolloutStrategy = Field(
        RolloutStrategy.AUTO,
        description="`Surge` starts new pods first; `InPlace` ends old pods first, which needs no spare accelerator; "
        "`Auto` is InPlace with an accelerator, else Surge.",
    )
    progress_deadline_seconds: Whole = Field(
        1200, ge=1, le=86_400, description="Time after which a rollout without progress has failed."
    )
    drain_seconds: Whole = Field(
        10, ge=0, le=600, description="Time between a pod's end being announced and its refusing connections."
    )


class Toleration(ApiObject):
    """A toleration, as in Kubernetes."""

    key: Annotated[str, Field(max_length=317)] | None = Field(None, description="Key of the taint; absent: all.")
    operator: Annotated[str, Field(max_length=16)] | None = Field(None, description="`Equal` (default) or `Exists`.")
    value: Annotated[str, Field(max_length=63)] | None = Field(None, description="Value of the taint.")
    effect: Annotated[str, Field(max_length=32)] | None = Field(None, description="Effect of the taint; absent: all.")
    toleration_seconds: Whole | None = Field(
        None, ge=0, le=2**31 - 1, description="How long NoExecute is tolerated; absent: for ever."
    )


class EnvironmentVariable(ApiObject):
    """An environment variable of the server container."""

    name: EnvName = Field(description="Its name.")
    value: Annotated[str, Field(max_length=32768)] | None = Field(None, description="Its value.")
    value_from: Passthrough | None = Field(None, description="EnvVarSource, handed on as it is.")


class PodTemplate(ApiObject):
    """What is added to the pods."""

    labels: Labels = Field(default_factory=dict, description="Labels.")
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64), NullIsAbsent] = (
        Field(default_factory=dict, description="Annotations.")
    )
    node_selector: Labels = Field(default_factory=dict, description="Labels of nodes that pods may run on.")
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(
        default_factory=list, description="Taints that pods tolerate."
    )
    affinity: Passthrough | None = Field(None, description="Affinity, handed on as it is.")
    priority_class_name: DnsName | None = Field(None, description="PriorityClass.")
    image_pull_secrets: Annotated[list[LocalReference], Field(max_length=16)] = Field(
        default_factory=list, description="Secrets for pulling images."
    )
    service_account_name: DnsName | None = Field(
        None, description="ServiceAccount; absent: one without rights, made by the operator."
    )
    runtime_class_name: DnsName | None = Field(None, description="RuntimeClass.")
    env: Annotated[list[EnvironmentVariable], Field(max_length=64)] = Field(
        default_factory=list, description="Environment variables of the server container."
    )


class PhoenixModelSpec(ApiObject):
    """What is served, and how. Only `model.uri` is needed."""

    model: ModelSource = Field(description="The ONNX model and where it comes from.")
    runtime: Runtime = Field(default_factory=Runtime, description="How sessions run.")
    batching: Batching = Field(default_factory=Batching, description="How requests are joined into batches.")
    warmup: Warmup = Field(default_factory=Warmup, description="What runs before the model counts as ready.")
    limits: Limits = Field(default_factory=Limits, description="What the server refuses.")
    resources: Resources = Field(default_factory=Resources, description="Compute resources of a pod.")
    replicas: Whole = Field(1, ge=0, le=1000, description="Pods without autoscaling; `kubectl scale` sets it.")
    autoscaling: Autoscaling | None = Field(None, description="Autoscaling; absent: off.")
    features: Features | None = Field(None, description="Online features; absent: none.")
    bindings: Bindings | None = Field(None, description="Backend services; absent: none.")
    networking: Networking = Field(default_factory=Networking, description="Who reaches the model, and how.")
    rollout: Rollout = Field(default_factory=Rollout, description="How a new version replaces the old one.")
    pod: PodTemplate = Field(default_factory=PodTemplate, description="What is added to the pods.")


class Metadata(ApiObject):
    """The part of Kubernetes' object metadata that Phoenix reads."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="Name of the model.")
    namespace: DnsLabel = Field("default", description="Namespace.")
    labels: Annotated[dict[str, LabelValue], Field(max_length=1024)] = Field(
        default_factory=dict, description="Labels."
    )
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=262_144)]], Field(max_length=1024)] = Field(
        default_factory=dict, description="Annotations."
    )


class PhoenixModel(ApiObject):
    """An ONNX model that Phoenix serves."""

    api_version: Literal["phoenix-ml.io/v1alpha1"] = Field(API_VERSION, description="Always this.")
    kind: Literal["PhoenixModel"] = Field(KIND, description="Always this.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.")
    spec: PhoenixModelSpec = Field(description="What is served, and how.")
    status: Status | None = Field(None, description="What the operator saw; never written by users.")

    @classmethod
    def read(cls, document: object, *, strict: bool) -> Self:
        """Check a parsed document. Lenient reading ignores unknown fields. Raises pydantic's `ValidationError`."""
        # by_name=False: manifests spell fields in camelCase; snake_case is for Python only
        return cls.model_validate(document, extra=None if strict else "ignore", by_name=False, by_alias=True)
