"""What the client scripts share: the cases, what onnxruntime answers to them, and a runner.

A script is started as `python SCRIPT SETTING [ARGUMENT]`; SETTING is a JSON file with `rest`, `grpc` (addresses of the
server), `models` (name -> ONNX file) and `requests` (name -> request document). It prints one line a check and exits
with 1 if one failed. Each client library needs its own process: protobuf keeps one pool of message types, and
tritonclient and kserve (and the server) each define `inference.ModelInferRequest` in a file of their own.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Check = Callable[[], None]

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip
OIP = {np.dtype(kind): name for name, kind in NUMPY.items()}
SETTING = json.loads(Path(sys.argv[1]).read_text())
REST: str = SETTING["rest"]
GRPC: str = SETTING["grpc"]

_checks: list[Check] = []


class Case(NamedTuple):
    """Inputs for a model and what onnxruntime, run here, answers."""

    model: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]

    @property
    def datatypes(self) -> set[str]:
        """The datatypes of all its tensors."""
        return {OIP[array.dtype] for array in (*self.inputs.values(), *self.outputs.values())}


@cache
def cases() -> list[Case]:
    """The examples' own requests, and a tensor of each datatype with its extremes."""
    found = [example(name) for name in SETTING["requests"]]
    for datatype, kind in NUMPY.items():
        dtype = np.dtype(kind)
        if dtype.kind == "O":
            sample = np.array([["", "plain"], ["zażółć \n", "🎉\u0000"]], dtype=object)
        elif dtype.kind == "b":
            sample = np.array([[True, False], [False, True]])
        elif dtype.kind == "f":
            sample = np.array([[np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal], [-0.0, 0.1]], dtype)
        else:
            sample = np.array([[np.iinfo(dtype).min, np.iinfo(dtype).max], [0, 1]], dtype)
        found.append(case(f"oip-identity-{datatype.lower()}", {"x": sample}))
    found.append(case("oip-many", {"x": np.array([[1.5, -2.5], [0, 7]], np.float32)}))
    found.append(case("oip-scalar", {"x": np.array(21, np.float32)}))
    return found


def case(model: str, inputs: dict[str, Array]) -> Case:
    """Return the case of these inputs."""
    return Case(model, inputs, _run(model, inputs))


@cache
def example(name: str) -> Case:
    """Return the case of an example's own request."""
    document = json.loads(Path(SETTING["requests"][name]).read_text())
    inputs = {
        item["name"]: np.array(item["data"], NUMPY[item["datatype"]]).reshape(item["shape"])
        for item in document["inputs"]
    }
    return case(name, inputs)


def assert_same(got: dict[str, Array], expected: dict[str, Array]) -> None:
    """Compare names, dtypes, shapes and every bit; BYTES may come as `bytes` or `str`."""
    assert list(got) == list(expected), f"outputs {list(got)}, expected {list(expected)}"
    for name, array in expected.items():
        other = got[name]
        assert other.dtype == array.dtype, f"'{name}' is {other.dtype}, expected {array.dtype}"
        assert other.shape == array.shape, f"'{name}' has shape {other.shape}, expected {array.shape}"
        assert _bits(other) == _bits(array), f"'{name}' is {other!r}, expected {array!r}"


def refused(call: Callable[[], Any], message: str) -> Exception:
    """Call and return the exception, whose text must match `message`, the server's own words."""
    try:
        call()
    except Exception as error:
        caught = error
    else:
        raise AssertionError(f"the call succeeded; expected an error: {message}")
    assert re.search(message, str(caught)), f"the error says {caught!s}; expected {message}"
    return caught


def check(function: Check) -> Check:
    """Run the decorated function when `main` is called, in the order of the file."""
    _checks.append(function)
    return function


def main() -> None:
    """Run every check; print one line each; exit 1 if one failed."""
    failed = 0
    for function in _checks:
        try:
            function()
        except Exception:
            failed += 1
            print(f"FAILED {function.__name__}\n{traceback.format_exc()}")
        else:
            print(f"ok     {function.__name__}")
    print(f"{len(_checks) - failed} of {len(_checks)} checks passed")
    sys.exit(1 if failed or not _checks else 0)


def _run(model: str, inputs: dict[str, Array]) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(SETTING["models"][model])
    names = [node.name for node in session.get_outputs()]
    return {name: np.asarray(array) for name, array in zip(names, session.run(names, inputs), strict=True)}


def _bits(array: Array) -> bytes | list[str]:
    if array.dtype.kind != "O":
        return array.tobytes()
    return [element.decode() if isinstance(element, bytes) else str(element) for element in array.flat]
