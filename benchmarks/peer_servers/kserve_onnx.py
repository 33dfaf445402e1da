"""A custom model for KServe's ModelServer that runs ONNX Runtime; run by the Python of KServe's environment.

python kserve_onnx.py MODEL.onnx NAME HTTP_PORT GRPC_PORT
"""

from __future__ import annotations

import sys
from uuid import uuid4

import onnxruntime as ort
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.utils.numpy_codec import from_np_dtype


class OnnxModel(Model):
    """One ONNX file."""

    def __init__(self, name: str, uri: str) -> None:
        super().__init__(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # as everywhere in this comparison
        self._session = ort.InferenceSession(uri, options, providers=["CPUExecutionProvider"])
        self._output_names = [output.name for output in self._session.get_outputs()]
        self.ready = True

    def predict(
        self,
        payload: InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """Run the model."""
        arrays = self._session.run(self._output_names, {tensor.name: tensor.as_numpy() for tensor in payload.inputs})
        outputs = []
        for name, array in zip(self._output_names, arrays, strict=True):
            output = InferOutput(name, list(array.shape), from_np_dtype(array.dtype))
            output.set_data_from_numpy(array, binary_data=payload.use_binary_outputs)
            outputs.append(output)
        return InferResponse(
            payload.id or str(uuid4()),
            self.name,
            outputs,
            use_binary_outputs=payload.use_binary_outputs,
            from_grpc=payload.from_grpc,
        )


if __name__ == "__main__":
    uri, name, http_port, grpc_port = sys.argv[1:]
    server = ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1, enable_latency_logging=False)
    server.start([OnnxModel(name, uri)])
