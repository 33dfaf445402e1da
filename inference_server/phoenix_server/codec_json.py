"""The JSON form of requests and responses (OIP v2 REST).

Decoding knows nothing of the model: it turns the document into arrays of the dtypes and shapes that the request
states, and lists every fault of the document in one error. `codec_binary` adds tensors that travel beside the JSON,
`codec_big_json` a faster parser for big bodies.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from phoenix_server.errors import PhoenixError, invalid, shown
from phoenix_server.tensors import (
    UNSERVED_PARAMETERS,
    Array,
    DType,
    InferRequest,
    InferResponse,
    Parameter,
    dtype_named,
    dtype_of,
)

# Bodies above this are decoded off the event loop.
BIG_BODY_BYTES = 1_000_000
_NO_JSON_FORM = (DType.FP16,)
_MAX_TIMEOUT_US = 2**63 - 1
_SMALL = 256
_zeros = {dtype.numpy: np.zeros(_SMALL, dtype.numpy) for dtype in DType if dtype.kind == "f"}

# (name, size, datatype, shape) -> the tensor that lies behind the JSON
Blob = Callable[[str, Any, DType, tuple[int, ...]], Array]


@dataclass(slots=True)
class OutputForms:
    """Which outputs the caller wants as binary: the request's default and what it says of single outputs."""

    is_binary: bool = False
    of_output: dict[str, bool] = field(default_factory=dict)


def parse(body: bytes | memoryview) -> dict[str, Any]:
    """Parse a JSON object; raise the 400 that says where it is broken."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise invalid(f"the body must be a JSON object, got {_kind(document)}")
    return document


def may_hold_bool(body: bytes | memoryview) -> bool:
    """Whether true or false may stand somewhere in a body."""
    return not isinstance(body, bytes) or b"true" in body or b"false" in body


def decode(
    document: Mapping[str, Any], blob: Blob | None = None, *, may_hold_bool: bool = True
) -> tuple[InferRequest, OutputForms]:
    """Turn a parsed document into a request; `blob` gives an input that is not in the JSON itself.

    `may_hold_bool` False: the text has neither true nor false in it, so no number needs to be looked at for that.

    Raises `PhoenixError(INVALID)` that lists every fault.
    """
    try:
        return _decode(document, blob, may_hold_bool)
    except PhoenixError as error:
        request_id = document.get("id")
        error.request_id = request_id if isinstance(request_id, str) else ""
        raise


def _decode(document: Mapping[str, Any], blob: Blob | None, may_hold_bool: bool) -> tuple[InferRequest, OutputForms]:
    faults: list[str] = []
    inputs: dict[str, Array] = {}
    items = document.get("inputs")
    if not isinstance(items, list):
        raise invalid(f"'inputs' must be a list of tensors, got {_kind(items)}")
    for index, item in enumerate(items):
        try:
            name, array = _decode_input(item, index, blob, may_hold_bool)
        except PhoenixError as error:
            faults.append(error.message)
            if blob is not None:
                break  # where the next blob begins is unknown
            continue
        if name in inputs:
            faults.append(f"input '{name}' is given twice")
        inputs[name] = array
    scalars, listed = _lists_as_text(document.get("parameters"))
    parameters = _parameters(scalars, "the request", faults)
    forms = OutputForms(is_binary=_flag(parameters.pop("binary_data_output", False), "binary_data_output", faults))
    outputs = _decode_outputs(document.get("outputs"), forms, faults)
    request_id = document.get("id")
    request_id = "" if request_id is None else request_id  # some clients send null for what they leave out
    if not isinstance(request_id, str):
        faults.append(f"'id' must be a string, got {_kind(request_id)}")
    timeout_us = _timeout_us(parameters.get("timeout", 0), faults)
    if faults:
        raise invalid("; ".join(faults))
    return InferRequest(inputs, outputs, request_id, parameters, timeout_us, listed), forms


def encode(response: InferResponse) -> bytes:
    """Return the response with every output as JSON; raise INVALID where a tensor has no JSON form."""
    document = envelope(response)
    document["outputs"] = [json_output(name, array) for name, array in response.outputs]
    return dump(document)


def dump(document: dict[str, Any]) -> bytes:
    """Return the document as JSON; raise INVALID if an output in it holds what JSON cannot."""
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in text:  # orjson's word for NaN and the infinities, or a piece of some string
        for output in document["outputs"]:
            data = output.get("data")
            if isinstance(data, np.ndarray) and data.dtype.kind == "f" and not np.isfinite(data).all():
                raise invalid(
                    f"output '{output['name']}' holds NaN or Infinity, which JSON cannot; "
                    "ask for it with binary_data: true"
                )
    return text


def envelope(response: InferResponse) -> dict[str, Any]:
    """Return what precedes the outputs in a response document."""
    document: dict[str, Any] = {
        "model_name": response.model_name,
        "model_version": response.model_version,
        "id": response.id,
    }
    if response.parameters:
        document["parameters"] = response.parameters
    return document


def json_output(name: str, array: Array) -> dict[str, Any]:
    """Return one output with its data flat and row-major, ready for `dump`."""
    dtype = dtype_of(array)
    if dtype in _NO_JSON_FORM:
        raise invalid(f"output '{name}' is {dtype.name}, which has no JSON form; ask for it with binary_data: true")
    flat = array.reshape(-1)
    return {
        "name": name,
        "datatype": dtype.name,
        "shape": array.shape,
        "data": flat if dtype.kind != "O" else flat.tolist(),
    }


def _array_of(data: Any, dtype: DType, shape: tuple[int, ...], name: str, may_hold_bool: bool) -> Array:
    """Return JSON `data`, flat or nested as `shape`, as an array; raise INVALID that names the input."""
    if dtype in _NO_JSON_FORM:
        raise invalid(f"input '{name}': {dtype.name} cannot be sent as JSON; send it as binary tensor data")
    if isinstance(data, np.ndarray):  # from `codec_big_json`, which has looked at the nesting
        array, is_flat = _cast(data, dtype, name), True
    elif dtype.kind == "f" and (packed := _packed(data, dtype, may_hold_bool)) is not None:
        array, is_flat = packed, True
    else:
        array, is_flat = _array_of_list(data, dtype, name)
    if array.shape != shape:
        if not is_flat:
            raise invalid(f"input '{name}': data is nested as {list(array.shape)}, but shape says {list(shape)}")
        if array.size != math.prod(shape):
            raise invalid(
                f"input '{name}': shape {list(shape)} needs {math.prod(shape)} elements, data has {array.size}"
            )
        array = array.reshape(shape)
    return array


def _packed(data: list[Any], dtype: DType, may_hold_bool: bool) -> Array | None:
    """Return a flat list of numbers as an array, a quarter of numpy's time; None where anything is unusual.

    `struct` refuses what is no number and what FP32 cannot hold; JSON itself has neither NaN nor infinity.
    """
    if may_hold_bool and bool in set(map(type, data)):
        return None
    try:
        packed = struct.pack(f"={len(data)}{dtype.numpy.char}", *data)
    except (struct.error, OverflowError):
        return None
    return np.frombuffer(packed, dtype.numpy)


def _array_of_list(data: list[Any], dtype: DType, name: str) -> tuple[Array, bool]:
    """Convert a Python list of the kinds that `dtype` allows; return it with whether it was flat."""
    if not data:
        return np.empty(0, dtype.numpy), True
    if dtype.kind == "O":
        array: Array = np.array(data, dtype=object)
        if not all(type(element) is str for element in array.flat):
            raise invalid(f"input '{name}': BYTES data must be strings, nested evenly or flat")
        return array, array.ndim == 1
    try:
        array = np.array(data)
    except ValueError:
        raise invalid(f"input '{name}': data is nested unevenly") from None
    kind = array.dtype.kind
    if array.size == 0:
        return array.astype(dtype.numpy), array.ndim == 1
    is_fitting = (
        kind in "iuf"
        if dtype.kind == "f"
        else kind == "b"
        if dtype.kind == "b"
        else kind in "iu" and not _has_bool(data)
    )
    if (
        dtype.kind in "iu"
        and kind in "fO"
        and all(type(element) is int for element in np.array(data, dtype=object).flat)
    ):
        # numpy makes floats, or objects, of integers that need 64 bits without a sign beside others that do not
        try:
            return np.array(data, dtype=dtype.numpy), array.ndim == 1
        except OverflowError:
            raise invalid(f"input '{name}': data holds an integer outside {dtype.name}") from None
    if dtype.kind == "f" and kind == "O" and _is_big_integers(array):
        array, is_fitting = array.astype(np.float64), True
    if not is_fitting or (dtype.kind == "f" and _has_bool(data)):
        raise invalid(f"input '{name}': data holds elements that are not {_expected(dtype)}")
    return _cast(array, dtype, name), array.ndim == 1


def _cast(array: Array, dtype: DType, name: str) -> Array:
    """Convert numbers of the right kind, refusing what `dtype` cannot hold."""
    if dtype.kind in "iu" and array.dtype != dtype.numpy:
        limits = np.iinfo(dtype.name.lower())
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            culprit = low if low < limits.min else high
            raise invalid(f"input '{name}': {culprit} is outside {dtype.name} ({limits.min} to {limits.max})")
    with np.errstate(over="ignore"):
        cast = array.astype(dtype.numpy, copy=False)
    if dtype.kind == "f" and not _is_finite(cast.reshape(-1)):
        raise invalid(f"input '{name}': data holds a number outside {dtype.name}")
    return cast


def _is_finite(flat: Array) -> bool:
    """Whether a flat array of numbers holds neither NaN nor an infinity (either times 0 is NaN)."""
    size = flat.size
    if size > _SMALL:
        return bool(np.isfinite(flat).all())
    return bool(np.vdot(flat, _zeros[flat.dtype][:size]) == 0.0)  # a third of the time of isfinite and all


def _has_bool(data: Any) -> bool:
    """Whether true or false hides among numbers, which numpy would take for 1 or 0."""
    if isinstance(data[0], list):
        return any(element and _has_bool(element) for element in data)
    return bool in set(map(type, data))


def _is_big_integers(array: Array) -> bool:
    return all(type(element) in (int, float) for element in array.flat)


def _decode_input(item: Any, index: int, blob: Blob | None, may_hold_bool: bool) -> tuple[str, Array]:
    if not isinstance(item, dict):
        raise invalid(f"inputs[{index}] must be an object, got {_kind(item)}")
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise invalid(f"inputs[{index}].name must be a non-empty string, got {_kind(name)}")
    where = f"input '{name}'"
    dtype = dtype_named(item.get("datatype"), where)
    shape = shape_of(item.get("shape"), where)
    parameters = item.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{where}: 'parameters' must be an object, got {_kind(parameters)}")
    if parameters and (unserved := _unserved(parameters)):
        raise invalid(f"{where}: {unserved}")
    size = None if parameters is None else parameters.get("binary_data_size")
    if size is None:
        if "data" not in item:
            raise invalid(f"{where}: 'data' is missing")
        data = item["data"]
        if data is None or isinstance(data, str | int | float | dict):
            raise invalid(f"{where}: 'data' must be a list, got {_kind(data)}")
        return name, _array_of(data, dtype, shape, name, may_hold_bool)
    if "data" in item:
        raise invalid(f"{where}: has both 'data' and 'binary_data_size'; give one")
    if blob is None:
        raise invalid(f"{where}: 'binary_data_size' needs the header Inference-Header-Content-Length")
    return name, blob(name, size, dtype, shape)


def shape_of(shape: Any, where: str) -> tuple[int, ...]:
    """Return a request's shape as a tuple; raise INVALID unless it is a list of sizes of at least 0."""
    if isinstance(shape, list) and len(shape) <= 64:
        for size in shape:
            if type(size) is not int or not 0 <= size <= 2**40:
                break
        else:
            return tuple(shape)
    raise invalid(f"{where}: 'shape' must be a list of integers of at least 0, got {shown(shape)}")


def _decode_outputs(items: Any, forms: OutputForms, faults: list[str]) -> tuple[str, ...]:
    if items is None:
        return ()
    if not isinstance(items, list):
        faults.append(f"'outputs' must be a list, got {_kind(items)}")
        return ()
    names: list[str] = []
    for index, item in enumerate(items):
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str):
            faults.append(f"outputs[{index}] must be an object with a 'name', got {shown(item)}")
            continue
        if name in names:
            faults.append(f"output '{name}' is asked for twice")
        names.append(name)
        parameters = _parameters(item.get("parameters"), f"output '{name}'", faults)
        if "binary_data" in parameters:
            forms.of_output[name] = _flag(parameters["binary_data"], f"output '{name}': binary_data", faults)
        if unserved := _unserved(parameters):
            faults.append(f"output '{name}': {unserved}")
    return tuple(names)


def _parameters(value: Any, where: str, faults: list[str]) -> dict[str, Parameter]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        faults.append(f"{where}: 'parameters' must be an object, got {_kind(value)}")
        return {}
    value = {key: item for key, item in value.items() if item is not None}
    wrong = [key for key, item in value.items() if not isinstance(item, str | int | float)]
    if wrong:
        faults.append(f"{where}: parameters must be strings, numbers or booleans; wrong: {', '.join(wrong)}")
    return {key: item for key, item in value.items() if isinstance(item, str | int | float)}


def _lists_as_text(parameters: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a request's parameters with lists as their JSON text, and the names of those; see `InferRequest`."""
    if not isinstance(parameters, dict) or list not in set(map(type, parameters.values())):
        return parameters, ()
    listed = tuple(name for name, value in parameters.items() if type(value) is list)
    return parameters | {name: orjson.dumps(parameters[name]).decode() for name in listed}, listed


def _unserved(parameters: Mapping[str, Any]) -> str | None:
    """Return what to say of parameters that belong to an extension that is not served, or None."""
    keys = [f"'{key}'" for key in UNSERVED_PARAMETERS if parameters.get(key)]
    return f"{', '.join(keys)} belongs to an extension that is not served" if keys else None


def _flag(value: Any, where: str, faults: list[str]) -> bool:
    if not isinstance(value, bool):
        faults.append(f"{where} must be true or false, got {shown(value)}")
    return value is True


def _timeout_us(value: Any, faults: list[str]) -> int:
    if type(value) is int and 0 <= value <= _MAX_TIMEOUT_US:
        return value
    faults.append(f"parameter 'timeout' must be microseconds, an integer of at least 0, got {shown(value)}")
    return 0


def _expected(dtype: DType) -> str:
    return {"f": "numbers", "i": "integers", "u": "integers", "b": "true or false"}[dtype.kind]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
