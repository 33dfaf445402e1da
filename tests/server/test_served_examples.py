"""Every example, served: answers equal onnxruntime's bit for bit, alone and batched with others."""

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import phoenix_process
import pytest
from phoenix_process import Running

from phoenix_server import codec_json
from phoenix_server.tensors import DTYPE_OF_ONNX

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["iris", "digits", "text", "filetype"]
AT_ONCE = 64


def magika_models() -> Path:
    found = importlib.util.find_spec("magika")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "models"


@pytest.fixture(scope="module", params=["1", "4"], ids=["1-cpu", "4-cpus"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    env = {"PHOENIX_MODEL_STORE": str(magika_models()), "PHOENIX_CPUS": request.param}
    with phoenix_process.start([EXAMPLES], env) as running:
        yield running


def session(name: str) -> onnxruntime.InferenceSession:
    path = magika_models() / "standard_v3_3/model.onnx" if name == "filetype" else EXAMPLES / name / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def row_requests(name: str, count: int) -> list[dict[str, Any]]:
    """Requests of one to three rows each, made from the example's own rows in turn."""
    request = json.loads((EXAMPLES / name / "request.json").read_text())
    tensor = request["inputs"][0]
    rows = np.array(tensor["data"], dtype=object).reshape(tensor["shape"])
    if name in ("iris", "digits"):  # other rows too: no request may get another's answer
        rows = np.concatenate([rows] * count).astype(float)
        rows += np.arange(len(rows)).reshape(-1, *[1] * (rows.ndim - 1)) % 17
    made, at = [], 0
    for index in range(count):
        size = 1 if name == "filetype" else index % 3 + 1
        part = np.take(rows, range(at, at + size), axis=0, mode="wrap")
        at += size
        made.append({"inputs": [tensor | {"shape": list(part.shape), "data": part.reshape(-1).tolist()}]})
    return made


def expected(run: onnxruntime.InferenceSession, request: dict[str, Any]) -> dict[str, Any]:
    decoded, _ = codec_json.decode(request)
    names = [output.name for output in run.get_outputs()]
    return dict(zip(names, run.run(names, decoded.inputs), strict=True))


def check(run: onnxruntime.InferenceSession, request: dict[str, Any], answer: dict[str, Any]) -> None:
    arrays = expected(run, request)
    assert [output["name"] for output in answer["outputs"]] == list(arrays)
    for output in answer["outputs"]:
        array = arrays[output["name"]]
        assert output["shape"] == list(array.shape)
        got = np.array(output["data"], dtype=array.dtype).reshape(array.shape)
        np.testing.assert_array_equal(got, array)  # float32 in JSON is its shortest form, so equal means every bit


@pytest.mark.parametrize("name", NAMES)
def test_answer_alone_equals_onnxruntime(server: Running, name: str) -> None:
    run = session(name)
    with httpx.Client(base_url=server.rest_url, timeout=30) as client:
        for request in row_requests(name, 6):
            response = client.post(f"/v2/models/{name}/infer", json=request)
            assert response.status_code == 200, response.text
            check(run, request, response.json())


@pytest.mark.parametrize("name", NAMES)
def test_answer_batched_with_others_equals_onnxruntime(server: Running, name: str) -> None:
    run = session(name)
    requests = row_requests(name, AT_ONCE)

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=server.rest_url, timeout=60, limits=limits) as client:
            calls = (client.post(f"/v2/models/{name}/infer", json=request) for request in requests * 3)
            return await asyncio.gather(*calls)

    for request, response in zip(requests * 3, asyncio.run(ask_all()), strict=True):
        assert response.status_code == 200, response.text
        check(run, request, response.json())
    stats = httpx.get(f"{server.rest_url}/v2/models/{name}/stats", timeout=30).json()["model_stats"][0]
    sizes = {batch["batch_size"] for batch in stats["batch_stats"]}
    assert max(sizes) > 3 or name == "filetype", "nothing was batched"
    assert (
        sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in stats["batch_stats"])
        == (stats["inference_count"])
    )


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_the_graphs(server: Running, name: str) -> None:
    run = session(name)
    metadata = httpx.get(f"{server.rest_url}/v2/models/{name}", timeout=30).json()
    for kind, nodes in (("inputs", run.get_inputs()), ("outputs", run.get_outputs())):
        assert metadata[kind] == [
            {
                "name": node.name,
                "datatype": DTYPE_OF_ONNX[node.type].name,
                "shape": [size if isinstance(size, int) else -1 for size in node.shape],
            }
            for node in nodes
        ]
