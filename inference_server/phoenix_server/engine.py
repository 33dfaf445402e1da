"""The one front door to ONNX Runtime: loads a model file into sessions and runs them.

Hides providers and their silent fall-back, session options, the optimised-graph cache, warm-up, and on which thread a
run happens. `repository` loads; `batching` runs through the `Runner`s at the end of this file.
"""

import contextlib
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    RuntimeException,
)
from onnxruntime.capi.onnxruntime_pybind11_state import (
    NotImplemented as NotImplementedByRuntime,
)

from phoenix_server.errors import Code, ModelLoadError, PhoenixError, Reason
from phoenix_server.graph_cache import OptimizedGraph
from phoenix_server.onnx_file import OnnxFacts
from phoenix_server.tensors import DTYPE_OF_ONNX, Array, DType, Signature, TensorSpec

_log = logging.getLogger(__name__)
_ORT_ERRORS = (EPFail, Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile, NotImplementedByRuntime,
               RuntimeException)  # fmt: skip

CPU_PROVIDER = "CPUExecutionProvider"
# Manifest name -> ONNX Runtime's, in order of preference where one falls back to another by design.
PROVIDERS = {
    "CUDA": ("CUDAExecutionProvider",),
    "TensorRT": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "ROCm": ("ROCMExecutionProvider",),
    "MIGraphX": ("MIGraphXExecutionProvider",),
    "OpenVINO": ("OpenVINOExecutionProvider",),
}
# Below this a thread hand-over costs more than it hides (measured: 0.14 ms inline, 0.20 ms with a thread).
INLINE_BELOW_S = 0.0002
# Smaller models load in milliseconds anyway.
_OPTIMIZED_CACHE_FROM_BYTES = 1 << 20
RUNTIME_VERSION: str = ort.__version__
_Providers = list[str | tuple[str, dict[str, str]]]


@dataclass(slots=True)
class Run:
    """One execution of a model: inputs of `rows` rows by name, the names asked for, and what came of it."""

    inputs: dict[str, Array]
    output_names: tuple[str, ...]
    rows: int
    outputs: Sequence[Array] = ()
    error: BaseException | None = None
    compute_ns: int = 0


class Runner(Protocol):
    """Executes runs, up to `slots` at a time, and reports each on the event loop's thread."""

    slots: int

    def start(self, run: Run, done: Callable[[Run], None]) -> None:
        """Execute `run` and call `done(run)`, which may happen before this returns."""

    def close(self) -> None:
        """Stop; nothing is started after this."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to load a model. `provider` is the manifest's name (None: CPU); `threads` intra-op threads a session."""

    provider: str | None = None
    provider_options: Mapping[str, str] | None = None
    must_accelerate: bool = True
    threads: int = 1
    instances: int = 1
    warmup_iterations: int = 3
    warmup_rows: int = 1
    cache_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A verified model on disk: where it is, its digest (64 hex digits), its facts."""

    path: Path
    sha256: str
    facts: OnnxFacts
    size_bytes: int


class Engine:
    """One loaded model: `instances` sessions with one signature."""

    def __init__(self, sessions: list[ort.InferenceSession], signature: Signature, options: EngineOptions) -> None:
        self.signature = signature
        self.provider: str = sessions[0].get_providers()[0]
        self.run_s: float | None = None
        self._sessions = sessions
        self._options = options
        self._is_on_cpu = self.provider == CPU_PROVIDER

    @property
    def is_inline(self) -> bool:
        """Whether a run is so short that it happens on the event loop."""
        return self._is_on_cpu and len(self._sessions) == 1 and self.run_s is not None and self.run_s < INLINE_BELOW_S

    def run(self, inputs: dict[str, Array], output_names: Sequence[str], *, instance: int = 0) -> Sequence[Array]:
        """Run one session on `inputs` and return the outputs named; raise `PhoenixError(INTERNAL)` if it fails."""
        session = self._sessions[instance]
        try:
            if self._is_on_cpu:
                return session.run(output_names, inputs)  # type: ignore[no-any-return]
            return self._run_bound(session, inputs, output_names)
        except _ORT_ERRORS as error:
            raise PhoenixError(Code.INTERNAL, f"the model failed on this input: {_first_sentence(error)}") from error

    @staticmethod
    def _run_bound(
        session: ort.InferenceSession, inputs: dict[str, Array], output_names: Sequence[str]
    ) -> Sequence[Array]:
        """Run with inputs and outputs bound, so that the device copies only what is asked for."""
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in output_names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()  # type: ignore[no-any-return]

    def runner(self, on_loop: Callable[..., object]) -> Runner:
        """Return what executes runs; `on_loop(callback, *args)` schedules a call on the event loop from any thread."""
        return InlineRunner(self) if self.is_inline else ThreadRunner(self, on_loop, len(self._sessions))

    def sample_inputs(self, rows: int) -> dict[str, Array]:
        """Make inputs of `rows` rows from the signature: ones, empty strings, size 1 where a dimension is dynamic."""
        samples: dict[str, Array] = {}
        for spec in self.signature.inputs:
            shape = [1 if size == -1 else size for size in spec.shape]
            if spec.shape and spec.shape[0] == -1:
                shape[0] = rows
            samples[spec.name] = np.full(shape, "" if spec.dtype is DType.BYTES else 1, dtype=spec.dtype.numpy)
        return samples

    def warm_up(self) -> None:
        """Run each session on sample inputs, measure a run, and learn whether rows can share one.

        A model with dynamic dimensions beyond the first may refuse the sample; then it is served as it is, from a
        thread and unbatched, and the log says so.
        """
        signature, names = self.signature, self.signature.output_names
        try:
            for instance in range(len(self._sessions)):
                for _ in range(self._options.warmup_iterations):
                    self.run(self.sample_inputs(self._options.warmup_rows), names, instance=instance)
            samples, times = self.sample_inputs(1), []
            for _ in range(5):
                started = time.perf_counter()
                self.run(samples, names)
                times.append(time.perf_counter() - started)
            self.run_s = min(times)
            if signature.is_batchable:
                outputs = self.run(self.sample_inputs(2), names)
                if any(output.shape[:1] != (2,) for output in outputs):
                    raise PhoenixError(Code.INTERNAL, "the first dimension of an output does not count rows")
        except PhoenixError as error:
            _log.warning("warm-up on sample inputs failed; serving without batching", extra={"cause": error.message})
            self.signature = Signature(signature.inputs, signature.outputs, is_batchable=False)

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()


def load(model: ModelFile, options: EngineOptions) -> Engine:
    """Load and warm up a model. Raises `ModelLoadError` with the reason; blocks, so call it in a thread."""
    providers = _providers(options)
    sessions = [_session(model, options, providers) for _ in range(max(1, options.instances))]
    active = sessions[0].get_providers()[0]
    if options.provider is not None and active not in PROVIDERS[options.provider]:
        message = (
            f"{options.provider} was asked for, but ONNX Runtime {RUNTIME_VERSION} runs on {active} here (built with: "
            f"{', '.join(ort.get_available_providers())}); use the GPU image on a node with the device, or "
            "runtime.accelerator.policy: Prefer to serve on the CPU"
        )
        if options.must_accelerate:
            raise ModelLoadError(Reason.PROVIDER_UNAVAILABLE, message)
        _log.warning("serving on the CPU", extra={"cause": message})
    engine = Engine(sessions, _signature(sessions[0]), options)
    engine.warm_up()
    return engine


def intra_op_threads(asked: int, cpus: float) -> int:
    """Return the threads of a session: `asked`, else the CPUs this process may use, rounded up, at least 1."""
    return asked or max(1, math.ceil(cpus or len(os.sched_getaffinity(0))))


def _providers(options: EngineOptions) -> _Providers:
    """Return the provider list for a session; only what this build of the runtime has, or creation would print."""
    available = set(ort.get_available_providers())
    chosen: _Providers = []
    for name in PROVIDERS.get(options.provider or "", ()):
        if name in available:
            own = dict(options.provider_options or {}) if not chosen else {}
            chosen.append((name, own) if own else name)
    return [*chosen, CPU_PROVIDER]


def _session(model: ModelFile, options: EngineOptions, providers: _Providers) -> ort.InferenceSession:
    cached = _cached_graph(model, options, providers)
    if cached is not None and (path := cached.find()) is not None:
        try:
            return _open(path, options, providers, level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
        except _ORT_ERRORS as error:
            cached.drop(str(error))
    partial = None if cached is None else cached.begin()
    try:
        session = _open(model.path, options, providers, write_to=partial)
    except _ORT_ERRORS as error:
        raise _load_error(model, error) from error
    if cached is not None and partial is not None:
        cached.commit(partial)
    return session


def _open(
    path: Path,
    options: EngineOptions,
    providers: _Providers,
    *,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    write_to: Path | None = None,
) -> ort.InferenceSession:
    """Return a session on the graph at `path`, optimised to `level`; the optimised graph goes to `write_to`."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # failures come as exceptions; the rest is noise in a JSON log
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = level
    if options.instances > 1 or options.threads == 1:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if write_to is not None:
        settings.optimized_model_filepath = str(write_to)
    session = ort.InferenceSession(str(path), settings, providers=providers)
    session.disable_fallback()  # a device that fails must be an error, not a quiet move to the CPU
    return session


def _cached_graph(model: ModelFile, options: EngineOptions, providers: _Providers) -> OptimizedGraph | None:
    """Return the place of this model's optimised graph; None where caching it would not pay, or not work."""
    if options.cache_dir is None or model.facts.external_files or model.size_bytes < _OPTIMIZED_CACHE_FROM_BYTES:
        return None
    return OptimizedGraph(options.cache_dir, (model.sha256, providers, RUNTIME_VERSION, options.threads))


def _load_error(model: ModelFile, error: Exception) -> ModelLoadError:
    text = str(error)
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.facts.opsets.items())
    if "opset" in text.lower() or "ir version" in text.lower() or "ir_version" in text.lower():
        return ModelLoadError(
            Reason.UNSUPPORTED_OPSET,
            f"the model uses opset {opsets} and IR version {model.facts.ir_version}, which ONNX Runtime "
            f"{RUNTIME_VERSION} does not support: {_first_sentence(error)}; export it with an older opset",
        )
    cause = _checker_fault(model.path) or _first_sentence(error)
    return ModelLoadError(Reason.INVALID_MODEL, f"ONNX Runtime {RUNTIME_VERSION} refuses the model: {cause}")


def _checker_fault(path: Path) -> str | None:
    """Return what the ONNX checker says of the file, which is clearer than the runtime; only asked after a failure."""
    import onnx.checker  # some 10 MB of memory and 0.1 s that a good model never pays

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        return _first_sentence(error)
    return None


def _first_sentence(error: Exception) -> str:
    """Return the first informative line of a runtime error, without codes and source locations."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"^(Load model from|Exception during initialization:) ?\S* ?(failed:)?\s*", "", text)
    text = re.sub(r"/\S*?/(onnxruntime|onnx)/\S+:\d+ .*?\)\s?", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:500] if lines else type(error).__name__


def _signature(session: ort.InferenceSession) -> Signature:
    inputs = tuple(_spec(node, "input") for node in session.get_inputs())
    outputs = tuple(_spec(node, "output") for node in session.get_outputs())
    if not inputs or not outputs:
        missing = "inputs" if not inputs else "outputs"
        raise ModelLoadError(Reason.INVALID_MODEL, f"the model has no {missing}; there is nothing to serve")
    first = {_first_dimension(node) for node in session.get_inputs()}
    rows_in = len(first) == 1 and not isinstance(next(iter(first)), int)
    rows_out = all(not isinstance(_first_dimension(node), int) for node in session.get_outputs())
    return Signature(inputs, outputs, is_batchable=rows_in and rows_out)


def _first_dimension(node: ort.NodeArg) -> int | str | None:
    """Return the first dimension: a size, the name of a dynamic one (None: unnamed), or 0 for a scalar."""
    return node.shape[0] if node.shape else 0


def _spec(node: ort.NodeArg, kind: str) -> TensorSpec:
    dtype = DTYPE_OF_ONNX.get(node.type)
    if dtype is None:
        raise ModelLoadError(
            Reason.INVALID_MODEL,
            f"{kind} '{node.name}' has type {node.type}; served are tensors of {', '.join(DTYPE_OF_ONNX)} "
            "(scikit-learn exporters: turn zipmap off)",
        )
    return TensorSpec(node.name, dtype, tuple(size if isinstance(size, int) else -1 for size in node.shape))


def _execute(engine: Engine, run: Run, instance: int = 0) -> None:
    started = time.perf_counter_ns()
    try:
        run.outputs = engine.run(run.inputs, run.output_names, instance=instance)
    except Exception as error:
        run.error = error if isinstance(error, PhoenixError) else _unexpected(error)
    run.compute_ns = time.perf_counter_ns() - started


def _unexpected(error: Exception) -> PhoenixError:
    _log.error("unexpected failure of a run", exc_info=error)
    return PhoenixError(Code.INTERNAL, "the model failed on this input")


class InlineRunner:
    """Runs on the event loop, for models whose run is shorter than a thread hand-over."""

    slots = 1

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start(self, run: Run, done: Callable[[Run], None]) -> None:
        """Execute `run` and report it before returning."""
        _execute(self._engine, run)
        done(run)

    def close(self) -> None:
        """Nothing to stop."""


class ThreadRunner:
    """Runs on one thread per session."""

    def __init__(self, engine: Engine, on_loop: Callable[..., object], slots: int) -> None:
        self.slots = slots
        self._engine = engine
        self._on_loop = on_loop
        self._runs: queue.SimpleQueue[tuple[Run, Callable[[Run], None]] | None] = queue.SimpleQueue()
        for instance in range(slots):
            threading.Thread(target=self._work, args=(instance,), name=f"engine-{instance}", daemon=True).start()

    def start(self, run: Run, done: Callable[[Run], None]) -> None:
        """Hand `run` to a thread."""
        self._runs.put((run, done))

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self.slots):
            self._runs.put(None)

    def _work(self, instance: int) -> None:
        while (item := self._runs.get()) is not None:
            run, done = item
            _execute(self._engine, run, instance)
            with contextlib.suppress(RuntimeError):  # the loop may be gone at exit
                self._on_loop(done, run)
