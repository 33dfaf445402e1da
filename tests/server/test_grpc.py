"""The gRPC port over real sockets and the real runtime, under both engines."""

import asyncio
import contextlib
import hashlib
import logging
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import onnx
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from onnx import TensorProto, helper

from phoenix_api import read_manifests
from phoenix_server import engine as engine_module
from phoenix_server._proto import inference as proto
from phoenix_server.artifacts import ArtifactStore
from phoenix_server.auth import ApiKeys
from phoenix_server.codec_binary import bytes_of
from phoenix_server.dataplane import DataPlane
from phoenix_server.errors import Code, Outcome, Reason, StartError
from phoenix_server.grpc_server import GrpcServer
from phoenix_server.grpc_service import GRPC_STATUS, SERVICE
from phoenix_server.logs import LogSettings
from phoenix_server.metrics import Metrics
from phoenix_server.repository import Repository
from phoenix_server.settings import Settings
from phoenix_server.tensors import DTYPES

TYPES = {
    "BOOL": TensorProto.BOOL, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
}  # fmt: skip
TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [-1.5, 3.25]),
    "FP64": ("fp64_contents", [-1.5, 1e300]),
    "BYTES": ("bytes_contents", ["grün".encode(), b""]),
}
MANIFEST = """
apiVersion: phoenix-ml.io/v1alpha1
kind: PhoenixModel
metadata:
  name: {name}
spec:
  model:
    uri: {file}
    sha256: {sha256}
    version: "1"
  limits: {limits}
  batching: {{maxRows: 2}}
  resources:
    limits: {{memory: 256Mi}}
"""


def identity(
    folder: Path, name: str, datatypes: list[str], limits: str = "{}", shape: tuple[str | int, ...] = ("n", 2)
) -> None:
    """Write a model that gives back what it gets: input `x_FP32` comes out as `y_FP32`."""
    nodes = [helper.make_node("Identity", [f"x_{dtype}"], [f"y_{dtype}"]) for dtype in datatypes]
    inputs, outputs = (
        [helper.make_tensor_value_info(f"{side}_{dtype}", TYPES[dtype], shape) for dtype in datatypes] for side in "xy"
    )
    graph = helper.make_graph(nodes, name, inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = model.SerializeToString()
    onnx.checker.check_model(model)
    (folder / f"{name}.onnx").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    text = MANIFEST.format(name=name, file=f"{name}.onnx", sha256=digest, limits=limits)
    (folder / f"{name}.yaml").write_text(text)


@dataclass
class Running:
    """A running server and a channel to it."""

    plane: DataPlane
    server: GrpcServer
    port: int
    channel: grpc.aio.Channel

    async def call(self, method: str, request: Any, *, service: str = SERVICE, **options: Any) -> Any:
        """Call a unary method; the response's class is found by the method's name."""
        name = f"{method}Response"
        reply_type = health_pb2.HealthCheckResponse if service != SERVICE else getattr(proto, name)
        rpc = self.channel.unary_unary(f"/{service}/{method}")
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return reply_type.FromString(await rpc(data, **options))

    async def infer(self, request: Any, **options: Any) -> Any:
        return await self.call("ModelInfer", request, **options)

    def stream(self, method: str = f"/{SERVICE}/ModelStreamInfer", **options: Any) -> Any:
        return self.channel.stream_stream(method)(**options)

    def requests(self, outcome: Outcome, model: str = "echo") -> int:
        return self.plane.repository.get(model).metrics.tallies[outcome, "grpc"].requests


Scenario = Callable[[Running], Awaitable[None]]
Serve = Callable[..., None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    identity(folder, "all", list(TYPES))
    identity(folder, "typed", list(TYPED))
    identity(folder, "echo", ["FP32"], "{maxRequestBytes: 65536, maxQueuedRows: 2, timeoutSeconds: 20}")
    identity(folder, "wide", ["FP32"], "{maxQueuedRows: 100, maxRequestBytes: 2097152}", ("n", "m"))
    return folder


@pytest.fixture(params=["native", "grpcio"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(engine: str, models: Path, tmp_path: Path) -> Serve:
    """Run a scenario against a server: `serve(scenario, keys=…, **settings)`."""

    async def run(scenario: Scenario, keys: ApiKeys | None, options: dict[str, Any]) -> None:
        values: dict[str, Any] = {
            "host": "127.0.0.1", "grpc_port": 0, "grpc_engine": engine, "measure_capacity": False,
            "state_dir": tmp_path / "state", "model_store": models, **options,
        }  # fmt: skip
        settings = Settings(**values)
        metrics = Metrics()
        repository = Repository(settings, metrics, ArtifactStore(model_store=models, cache_dir=settings.state_dir))
        plane = DataPlane(repository, metrics, is_access_logged=settings.access_log)
        server = GrpcServer(plane, settings, keys, LogSettings(), max_message_bytes=1 << 20)
        port = await server.start()
        try:
            await repository.start(read_manifests([models]))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await asyncio.wait_for(scenario(Running(plane, server, port, channel)), 60)
        finally:
            await server.stop(5)
            await repository.close()

    def start(scenario: Scenario, *, keys: ApiKeys | None = None, **options: Any) -> None:
        # Log settings are the process's, which here is pytest's.
        root = logging.getLogger()
        level, filters = root.level, [(handler, list(handler.filters)) for handler in root.handlers]
        try:
            asyncio.run(run(scenario, keys, options))
        finally:
            root.setLevel(level)
            for handler, before in filters:
                handler.filters[:] = before

    return start


class Gate:
    """Holds every run of a model until it is opened."""

    def __init__(self, at: Running, monkeypatch: pytest.MonkeyPatch, model: str = "echo") -> None:
        self._opened, self.entered = threading.Event(), threading.Event()
        engine = at.plane.repository.get(model).engine
        run = engine.run

        def wait_and_run(*arguments: Any, **options: Any) -> Any:
            self.entered.set()
            assert self._opened.wait(30)
            return run(*arguments, **options)

        monkeypatch.setattr(engine, "run", wait_and_run)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run models on a thread however short a run is, so that a held run does not hold the event loop."""
    monkeypatch.setattr(engine_module, "INLINE_BELOW_S", 0.0)


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop turns until `condition` holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for knows no event
            await asyncio.sleep(0.001)


def echo(number: float = 1.0, **fields: Any) -> Any:
    contents = {"fp32_contents": [number, number + 1]}
    tensor = {"name": "x_FP32", "datatype": "FP32", "shape": [1, 2], "contents": contents}
    return proto.ModelInferRequest(**{"model_name": "echo", "inputs": [tensor], **fields})


@contextlib.asynccontextmanager
async def fails(code: grpc.StatusCode, *parts: str) -> AsyncIterator[pytest.ExceptionInfo[grpc.aio.AioRpcError]]:
    """Expect a status and parts of its message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield caught
    error = caught.value
    assert error.code() is code, error.details()
    assert [part for part in parts if part not in (error.details() or "")] == [], error.details()


def test_statuses_cover_every_code() -> None:
    assert set(GRPC_STATUS) == set(Code)


# --- the protocol's calls ---------------------------------------------------------------------------------------------


def test_health_and_metadata_calls_answer(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        assert (await at.call("ServerLive", proto.ServerLiveRequest())).live
        assert (await at.call("ServerReady", proto.ServerReadyRequest())).ready
        assert (await at.call("ModelReady", proto.ModelReadyRequest(name="echo"))).ready
        assert (await at.call("ModelReady", proto.ModelReadyRequest(name="echo", version="1"))).ready
        server = await at.call("ServerMetadata", proto.ServerMetadataRequest())
        assert server.name == "phoenix"
        assert "statistics" in server.extensions
        model = await at.call("ModelMetadata", proto.ModelMetadataRequest(name="all"))
        assert (model.name, list(model.versions), model.platform) == ("all", ["1"], "onnxruntime_onnx")
        assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [
            (f"x_{dtype}", dtype, [-1, 2]) for dtype in TYPES
        ]
        assert [t.name for t in model.outputs] == [f"y_{dtype}" for dtype in TYPES]

    serve(scenario)


def test_model_config_has_what_perf_analyzer_needs(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        config = (await at.call("ModelConfig", proto.ModelConfigRequest(name="all"))).config
        assert (config.name, config.platform, config.backend) == ("all", "onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size > 1
        assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
        kinds = {
            kind.name: kind.number for kind in proto.ModelInput.DESCRIPTOR.fields_by_name["data_type"].enum_type.values
        }
        wanted = [kinds[DTYPES[dtype].config_name] for dtype in TYPES]
        assert [(tensor.data_type, list(tensor.dims)) for tensor in config.input] == [(kind, [2]) for kind in wanted]
        assert config.version_policy.latest.num_versions == 1
        assert config.instance_group[0].count == 1

    serve(scenario)


def test_statistics_count_rows_and_requests(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        for number in range(3):
            await at.infer(echo(number))
        request = proto.ModelStatisticsRequest(name="echo", version="1")
        stats = (await at.call("ModelStatistics", request)).model_stats[0]
        assert (stats.name, stats.version) == ("echo", "1")
        assert stats.inference_count == stats.execution_count == stats.inference_stats.success.count == 3
        assert stats.last_inference > 0
        assert sum(batch.compute_infer.count for batch in stats.batch_stats) == 3
        everything = (await at.call("ModelStatistics", proto.ModelStatisticsRequest())).model_stats
        assert sorted(model.name for model in everything) == ["all", "echo", "typed", "wide"]
        tally = at.plane.repository.get("echo").metrics.tallies[Outcome.OK, "grpc"]
        assert (tally.requests, tally.rows) == (3, 3)
        assert tally.request_bytes == sum(len(echo(number).SerializeToString()) for number in range(3))
        assert tally.response_bytes > 3 * 8

    serve(scenario)


def test_repository_calls_list_unload_and_load(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        index = (await at.call("RepositoryIndex", proto.RepositoryIndexRequest())).models
        assert [(m.name, m.version, m.state) for m in index] == [
            (n, "1", "READY") for n in ("all", "echo", "typed", "wide")
        ]
        await at.call("RepositoryModelUnload", proto.RepositoryModelUnloadRequest(model_name="echo"))
        ready = (await at.call("RepositoryIndex", proto.RepositoryIndexRequest(ready=True))).models
        assert [m.name for m in ready] == ["all", "typed", "wide"]
        assert not (await at.call("ModelReady", proto.ModelReadyRequest(name="echo"))).ready
        async with fails(grpc.StatusCode.UNAVAILABLE, "'echo' is not ready") as caught:
            await at.infer(echo())
        assert caught.value.trailing_metadata()["retry-after"] == "5"
        await at.call("RepositoryModelLoad", proto.RepositoryModelLoadRequest(model_name="echo"))
        assert (await at.infer(echo())).model_name == "echo"
        overriding = proto.RepositoryModelLoadRequest(model_name="echo")
        overriding.parameters["config"].string_param = "{}"
        async with fails(grpc.StatusCode.INVALID_ARGUMENT, "load parameters are not supported (config)"):
            await at.call("RepositoryModelLoad", overriding)
        async with fails(grpc.StatusCode.NOT_FOUND, "'nope'"):
            await at.call("RepositoryModelUnload", proto.RepositoryModelUnloadRequest(model_name="nope"))

    serve(scenario)


def test_log_settings_are_read_and_changed(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        level = logging.getLogger().level
        try:
            settings = (await at.call("LogSettings", proto.LogSettingsRequest())).settings
            assert settings["log_error"].bool_param is True
            assert settings["log_format"].string_param == "default"
            wanted = proto.LogSettingsRequest()
            wanted.settings["log_info"].bool_param = False
            wanted.settings["log_verbose_level"].uint32_param = 0
            assert (await at.call("LogSettings", wanted)).settings["log_info"].bool_param is False
            assert logging.getLogger().level == logging.WARNING
            wanted.settings["log_colour"].string_param = "red"
            wanted.settings["log_info"].string_param = "yes"
            async with fails(grpc.StatusCode.INVALID_ARGUMENT, "'log_colour'", "'log_info' must be true or false"):
                await at.call("LogSettings", wanted)
        finally:
            logging.getLogger().setLevel(level)

    serve(scenario)


def test_calls_that_are_not_served_are_unimplemented(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        for method in ("SystemSharedMemoryStatus", "CudaSharedMemoryStatus", "TraceSetting"):
            async with fails(grpc.StatusCode.UNIMPLEMENTED):
                await at.channel.unary_unary(f"/{SERVICE}/{method}")(b"")

    serve(scenario)


# --- inference --------------------------------------------------------------------------------------------------------


def test_infer_gives_back_typed_contents_of_every_datatype(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        tensors = [
            {"name": f"x_{dtype}", "datatype": dtype, "shape": [1, 2], "contents": {field: elements}}
            for dtype, (field, elements) in TYPED.items()
        ]
        reply = await at.infer(proto.ModelInferRequest(model_name="typed", id="7", inputs=tensors))
        assert (reply.model_name, reply.model_version, reply.id) == ("typed", "1", "7")
        assert not reply.raw_output_contents
        got = {output.name: list(getattr(output.contents, TYPED[output.datatype][0])) for output in reply.outputs}
        assert got == {f"y_{dtype}": elements for dtype, (_, elements) in TYPED.items()}
        assert all(list(output.shape) == [1, 2] for output in reply.outputs)

    serve(scenario)


def test_infer_gives_back_raw_contents_of_every_datatype(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        raws = []
        for dtype in TYPES:
            values = [["grün", "" if dtype == "BYTES" else "x"]] if dtype == "BYTES" else [[0, 1]]
            raws.append(bytes(bytes_of(np.array(values, dtype=DTYPES[dtype].numpy))))
        tensors = [{"name": f"x_{dtype}", "datatype": dtype, "shape": [1, 2]} for dtype in TYPES]
        request = proto.ModelInferRequest(
            model_name="all", inputs=tensors, raw_input_contents=raws, outputs=[{"name": f"y_{d}"} for d in TYPES]
        )
        reply = await at.infer(request)
        assert list(reply.raw_output_contents) == raws
        assert [(o.name, o.datatype, list(o.shape)) for o in reply.outputs] == [(f"y_{d}", d, [1, 2]) for d in TYPES]
        assert reply.id

    serve(scenario)


def test_infer_orders_outputs_as_asked_and_takes_the_request_id_of_the_metadata(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        tensors = [
            {"name": f"x_{dtype}", "datatype": dtype, "shape": [1, 2], "contents": {field: elements}}
            for dtype, (field, elements) in TYPED.items()
        ]
        request = proto.ModelInferRequest(
            model_name="typed", inputs=tensors, outputs=[{"name": "y_INT64"}, {"name": "y_BOOL"}]
        )
        reply = await at.infer(request, metadata=(("x-request-id", "abc"),))
        assert [output.name for output in reply.outputs] == ["y_INT64", "y_BOOL"]
        assert reply.id == "abc"

    serve(scenario)


def test_infer_takes_compressed_requests(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        reply = await at.infer(echo(5, id="é" * 3000), compression=grpc.Compression.Gzip)
        assert list(reply.outputs[0].contents.fp32_contents) == [5, 6]

    serve(scenario)


def test_infer_answers_many_calls_at_once_each_with_its_own_rows(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        model = at.plane.repository.get("echo")
        model.batcher._max_queued_rows = 1000
        replies = await asyncio.gather(*(at.infer(echo(number, id=str(number))) for number in range(100)))
        assert [(reply.id, reply.outputs[0].contents.fp32_contents[0]) for reply in replies] == [
            (str(number), number) for number in range(100)
        ]
        assert model.metrics.inflight == 0

    serve(scenario)


def test_infer_names_the_fault(serve: Serve) -> None:
    def wrong(**fields: Any) -> Any:
        return echo(inputs=[{"name": "x_FP32", "datatype": "FP32", "shape": [1, 2], **fields}])

    both = wrong(contents={"fp32_contents": [1, 2]})
    both.raw_input_contents.append(bytes(8))
    cases: list[tuple[Any, grpc.StatusCode, str]] = [
        (both, grpc.StatusCode.INVALID_ARGUMENT, "both 'contents' and 'raw_input_contents'"),
        (wrong(contents={"fp32_contents": [1]}), grpc.StatusCode.INVALID_ARGUMENT, "needs 2 elements"),
        (
            wrong(datatype="INT64", contents={"int64_contents": [1, 2]}),
            grpc.StatusCode.INVALID_ARGUMENT,
            "expects FP32",
        ),
        (wrong(name="grün", contents={"fp32_contents": [1, 2]}), grpc.StatusCode.INVALID_ARGUMENT, "'grün'"),
        (wrong(name="a\nb%", contents={"fp32_contents": [1, 2]}), grpc.StatusCode.INVALID_ARGUMENT, "'a\nb%'"),
        (echo(inputs=[]), grpc.StatusCode.INVALID_ARGUMENT, "input 'x_FP32' is missing"),
        (echo(outputs=[{"name": "z"}]), grpc.StatusCode.INVALID_ARGUMENT, "unknown output 'z'"),
        (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "not an inference.ModelInferRequest message"),
        (echo(model_name="nope"), grpc.StatusCode.NOT_FOUND, "'nope' is not found; served: all, echo, typed, wide"),
        (echo(model_version="7"), grpc.StatusCode.NOT_FOUND, "no version '7'"),
        (echo(id="i" * 70_000), grpc.StatusCode.RESOURCE_EXHAUSTED, "at most 65536 are accepted"),
        (echo(id="i" * (8 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    ]

    async def scenario(at: Running) -> None:
        for request, code, text in cases:
            async with fails(code, text):
                await at.infer(request)
        assert at.requests(Outcome.CLIENT_ERROR) == 7
        assert at.plane.metrics.rejected == {("grpc", "invalid"): 1, ("grpc", "not_found"): 2, ("grpc", "too_large"): 1}
        assert at.requests(Outcome.OK) == 0
        assert list((await at.infer(echo())).outputs[0].contents.fp32_contents) == [1, 2]

    serve(scenario)


def test_other_calls_name_the_fault(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
            request = getattr(proto, f"{method}Request")
            async with fails(grpc.StatusCode.NOT_FOUND, "'nope' is not found"):
                await at.call(method, request(name="nope"))
            async with fails(grpc.StatusCode.NOT_FOUND, "no version '7'"):
                await at.call(method, request(name="echo", version="7"))
            async with fails(grpc.StatusCode.INVALID_ARGUMENT, f"not an inference.{method}Request message"):
                await at.call(method, b"\xff\xff")

    serve(scenario)


def test_a_long_message_is_cut_to_fit_the_status(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        for character in "x", "ü", "\n":
            async with fails(grpc.StatusCode.NOT_FOUND) as caught:
                await at.infer(echo(model_name=character * 30_000))
            details = caught.value.details()
            assert details.startswith(f"model '{character * 100}")
            assert details.endswith("…")

    serve(scenario)


def test_an_unexpected_failure_is_logged_and_names_only_a_request_id(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    async def scenario(at: Running) -> None:
        monkeypatch.setattr(at.plane, "infer", broken)
        async with fails(grpc.StatusCode.INTERNAL, "request id 42") as caught:
            await at.infer(echo(id="42"))
        assert "secret" not in caught.value.details()
        assert at.requests(Outcome.ERROR) == 1
        monkeypatch.setattr(at.plane, "statistics", broken)
        async with fails(grpc.StatusCode.INTERNAL, "internal error; the log has it under request id"):
            await at.call("ModelStatistics", proto.ModelStatisticsRequest())
        assert [r.exc_info[0] for r in caplog.records if r.exc_info] == [ZeroDivisionError, ZeroDivisionError]

    serve(scenario)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threaded")
def test_the_deadline_of_the_call_and_of_the_request_end_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(at: Running) -> None:
        gate = Gate(at, monkeypatch)
        try:
            async with fails(grpc.StatusCode.DEADLINE_EXCEEDED):
                await at.infer(echo(), timeout=0.1)
            await until(lambda: at.requests(Outcome.TIMEOUT) == 1)
            own = {"timeout": proto.InferParameter(int64_param=1000)}
            async with fails(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed after"):
                await at.infer(echo(parameters=own), timeout=30)
            assert at.requests(Outcome.TIMEOUT) == 2
        finally:
            gate.open()
        own["timeout"].int64_param = 30_000_000
        assert (await at.infer(echo(parameters=own), timeout=30)).outputs

    serve(scenario)


@pytest.mark.usefixtures("threaded")
def test_a_full_queue_refuses_and_a_cancelled_call_frees_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(at: Running) -> None:
        gate = Gate(at, monkeypatch)
        metrics = at.plane.repository.get("echo").metrics
        calls = [asyncio.create_task(at.infer(echo(0)))]
        try:
            await until(gate.entered.is_set)
            calls += [asyncio.create_task(at.infer(echo(number))) for number in (1, 2)]
            await until(lambda: metrics.queued_rows() == 2)
            async with fails(grpc.StatusCode.UNAVAILABLE, "the queue is full: 2 rows wait") as caught:
                await at.infer(echo(3))
            assert caught.value.trailing_metadata()["retry-after"] == "1"
            assert at.plane.metrics.rejected == {("grpc", "overloaded"): 1}
            calls.pop(1).cancel()
            await until(lambda: metrics.inflight == 2)
            calls.append(asyncio.create_task(at.infer(echo(4))))
            await until(lambda: metrics.inflight == 3)
        finally:
            gate.open()
        replies = await asyncio.gather(*calls)
        assert [reply.outputs[0].contents.fp32_contents[0] for reply in replies] == [0, 2, 4]
        assert at.requests(Outcome.OK) == 3
        assert at.requests(Outcome.CLIENT_ERROR) == 1

    serve(scenario)


def test_keys_are_asked_for_everything_but_health(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("s3cret\n")
    right, wrong = (("authorization", "Bearer s3cret"),), (("authorization", "Bearer other"),)

    async def scenario(at: Running) -> None:
        assert (await at.call("ServerLive", proto.ServerLiveRequest())).live
        assert (await at.call("ServerReady", proto.ServerReadyRequest())).ready
        check = health_pb2.HealthCheckRequest()
        assert (await at.call("Check", check, service="grpc.health.v1.Health")).status
        for method, request in (("ModelInfer", echo()), ("ModelReady", proto.ModelReadyRequest(name="echo"))):
            async with fails(grpc.StatusCode.UNAUTHENTICATED, "Authorization: Bearer"):
                await at.call(method, request)
            async with fails(grpc.StatusCode.PERMISSION_DENIED, "not known"):
                await at.call(method, request, metadata=wrong)
            await at.call(method, request, metadata=right)
        for path in (f"/{SERVICE}/ModelStreamInfer", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            async with fails(grpc.StatusCode.UNAUTHENTICATED):
                await at.stream(path).read()
        assert at.plane.metrics.rejected == {("grpc", "unauthenticated"): 2, ("grpc", "forbidden"): 1}

    serve(scenario, keys=ApiKeys(file))


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_answers_in_order_and_goes_on_after_a_failure(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        at.plane.repository.get("echo").batcher._max_queued_rows = 1000
        stream = at.stream()
        requests = [echo(number, id=str(number)).SerializeToString() for number in range(200)]
        requests[50] = echo(model_name="nope", id="50").SerializeToString()
        requests[60] = b"\xff\xff"

        async def write() -> None:
            for request in requests:
                await stream.write(request)
            await stream.done_writing()

        writing = asyncio.create_task(write())
        replies = [proto.ModelStreamInferResponse.FromString(data) async for data in stream]
        await writing
        assert [reply.infer_response.id for reply in replies] == [str(n) if n != 60 else "" for n in range(200)]
        assert "'nope' is not found" in replies[50].error_message
        assert "not an inference.ModelInferRequest" in replies[60].error_message
        assert replies[199].infer_response.outputs[0].contents.fp32_contents[0] == 199
        assert sum(bool(reply.error_message) for reply in replies) == 2
        assert await stream.code() is grpc.StatusCode.OK

    serve(scenario)


@pytest.mark.usefixtures("threaded")
def test_a_cancelled_stream_frees_its_places(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(at: Running) -> None:
        gate = Gate(at, monkeypatch)
        metrics = at.plane.repository.get("echo").metrics
        stream = at.stream()
        try:
            for number in range(2):
                await stream.write(echo(number).SerializeToString())
            await until(lambda: metrics.inflight == 2)
            stream.cancel()
            await until(lambda: metrics.inflight == 0)
        finally:
            gate.open()
        assert (await at.infer(echo())).outputs

    serve(scenario)


# --- health and reflection --------------------------------------------------------------------------------------------


def test_health_check_follows_readiness(serve: Serve) -> None:
    status = health_pb2.HealthCheckResponse

    async def scenario(at: Running) -> None:
        async def check(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return (await at.call("Check", request, service="grpc.health.v1.Health")).status

        assert [await check(service) for service in ("", SERVICE)] == [status.SERVING] * 2
        async with fails(grpc.StatusCode.NOT_FOUND, "'other' is not known"):
            await check("other")
        at.plane.repository.is_draining = True
        assert [await check(service) for service in ("", SERVICE)] == [status.NOT_SERVING] * 2
        assert not (await at.call("ServerReady", proto.ServerReadyRequest())).ready
        assert (await at.call("ServerLive", proto.ServerLiveRequest())).live

    serve(scenario)


def test_health_watch_tells_each_change(serve: Serve) -> None:
    status = health_pb2.HealthCheckResponse

    async def scenario(at: Running) -> None:
        def watch(service: str) -> Any:
            rpc = at.channel.unary_stream("/grpc.health.v1.Health/Watch")
            return rpc(health_pb2.HealthCheckRequest(service=service).SerializeToString())

        async def following(stream: Any) -> int:
            return status.FromString(await stream.read()).status

        known, unknown = watch(""), watch("other")
        assert await following(known) == status.SERVING
        assert await following(unknown) == status.SERVICE_UNKNOWN
        at.plane.repository.is_draining = True
        assert await following(known) == status.NOT_SERVING
        at.plane.repository.is_draining = False
        assert await following(known) == status.SERVING
        unknown.cancel()
        await at.server.stop(5)
        assert await following(known) == status.NOT_SERVING
        async with fails(grpc.StatusCode.UNAVAILABLE):
            await known.read()

    serve(scenario)


def test_reflection_lists_services_and_gives_their_files(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        stream = at.stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        asked = [
            {"list_services": ""},
            *({"file_containing_symbol": name} for name in (SERVICE, "inference.ModelConfig", "grpc.health.v1.Health")),
            {"file_containing_symbol": "inference.Nope"},
        ]
        for question in asked:
            await stream.write(reflection_pb2.ServerReflectionRequest(**question).SerializeToString())
        await stream.done_writing()
        answers = [reflection_pb2.ServerReflectionResponse.FromString(data) async for data in stream]
        assert [service.name for service in answers[0].list_services_response.service] == [
            "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", SERVICE,
        ]  # fmt: skip
        assert [bool(a.file_descriptor_response.file_descriptor_proto) for a in answers[1:]] == [True] * 3 + [False]
        assert answers[4].error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]

    serve(scenario)


# --- life -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threaded")
def test_stop_finishes_calls_in_flight_and_ends_idle_streams(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(at: Running) -> None:
        gate = Gate(at, monkeypatch)
        idle, busy = at.stream(), at.stream()
        watch = at.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        reflection = at.stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        await reflection.write(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
        await asyncio.gather(watch.read(), reflection.read(), idle.wait_for_connection())
        try:
            call = asyncio.create_task(at.infer(echo(7)))
            await until(gate.entered.is_set)
            await busy.write(echo(8).SerializeToString())
            await until(lambda: at.plane.repository.get("echo").metrics.inflight == 2)
            stopping = asyncio.create_task(at.server.stop(30))
            refusal = None
            while refusal is None:  # the stop begins
                try:
                    await at.call("ServerLive", proto.ServerLiveRequest())
                except grpc.aio.AioRpcError as error:
                    refusal = error.code()
            # grpcio cancels what arrives in the instant in which it stops.
            assert refusal in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert not stopping.done()
            assert not call.done()
        finally:
            gate.open()
        assert list((await call).outputs[0].contents.fp32_contents) == [7, 8]
        reply = proto.ModelStreamInferResponse.FromString(await busy.read())
        assert list(reply.infer_response.outputs[0].contents.fp32_contents) == [8, 9]
        await stopping
        assert await idle.code() is grpc.StatusCode.UNAVAILABLE
        assert await busy.code() is grpc.StatusCode.UNAVAILABLE

    serve(scenario)


@pytest.mark.usefixtures("threaded")
def test_stop_waits_until_the_last_answers_have_left(
    serve: Serve, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under pygrpc-native far more than a connection holds, so that most is still to be sent when the last call ends.
    # grpcio, which may reset a connection whose client has not yet read so much, only what its buffers hold.
    size = 250_000 if engine == "native" else 5_000
    raw = np.arange(size, dtype=np.float32).tobytes()
    tensor = {"name": "x_FP32", "datatype": "FP32", "shape": [1, size]}
    request = proto.ModelInferRequest(model_name="wide", inputs=[tensor], raw_input_contents=[raw])

    async def scenario(at: Running) -> None:
        gate = Gate(at, monkeypatch, "wide")
        try:
            calls = [asyncio.create_task(at.infer(request)) for _ in range(40)]
            await until(lambda: at.plane.repository.get("wide").metrics.inflight == 40)
            stopping = asyncio.create_task(at.server.stop(30))
        finally:
            gate.open()
        replies = await asyncio.gather(*calls)
        assert all(reply.raw_output_contents[0] == raw for reply in replies)
        await stopping

    serve(scenario)


@pytest.mark.usefixtures("threaded")
def test_stop_ends_calls_that_take_longer_than_the_grace(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(at: Running) -> None:
        gate = Gate(at, monkeypatch)
        try:
            call = asyncio.create_task(at.infer(echo()))
            await until(gate.entered.is_set)
            await asyncio.wait_for(at.server.stop(0.05), 4)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call
            assert ended.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        finally:
            gate.open()

    serve(scenario)


def test_start_says_that_the_port_is_taken(serve: Serve) -> None:
    async def scenario(at: Running) -> None:
        settings = at.server._settings.model_copy(update={"grpc_port": at.port})
        with pytest.raises(StartError, match="PHOENIX_GRPC_PORT") as caught:
            await GrpcServer(at.plane, settings, None, LogSettings(), max_message_bytes=1 << 20).start()
        assert caught.value.reason is Reason.PORT_IN_USE
        assert f"127.0.0.1:{at.port}: Address already in use" in caught.value.message
        other = GrpcServer(
            at.plane, settings.model_copy(update={"grpc_port": 0}), None, LogSettings(), max_message_bytes=1 << 20
        )
        assert await other.start() not in (0, at.port)
        await other.stop(0)

    serve(scenario)


@pytest.mark.parametrize("wanted", ["auto", "native"])
def test_start_without_pygrpc_native_falls_back_or_says_so(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setitem(sys.modules, "pygrpc_native", None)
    monkeypatch.setitem(sys.modules, "pygrpc_native.aio", None)
    metrics = Metrics()
    settings = Settings(host="127.0.0.1", grpc_port=0, grpc_engine=wanted)
    plane = DataPlane(Repository(settings, metrics, ArtifactStore(model_store=Path(), cache_dir=Path())), metrics)

    async def scenario() -> None:
        server = GrpcServer(plane, settings, None, LogSettings(), max_message_bytes=1 << 20)
        if wanted == "native":
            with pytest.raises(StartError, match="PHOENIX_GRPC_ENGINE") as caught:
                await server.start()
            assert caught.value.reason is Reason.INVALID_SETTING
        else:
            port = await server.start()
            socket.create_connection(("127.0.0.1", port)).close()
        await server.stop(0)

    asyncio.run(scenario())


def test_inferences_are_logged_when_asked(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(at: Running) -> None:
        await at.infer(echo(id="a"), metadata=(("traceparent", "00-1-2-01"),))
        async with fails(grpc.StatusCode.INVALID_ARGUMENT):
            await at.infer(echo(id="b", inputs=[]))
        lines = [vars(record) for record in caplog.records if record.name == "phoenix_server.access"]
        assert [(line["request_id"], line["outcome"]) for line in lines] == [("a", "ok"), ("b", "client_error")]
        assert lines[0]["traceparent"] == "00-1-2-01"

    with caplog.at_level(logging.INFO):
        serve(scenario, access_log=True)


# --- stock clients, in processes of their own because both fill protobuf's process-wide pool --------------------------

_TRITON = """
import queue, warnings; warnings.simplefilter("ignore")
import numpy as np, tritonclient.grpc as t
client = t.InferenceServerClient(f"127.0.0.1:{port}")
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("echo", "1")
assert client.get_server_metadata().name == "phoenix"
assert client.get_model_metadata("echo", as_json=True)["inputs"][0]["datatype"] == "FP32"
assert client.get_model_config("echo").config.input[0].name == "x_FP32"
assert {m.name for m in client.get_model_repository_index().models} == {"all", "echo", "typed", "wide"}
assert client.get_log_settings(as_json=True)["settings"]["log_error"]["bool_param"]
x = t.InferInput("x_FP32", [1, 2], "FP32"); x.set_data_from_numpy(np.array([[1, 2]], np.float32))
for options in ({}, {"compression_algorithm": "gzip"}, {"client_timeout": 20}, {"timeout": 20_000_000}):
    result = client.infer("echo", [x], request_id="9", outputs=[t.InferRequestedOutput("y_FP32")], **options)
    assert result.as_numpy("y_FP32").tolist() == [[1, 2]] and result.get_response().id == "9"
b = t.InferInput("x_BYTES", [1, 2], "BYTES"); b.set_data_from_numpy(np.array([["a", "grün"]], dtype=object))
try:
    client.infer("typed", [b])
    raise SystemExit("missing inputs were accepted")
except t.InferenceServerException as error:
    assert error.status() == "StatusCode.INVALID_ARGUMENT" and "'x_BOOL' is missing" in error.message()
answers = queue.Queue()
client.start_stream(lambda result, error: answers.put((result, error)))
client.async_stream_infer("echo", [x], request_id="s1")
client.async_stream_infer("nope", [x], request_id="s2")
client.async_stream_infer("echo", [x], request_id="s3")
(one, none), (two, error), (three, _) = [answers.get(timeout=20) for _ in range(3)]
assert none is None and one.get_response().id == "s1" and three.get_response().id == "s3" and "nope" in str(error)
client.stop_stream()
stats = client.get_inference_statistics("echo").model_stats[0]
assert stats.inference_count == 6, stats
client.unload_model("echo"); assert not client.is_model_ready("echo")
client.load_model("echo"); assert client.is_model_ready("echo")
"""
_KSERVE = """
import asyncio, warnings; warnings.simplefilter("ignore")
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
async def main():
    client = InferenceGRPCClient(f"127.0.0.1:{port}")
    assert await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready("echo")
    for is_raw in (True, False):
        x = InferInput("x_FP32", [1, 2], "FP32")
        x.set_data_from_numpy(np.array([[1, 2]], np.float32), binary_data=is_raw)
        reply = await client.infer(InferRequest("echo", [x]))
        assert reply.outputs[0].as_numpy().tolist() == [[1, 2]], reply
    await client.close()
asyncio.run(main())
"""


@pytest.mark.clients
@pytest.mark.parametrize("script", [_TRITON, _KSERVE], ids=["tritonclient", "kserve"])
def test_stock_clients_work_unchanged(serve: Serve, script: str) -> None:
    async def scenario(at: Running) -> None:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", f"port = {at.port}\n{script}", stderr=asyncio.subprocess.PIPE
        )
        _, errors = await client.communicate()
        assert client.returncode == 0, errors.decode()

    serve(scenario)
