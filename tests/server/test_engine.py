"""The engine on real onnxruntime: threads and instances, warm-up, what is batched, what its errors say."""

import asyncio
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from phoenix_server import engine
from phoenix_server.batching import Batcher
from phoenix_server.engine import Engine, EngineOptions, InlineRunner, ModelFile, Run, ThreadRunner
from phoenix_server.errors import ModelLoadError, PhoenixError, Reason
from phoenix_server.metrics import ModelMetrics
from phoenix_server.onnx_file import read_facts

OPSET = [helper.make_opsetid("", 17)]


def load(tmp_path: Path, graph: onnx.GraphProto, options: EngineOptions | None = None) -> Engine:
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=OPSET, ir_version=8), path)
    model = ModelFile(path, "0" * 64, read_facts(path), path.stat().st_size)
    return engine.load(model, options or EngineOptions())


def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def dense(width: int, layers: int) -> onnx.GraphProto:
    """A stack of square layers: `width` 1024 takes milliseconds, so its runs go to a thread."""
    rng = np.random.default_rng(1)
    nodes, weights = [], []
    for layer in range(layers):
        matrix = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"h{layer + 1}"]))
    return helper.make_graph(nodes, "dense", [value("h0", "n", width)], [value(f"h{layers}", "n", width)], weights)


def test_small_model_runs_inline_and_batches(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value("x", "n", 2)], [value("y", "n", 2)])
    loaded = load(tmp_path, graph)
    assert loaded.is_inline
    assert loaded.signature.is_batchable
    assert isinstance(loaded.runner(lambda *_: None), InlineRunner)


@pytest.mark.parametrize("instances", [1, 3])
def test_runs_on_threads_give_every_caller_its_rows(tmp_path: Path, instances: int) -> None:
    loaded = load(tmp_path, dense(1024, 12), EngineOptions(instances=instances))
    assert not loaded.is_inline
    inputs = np.random.default_rng(2).standard_normal((40, 1024)).astype(np.float32)
    alone = loaded.run({"h0": inputs}, ["h12"])[0]

    async def main() -> ModelMetrics:
        runner = loaded.runner(asyncio.get_running_loop().call_soon_threadsafe)
        assert isinstance(runner, ThreadRunner)
        assert runner.slots == instances
        metrics = ModelMetrics("m", "1")
        batcher = Batcher(runner, metrics, max_rows=8, max_queued_rows=1000, timeout_s=60)
        answers = await asyncio.gather(
            *(batcher.submit({"h0": inputs[i : i + 1]}, ("h12",), 1) for i in range(len(inputs)))
        )
        for index, (answer,) in enumerate(answers):
            np.testing.assert_allclose(answer[0], alone[index], rtol=1e-4, atol=1e-4)
        await batcher.drain()
        runner.close()
        return metrics

    metrics = asyncio.run(main())
    assert metrics.batch_rows.sum == 40
    assert metrics.execution_count < 40


@pytest.mark.parametrize(
    ("graph", "batchable"),
    [
        (
            helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value("x", 1, 2)], [value("y", 1, 2)]),
            False,
        ),
        (
            helper.make_graph(
                [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], "g", [value("x", "n", 2)], [value("y")]
            ),
            False,
        ),
        (  # says that rows come out, but the first dimension is another
            helper.make_graph(
                [helper.make_node("Transpose", ["x"], ["y"])], "g", [value("x", "n", "m")], [value("y", "a", "b")]
            ),
            False,
        ),
        (  # two inputs whose first dimensions are different things
            helper.make_graph(
                [helper.make_node("MatMul", ["x", "w"], ["y"])],
                "g",
                [value("x", "n", "k"), value("w", "k", 3)],
                [value("y", "n", 3)],
            ),
            False,
        ),
        (
            helper.make_graph(
                [helper.make_node("Add", ["x", "w"], ["y"])],
                "g",
                [value("x", "n", 3), value("w", "n", 3)],
                [value("y", "n", 3)],
            ),
            True,
        ),
    ],
    ids=["fixed", "scalar-output", "transposed", "two-meanings", "two-inputs"],
)
def test_only_models_with_rows_are_batched(tmp_path: Path, graph: onnx.GraphProto, batchable: bool) -> None:
    assert load(tmp_path, graph).signature.is_batchable == batchable


def test_model_that_refuses_the_sample_is_served_unbatched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pooling needs more than one pixel, which a sample of size 1 has not."""
    pool = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3])
    graph = helper.make_graph([pool], "g", [value("x", "n", 1, "h", "w")], [value("y", "n", 1, "a", "b")])
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path, graph)
    assert "warm-up on sample inputs failed" in caplog.text
    assert not loaded.signature.is_batchable
    assert not loaded.is_inline
    image = np.ones((1, 1, 3, 3), np.float32)
    assert loaded.run({"x": image}, ["y"])[0].item() == 1.0


def test_run_that_fails_says_so_without_internals(tmp_path: Path) -> None:
    gather = helper.make_node("Gather", ["t", "i"], ["y"])
    table = numpy_helper.from_array(np.arange(4, dtype=np.float32), "t")
    graph = helper.make_graph([gather], "g", [value("i", "n", kind=TensorProto.INT64)], [value("y", "n")], [table])
    loaded = load(tmp_path, graph)
    with pytest.raises(PhoenixError, match="the model failed on this input") as fault:
        loaded.run({"i": np.array([9])}, ["y"])
    assert "/" not in fault.value.message.replace("and/or", "")


def test_model_without_inputs_is_refused(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.ones(1, np.float32)))
    with pytest.raises(ModelLoadError, match="no inputs") as fault:
        load(tmp_path, helper.make_graph([constant], "g", [], [value("y", 1)]))
    assert fault.value.reason is Reason.INVALID_MODEL


def test_bound_run_equals_plain_run(tmp_path: Path) -> None:
    """The path of devices, on the CPU: inputs and outputs bound instead of passed."""
    loaded = load(tmp_path, dense(64, 2))
    inputs = {"h0": np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)[:, ::1]}
    bound = Engine._run_bound(loaded._sessions[0], inputs, ["h2"])
    np.testing.assert_array_equal(bound[0], loaded.run(inputs, ["h2"])[0])


def test_prefer_serves_on_the_cpu_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = EngineOptions(provider="CUDA", must_accelerate=False)
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path, dense(8, 1), options)
    assert loaded.provider == "CPUExecutionProvider"
    assert "serving on the CPU" in caplog.text
    with pytest.raises(ModelLoadError, match="policy: Prefer") as fault:
        load(tmp_path, dense(8, 1), EngineOptions(provider="CUDA", must_accelerate=True))
    assert fault.value.reason is Reason.PROVIDER_UNAVAILABLE


@pytest.mark.parametrize(
    ("asked", "cpus", "threads"), [(0, 1.0, 1), (0, 0.25, 1), (0, 1.5, 2), (0, 4.0, 4), (3, 1.0, 3)]
)
def test_threads_come_from_the_cpu_request(asked: int, cpus: float, threads: int) -> None:
    assert engine.intra_op_threads(asked, cpus) == threads


def test_failed_run_reports_to_its_caller(tmp_path: Path) -> None:
    loaded = load(tmp_path, dense(8, 1))
    reported: list[Run] = []
    run = Run({"h0": np.zeros((1, 9), np.float32)}, ("h1",), 1)
    InlineRunner(loaded).start(run, reported.append)
    assert isinstance(reported[0].error, PhoenixError)
