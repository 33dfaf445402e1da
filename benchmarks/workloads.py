"""The models that are served and the requests that are sent: bytes made once, answers checked bit for bit.

One input for each model, of one row (for iris also one of 32), in the three forms of the protocol: JSON, JSON with
binary tensor data, gRPC.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from load import HttpRequest
from numpy.typing import NDArray
from processes import BenchError
from raw import RawWorker

Form = Literal["json", "binary", "grpc"]
Array = NDArray[np.generic]

HERE = Path(__file__).parent
MODELS_DIR = HERE / ".cache" / "models"
GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_SEED = 7
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Workload:
    """One model with its request. `folder` is what Phoenix serves; `inputs` a `.npy` file with the input."""

    name: str
    folder: Path
    inputs: Path

    @property
    def key(self) -> str:
        """Tells apart the workloads of one model."""
        return self.inputs.stem

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / "model.onnx"

    def request(self, form: Form) -> HttpRequest:
        """Return the HTTP request in one of the two REST forms."""
        array = np.load(self.inputs)
        tensor = {"name": "x", "shape": array.shape, "datatype": "FP32"}
        path = f"/v2/models/{self.name}/infer"
        if form == "json":
            document = {"inputs": [{**tensor, "data": array.ravel()}]}
            return HttpRequest(path, orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))
        tensor["parameters"] = {"binary_data_size": array.nbytes}
        header = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
        headers = (
            ("Content-Type", "application/octet-stream"),
            ("Inference-Header-Content-Length", str(len(header))),
        )
        return HttpRequest(path, header + array.tobytes(), headers)

    def message(self) -> bytes:
        """Return the gRPC request. It brings an id, so that all answers have one size."""
        from phoenix_server._proto.inference import ModelInferRequest

        array = np.load(self.inputs)
        request = ModelInferRequest(model_name=self.name, id="bench", raw_input_contents=[array.tobytes()])
        request.inputs.add(name="x", datatype="FP32", shape=array.shape)
        return bytes(request.SerializeToString())


def prepare(folder: Path) -> dict[str, Workload]:
    """Make the models that are not there yet and write the inputs to `folder`."""
    maker = HERE / "models.py"
    made = [MODELS_DIR / name / "model.yaml" for name in ("mlp", "resnet")]
    if not all(file.is_file() and file.stat().st_mtime >= maker.stat().st_mtime for file in made):
        subprocess.run(
            [sys.executable, str(maker), str(MODELS_DIR)], check=True, stdout=subprocess.DEVNULL, timeout=300
        )
    random = np.random.Generator(np.random.PCG64(_SEED))
    rows: dict[str, Array] = {
        "iris": np.array([[5.1, 3.5, 1.4, 0.2]], np.float32),
        "mlp": random.standard_normal((1, 256), np.float32),
        "resnet": random.standard_normal((1, 3, 224, 224), np.float32),
        "iris-32": random.uniform(0.1, 8.0, (32, 4)).astype(np.float32),
    }
    folders = {"iris": HERE.parent / "examples" / "iris"}
    workloads = {}
    for key, row in rows.items():
        name, inputs = key.partition("-")[0], folder / f"{key}.npy"
        np.save(inputs, row)
        workloads[key] = Workload(name, folders.get(name, MODELS_DIR / name), inputs)
    return workloads


def right_answer(workload: Workload, raw: RawWorker, folder: Path) -> dict[str, Array]:
    """Return what ONNX Runtime in process answers: arrays by output name."""
    file = folder / f"{workload.key}-answer.npz"
    if not file.exists():
        raw.write_answer(workload.model, workload.inputs, file)
    with np.load(file) as saved:
        return dict(saved)


def check_http(port: int, request: HttpRequest, right: dict[str, Array]) -> None:
    """Send one request and compare the answer bit for bit; raise `BenchError` if it differs."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        reply = connection.getresponse()
        body = reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"no answer: {error!r}") from error
    finally:
        connection.close()
    if reply.status != 200:
        raise BenchError(f"HTTP {reply.status}: {body[:500].decode(errors='replace')}")
    header_size = reply.headers.get("Inference-Header-Content-Length")
    document = json.loads(body[: int(header_size)] if header_size else body)
    compare_json(document, right, body[int(header_size) :] if header_size else b"")


def compare_json(document: dict[str, Any], right: dict[str, Array], blobs: bytes = b"") -> None:
    """Compare an answer, whose binary tensor data are `blobs`, bit for bit; raise `BenchError` if it differs."""
    answer = {}
    for output in document["outputs"]:
        dtype = right[output["name"]].dtype if output["name"] in right else None
        size = (output.get("parameters") or {}).get("binary_data_size")
        if size is None:
            array = np.array(output["data"]).astype(dtype)
        else:
            array, blobs = np.frombuffer(blobs[:size], dtype), blobs[size:]
        answer[output["name"]] = array.reshape(output["shape"])
    _compare(answer, right)


def check_grpc(port: int, message: bytes, right: dict[str, Array]) -> int:
    """Make one call and compare the answer bit for bit; return the size of its message."""
    import grpc

    from phoenix_server._proto.inference import ModelInferResponse

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            reply = channel.unary_unary(GRPC_METHOD)(message, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise BenchError(f"gRPC {error.code().name}: {error.details()}") from error
    response = ModelInferResponse.FromString(reply)
    answer = {}
    for index, output in enumerate(response.outputs):
        dtype = right[output.name].dtype if output.name in right else None
        if response.raw_output_contents:
            array = np.frombuffer(response.raw_output_contents[index], dtype)
        else:
            fields = (field[1] for field in output.contents.ListFields())
            array = np.array(next(fields)).astype(dtype)
        answer[output.name] = array.reshape(list(output.shape))
    _compare(answer, right)
    return len(reply)


def _compare(answer: dict[str, Array], right: dict[str, Array]) -> None:
    for name, expected in right.items():
        got = answer.get(name)
        if got is None or got.shape != expected.shape or got.tobytes() != expected.tobytes():
            raise BenchError(f"output '{name}' differs from ONNX Runtime's in process")
