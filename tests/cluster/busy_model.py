"""A model that keeps a core busy for as long as one likes, small enough for a ConfigMap: a loop of additions."""

import base64
from typing import Any

from onnx import ModelProto, TensorProto, helper


def busy(iterations: int) -> ModelProto:
    """Return a model that adds 1 to its input `x`, of shape [n, 4], so many times, one after the other."""
    row = ["n", 4]
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["before", "one"], ["after"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, row),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, row),
        ],
        [one],
    )
    count = helper.make_tensor("count", TensorProto.INT64, [], [iterations])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "yes", "x"], ["y"], body=body)],
        "busy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, row)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, row)],
        [count, yes],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def config_map(iterations: int) -> dict[str, Any]:
    """Return a ConfigMap `busy` with the key `model.onnx`."""
    data = base64.b64encode(busy(iterations).SerializeToString()).decode()
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "busy"},
        "binaryData": {"model.onnx": data},
    }
