"""Models that are completed with features, for tests: manifests, ONNX files, requests and what is in Redis."""

import http.client
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import redis
from onnx import TensorProto, helper
from phoenix_process import Running

NAMES = ["a", "b", "c"]
# name -> (features, datatype); each multiplies nothing: `y` is what came in as `x`, and `k` decides the rows.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "strict": ({"defaults": {"c": 7}}, TensorProto.FLOAT),
    "lenient": ({"onMissing": "Default", "defaults": {"a": 10, "b": 20, "c": 30}}, TensorProto.FLOAT),
    "fresh": ({"onStale": "Reject", "maxAgeSeconds": 60}, TensorProto.FLOAT),
    "whole": ({}, TensorProto.INT64),
    "words": ({}, TensorProto.STRING),
}


def identity(datatype: int) -> onnx.ModelProto:
    """`x` [n, 3] comes out as `y`, `k` [n, 1] as `l`."""
    inputs = [
        helper.make_tensor_value_info("x", datatype, ["n", 3]),
        helper.make_tensor_value_info("k", TensorProto.FLOAT, ["n", 1]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", datatype, ["n", 3]),
        helper.make_tensor_value_info("l", TensorProto.FLOAT, ["n", 1]),
    ]
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["k"], ["l"])]
    graph = helper.make_graph(nodes, "identity", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def alone() -> onnx.ModelProto:
    """A model whose only input comes from features."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "alone", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(folder: Path, *names: str) -> Path:
    """Write the models of those names (none: all) with their manifests; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or (*MODELS, "alone"):
        features, datatype = MODELS.get(name, ({}, TensorProto.FLOAT))
        model = alone() if name == "alone" else identity(datatype)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        write_manifest(folder, name, features)
    return folder


def write_manifest(folder: Path, name: str, features: Mapping[str, Any], **spec: Any) -> None:
    """Write the manifest of a model that is in `folder`."""
    spec = {
        "model": {"uri": f"{name}.onnx"},
        "features": {"keyTemplate": "user:{entity}", "input": "x", "names": NAMES, **features},
        "bindings": {"redis": {"backend": "default"}},
        **spec,
    }
    metadata = {"name": name, "namespace": "ml"}
    document = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "metadata": metadata, "spec": spec}
    (folder / f"{name}.yaml").write_text(json.dumps(document))


def put(client: redis.Redis, model: str, entity: str, *values: Any, age_s: float | None = 10, prefix: str = "") -> None:
    """Write an entity's hash: `values` are those of a, b, c; None leaves one out."""
    fields = {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}
    if age_s is not None:
        fields["_updated"] = time.time() - age_s
    client.delete(key := f"{prefix or f'phx:ml:{model}:'}user:{entity}")
    client.hset(key, mapping=fields)


def ask(
    server: Running, model: str, entity: Any, *, rows: int = 1, timeout_s: float | None = None, **others: Any
) -> tuple[int, dict[str, Any]]:
    """Send a JSON request with `rows` rows of `k`; status and body."""
    parameters: dict[str, Any] = {} if entity is None else {"entity_id": entity}
    if timeout_s is not None:
        parameters["timeout"] = int(timeout_s * 1e6)
    k = {"name": "k", "shape": [rows, 1], "datatype": "FP32", "data": list(range(rows))}
    body = {"inputs": [] if model == "alone" else [k], "parameters": parameters} | others
    connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def rows_of(answer: tuple[int, dict[str, Any]], name: str = "y") -> list[list[Any]]:
    """The rows of an output of a good answer."""
    status, body = answer
    assert status == 200, body
    (output,) = [output for output in body["outputs"] if output["name"] == name]
    width = output["shape"][1]
    return [output["data"][at : at + width] for at in range(0, len(output["data"]), width)]


def get(server: Running, path: str) -> tuple[int, str]:
    """GET a path; status and text."""
    connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def binding(server: Running, model: str) -> dict[str, Any]:
    """What `/state` says of Redis."""
    return dict(json.loads(get(server, f"/v2/models/{model}/state")[1])["bindings"]["redis"])


def counted(server: Running, model: str, reason: str) -> float:
    """`phoenix_features_missing_total`."""
    wanted = f'phoenix_features_missing_total{{model="{model}",reason="{reason}",version="1"}} '
    (line,) = [line for line in get(server, "/metrics")[1].splitlines() if line.startswith(wanted)]
    return float(line.removeprefix(wanted))
