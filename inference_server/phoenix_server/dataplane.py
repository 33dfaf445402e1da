"""What happens to a request, whatever transport it came by: look up, complete, validate, batch, run, record.

Transports (`hotpath`, `rest`, `grpc_service`) decode, call `DataPlane.infer`, encode, and report through
`DataPlane.finished`; nothing else decides. `Recorder` is the seam for events and audit; what completes requests with
online features belongs to the model (`ServedModel.features`).
"""

import itertools
import logging
import os
import time
from dataclasses import dataclass
from typing import Any, Protocol

from phoenix_server import __version__
from phoenix_server.engine import CPU_PROVIDER, RUNTIME_VERSION
from phoenix_server.errors import Code, Outcome, PhoenixError
from phoenix_server.metrics import Metrics
from phoenix_server.metrics import Protocol as Transport
from phoenix_server.repository import Repository, State
from phoenix_server.served_model import ServedModel
from phoenix_server.tensors import InferRequest, InferResponse, TensorSpec
from phoenix_server.tracing import Tracer

_access_log = logging.getLogger("phoenix_server.access")

SERVER_NAME = "phoenix"
EXTENSIONS = (
    "model_repository",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "model_configuration",
    "logging",
)
PLATFORM = "onnxruntime_onnx"
# A look-up of features that was shorter is not taken off the model's own time, which saves each request a timer.
_NEGLIGIBLE_S = 0.01


@dataclass(slots=True)
class Prediction:  # not frozen: that would cost a third of a microsecond a request
    """One answered or failed request, as events and audit see it. `time_s` is unix time, `latency_s` its duration."""

    model: ServedModel
    request: InferRequest
    response: InferResponse | None
    error: PhoenixError | None
    time_s: float
    latency_s: float


class Recorder(Protocol):
    """Keeps predictions: audit rows, events."""

    async def record(self, prediction: Prediction) -> None:
        """Return when the prediction is as safe as the manifest demands; raise `PhoenixError(UNAVAILABLE)` if not."""


class DataPlane:
    """The one interface between transports and models."""

    def __init__(
        self,
        repository: Repository,
        metrics: Metrics,
        *,
        recorder: Recorder | None = None,
        tracer: Tracer | None = None,
        is_access_logged: bool = False,
    ) -> None:
        """Absent seams cost nothing. `is_access_logged`: one log line for each request."""
        self.repository = repository
        self.metrics = metrics
        self._recorder = recorder
        self._tracer = tracer
        self._is_access_logged = is_access_logged
        self._id_prefix = os.urandom(6).hex()
        self._id_count = itertools.count(1)

    @property
    def is_traced(self) -> bool:
        """Whether `finished` has a use for the caller's trace context."""
        return self._is_access_logged or self._tracer is not None

    def admit(self, name: str, version: str = "") -> ServedModel:
        """Return the model that a request names, before anything of the request is decoded.

        Raises `PhoenixError`: NOT_FOUND, UNAVAILABLE while it loads, OVERLOADED when its queue is full.
        """
        model = self.repository.get(name, version)
        if model.batcher.is_full:
            raise model.batcher.overloaded()
        return model

    def new_id(self) -> str:
        """Return an id for a request that brought none: unique to this process's life and, in practice, beyond."""
        return f"{self._id_prefix}-{next(self._id_count):x}"

    async def infer(self, model: ServedModel, request: InferRequest) -> InferResponse:
        """Answer `request` with `model`; the response holds exactly the request's rows.

        Raises `PhoenixError`: INVALID with every fault of the request, DEADLINE, OVERLOADED, INTERNAL.
        """
        if not request.id:
            request.id = self.new_id()
        if request.listed_parameters:
            _refuse_lists(model, request)
        if model.features is None and (self._recorder is None or not model.is_bound):
            return await self._answer(model, request, request.timeout_us)
        return await self._answer_bound(model, request)

    async def _answer(self, model: ServedModel, request: InferRequest, timeout_us: int) -> InferResponse:
        rows = model.signature.validate(request)
        names = request.outputs or model.signature.output_names
        arrays = await model.batcher.submit(request.inputs, names, rows, timeout_us=timeout_us)
        outputs = list(zip(names, arrays, strict=True))
        return InferResponse(model.name, model.version, request.id, outputs, rows=rows)

    async def _answer_bound(self, model: ServedModel, request: InferRequest) -> InferResponse:
        """Answer with features filled in before and the prediction recorded after."""
        started, time_s = time.perf_counter(), time.time()
        response, failure, age_s = None, None, None
        timeout_us = request.timeout_us
        try:
            if model.features is not None:
                try:
                    age_s = await model.features.fill(request)
                finally:
                    waited_s = time.perf_counter() - started
                    model.metrics.feature_lookup.observe(waited_s)
                timeout_us = _left_us(model, timeout_us, waited_s)
            response = await self._answer(model, request, timeout_us)
            if age_s is not None:
                response.parameters["feature_age_seconds"] = round(age_s, 3)
        except PhoenixError as error:
            failure = error
        if self._recorder is not None:
            latency_s = time.perf_counter() - started
            await self._recorder.record(Prediction(model, request, response, failure, time_s, latency_s))
        if failure is not None:
            raise failure
        assert response is not None
        return response

    def is_ready(self) -> bool:
        """Whether every model of the manifests is loaded and warm and the server is not draining."""
        return self.repository.is_ready

    def server_metadata(self) -> dict[str, Any]:
        """Return the body of `GET /v2`."""
        return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Whether the model answers; raises NOT_FOUND for one that nobody declared."""
        try:
            self.repository.get(name, version)
        except PhoenixError as error:
            if error.code is Code.NOT_FOUND:
                raise
            return False
        return True

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Return the metadata of a loaded model: names, datatypes and shapes (-1: dynamic)."""
        model = self.repository.get(name, version)
        return {
            "name": name,
            "versions": self.repository.versions(name),
            "platform": PLATFORM,
            "inputs": [_tensor_metadata(spec) for spec in model.signature.inputs],
            "outputs": [_tensor_metadata(spec) for spec in model.signature.outputs],
        }

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        """Return Triton's model configuration; `dims` leave out the batch dimension of a batching model."""
        model = self.repository.get(name, version)
        batches = model.max_batch_rows > 1
        dims = slice(1, None) if batches else slice(None)
        config: dict[str, Any] = {
            "name": name,
            "platform": PLATFORM,
            "backend": "onnxruntime",
            "max_batch_size": model.max_batch_rows if batches else 0,
        }
        for key, specs in (("input", model.signature.inputs), ("output", model.signature.outputs)):
            config[key] = [
                {"name": spec.name, "data_type": spec.dtype.config_name, "dims": list(spec.shape[dims])}
                for spec in specs
            ]
        kind = "KIND_CPU" if model.engine.provider == CPU_PROVIDER else "KIND_GPU"
        config["version_policy"] = {"latest": {"num_versions": 1}}
        config["instance_group"] = [{"name": name, "kind": kind, "count": model.spec.runtime.instances}]
        if batches:
            config["dynamic_batching"] = {
                "max_queue_delay_microseconds": model.spec.batching.max_delay_milliseconds * 1000
            }
        return config

    def model_state(self, name: str, version: str = "") -> dict[str, Any]:
        """Return what is loaded and how it runs; the operator asks this of each ready pod."""
        model = self.repository.get(name, version)
        capacity = model.capacity
        return {
            "name": model.name,
            "namespace": model.manifest.model.metadata.namespace,
            "version": model.version,
            "state": State.READY,
            "reason": self.repository.reason(model.name, model.version),
            "uri": model.spec.model.uri,
            "sha256": model.artifact.sha256,
            "size_bytes": model.artifact.size_bytes,
            "provider": model.engine.provider,
            "runtime": f"onnxruntime {RUNTIME_VERSION}",
            "inline": model.engine.is_inline,
            "max_batch_rows": model.max_batch_rows,
            "loaded_at": model.loaded_at_s,
            "load_seconds": model.metrics.load_s,
            "slo_seconds": model.metrics.slo_s,
            "capacity": None
            if capacity is None
            else {
                "concurrency": capacity.concurrency,
                "rows_per_second": capacity.rows_per_second,
                "latency_p95_seconds": capacity.latency_p95_s,
                "latency_alone_seconds": capacity.latency_alone_s,
            },
            "inputs": [_tensor_metadata(spec) for spec in model.signature.inputs],
            "outputs": [_tensor_metadata(spec) for spec in model.signature.outputs],
            "bindings": {
                binding.kind: binding.as_state() for binding in self.metrics.bindings if model.name in binding.models
            },
        }

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Load a model again from its manifest. Overrides are refused: the manifest is the only configuration."""
        if parameters:
            raise PhoenixError(
                Code.INVALID,
                f"load parameters are not supported ({', '.join(parameters)}): change the model's manifest instead",
            )
        await self.repository.load_named(name)

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Return the statistics of one version, of all versions of one model, or of everything."""
        if name:
            self.repository.get(name, version)
        models = [
            model for model in self.repository.served() if name in ("", model.name) and version in ("", model.version)
        ]
        return {"model_stats": [_statistics(model) for model in models]}

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """Return every declared version with its state and, where it is not ready, the reason."""
        return [
            {"name": name, "version": version, "state": state, "reason": reason}
            for name, version, state, reason in self.repository.index()
            if not ready_only or state is State.READY
        ]

    def finished(
        self,
        model: ServedModel,
        transport: Transport,
        error: PhoenixError | None,
        seconds: float,
        sizes: tuple[int, int, int],
        *,
        request_id: str = "",
        traceparent: str = "",
    ) -> None:
        """Count an answered request, and log and trace it where that is asked for.

        `seconds` lie between body received and body ready; `sizes` are rows, request bytes and response bytes.
        `traceparent` is the caller's trace context (W3C Trace Context), carried into log and trace.
        """
        outcome = Outcome.OK if error is None else error.outcome
        model.metrics.observe_request(outcome, transport, seconds, sizes)
        if self.is_traced:
            fields = {"model": model.name, "version": model.version, "request_id": request_id, "outcome": outcome.value,
                      "protocol": transport, "rows": sizes[0]}  # fmt: skip
            if self._is_access_logged:
                extra = fields | {"seconds": round(seconds, 6), "traceparent": traceparent}
                _access_log.info("request", extra=extra)
            if self._tracer is not None:
                self._tracer.report(traceparent, seconds, fields, None if error is None else error.message)


def _left_us(model: ServedModel, timeout_us: int, waited_s: float) -> int:
    """Return what is left of a request's time once its features are there; 0: the model's own bound, all of it.

    Raises `PhoenixError(DEADLINE)` when nothing is left.
    """
    if not timeout_us:
        if waited_s < _NEGLIGIBLE_S:
            return 0
        timeout_us = int(model.spec.limits.timeout_seconds * 1e6)
    left_us = timeout_us - int(waited_s * 1e6)
    if left_us <= 0:
        raise PhoenixError(Code.DEADLINE, f"the deadline passed after {waited_s:.3f} s of looking up features")
    return left_us


def _refuse_lists(model: ServedModel, request: InferRequest) -> None:
    """Only the parameter that names entities may be a list."""
    wrong = [
        name
        for name in request.listed_parameters
        if model.spec.features is None or name != model.spec.features.entity_parameter
    ]
    if wrong:
        raise PhoenixError(
            Code.INVALID,
            f"the request: parameters must be strings, numbers or booleans; wrong: {', '.join(wrong)}",
        )


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.dtype.name, "shape": list(spec.shape)}


def _statistics(model: ServedModel) -> dict[str, Any]:
    metrics = model.metrics
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": metrics.last_inference_ms,
        "inference_count": metrics.inference_count,
        "execution_count": metrics.execution_count,
        "inference_stats": {name: {"count": s.count, "ns": s.ns} for name, s in metrics.stages().items()},
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": {"count": of.compute_input.count, "ns": of.compute_input.ns},
                "compute_infer": {"count": of.compute_infer.count, "ns": of.compute_infer.ns},
                "compute_output": {"count": of.compute_output.count, "ns": of.compute_output.ns},
            }
            for rows, of in sorted(metrics.batch_stats.items())
        ],
        "memory_usage": [],
    }
