"""Small real models for the tests of fetching and reading: one file, with external data, with data in subgraphs."""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def _model(
    nodes: list[NodeProto], initializers: list[TensorProto], functions: list[onnx.FunctionProto] = ()
) -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=9, producer_name="tests", functions=list(functions)
    )


def weights(name: str, seed: int = 0, rows: int = 1) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).random((rows, 4), np.float32), name)


def external(name: str, location: str) -> TensorProto:
    """A tensor of 1 x 4 floats whose bytes lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1, 4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="16")
    return tensor


def plain_model(seed: int = 0, rows: int = 1) -> bytes:
    """y = x + w; `rows` of weights make it bigger (16 bytes each)."""
    return _model([helper.make_node("Add", ["x", "w"], ["y"])], [weights("w", seed, rows)]).SerializeToString()


def external_model(*locations: str) -> bytes:
    """y = x + w0 + w1 ... with each w in its own external file."""
    names = [f"w{i}" for i in range(len(locations))]
    sums = ["x", *(f"s{i}" for i in range(len(locations) - 1)), "y"]
    nodes = [helper.make_node("Add", [sums[i], name], [sums[i + 1]]) for i, name in enumerate(names)]
    tensors = [external(name, location) for name, location in zip(names, locations, strict=True)]
    return _model(nodes, tensors).SerializeToString()


def hidden_model() -> bytes:
    """External data in every place the format has room for a tensor."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["o"])],
        "branch",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1, 4])],
        [external("w", "in_subgraph")],
    )
    loop = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    constant = helper.make_node("Constant", [], ["k"], value=external("k", "in_attribute"))
    several = helper.make_node("Custom", [], ["l"], domain="local", list=[external("a", "in_tensors"), weights("b")])
    graphs = helper.make_node("Custom", [], ["m"], domain="local", bodies=[branch])
    graphs.attribute[0].graphs[0].initializer[0].CopyFrom(external("w", "sub/in_graphs"))
    sparse = helper.make_node("Custom", [], ["o"], domain="local")
    attribute = sparse.attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(external("v", "in_sparse_values"))
    attribute.sparse_tensor.indices.CopyFrom(external("i", "in_sparse_indices"))
    attribute = sparse.attribute.add(name="t", type=onnx.AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add().values.CopyFrom(external("v", "in_sparse_tensors"))
    inner = helper.make_node("Constant", [], ["q"], value=external("q", "in_function"))
    function = helper.make_function("local", "F", ["p"], ["q"], [inner], [helper.make_opsetid("", 17)])
    default = function.attribute_proto.add(name="d", type=onnx.AttributeProto.TENSOR)
    default.t.CopyFrom(external("d", "in_function_default"))
    add = helper.make_node("Add", ["x", "w"], ["y"])
    model = _model([loop, constant, several, graphs, sparse, add], [external("w", "./in_initializer")], [function])
    model.graph.sparse_initializer.add().values.CopyFrom(external("s", "in_sparse_initializer"))
    not_external = model.graph.initializer.add(name="n", data_type=TensorProto.FLOAT, dims=[0])
    not_external.external_data.add(key="location", value="../left_over")  # no data_location: nobody reads it
    return model.SerializeToString()


HIDDEN = (
    "in_attribute", "in_function", "in_function_default", "in_initializer", "in_sparse_indices",
    "in_sparse_initializer", "in_sparse_tensors", "in_sparse_values", "in_subgraph", "in_tensors", "sub/in_graphs",
)  # fmt: skip


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files; return the path of the first."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / next(iter(files))
