"""The endpoint a competent team writes first: FastAPI, pydantic in and out, ONNX Runtime in a `def` endpoint, uvicorn.

    python benchmarks/naive.py MODEL.onnx --name iris --port 8010

It speaks the JSON form of the Open Inference Protocol, so that it gets the same bytes as Phoenix. It is given every
advantage that costs its author nothing: uvloop and httptools, no access log, one thread for the session.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

NUMPY = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64, "INT32": np.int32}
OIP = {np.dtype(of): name for name, of in NUMPY.items()}


class Tensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class InferRequest(BaseModel):
    id: str | None = None
    inputs: list[Tensor]


class InferResponse(BaseModel):
    model_name: str
    id: str | None = None
    outputs: list[Tensor]


def create_app(model: Path, name: str) -> FastAPI:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    output_names = [output.name for output in session.get_outputs()]
    app = FastAPI()

    @app.get("/v2/health/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post(f"/v2/models/{name}/infer")
    def infer(request: InferRequest) -> InferResponse:
        feed = {t.name: np.array(t.data, NUMPY[t.datatype]).reshape(t.shape) for t in request.inputs}
        arrays = session.run(output_names, feed)
        outputs = [
            Tensor(name=of, shape=list(array.shape), datatype=OIP[array.dtype], data=array.ravel().tolist())
            for of, array in zip(output_names, arrays, strict=True)
        ]
        return InferResponse(model_name=name, id=request.id, outputs=outputs)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="A plain FastAPI endpoint for one ONNX model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(create_app(options.model, options.name), host="127.0.0.1", port=options.port, log_level="warning",
                access_log=False)  # fmt: skip


if __name__ == "__main__":
    main()
