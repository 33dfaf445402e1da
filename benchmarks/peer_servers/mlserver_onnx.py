"""A model for MLServer that runs ONNX Runtime, for which MLServer has no runtime; MLServer imports it."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """Loads the file in `parameters.uri`."""

    async def load(self) -> bool:
        """Load the model, with one thread as everywhere in this comparison."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        uri = self.settings.parameters.uri
        self._session = ort.InferenceSession(uri, options, providers=["CPUExecutionProvider"])
        self._output_names = [output.name for output in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run the model."""
        feed = {tensor.name: np.asarray(NumpyCodec.decode_input(tensor)) for tensor in payload.inputs}
        arrays = self._session.run(self._output_names, feed)
        outputs = []
        for name, array in zip(self._output_names, arrays, strict=True):
            output = NumpyCodec.encode_output(name, array)
            output.shape = list(array.shape)  # the codec makes a column of a vector
            outputs.append(output)
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=outputs)
