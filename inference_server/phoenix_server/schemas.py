"""The bodies of the REST API as pydantic models: documentation for OpenAPI, and validation off the hot path."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Parameters = dict[str, str | int | float | bool]
# The parameter that names the entities of features may be a list.
RequestParameters = dict[str, str | int | float | bool | list[str | int]]


class _Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ErrorBody(_Body):
    """What every failure answers."""

    error: str


class ServerLiveBody(_Body):
    """Liveness."""

    live: bool


class ReadyBody(_Body):
    """Readiness of the server."""

    ready: bool
    live: bool


class ModelReadyBody(_Body):
    """Readiness of a model."""

    name: str
    ready: bool


class ServerMetadataBody(_Body):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class ModelList(_Body):
    """Loaded models."""

    models: list[str]


class TensorMetadata(_Body):
    """One input or output; -1 stands for a dynamic dimension."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadataBody(_Body):
    """A model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InferInput(_Body):
    """One input tensor; `data` is flat and row-major, or nested as the shape."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None


class InferRequestedOutput(_Body):
    """One output that is asked for."""

    name: str
    parameters: Parameters | None = None


class InferRequestBody(_Body):
    """An inference request. No `outputs`: all of them."""

    id: str | None = None
    parameters: RequestParameters | None = None
    inputs: list[InferInput] = Field(description="Empty where features fill the model's only input.")
    outputs: list[InferRequestedOutput] | None = None


class InferOutput(_Body):
    """One output tensor."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None


class InferResponseBody(_Body):
    """An inference response."""

    model_name: str
    model_version: str
    id: str
    parameters: Parameters | None = None
    outputs: list[InferOutput]


class ModelIndexItem(_Body):
    """One version in the repository."""

    name: str
    version: str
    state: str
    reason: str


class RepositoryLoadResponse(_Body):
    """What was done."""

    name: str
    load: bool | None = None
    unload: bool | None = None


class Duration(_Body):
    """A count and cumulative nanoseconds."""

    count: int
    ns: int


class BatchStatistics(_Body):
    """Runs of one batch size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(_Body):
    """Statistics of one version. `last_inference` is in milliseconds since the epoch."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, Duration]
    response_stats: dict[str, Any]
    batch_stats: list[BatchStatistics]
    memory_usage: list[Any]


class StatisticsBody(_Body):
    """Statistics."""

    model_stats: list[ModelStatistics]


class ModelConfigTensor(_Body):
    """One input or output in Triton's model configuration."""

    name: str
    data_type: str
    dims: list[int]


class ModelConfigBody(_Body):
    """Triton's model configuration, as far as it applies."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ModelConfigTensor]
    output: list[ModelConfigTensor]
    version_policy: dict[str, Any]
    instance_group: list[dict[str, Any]]
    dynamic_batching: dict[str, Any] | None = None


class CapacityBody(_Body):
    """Measured capacity of one replica."""

    concurrency: int
    rows_per_second: float
    latency_p95_seconds: float
    latency_alone_seconds: float


class ModelStateBody(_Body):
    """What is loaded and how it runs."""

    name: str
    namespace: str
    version: str
    state: str
    reason: str
    uri: str
    sha256: str
    size_bytes: int
    provider: str
    runtime: str
    inline: bool
    max_batch_rows: int
    loaded_at: float
    load_seconds: float
    slo_seconds: float | None
    capacity: CapacityBody | None
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    bindings: dict[str, Any]


class LogSettingsBody(_Body):
    """Log settings."""

    log_file: str
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int
    log_format: str
