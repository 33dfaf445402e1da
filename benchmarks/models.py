"""Make the models that the benchmarks serve, with seeded random weights: what is measured is the work, not the answers.

    python benchmarks/models.py DIR

writes `DIR/mlp` and `DIR/resnet`, each a folder that `phoenix-server serve` takes: `model.onnx` and `model.yaml`. They
are 66 MB, so DIR is a cache and nothing in it is committed. The third model of the benchmarks is `examples/iris`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

SEED = 18
OPSET = 17
IR_VERSION = 8

MLP_WIDTHS = (256, 1024, 2048, 1024, 256, 10)
RESNET_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels and the stride of the first of two blocks

MANIFEST = """\
apiVersion: phoenix-ml.io/v1alpha1
kind: PhoenixModel
metadata:
  name: {name}
spec:
  model:
    uri: model.onnx
    sha256: {sha256}
    version: "1"
  resources:
    requests: {{cpu: "1", memory: 512Mi}}
    limits: {{memory: 512Mi}}
"""


class Graph:
    """An ONNX graph under construction: each layer method appends nodes and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.Generator(np.random.PCG64(SEED))

    def _weight(self, name: str, values: npt.NDArray[np.float32]) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def _he(self, name: str, shape: tuple[int, ...], fan_in: int) -> str:
        """He initialisation: activations neither vanish nor overflow on the way down."""
        return self._weight(name, self._random.standard_normal(shape, np.float32) * np.float32((2 / fan_in) ** 0.5))

    def node(self, op: str, inputs: list[str], output: str, **attributes: int | list[int]) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def dense(self, x: str, name: str, inputs: int, outputs: int) -> str:
        weight = self._he(f"{name}.weight", (inputs, outputs), inputs)
        bias = self._weight(f"{name}.bias", np.zeros(outputs, np.float32))
        return self.node("Gemm", [x, weight, bias], name)

    def convolution(self, x: str, name: str, inputs: int, outputs: int, *, size: int, stride: int = 1) -> str:
        """Convolution without bias, then batch normalisation, as ResNet has them."""
        weight = self._he(f"{name}.weight", (outputs, inputs, size, size), inputs * size * size)
        x = self.node("Conv", [x, weight], name, kernel_shape=[size] * 2, strides=[stride] * 2, pads=[size // 2] * 4)
        norm = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
        names = [self._weight(f"{name}.norm.{k}", np.full(outputs, v, np.float32)) for k, v in norm.items()]
        return self.node("BatchNormalization", [x, *names], f"{name}.norm")

    def block(self, x: str, name: str, inputs: int, outputs: int, *, stride: int) -> str:
        """ResNet's basic block: two 3x3 convolutions beside a shortcut."""
        y = self.convolution(x, f"{name}.conv1", inputs, outputs, size=3, stride=stride)
        y = self.node("Relu", [y], f"{name}.relu1")
        y = self.convolution(y, f"{name}.conv2", outputs, outputs, size=3)
        if stride != 1 or inputs != outputs:
            x = self.convolution(x, f"{name}.shortcut", inputs, outputs, size=1, stride=stride)
        return self.node("Relu", [self.node("Add", [y, x], f"{name}.add")], f"{name}.relu2")

    def model(self, name: str, input_shape: list[int], output: str, outputs: int) -> onnx.ModelProto:
        self.node("Identity", [output], "y")
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *input_shape])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])
        graph = helper.make_graph(self.nodes, name, [x], [y], initializer=self.weights)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, producer_name="phoenix-benchmarks", ir_version=IR_VERSION, opset_imports=opsets)


def mlp() -> onnx.ModelProto:
    """Five dense layers, 4.7 million parameters: `x` FP32 [-1, 256] to `y` FP32 [-1, 10]."""
    graph, x, last = Graph(), "x", len(MLP_WIDTHS) - 1
    for i, (inputs, outputs) in enumerate(pairwise(MLP_WIDTHS), start=1):
        x = graph.dense(x, f"dense{i}", inputs, outputs)
        if i < last:
            x = graph.node("Relu", [x], f"relu{i}")
    return graph.model("mlp", [MLP_WIDTHS[0]], x, MLP_WIDTHS[-1])


def resnet() -> onnx.ModelProto:
    """ResNet-18 (He et al. 2015, https://arxiv.org/abs/1512.03385), 11.7 million parameters.

    `x` FP32 [-1, 3, 224, 224] to `y` FP32 [-1, 1000].
    """
    graph = Graph()
    x = graph.convolution("x", "stem", 3, 64, size=7, stride=2)
    x = graph.node("Relu", [x], "stem.relu")
    x = graph.node("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for i, (outputs, stride) in enumerate(RESNET_STAGES, start=1):
        x = graph.block(x, f"stage{i}.block1", channels, outputs, stride=stride)
        x = graph.block(x, f"stage{i}.block2", outputs, outputs, stride=1)
        channels = outputs
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pool")], "flatten")
    return graph.model("resnet", [3, 224, 224], graph.dense(x, "head", channels, 1000), 1000)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {"mlp": mlp, "resnet": resnet}


def parameter_count(model: onnx.ModelProto) -> int:
    """Trained numbers, as papers count them: without the running mean and variance of batch normalisation."""
    counted = [w for w in model.graph.initializer if not w.name.endswith((".norm.mean", ".norm.var"))]
    return sum(int(np.prod(w.dims)) for w in counted)


def write(directory: Path) -> dict[str, int]:
    """Write every model under `directory` and return its number of parameters."""
    counts = {}
    for name, build in MODELS.items():
        model = build()
        data = model.SerializeToString(deterministic=True)
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(data)
        (folder / "model.yaml").write_text(MANIFEST.format(name=name, sha256=hashlib.sha256(data).hexdigest()))
        counts[name] = parameter_count(model)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the models that the benchmarks serve.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a cache folder, for example benchmarks/.cache")
    directory = parser.parse_args().directory
    for name, count in write(directory).items():
        print(f"{directory / name}: {count:,} parameters")


if __name__ == "__main__":
    main()
