"""The models that the conformance table asks for, and the manifests that serve them.

    python tests/conformance/models.py DIR      write `<name>.onnx` and `<name>.yaml` for each

Serve DIR with any server (`phoenix-server serve DIR`), then judge it with `pytest tests/conformance --url … --grpc …`.
A server of another make needs the same ONNX files under the same names and versions; the manifests only add one limit
(`oip-limited` takes bodies of at most 4 KiB), which no rule of the protocol itself depends on.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

# Read by every onnxruntime since 1.12.
OPSET = 17
IR_VERSION = 8
LIMITED_BYTES = 4096

Dims = Sequence[int | str]

# The protocol's datatypes, as ONNX spells them.
ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


class Tensor(NamedTuple):
    """One input or output: a dimension that is a name is dynamic."""

    name: str
    datatype: str
    dims: Dims

    @property
    def shape(self) -> list[int]:
        """The shape as the protocol's metadata gives it, -1 for a dynamic dimension."""
        return [dim if isinstance(dim, int) else -1 for dim in self.dims]

    @property
    def value_info(self) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(self.name, ONNX_TYPES[self.datatype], self.dims)


class Model(NamedTuple):
    """One version of a conformance model. `spec`: what its manifest says beside the model itself."""

    name: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    nodes: Sequence[onnx.NodeProto]
    constants: Sequence[onnx.TensorProto] = ()
    version: str = "1"
    spec: dict[str, object] = {}  # noqa: RUF012 (never changed)

    @property
    def onnx(self) -> bytes:
        graph = helper.make_graph(
            list(self.nodes),
            self.name,
            [tensor.value_info for tensor in self.inputs],
            [tensor.value_info for tensor in self.outputs],
            initializer=list(self.constants),
        )
        model = helper.make_model(
            graph,
            producer_name="phoenix-conformance",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.version}"


def constant(name: str, values: object, dtype: type[np.generic] = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def identity(datatype: str) -> Model:
    return Model(
        f"oip-identity-{datatype.lower()}",
        [Tensor("x", datatype, ["rows", 2])],
        [Tensor("y", datatype, ["rows", 2])],
        [helper.make_node("Identity", ["x"], ["y"])],
    )


def plus(version: str, amount: float) -> Model:
    return Model(
        "oip-version",
        [Tensor("x", "FP32", ["rows"])],
        [Tensor("y", "FP32", ["rows"])],
        [helper.make_node("Add", ["x", "amount"], ["y"])],
        [constant("amount", amount)],
        version=version,
    )


def loop(turns: int) -> Model:
    """A model whose run takes long because it goes round a loop: some 0.1 s, more on a slow machine, never nothing."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still_go_on"]),
            helper.make_node("Neg", ["value"], ["next_value"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, ["rows"]),
        ],
        [
            helper.make_tensor_value_info("still_go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_value", TensorProto.FLOAT, ["rows"]),
        ],
    )
    return Model(
        "oip-slow",
        [Tensor("x", "FP32", ["rows"])],
        [Tensor("y", "FP32", ["rows"])],
        [helper.make_node("Loop", ["turns", "always", "x"], ["y"], body=body)],
        [constant("turns", turns, np.int64), constant("always", True, np.bool_)],
        spec={"warmup": {"iterations": 1}},
    )


ADD = Model(
    "oip-add",
    [Tensor("a", "FP32", [2, 3]), Tensor("b", "FP32", [2, 3])],
    [Tensor("sum", "FP32", [2, 3])],
    [helper.make_node("Add", ["a", "b"], ["sum"])],
)
SCALAR = Model(
    "oip-scalar",
    [Tensor("x", "FP32", [])],
    [Tensor("y", "FP32", [])],
    [helper.make_node("Add", ["x", "x"], ["y"])],
)
MANY = Model(
    "oip-many",
    [Tensor("x", "FP32", ["rows", 2])],
    [
        Tensor("doubled", "FP32", ["rows", 2]),
        Tensor("negated", "FP32", ["rows", 2]),
        Tensor("integer", "INT64", ["rows", 2]),
    ],
    [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("Neg", ["x"], ["negated"]),
        helper.make_node("Cast", ["x"], ["integer"], to=TensorProto.INT64),
    ],
)
CUBE = Model(
    "oip-cube",
    [Tensor("x", "INT32", ["rows", "height", "width"])],
    [Tensor("y", "INT32", ["rows", "width", "height"])],
    [helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 1])],
)
DIVIDE = Model(
    "oip-divide",
    [Tensor("a", "FP32", ["rows"]), Tensor("b", "FP32", ["rows"])],
    [Tensor("ratio", "FP32", ["rows"])],
    [helper.make_node("Div", ["a", "b"], ["ratio"])],
)
TOTAL = Model(  # its output has no rows, so requests can never share a run
    "oip-total",
    [Tensor("x", "FP32", ["rows"])],
    [Tensor("total", "FP32", [])],
    [helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0)],
)
TEXT = Model(
    "oip-text",
    [Tensor("x", "BYTES", ["rows"])],
    [Tensor("y", "BYTES", ["rows"])],
    [helper.make_node("Identity", ["x"], ["y"])],
)
LOOKUP = Model(  # fails while it runs on an index that is not 0, 1 or 2
    "oip-lookup",
    [Tensor("index", "INT64", ["rows"])],
    [Tensor("value", "FP32", ["rows"])],
    [helper.make_node("Gather", ["table", "index"], ["value"])],
    [constant("table", [10, 20, 30])],
)
LIMITED = Model(
    "oip-limited",
    [Tensor("x", "UINT8", ["rows"])],
    [Tensor("y", "UINT8", ["rows"])],
    [helper.make_node("Identity", ["x"], ["y"])],
    spec={"limits": {"maxRequestBytes": LIMITED_BYTES}},
)
SPARE = Model(  # loaded and unloaded by the repository rules
    "oip-spare",
    [Tensor("x", "FP32", ["rows"])],
    [Tensor("y", "FP32", ["rows"])],
    [helper.make_node("Neg", ["x"], ["y"])],
)
IDLE = Model(  # never asked to infer
    "oip-idle",
    [Tensor("x", "FP32", ["rows"])],
    [Tensor("y", "FP32", ["rows"])],
    [helper.make_node("Neg", ["x"], ["y"])],
)
SLOW = loop(turns=100_000)

MODELS = (
    *(identity(datatype) for datatype in ONNX_TYPES),
    ADD, SCALAR, MANY, CUBE, DIVIDE, TOTAL, TEXT, LOOKUP, LIMITED, SPARE, IDLE, SLOW,
    plus("1", 1.0),
    plus("2", 2.0),
)  # fmt: skip


def manifest(model: Model) -> dict[str, object]:
    source = {
        "uri": f"{model.file_name}.onnx",
        "sha256": hashlib.sha256(model.onnx).hexdigest(),
        "version": model.version,
    }
    return {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": model.name},
        "spec": {"model": source, **model.spec},
    }


def write(folder: Path) -> None:
    """Write every model and its manifest into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        (folder / f"{model.file_name}.onnx").write_bytes(model.onnx)
        (folder / f"{model.file_name}.yaml").write_text(yaml.safe_dump(manifest(model), sort_keys=False))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/conformance/models.py DIR")
    write(Path(sys.argv[1]))
    print(f"{len(MODELS)} models in {sys.argv[1]}; serve them with: phoenix-server serve {sys.argv[1]}")
