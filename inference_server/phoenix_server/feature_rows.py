"""What a manifest's `features` mean for one request: which hashes to read, and what their fields are as a tensor.

Pure: no I/O, no clock. `features` looks up what `FeaturePlan.entities` names and hands the values to
`FeaturePlan.complete`; the importer and the embedded table parse values with the same `parse_value`. Values are the
bytes of hash fields. Terms: a row is *missing* fields that its hash lacks, *unparsable* ones that are no value of the
input's datatype, and *stale* by its hash's field `_updated`.
"""

import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import orjson

from phoenix_api import Features, OnMissing, OnStale
from phoenix_server.errors import ModelLoadError, Reason, invalid, shown
from phoenix_server.tensors import Array, DType, InferRequest, Signature, TensorSpec

UPDATED = "_updated"
MAX_ENTITIES = 10_000
MAX_ENTITY_CHARACTERS = 256

Values = Sequence[bytes | None] | None
Scalar = float | int | bool | str

# Neither control characters (C0, C1, DEL, line separators) nor halves of surrogate pairs, which UTF-8 cannot hold.
ENTITY = re.compile(rf"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{{1,{MAX_ENTITY_CHARACTERS}}}")
_INTEGER = re.compile(rb"[+-]?[0-9]+")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLS = {b"1": True, b"true": True, b"0": False, b"false": False}
_EXPECTED = {"f": "a finite number", "i": "an integer", "u": "an integer", "b": "true, false, 1 or 0", "O": "UTF-8"}
_NAMED_ROWS = 5
# struct's letters for numbers of standard size, by kind and bytes; numpy's own differ with the platform.
_LETTERS = {"f": {2: "e", 4: "f", 8: "d"}, "i": {1: "b", 2: "h", 4: "i", 8: "q"}, "u": {1: "B", 2: "H", 4: "I", 8: "Q"}}


@dataclass(frozen=True, slots=True)
class Completed:
    """The tensor for a request's rows, and what has to be told of it.

    `age_s`: of the oldest row whose age is known, else None. `counts`: rows by reason. `refusal`: why the manifest
    does not let the request pass, for the caller; empty if it does.
    """

    array: Array
    age_s: float | None
    counts: dict[str, int] = field(default_factory=dict)
    refusal: str = ""


def expected_of(dtype: DType) -> str:
    """Return what a value of that datatype has to look like."""
    limits = f" of {dtype.name}" if dtype.kind != "b" else ""
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype.name.lower())
        limits += f" ({bounds.min} to {bounds.max})"
    return f"{_EXPECTED[dtype.kind]}{limits if dtype.kind != 'O' else ''}"


def parse_value(value: bytes, dtype: DType) -> Scalar:
    """Return one value; raise `ValueError` for anything that is not plainly one of the datatype.

    Numbers are decimal and finite, and within the datatype's range: NaN is how data frames write that nothing is
    there, and an infinity is the result of a fault. Integers have no fraction. Strings are UTF-8, as ONNX has them.
    """
    kind = dtype.kind
    if kind == "O":
        return value.decode()
    if kind == "b":
        if (flag := _BOOLS.get(value.strip().lower())) is None:
            raise ValueError(expected_of(dtype))
        return flag
    value = value.strip()
    if kind == "f":
        if not _NUMBER.fullmatch(value):
            raise ValueError(expected_of(dtype))
        number = float(value)
        try:
            struct.pack("=" + _LETTERS["f"][dtype.size], number)  # "=": only so is a number that is too large refused
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(expected_of(dtype))
        return number
    if not _INTEGER.fullmatch(value):
        raise ValueError(expected_of(dtype))
    integer, bounds = int(value), np.iinfo(dtype.name.lower())
    if not bounds.min <= integer <= bounds.max:
        raise ValueError(expected_of(dtype))
    return integer


class FeaturePlan:
    """The compiled `features` of one model. Keys and requests in, tensors out; see `complete`."""

    def __init__(self, spec: Features, signature: Signature, *, prefix: str) -> None:
        """`prefix` goes before every key. Raises `ModelLoadError(InvalidSpec)` with all that does not fit the model."""
        self.spec = spec
        self.fields = (*spec.names, UPDATED)
        tensor = signature.input_named.get(spec.input)
        faults = _faults(spec, tensor, signature)
        if faults or tensor is None:
            raise ModelLoadError(Reason.INVALID_SPEC, "; ".join(faults))
        self.tensor: TensorSpec = tensor
        self._dtype = tensor.dtype
        self._letter = _LETTERS.get(tensor.dtype.kind, {}).get(tensor.dtype.size, "")
        # None: as many rows as there are entities.
        self._fixed_rows = None if tensor.shape[0] == -1 else tensor.shape[0]
        self._is_batchable = signature.is_batchable
        head, _, tail = spec.key_template.partition("{entity}")
        # A key is these two around the entity: whatever that is, the key stays under the prefix.
        self.key_before, self.key_after = prefix + head, tail
        self._defaults = [
            _default(spec.defaults[name], tensor.dtype) if name in spec.defaults else None for name in spec.names
        ]

    def key(self, entity: str) -> bytes:
        """Return the key of an entity's hash."""
        return f"{self.key_before}{entity}{self.key_after}".encode()

    def entities(self, request: InferRequest) -> tuple[list[str], int]:
        """Return the entities that a request names, and its rows: as many, or any number for a single entity.

        Raises `PhoenixError(INVALID)`.
        """
        spec, name = self.spec, self.spec.entity_parameter
        if spec.input in request.inputs:
            raise invalid(
                f"input '{spec.input}' is filled with the features of parameter '{name}' and cannot be sent beside it; "
                "leave it out"
            )
        value = request.parameters.get(name)
        if type(value) is str and value[:1] != "[":
            found, is_list = [value], False
        else:
            found, is_list = self._listed(value)
        text, lengths = "".join(found), list(map(len, found))
        is_plain = text.isascii() and text.isprintable() and min(lengths) and max(lengths) <= MAX_ENTITY_CHARACTERS
        if not is_plain and not all(map(ENTITY.fullmatch, found)):
            index = next(index for index, entity in enumerate(found) if not ENTITY.fullmatch(entity))
            where = f"parameter '{name}'" + (f"[{index}]" if is_list else "")
            raise invalid(
                f"{where} must have 1 to {MAX_ENTITY_CHARACTERS} characters and no control characters, "
                f"got {shown(found[index])}"
            )
        rows = self._fixed_rows
        if rows is None:
            rows = len(found)
            if self._is_batchable:
                for array in request.inputs.values():
                    rows = array.shape[0] if array.ndim else rows
                    break
        if rows != len(found) and is_list:
            raise invalid(
                f"parameter '{name}' lists {len(found)} entities for {rows} rows; "
                "list one for each row, or give a single one for all"
            )
        return found, rows

    def _listed(self, value: object) -> tuple[list[str], bool]:
        """Return the entities of a parameter that is more than a plain string."""
        name = self.spec.entity_parameter
        if value is None:
            raise invalid(
                f"parameter '{name}' is missing: the entity whose features fill input '{self.spec.input}', "
                "or a JSON list with one for each row"
            )
        if type(value) is int:
            return [str(value)], False
        if not isinstance(value, str):
            raise invalid(f"parameter '{name}' must be a string or a JSON list of strings, got {shown(value)}")
        try:
            items = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise invalid(f"parameter '{name}' begins with '[' and is not a JSON list: {error}") from None
        if not 1 <= len(items) <= MAX_ENTITIES:
            raise invalid(f"parameter '{name}' must list 1 to {MAX_ENTITIES} entities, got {len(items)}")
        if set(map(type, items)) == {str}:
            return items, True
        for index, item in enumerate(items):
            if type(item) is int:
                items[index] = str(item)
            elif type(item) is not str:
                raise invalid(f"parameter '{name}'[{index}] must be a string or an integer, got {shown(item)}")
        return items, True

    def complete(self, entities: Sequence[str], found: Sequence[Values], rows: int, now_s: float) -> Completed:
        """Return the tensor for `rows` rows of what was found: for each entity the values of `fields`, in that order.

        None instead of values: the key holds something else than a hash. `now_s` is unix time.
        """
        spec = self.spec
        width = len(spec.names)
        plain = self._plain(found, now_s) if self._dtype.kind in "fiu" else None
        if plain is not None:
            array, age_s = plain
            completed = Completed(array.reshape(len(found), width), age_s)
        else:
            completed = self._examined(entities, found, now_s)
        return self._shaped(completed, rows)

    def defaulted(self, entities: Sequence[str], rows: int) -> Completed | None:
        """Return a tensor of defaults for a store that does not answer; None where the manifest wants no answer."""
        if self.spec.on_missing is not OnMissing.DEFAULT:
            return None
        array = np.array([self._defaults] * len(entities), dtype=self._dtype.numpy)
        return self._shaped(Completed(array, None, {"unavailable": rows}), rows)

    def _shaped(self, completed: Completed, rows: int) -> Completed:
        array = completed.array
        if len(array) != rows:  # one entity for all of them
            array = np.repeat(array, rows, axis=0)
        if len(self.tensor.shape) == 1:
            array = array.reshape(rows)
        if array is completed.array:
            return completed
        return Completed(array, completed.age_s, completed.counts, completed.refusal)

    def _plain(self, found: Sequence[Values], now_s: float) -> tuple[Array, float] | None:
        """Return numbers where all are there, plain and fresh, many times faster than one by one; else None."""
        dtype = self._dtype
        convert: Callable[[Any], Any] = float if dtype.kind == "f" else int
        try:
            values: list[Any] = list(chain.from_iterable(found))  # type: ignore[arg-type]
            has_underscore = b"_" in b"".join(values)
            width = len(self.fields)
            updated = list(map(float, values[width - 1 :: width]))
            del values[width - 1 :: width]
            numbers = list(map(convert, values))
            packed = struct.pack(f"={len(numbers)}{self._letter}", *numbers)
            is_finite = math.isfinite(sum(numbers) + sum(updated))  # its own overflow only costs time
        except (TypeError, ValueError, OverflowError, struct.error):
            return None
        age_s = now_s - min(updated)
        # Python takes `1_0` for a number.
        if not is_finite or has_underscore or age_s > self.spec.max_age_seconds:
            return None
        return np.frombuffer(packed, dtype.numpy), max(0.0, age_s)

    def _examined(self, entities: Sequence[str], found: Sequence[Values], now_s: float) -> Completed:
        """Look at every value by itself."""
        spec, dtype, names = self.spec, self._dtype, self.spec.names
        rows: list[list[Scalar]] = []
        counts = dict.fromkeys(("missing", "unparsable", "stale"), 0)
        refusals: list[str] = []
        ages: list[float] = []
        filler: Scalar = "" if dtype is DType.BYTES else 0
        for entity, values in zip(entities, found, strict=True):
            is_known = values is None or any(value is not None for value in values)
            missing, unparsable, row = [], [], []
            for index, value in enumerate([b"\xff"] * len(names) if values is None else values[:-1]):
                parsed: Scalar | None = None
                if value is None:
                    missing.append(index)
                else:
                    try:
                        if values is None:
                            raise ValueError
                        parsed = parse_value(value, dtype)
                    except ValueError:
                        unparsable.append(index)
                if parsed is None:
                    default = self._defaults[index]
                    parsed = filler if default is None else default
                row.append(parsed)
            rows.append(row)
            counts["missing"] += bool(missing)
            counts["unparsable"] += bool(unparsable)
            if spec.on_missing is OnMissing.REJECT:
                # A default stands in for a field of an entity that is known, not for an entity that is not.
                refusals += self._refusals(entity, missing, unparsable, is_known=is_known)
            if is_known:
                age_s = None if values is None else _age_s(values[-1], now_s)
                if age_s is not None:
                    ages.append(age_s)
                if age_s is None or age_s > spec.max_age_seconds:
                    counts["stale"] += 1
                    if spec.on_stale is OnStale.REJECT:
                        age = "of unknown age" if age_s is None else f"{age_s:.0f} s old"
                        refusals.append(
                            f"features of {shown(entity)} are {age}, at most {spec.max_age_seconds} s are allowed"
                        )
        array = np.array(rows, dtype=dtype.numpy).reshape(len(rows), len(names))
        return Completed(
            array,
            max(ages, default=None),
            {reason: count for reason, count in counts.items() if count},
            _shortened(refusals),
        )

    def _refusals(self, entity: str, missing: list[int], unparsable: list[int], *, is_known: bool) -> list[str]:
        texts = []
        for indexes, what in ((missing, "are missing"), (unparsable, f"are not {expected_of(self._dtype)}")):
            names = [self.spec.names[i] for i in indexes if self._defaults[i] is None or not is_known]
            if names:
                listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
                texts.append(f"features of {shown(entity)} {what}: {listed}")
        return texts


def _age_s(updated: bytes | None, now_s: float) -> float | None:
    """Return the age in seconds of a hash by its `_updated`, or None where it has none that can be read."""
    if updated is None:
        return None
    try:
        return max(0.0, now_s - float(parse_value(updated, DType.FP64)))
    except ValueError:
        return None


def _shortened(texts: list[str]) -> str:
    more = f"; and {len(texts) - _NAMED_ROWS} more" if len(texts) > _NAMED_ROWS else ""
    return "; ".join(texts[:_NAMED_ROWS]) + more


def _faults(spec: Features, tensor: TensorSpec | None, signature: Signature) -> list[str]:
    """Return what does not fit between a manifest's features and the model that was loaded."""
    if tensor is None:
        known = ", ".join(signature.input_named)
        return [f"spec.features.input: the model has no input '{spec.input}'; it has: {known}"]
    faults, shape, width = [], list(tensor.shape), len(spec.names)
    if len(shape) == 2:
        if shape[1] not in (-1, width):
            faults.append(
                f"spec.features.names: {width} names for input '{spec.input}', whose rows have {shape[1]} columns"
            )
    elif len(shape) != 1 or width != 1:
        faults.append(
            f"spec.features.input: '{spec.input}' has shape {shape}; expected [rows, {width}] for {width} names"
            + (", or [rows]" if width == 1 else "")
        )
    if UPDATED in spec.names:
        faults.append(f"spec.features.names: {UPDATED} is the time of the last write, not a feature")
    for name, default in spec.defaults.items():
        try:
            _default(default, tensor.dtype)
        except ValueError as error:
            faults.append(f"spec.features.defaults.{name}: expected {error}, got {default:g}")
    return faults


def _default(default: float, dtype: DType) -> Scalar:
    text = str(int(default)) if float(default).is_integer() else repr(float(default))
    return parse_value(text.encode(), dtype)
