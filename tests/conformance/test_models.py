"""The conformance models against onnxruntime itself, without any server."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conformance.datatypes import DATATYPES, Array, assert_same
from conformance.models import MODELS, Model, manifest, write

_BY_NAME = {(model.name, model.version): model for model in MODELS}


def _run(name: str, version: str = "1", **inputs: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(_BY_NAME[name, version].onnx, options)
    return list(session.run(None, inputs))


def _floats(*values: float) -> Array:
    return np.array(values, np.float32)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_identity_gives_its_input_bit_for_bit(datatype: str) -> None:
    sample = DATATYPES[datatype].sample
    assert_same(_run(f"oip-identity-{datatype.lower()}", x=sample)[0], sample)


def test_models_compute_what_the_rules_expect() -> None:
    assert _run("oip-add", a=np.ones((2, 3), np.float32), b=np.ones((2, 3), np.float32))[0].tolist() == [[2.0] * 3] * 2
    assert _run("oip-scalar", x=np.array(21, np.float32))[0] == 42
    doubled, negated, integer = _run("oip-many", x=np.array([[1.5, -2.5]], np.float32))
    assert (doubled.tolist(), negated.tolist(), integer.tolist()) == ([[3, -5]], [[-1.5, 2.5]], [[1, -2]])
    assert _run("oip-cube", x=np.array([[[1, 2, 3], [4, 5, 6]]], np.int32))[0].tolist() == [[[1, 4], [2, 5], [3, 6]]]
    assert _run("oip-total", x=_floats(1, 2, 3.5))[0] == 6.5
    assert _run("oip-text", x=np.array(["", "ż"], dtype=object))[0].tolist() == ["", "ż"]
    assert _run("oip-slow", x=_floats(1, -2))[0].tolist() == [1, -2]
    assert [_run("oip-version", version, x=_floats(0))[0].tolist() for version in "12"] == [[1.0], [2.0]]


def test_divide_makes_nan_and_infinity() -> None:
    (ratio,) = _run("oip-divide", a=_floats(0, 1, -1), b=_floats(0, 0, 0))
    assert np.isnan(ratio[0])
    assert ratio[1:].tolist() == [np.inf, -np.inf]


def test_lookup_fails_outside_its_table() -> None:
    assert _run("oip-lookup", index=np.array([2, 0]))[0].tolist() == [30.0, 10.0]
    with pytest.raises(Exception, match="out of data bounds"):
        _run("oip-lookup", index=np.array([7]))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name}-{model.version}")
def test_signature_is_what_the_rules_expect(model: Model) -> None:
    session = onnxruntime.InferenceSession(model.onnx)
    for nodes, tensors in ((session.get_inputs(), model.inputs), (session.get_outputs(), model.outputs)):
        assert [node.name for node in nodes] == [tensor.name for tensor in tensors]
        shapes = [[size if isinstance(size, int) else -1 for size in node.shape] for node in nodes]
        assert shapes == [tensor.shape for tensor in tensors]


def test_written_folder_has_a_manifest_for_each_model(tmp_path: Path) -> None:
    write(tmp_path)
    assert {file.stem for file in tmp_path.glob("*.yaml")} == {file.stem for file in tmp_path.glob("*.onnx")}
    assert len(list(tmp_path.glob("*.yaml"))) == len(MODELS)
    names = [manifest(model)["metadata"] for model in MODELS]
    assert {"name": "oip-version"} in names
