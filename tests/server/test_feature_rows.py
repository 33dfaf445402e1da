"""What a manifest's features mean for one request, without a store: entities, keys, values, refusals."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_api import Features
from phoenix_server.errors import Code, ModelLoadError, PhoenixError, Reason
from phoenix_server.feature_rows import MAX_ENTITIES, FeaturePlan, Values, expected_of, parse_value
from phoenix_server.tensors import DType, InferRequest, Signature, TensorSpec

NOW = 1_800_000_000.0
FRESH = b"1799999990"  # ten seconds old
OUTPUT = TensorSpec("y", DType.FP32, (-1, 1))


def signature(
    dtype: DType = DType.FP32, shape: tuple[int, ...] = (-1, 3), *others: TensorSpec, is_batchable: bool = True
) -> Signature:
    return Signature((TensorSpec("x", dtype, shape), *others), (OUTPUT,), is_batchable=is_batchable)


def plan(model: Signature | None = None, **features: Any) -> FeaturePlan:
    spec = {"keyTemplate": "user:{entity}:v1", "input": "x", "names": ["a", "b", "c"]} | features
    return FeaturePlan(Features.model_validate(spec), model or signature(), prefix="phx:ml:fraud:")


def asked(value: Any, **inputs: Any) -> InferRequest:
    return InferRequest(inputs, parameters={} if value is None else {"entity_id": value})


K = TensorSpec("k", DType.FP32, (-1, 1))


# --- entities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "entities"),
    [
        ("alice", ["alice"]),
        (42, ["42"]),
        ('["alice"]', ["alice"]),
        ('["alice", "bob", 7]', ["alice", "bob", "7"]),
        ("{entity}", ["{entity}"]),
        ("*", ["*"]),
        ("a\\b", ["a\\b"]),
        ("é😀", ["é😀"]),
        ("x" * 256, ["x" * 256]),
    ],
)
def test_entities_are_read_from_a_string_an_integer_or_a_json_list(value: Any, entities: list[str]) -> None:
    assert plan().entities(asked(value)) == (entities, len(entities))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "parameter 'entity_id' is missing: the entity whose features fill input 'x'"),
        (True, "must be a string or a JSON list of strings, got True"),
        (1.5, "must be a string or a JSON list of strings, got 1.5"),
        ("", "1 to 256 characters and no control characters, got ''"),
        ("x" * 257, "1 to 256 characters"),
        ("a\nb", "no control characters"),
        ("a\0b", "no control characters"),
        ("a\r\n*1\r\n$8\r\nFLUSHALL", "no control characters"),
        ("a\x7f", "no control characters"),
        ("a\x85b", "no control characters"),
        ("a\u2028b", "no control characters"),
        ("\ud800", "no control characters"),
        ("[", "begins with '[' and is not a JSON list"),
        ("[alice]", "begins with '[' and is not a JSON list"),
        ("[]", f"must list 1 to {MAX_ENTITIES} entities, got 0"),
        (json.dumps(["a"] * (MAX_ENTITIES + 1)), f"must list 1 to {MAX_ENTITIES} entities"),
        ('["a", null]', "'entity_id'[1] must be a string or an integer, got None"),
        ('["a", true]', "'entity_id'[1] must be a string or an integer, got True"),
        ('["a", 1.0]', "'entity_id'[1] must be a string or an integer, got 1.0"),
        ('["a", ["b"]]', "'entity_id'[1] must be a string or an integer"),
        ('["a", ""]', "'entity_id'[1] must have 1 to 256 characters"),
        ('["a", "b\\u0000"]', "'entity_id'[1] must have 1 to 256 characters"),
    ],
)
def test_a_parameter_that_names_no_entities_is_the_callers_fault(value: Any, fault: str) -> None:
    with pytest.raises(PhoenixError) as error:
        plan().entities(asked(value))
    assert error.value.code is Code.INVALID
    assert fault in error.value.message


def test_the_input_itself_beside_its_features_is_refused() -> None:
    with pytest.raises(PhoenixError, match="input 'x' is filled with the features of parameter 'entity_id'") as error:
        plan().entities(asked("alice", x=np.zeros((1, 3), np.float32)))
    assert error.value.code is Code.INVALID


def test_a_single_entity_stands_for_all_rows_and_a_list_has_one_for_each() -> None:
    compiled = plan(signature(DType.FP32, (-1, 3), K))
    rows = np.zeros((2, 1), np.float32)
    assert compiled.entities(asked("alice", k=rows)) == (["alice"], 2)
    assert compiled.entities(asked('["alice", "bob"]', k=rows)) == (["alice", "bob"], 2)
    with pytest.raises(PhoenixError, match="lists 3 entities for 2 rows"):
        compiled.entities(asked('["a", "b", "c"]', k=rows))
    with pytest.raises(PhoenixError, match="lists 1 entities for 2 rows"):
        compiled.entities(asked('["a"]', k=rows))


def test_a_model_with_a_fixed_number_of_rows_gets_that_many() -> None:
    compiled = plan(signature(DType.FP32, (1, 3), is_batchable=False))
    assert compiled.entities(asked("alice")) == (["alice"], 1)
    with pytest.raises(PhoenixError, match="lists 2 entities for 1 rows"):
        compiled.entities(asked('["a", "b"]'))


@given(st.text(min_size=1, max_size=256))
def test_whatever_the_entity_its_key_is_its_own(entity: str) -> None:
    compiled = plan()
    try:
        entities, _ = compiled.entities(asked(json.dumps([entity])))
    except PhoenixError:
        return
    key = compiled.key(entities[0])
    assert key == b"phx:ml:fraud:user:" + entity.encode() + b":v1"
    assert not any(byte < 32 for byte in key)


# --- values ----------------------------------------------------------------------------------------------------------

NUMBERS = [DType.FP16, DType.FP32, DType.FP64]
INTEGERS = [
    DType.INT8, DType.INT16, DType.INT32, DType.INT64, DType.UINT8, DType.UINT16, DType.UINT32, DType.UINT64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: dtype.name)
def test_integers_are_read_up_to_their_limits(dtype: DType) -> None:
    limits = np.iinfo(dtype.name.lower())
    for good in (limits.min, limits.max):
        assert parse_value(str(good).encode(), dtype) == good
    for bad in (str(limits.min - 1), str(limits.max + 1), "1.0", "1_0", "", "nan", "0x1", "9" * 5000):
        with pytest.raises(ValueError, match=r".*"):
            parse_value(bad.encode(), dtype)


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(
    "text", ["nan", "NaN", "inf", "-Infinity", "1e999", "1_0", "", "abc", "1,5", "0x1p3", "\u0661"]
)
def test_what_is_no_finite_decimal_number_is_not_parsable(dtype: DType, text: str) -> None:
    with pytest.raises(ValueError, match="a finite number"):
        parse_value(text.encode(), dtype)


@pytest.mark.parametrize(("dtype", "text"), [(DType.FP32, "3.5e38"), (DType.FP16, "65520")])
def test_a_number_that_the_datatype_cannot_hold_is_not_parsable(dtype: DType, text: str) -> None:
    with pytest.raises(ValueError, match=dtype.name):
        parse_value(text.encode(), dtype)
    assert parse_value(text.encode(), DType.FP64) == float(text)


@pytest.mark.parametrize(
    ("text", "flag"), [("1", True), ("true", True), ("True", True), ("0", False), ("false", False), ("FALSE", False)]
)
def test_booleans_are_read(text: str, flag: bool) -> None:
    assert parse_value(text.encode(), DType.BOOL) is flag


@pytest.mark.parametrize("text", ["2", "yes", "", "1.0"])
def test_what_is_no_boolean_is_not_parsable(text: str) -> None:
    with pytest.raises(ValueError, match="true, false, 1 or 0"):
        parse_value(text.encode(), DType.BOOL)


def test_strings_are_utf8() -> None:
    assert parse_value("Zürich".encode(), DType.BYTES) == "Zürich"
    assert parse_value(b"", DType.BYTES) == ""
    with pytest.raises(ValueError, match="utf-8"):
        parse_value(b"\xff", DType.BYTES)


def row(*values: bytes | None, updated: bytes | None = FRESH) -> list[bytes | None]:
    return [*values, updated]


texts = st.one_of(
    st.floats().map(repr),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["", " 1 ", "1_0", "+1", "-0", ".5", "5.", "1e5", "1e400", "nan", "inf", "0x1", "1e", "--1", "\u0663"]
    ),
    st.text("0123456789+-.eE_ xnaif\n\t\0", max_size=8),
).map(str.encode)


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5), st.sampled_from([*NUMBERS, *INTEGERS]))
def test_the_fast_way_and_the_careful_way_agree(rows: list[tuple[bytes, ...]], dtype: DType) -> None:
    compiled = plan(signature(dtype), onMissing="Default", defaults={"a": 1, "b": 2, "c": 3})
    found: list[Values] = [row(*values) for values in rows]
    entities = [f"e{index}" for index in range(len(rows))]
    completed = compiled.complete(entities, found, len(rows), NOW)
    careful = compiled._examined(entities, found, NOW)
    assert completed.array.dtype == careful.array.dtype == dtype.numpy
    assert np.array_equal(completed.array, careful.array)
    assert completed.counts == careful.counts
    assert completed.age_s == careful.age_s == 10


@given(st.data(), st.integers(1, 40))
def test_each_row_gets_its_own_entitys_values_in_the_order_of_the_names(data: st.DataObject, count: int) -> None:
    numbers = data.draw(st.lists(st.lists(st.integers(-1000, 1000), min_size=3, max_size=3), min_size=count,
                                 max_size=count))  # fmt: skip
    found: list[Values] = [row(*(str(number).encode() for number in three)) for three in numbers]
    completed = plan().complete([str(index) for index in range(count)], found, count, NOW)
    assert completed.array.tolist() == numbers
    assert completed.refusal == ""


def test_strings_and_booleans_fill_tensors() -> None:
    words = plan(signature(DType.BYTES)).complete(["u"], [row("é".encode(), b"", b"z")], 1, NOW)
    assert words.array.dtype == object
    assert words.array.tolist() == [["é", "", "z"]]
    flags = plan(signature(DType.BOOL)).complete(["u"], [row(b"1", b"false", b"TRUE")], 1, NOW)
    assert flags.array.tolist() == [[True, False, True]]


def test_one_entity_is_repeated_for_every_row() -> None:
    completed = plan().complete(["u"], [row(b"1", b"2", b"3")], 3, NOW)
    assert completed.array.tolist() == [[1, 2, 3]] * 3


def test_an_input_of_one_dimension_takes_a_single_name() -> None:
    compiled = plan(signature(DType.INT64, (-1,)), names=["a"])
    completed = compiled.complete(["u", "v"], [row(b"1"), row(b"2")], 2, NOW)
    assert completed.array.tolist() == [1, 2]


# --- missing, unparsable, stale --------------------------------------------------------------------------------------


def test_reject_names_the_entity_and_its_fields() -> None:
    completed = plan(defaults={"c": 0}).complete(["u7"], [row(b"1", None, b"abc")], 1, NOW)
    assert completed.refusal == "features of 'u7' are missing: b"
    assert completed.counts == {"missing": 1, "unparsable": 1}
    assert completed.array.tolist() == [[1, 0, 0]]
    completed = plan().complete(["u7"], [row(b"1", None, b"abc")], 1, NOW)
    assert completed.refusal == ("features of 'u7' are missing: b; features of 'u7' are not a finite number of FP32: c")


def test_a_default_stands_in_for_a_field_but_not_for_an_entity_under_reject() -> None:
    compiled = plan(defaults={"a": 7, "b": 8, "c": 9})
    assert compiled.complete(["u"], [row(b"1", None, b"3")], 1, NOW).refusal == ""
    assert compiled.complete(["u"], [row(b"1", None, b"3")], 1, NOW).array.tolist() == [[1, 8, 3]]
    unknown = compiled.complete(["u"], [row(None, None, None, updated=None)], 1, NOW)
    assert unknown.refusal == "features of 'u' are missing: a, b, c"
    assert unknown.counts == {"missing": 1}


def test_default_serves_what_is_there_and_defaults_for_the_rest() -> None:
    compiled = plan(onMissing="Default", defaults={"a": 7, "b": 8, "c": 9.5})
    found: list[Values] = [row(b"1", b"x", None), row(None, None, None, updated=None), None]
    completed = compiled.complete(["u", "v", "w"], found, 3, NOW)
    assert completed.refusal == ""
    assert completed.array.tolist() == [[1, 8, 9.5], [7, 8, 9.5], [7, 8, 9.5]]
    # what holds no hash is known and of unknown age
    assert completed.counts == {"missing": 2, "unparsable": 2, "stale": 1}


def test_many_refusals_are_shortened() -> None:
    found: list[Values] = [row(None, None, None, updated=None)] * 32
    refusal = plan().complete([f"u{index}" for index in range(32)], found, 32, NOW).refusal
    assert "'u4'" in refusal
    assert "'u5'" not in refusal
    assert refusal.endswith("; and 27 more")


@pytest.mark.parametrize(
    ("updated", "age", "is_stale"),
    [
        (b"1799999990", 10, False),
        (b"1799999989.5", 10.5, False),
        (b"1799913600", 86400, False),
        (b"1799913599", 86401, True),
        (b"1900000000", 0, False),  # a clock that runs ahead
        (None, None, True),
        (b"yesterday", None, True),
        (b"nan", None, True),
        (b"1_799_999_990", None, True),
    ],
)
def test_age_and_staleness_follow_updated(updated: bytes | None, age: float | None, is_stale: bool) -> None:
    found: list[Values] = [row(b"1", b"2", b"3", updated=updated)]
    used = plan().complete(["u"], found, 1, NOW)
    assert used.age_s == age
    assert used.refusal == ""
    assert used.counts == ({"stale": 1} if is_stale else {})
    refused = plan(onStale="Reject").complete(["u"], found, 1, NOW).refusal
    assert bool(refused) is is_stale
    if is_stale:
        told = "of unknown age" if age is None else f"{age} s old"
        assert refused == f"features of 'u' are {told}, at most 86400 s are allowed"


def test_the_age_is_that_of_the_oldest_row() -> None:
    found: list[Values] = [row(b"1", b"2", b"3"), row(b"1", b"2", b"3", updated=b"1799999900")]
    assert plan().complete(["u", "v"], found, 2, NOW).age_s == 100


def test_without_an_answer_defaults_are_served_only_where_the_manifest_says_so() -> None:
    assert plan(defaults={"a": 7, "b": 8, "c": 9}).defaulted(["u"], 1) is None
    compiled = plan(onMissing="Default", defaults={"a": 7, "b": 8, "c": 9})
    completed = compiled.defaulted(["u"], 3)
    assert completed is not None
    assert completed.array.tolist() == [[7, 8, 9]] * 3
    assert completed.array.dtype == np.float32
    assert completed.counts == {"unavailable": 3}
    assert completed.age_s is None


# --- the plan against the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "features", "fault"),
    [
        (signature(), {"input": "z"}, "spec.features.input: the model has no input 'z'; it has: x"),
        (signature(shape=(-1, 4)), {}, "spec.features.names: 3 names for input 'x', whose rows have 4 columns"),
        (signature(shape=(-1,)), {}, "'x' has shape [-1]; expected [rows, 3] for 3 names"),
        (signature(shape=(-1, 3, 1)), {}, "'x' has shape [-1, 3, 1]"),
        (signature(shape=()), {"names": ["a"]}, "expected [rows, 1] for 1 names, or [rows]"),
        (signature(), {"names": ["a", "b", "_updated"]}, "_updated is the time of the last write"),
        (signature(DType.INT8), {"defaults": {"a": 300}},
         "spec.features.defaults.a: expected an integer of INT8 (-128 to 127), got 300"),
        (signature(DType.UINT64), {"defaults": {"b": 0.5}}, "spec.features.defaults.b: expected an integer of UINT64"),
        (signature(DType.BOOL), {"defaults": {"a": 2}}, "expected true, false, 1 or 0, got 2"),
        (signature(DType.FP16), {"defaults": {"a": 1e6}}, "expected a finite number of FP16, got 1e+06"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused_when_it_loads(
    model: Signature, features: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ModelLoadError) as error:
        plan(model, **features)
    assert error.value.reason is Reason.INVALID_SPEC
    assert fault in error.value.message


def test_all_that_does_not_fit_is_told_at_once() -> None:
    with pytest.raises(ModelLoadError) as error:
        plan(signature(DType.INT8, (-1, 4)), defaults={"a": 300, "b": 1.5})
    assert error.value.message.count("spec.features") == 3


@pytest.mark.parametrize("shape", [(-1, 3), (-1, -1), (1, 3)])
def test_inputs_that_rows_of_names_fit_are_taken(shape: tuple[int, ...]) -> None:
    assert plan(signature(shape=shape)).fields == ("a", "b", "c", "_updated")


@pytest.mark.parametrize("dtype", list(DType), ids=lambda dtype: dtype.name)
def test_defaults_are_values_of_every_datatype(dtype: DType) -> None:
    compiled = plan(signature(dtype), onMissing="Default", defaults={"a": 0, "b": 1, "c": 1})
    completed = compiled.defaulted(["u"], 1)
    assert completed is not None
    assert completed.array.dtype == dtype.numpy
    expected: Any = {"O": ["0", "1", "1"], "b": [False, True, True]}.get(dtype.kind, [0, 1, 1])
    assert completed.array.tolist() == [expected]
    assert expected_of(dtype)


def test_a_default_with_a_large_exponent_is_exact() -> None:
    compiled = plan(signature(DType.FP64), onMissing="Default", defaults={"a": 1e300, "b": 1e-300, "c": -0.1})
    completed = compiled.defaulted(["u"], 1)
    assert completed is not None
    assert completed.array.tolist() == [[1e300, 1e-300, -0.1]]
    assert math.isfinite(completed.array.sum())
