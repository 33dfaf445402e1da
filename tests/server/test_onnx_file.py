import contextlib
import json
import pickle
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from server.artifact_models import HIDDEN, external_model, hidden_model, plain_model

from phoenix_server.onnx_file import FIELDS, OnnxFacts, OnnxFileError, read_facts


def facts_of(data: bytes, folder: Path) -> OnnxFacts:
    path = folder / "model.onnx"
    path.write_bytes(data)
    return read_facts(path)


def refusal(data: bytes, folder: Path) -> str:
    with pytest.raises(OnnxFileError) as caught:
        facts_of(data, folder)
    return str(caught.value)


def edited(data: bytes, edit: object) -> bytes:
    model = onnx.load_from_string(data)
    edit(model)  # type: ignore[operator]
    return model.SerializeToString()


def test_facts_of_plain_model_are_those_of_the_onnx_package(tmp_path: Path) -> None:
    assert facts_of(plain_model(), tmp_path) == OnnxFacts(
        ir_version=9, opsets={"": 17, "local": 1}, producer="tests", inputs=("x",), outputs=("y",), external_files=()
    )


def _models_of_the_onnx_package() -> list[Path]:
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    return sorted(data.rglob("*.onnx"))


def test_facts_agree_with_the_onnx_package_on_its_own_models() -> None:
    paths = _models_of_the_onnx_package()
    assert len(paths) > 50
    for path in paths:
        model, facts = onnx.load(path, load_external_data=False), read_facts(path)
        assert facts.ir_version == model.ir_version
        assert facts.opsets == {o.domain.replace("ai.onnx", "") if o.domain == "ai.onnx" else o.domain: o.version
                                for o in model.opset_import}, path  # fmt: skip
        assert facts.producer == model.producer_name
        assert facts.inputs == tuple(i.name for i in model.graph.input)
        assert facts.outputs == tuple(o.name for o in model.graph.output)


def test_field_numbers_are_those_of_the_onnx_descriptors() -> None:
    for message, fields in FIELDS.items():
        by_name = getattr(onnx, message).DESCRIPTOR.fields_by_name
        assert {name: by_name[name].number for name in fields} == fields
    assert onnx.TensorProto.EXTERNAL == 1


def test_module_imports_neither_onnx_nor_protobuf() -> None:
    code = "import sys, phoenix_server.onnx_file; print([m for m in sys.modules if 'onnx' in m or 'google' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['phoenix_server.onnx_file']"


def test_external_files_are_found_wherever_a_tensor_can_stand(tmp_path: Path) -> None:
    assert facts_of(hidden_model(), tmp_path).external_files == HIDDEN


def test_external_files_are_unique_and_sorted(tmp_path: Path) -> None:
    assert facts_of(external_model("b", "a", "./b", "a"), tmp_path).external_files == ("a", "b")


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../weights", "a/../../b", "..", "", ".", "a\\..\\b", "C:\\weights", "a\nb", "a\0b"],
)
def test_external_location_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    message = refusal(external_model(location), tmp_path)
    assert "external data location" in message
    assert "\n" not in message


def test_external_location_missing_is_refused(tmp_path: Path) -> None:
    def forget(model: onnx.ModelProto) -> None:
        del model.graph.initializer[0].external_data[:]

    assert "'w0' lies outside the file, but says not where" in refusal(edited(external_model("a"), forget), tmp_path)


def test_external_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "weights").symlink_to("../secret")
    assert "leads out of the model's folder" in refusal(external_model("weights"), folder)


def test_external_folder_linked_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    (folder / "sub").symlink_to("../other")
    assert "leads out of the model's folder" in refusal(external_model("sub/weights"), folder)


def test_external_links_of_a_configmap_mount_are_followed(tmp_path: Path) -> None:
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "..2026" / "model.onnx").write_bytes(external_model("weights"))
    (tmp_path / "..2026" / "weights").write_bytes(bytes(16))
    for name in ("model.onnx", "weights"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert read_facts(tmp_path / "model.onnx").external_files == ("weights",)


def test_external_links_of_a_blob_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(external_model("weights"))
    (tmp_path / "blobs" / "2").write_bytes(bytes(16))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.onnx").symlink_to("../blobs/1")
    (snapshot / "weights").symlink_to("../blobs/2")
    assert read_facts(snapshot / "model.onnx").external_files == ("weights",)


def _zip() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "Git LFS pointer; .*git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title>", "HTML page"),
        (b"\xef\xbb\xbf<html>", "HTML page"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "XML document"),
        (json.dumps({"error": "no"}).encode(), "JSON document"),
        (_zip(), "zip archive, as PyTorch"),
        (pickle.dumps({"a": 1}), "Python pickle"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(40), "TensorFlow Lite"),
        (b"\x1c\x00\x00\x00ORTM" + bytes(40), "ORT format"),
        (b"\x89HDF\r\n\x1a\n" + bytes(8), "HDF5"),
        (b"GGUF\x03" + bytes(30), "GGUF"),
        (b'\x20\0\0\0\0\0\0\0{"w":{"dtype":"F32"}}', "safetensors"),
        (b"\x1f\x8b\x08" + bytes(20), "gzip"),
        ("grüß Gott ".encode() * 100, "text"),
    ],
)
def test_something_else_is_named(data: bytes, kind: str, tmp_path: Path) -> None:
    with pytest.raises(OnnxFileError, match=f"^not an ONNX model: the file looks like an? ?.*{kind}|looks like {kind}"):
        facts_of(data, tmp_path)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    assert refusal(b"", tmp_path) == "the file is empty"


def test_binary_garbage_is_refused(tmp_path: Path) -> None:
    assert "not an ONNX model" in refusal(bytes(range(256)), tmp_path)


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_facts(tmp_path / "none.onnx")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    # One opset: a file that ends exactly between two opset imports is whole by the rules of the format.
    data = edited(plain_model(), lambda model: model.opset_import.pop())
    for size in range(1, len(data)):
        message = refusal(data[:size], tmp_path)
        assert "truncated" in message or "break" in message or "ir_version" in message, (size, message)


def test_truncation_says_where_it_ends_and_what_was_expected(tmp_path: Path) -> None:
    data = plain_model(rows=100)
    graph = onnx.load_from_string(data).graph.ByteSize()
    message = refusal(data[:1000], tmp_path)
    assert "it ends at byte 1000, but ModelProto.graph at byte " in message
    assert f"needs {graph} bytes" in message


def test_damage_inside_is_told_from_truncation(tmp_path: Path) -> None:
    # A graph of 2 bytes whose first field claims 100.
    assert "damaged: GraphProto.node at byte 6 needs 100" in refusal(b"\x08\x09\x3a\x02\x0a\x64" + bytes(200), tmp_path)


def test_model_without_graph_outputs_opsets_or_ir_version_is_refused(tmp_path: Path) -> None:
    data = plain_model()
    assert "no graph" in refusal(edited(data, lambda m: m.ClearField("graph")), tmp_path)
    assert "no outputs" in refusal(edited(data, lambda m: m.graph.ClearField("output")), tmp_path)
    assert "no opset" in refusal(edited(data, lambda m: m.ClearField("opset_import")), tmp_path)
    assert "no ir_version" in refusal(edited(data, lambda m: m.ClearField("ir_version")), tmp_path)


def test_nesting_beyond_protobufs_limit_is_refused(tmp_path: Path) -> None:
    graph = b""
    for _ in range(200):  # graph > node > attribute > graph ...
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size = helper.make_attribute("s", graph).s
            graph = tag + _varint(len(size)) + graph
    assert "nested deeper" in refusal(b"\x08\x09\x3a" + _varint(len(graph)) + graph, tmp_path)


def test_forged_string_length_is_refused(tmp_path: Path) -> None:
    name = b"a" * 100_000
    assert "producer_name at byte 6 is 100000 bytes long" in refusal(
        b"\x08\x09\x12" + _varint(len(name)) + name, tmp_path
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_memory_stays_flat_while_weights_are_stepped_over(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "big.onnx"
    path.write_bytes(plain_model(rows=1_000_000))
    tracemalloc.start()
    try:
        read_facts(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


_fuzz = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def _survives(data: bytes, folder: Path) -> None:
    with contextlib.suppress(OnnxFileError):
        facts_of(data, folder)


@given(data=st.binary(max_size=300))
@_fuzz
def test_random_bytes_raise_nothing_else(data: bytes, tmp_path: Path) -> None:
    _survives(data, tmp_path)


@given(
    model=st.sampled_from([plain_model(), external_model("a", "b"), hidden_model()]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=6), st.integers(0, 6)), max_size=6),
)
@_fuzz
def test_mutated_models_raise_nothing_else(model: bytes, edits: list[tuple[float, bytes, int]], tmp_path: Path) -> None:
    data = bytearray(model)
    for where, insert, drop in edits:
        at = int(where * len(data))
        data[at : at + drop] = insert
    _survives(bytes(data), tmp_path)
