"""What is hashed, what a broken chain looks like, and tensors that come back bit for bit. No database."""

import hashlib
import json
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_server.audit.chain import AuditRow, Break, Head, canonical, chained, check, genesis, microseconds, moment
from phoenix_server.audit.record import clean
from phoenix_server.audit.tensor_blob import pack, unpack
from phoenix_server.tensors import DType

WRITER = "ab" * 16


def row(sequence: int, *, entity: str | None = None, inputs: bytes | None = b"\x00\xff") -> AuditRow:
    return AuditRow(
        WRITER, sequence, 1_795_851_056_000_001 + sequence, 1_795_851_056_000_000, 250, "ml", "iris", "1", "0" * 64,
        "CPUExecutionProvider", "onnxruntime 1", "ok", f"r{sequence}", None, entity, None, None, inputs, None, None,
    )  # fmt: skip


def chain(count: int) -> list[tuple[AuditRow, bytes]]:
    rows, last = [], genesis(WRITER)
    for number in range(1, count + 1):
        link = chained(last, row(number))
        last = link.hash
        rows.append((link.row, link.hash))
    return rows


def broken_at(rows: list[tuple[AuditRow, bytes]], *heads: Head) -> tuple[int, str] | None:
    steps = list(check(WRITER, rows, heads))
    fault = steps[-1] if steps else None
    return (fault.sequence, fault.text) if isinstance(fault, Break) else None


def test_canonical_form_is_the_row_as_json() -> None:
    text = canonical(row(7, entity='a"\\\n\u00e9'))
    assert json.loads(text) == {
        "writer": WRITER, "sequence": 7, "written": "2026-11-28T07:30:56.000008Z",
        "time": "2026-11-28T07:30:56.000000Z",
        "latency_us": 250, "namespace": "ml", "model": "iris", "version": "1", "digest": "0" * 64,
        "provider": "CPUExecutionProvider", "runtime": "onnxruntime 1", "outcome": "ok", "request_id": "r7",
        "event_id": None, "entity": 'a"\\\n\u00e9', "caller": None, "error": None, "inputs": "\\x00ff",
        "outputs": None, "features": None,
    }  # fmt: skip
    # pinned: a change of the form would break every chain that was ever written
    assert hashlib.sha256(text).hexdigest() == "422b3dd3e4200faa12bf4b1b5cf44c26d06dd477d17ed143ee854548f7951e01"
    assert chained(b"\1" * 32, row(7)).hash == hashlib.sha256(b"\1" * 32 + canonical(row(7))).digest()


@given(st.text(), st.text(), st.binary(max_size=8) | st.none())
def test_canonical_form_tells_rows_apart(first: str, second: str, data: bytes | None) -> None:
    one = row(1)._replace(request_id=clean(first), entity=clean(second), inputs=data)
    two = row(1)._replace(request_id=clean(first + second), entity="", inputs=data)
    assert (canonical(one) == canonical(two)) == (one == two)
    json.loads(canonical(one))


def test_chain_holds() -> None:
    rows = chain(5)
    assert list(check(WRITER, rows, [Head(WRITER, 3, rows[2][1]), Head(WRITER, 5, rows[4][1])])) == [1, 2, 3, 4, 5]
    assert list(check(WRITER, [], [Head(WRITER, 0, genesis(WRITER))])) == []


def test_first_changed_row_is_named() -> None:
    rows = chain(5)
    rows[2] = (rows[2][0]._replace(outcome="error"), rows[2][1])
    rows[4] = (rows[4][0]._replace(outcome="error"), rows[4][1])
    assert broken_at(rows) == (3, "this row was changed, or another stands in its place")


def test_removed_row_is_named() -> None:
    rows = chain(6)
    assert broken_at(rows[:1] + rows[2:]) == (2, "this row is missing")
    assert broken_at(rows[:1] + rows[4:]) == (2, "this row and the 2 behind it are missing")
    assert broken_at(rows[1:]) == (1, "this row is missing")


def test_swapped_rows_are_named() -> None:
    rows = chain(4)
    rows[1], rows[2] = (
        (rows[2][0]._replace(sequence=2), rows[2][1]),
        (rows[1][0]._replace(sequence=3), rows[1][1]),
    )
    assert broken_at(rows) == (2, "this row was changed, or another stands in its place")


def test_doubled_row_is_named() -> None:
    rows = chain(3)
    assert broken_at([rows[0], rows[1], rows[1], rows[2]]) == (2, "there are two rows of this number")


def test_cut_end_is_found_with_a_published_head() -> None:
    rows = chain(5)
    head = Head(WRITER, 5, rows[4][1])
    assert broken_at(rows[:3]) is None
    assert broken_at(rows[:3], head) == (4, "the end of the chain is missing: its head was published at row 5")
    assert broken_at([], head) == (1, "the end of the chain is missing: its head was published at row 5")


def test_rewritten_chain_is_found_with_a_published_head() -> None:
    forged, last = [], genesis(WRITER)
    for number in range(1, 4):
        link = chained(last, row(number, entity="forged"))
        last = link.hash
        forged.append((link.row, link.hash))
    text = "the chain up to this row is not the one whose head was published"
    assert broken_at(forged, Head(WRITER, 2, chain(3)[1][1])) == (2, text)


def test_chain_goes_on_where_retention_dropped_its_beginning() -> None:
    rows = chain(6)
    pruned = Head(WRITER, 4, rows[3][1], is_pruned=True)
    assert list(check(WRITER, rows[4:], [pruned])) == [5, 6]
    assert broken_at(rows[5:], pruned) == (5, "this row is missing")
    assert broken_at(rows[4:]) == (1, "this row and the 3 behind it are missing")


@pytest.mark.parametrize("dtype", list(DType), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (0, 4)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype: DType, shape: tuple[int, ...]) -> None:
    if dtype is DType.BYTES:
        array = np.full(shape, "gr\u00fc\u00df\x00e", dtype=object)
    else:
        count = int(np.prod(shape, dtype=int))
        raw = np.random.default_rng(7).integers(0, 256, count * dtype.size, dtype=np.uint8)  # NaNs of every kind too
        array = (raw % 2 if dtype is DType.BOOL else raw).view(dtype.numpy).reshape(shape)
    ((name, back), (_, again)) = unpack(pack([("x", array), ("y", array)]))
    assert name == "x"
    assert back.dtype == array.dtype
    assert back.shape == again.shape == array.shape
    assert (back == array).all() if dtype is DType.BYTES else back.tobytes() == array.tobytes()


def test_tensors_that_are_strided_come_back() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3]
    assert unpack(pack([("x", array)]))[0][1].tolist() == array.tolist()


@pytest.mark.parametrize("blob", [b"", b"\x05\x00\x00\x00[", b"\x02\x00\x00\x00[]x", b"\x04\x00\x00\x00null"])
def test_what_is_no_tensors_is_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match=r"tensors|left"):
        unpack(blob)


def test_times_are_exact() -> None:
    time = datetime(2026, 11, 28, 7, 30, 56, 123457, tzinfo=UTC)
    assert moment(microseconds(time)) == time


def test_texts_are_what_a_database_can_hold() -> None:
    assert clean("a\0b") == "a\ufffdb"
    assert clean("\ud800x") == "?x"
    assert len(clean("x" * 5000)) == 1025
