"""Tensors, signatures and the request and response that every transport speaks with the data plane.

Hides the correspondence of Open Inference Protocol datatypes, numpy dtypes and ONNX types, and the one validation of
a request against a model's signature. Arrays are numpy throughout; BYTES tensors are object arrays of `str`, because
ONNX strings are UTF-8.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phoenix_server.errors import PhoenixError, invalid, shown

Array = NDArray[Any]
Parameter = str | int | float | bool
# Tensor parameters of extensions that are not served; to ignore them would answer something else than was asked.
UNSERVED_PARAMETERS = ("shared_memory_region", "classification")


class DType(Enum):
    """An OIP datatype: its name, numpy dtype, bytes an element (0: variable) and the names ONNX and Triton use."""

    BOOL = (np.dtype(np.bool_), "tensor(bool)")
    UINT8 = (np.dtype(np.uint8), "tensor(uint8)")
    UINT16 = (np.dtype(np.uint16), "tensor(uint16)")
    UINT32 = (np.dtype(np.uint32), "tensor(uint32)")
    UINT64 = (np.dtype(np.uint64), "tensor(uint64)")
    INT8 = (np.dtype(np.int8), "tensor(int8)")
    INT16 = (np.dtype(np.int16), "tensor(int16)")
    INT32 = (np.dtype(np.int32), "tensor(int32)")
    INT64 = (np.dtype(np.int64), "tensor(int64)")
    FP16 = (np.dtype(np.float16), "tensor(float16)")
    FP32 = (np.dtype(np.float32), "tensor(float)")
    FP64 = (np.dtype(np.float64), "tensor(double)")
    BYTES = (np.dtype(object), "tensor(string)")

    def __init__(self, numpy: "np.dtype[np.generic]", onnx: str) -> None:
        self.numpy = numpy
        self.onnx = onnx
        self.kind = numpy.kind
        self.size = 0 if numpy.kind == "O" else numpy.itemsize
        self.little_endian = numpy.newbyteorder("<") if self.size else numpy

    @property
    def config_name(self) -> str:
        """Return the name in Triton's model configuration (`TYPE_FP32`; BYTES is `TYPE_STRING`)."""
        return "TYPE_STRING" if self is DType.BYTES else f"TYPE_{self.name}"


DTYPES = {dtype.name: dtype for dtype in DType}
DTYPE_OF_ONNX = {dtype.onnx: dtype for dtype in DType}
_DTYPE_OF_NUMPY = {dtype.numpy: dtype for dtype in DType}


def dtype_named(datatype: object, where: str) -> DType:
    """Return the datatype of that OIP name, or raise the error that lists the known ones."""
    try:
        return DTYPES[datatype]  # type: ignore[index]
    except (KeyError, TypeError):
        raise invalid(f"{where}: unknown datatype {shown(datatype)}; known: {', '.join(DTYPES)}") from None


def dtype_of(array: Array) -> DType:
    """Return the OIP datatype of an array that came out of a codec or the engine."""
    return _DTYPE_OF_NUMPY[array.dtype]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model. `shape` holds -1 where a dimension is dynamic."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    def fault(self, array: Array) -> str | None:
        """Return what is wrong with `array` for this tensor, or None."""
        if array.dtype != self.dtype.numpy:
            return f"input '{self.name}' has datatype {dtype_of(array).name}, the model expects {self.dtype.name}"
        shape = array.shape
        if len(shape) == len(self.shape):
            for got, expected in zip(shape, self.shape, strict=True):
                if got != expected and expected != -1:
                    break
            else:
                return None
        return f"input '{self.name}' has shape {list(shape)}, the model expects {list(self.shape)} (-1: any size)"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in the order of the graph.

    `is_batchable`: every input and output has a dynamic first dimension that counts rows, so requests can share a run.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_batchable: bool = False
    input_named: dict[str, TensorSpec] = field(init=False, repr=False)
    output_names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_named", {spec.name: spec for spec in self.inputs})
        object.__setattr__(self, "output_names", tuple(spec.name for spec in self.outputs))

    def validate(self, request: "InferRequest") -> int:
        """Return the rows of `request`; raise one `PhoenixError` that lists every fault in it.

        Rows are the common first dimension of a batchable model's inputs, else 1.
        """
        inputs = request.inputs
        rows = -1
        for spec in self.inputs:
            array = inputs.get(spec.name)
            if array is None or spec.fault(array):
                raise self._faults(request)
            if self.is_batchable:
                if rows not in (-1, array.shape[0]):
                    raise self._faults(request)
                rows = array.shape[0]
        if len(inputs) != len(self.inputs):
            raise self._faults(request)
        if request.outputs and not set(request.outputs) <= set(self.output_names):
            raise self._faults(request)
        return rows if self.is_batchable else 1

    def _faults(self, request: "InferRequest") -> PhoenixError:
        faults = []
        for spec in self.inputs:
            array = request.inputs.get(spec.name)
            fault = f"input '{spec.name}' is missing" if array is None else spec.fault(array)
            if fault:
                faults.append(fault)
        known = ", ".join(self.input_named)
        faults += [
            f"unknown input '{name}'; the model has: {known}" for name in request.inputs if name not in self.input_named
        ]
        known = ", ".join(self.output_names)
        faults += [
            f"unknown output '{name}'; the model has: {known}"
            for name in request.outputs
            if name not in self.output_names
        ]
        if self.is_batchable and not faults:
            rows = ", ".join(f"'{name}' {array.shape[0]}" for name, array in request.inputs.items())
            faults.append(f"inputs differ in their number of rows: {rows}")
        return invalid("; ".join(faults))


@dataclass(slots=True)
class InferRequest:
    """One inference request, decoded.

    `inputs` maps input names to arrays; `outputs` names the outputs asked for, in order (empty: all).
    `timeout_us` is the caller's own deadline in microseconds (0: only the model's). `listed_parameters` names the
    parameters that came as JSON lists; their value is the list's JSON text, as transports without lists have it.
    `caller` tells API keys apart (`ApiKeys.caller`); empty where none are asked for.
    """

    inputs: dict[str, Array]
    outputs: tuple[str, ...] = ()
    id: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    timeout_us: int = 0
    listed_parameters: tuple[str, ...] = ()
    caller: str = ""


@dataclass(slots=True)
class InferResponse:
    """The answer: arrays in the order asked for, with the dtypes and shapes that the model gave them."""

    model_name: str
    model_version: str
    id: str
    outputs: list[tuple[str, Array]]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    rows: int = 1
