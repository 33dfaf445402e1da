"""Features from the file beside the manifest: what it may look like, what is wrong in it, and that it is read again."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import feature_models
import phoenix_process
import pytest
from feature_models import ask, counted, rows_of
from phoenix_process import wait_until

from phoenix_server.errors import ModelLoadError, Reason
from phoenix_server.feature_file import FeatureFile
from phoenix_server.feature_rows import Values

FIELDS = ("a", "b", "_updated")


def table(folder: Path, *entities: str) -> list[Values]:
    async def read() -> list[Values]:
        file = FeatureFile(folder, "entity_id")
        await file.open()
        return file.read(entities, FIELDS)

    return asyncio.run(read())


def replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)


def test_json_maps_entities_to_fields(tmp_path: Path) -> None:
    document = {"alice": {"a": 1, "b": 2.5, "_updated": 1000}, "bob": {"a": True, "b": None}, "7": {"a": "text"}}
    (tmp_path / "features.json").write_text(json.dumps(document))
    alice, bob, seven, nobody = table(tmp_path, "alice", "bob", "7", "nobody")
    assert alice == [b"1", b"2.5", b"1000"]
    assert bob is not None
    assert bob[:2] == [b"true", None]
    assert seven is not None
    assert seven[:2] == [b"text", None]
    assert nobody == [None, None, None]


def test_csv_has_a_column_for_the_entity(tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text('\ufeffb,entity_id,a\n2.5,alice,1\n,"bo,b",x\n', encoding="utf-8")
    alice, bob = table(tmp_path, "alice", "bo,b")
    assert alice is not None
    assert alice[:2] == [b"1", b"2.5"]
    assert bob is not None
    assert bob[:2] == [b"x", None]


def test_rows_without_updated_are_as_old_as_their_file(tmp_path: Path) -> None:
    (tmp_path / "features.json").write_text('{"alice": {"a": 1}}')
    (alice,) = table(tmp_path, "alice")
    assert alice is not None
    updated = alice[2]
    assert updated is not None
    assert abs(float(updated) - time.time()) < 60


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("features.json", "[1, 2]", "expected an object of entities"),
        ("features.json", '{"alice": 1}', "expected an object of fields for entity 'alice'"),
        ("features.json", '{"alice": {"a": [1]}}', "expected a number, a string, true, false or null in 'alice'.'a'"),
        ("features.json", '{"alice": {', "features.json"),
        ("features.csv", "", "line 1: expected a column 'entity_id', found nothing"),
        ("features.csv", "a,b\n1,2\n", "line 1: expected a column 'entity_id', found a, b"),
        ("features.csv", "entity_id,a\nalice\n", "line 2: expected 2 columns"),
        ("features.csv", "entity_id,a\nalice,1,2\n", "line 2: expected 2 columns"),
        ("features.csv", 'entity_id,a\n"alice,1\n', "features.csv"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, name: str, text: str, fault: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelLoadError) as error:
        table(tmp_path, "alice")
    assert error.value.reason is Reason.INVALID_SPEC
    assert name in error.value.message
    assert fault in error.value.message


def test_without_a_file_and_without_redis_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no features\.json or features\.csv in .*PHOENIX_REDIS_URL") as error:
        table(tmp_path, "alice")
    assert error.value.reason is Reason.NOT_FOUND


def test_models_are_completed_from_the_file_and_changes_are_read(tmp_path: Path) -> None:
    folder = feature_models.write(tmp_path / "models", "strict", "lenient")
    file = folder / "features.json"
    replace(file, json.dumps({"alice": {"a": 1, "b": 2, "c": 3}, "bob": {"a": "x"}}))
    with phoenix_process.start([folder], {"PHOENIX_MEASURE_CAPACITY": "false"}) as server:
        assert rows_of(ask(server, "strict", "alice")) == [[1, 2, 3]]
        assert 0 <= ask(server, "strict", "alice")[1]["parameters"]["feature_age_seconds"] < 60
        assert rows_of(ask(server, "lenient", ["bob", "nobody"], rows=2)) == [[10, 20, 30]] * 2
        assert counted(server, "lenient", "unparsable") == 1
        assert counted(server, "lenient", "missing") == 2
        assert ask(server, "strict", "nobody")[0] == 400
        replace(file, json.dumps({"alice": {"a": 7, "b": 8, "c": 9}}))
        wait_until(lambda: rows_of(ask(server, "strict", "alice")) == [[7, 8, 9]], "the file is read again")
        replace(file, "{")

        def is_told() -> bool:
            assert rows_of(ask(server, "strict", "alice")) == [[7, 8, 9]]
            return any("features not read again" in line for line in server.stderr)

        wait_until(is_told, "the log tells of the broken file")
        file.unlink()
        assert rows_of(ask(server, "strict", "alice")) == [[7, 8, 9]]


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "phoenix_server", "check", folder],
        env={"PHOENIX_STATE_DIR": str(folder / "state"), "PHOENIX_MEASURE_CAPACITY": "false"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_check_finds_what_serving_would(tmp_path: Path) -> None:
    folder = feature_models.write(tmp_path / "models", "strict")
    failed = check(folder)
    assert failed.returncode == Reason.NOT_FOUND.exit_code
    assert "no features.json or features.csv" in failed.stdout
    (folder / "features.json").write_text("{}")
    assert check(folder).returncode == 0
    feature_models.write_manifest(folder, "strict", {"names": ["a", "b"], "input": "x"})
    failed = check(folder)
    assert failed.returncode == Reason.INVALID_SPEC.exit_code
    assert "spec.features.names: 2 names for input 'x', whose rows have 3 columns" in failed.stdout
    feature_models.write_manifest(folder, "strict", {"input": "nothing"})
    assert "the model has no input 'nothing'; it has: x, k" in check(folder).stdout
