"""Reading manifests: files, folders, mounts, and every way in which they can be wrong."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from phoenix_api import Fault, Manifest, ManifestError, parse_manifests, read_manifests
from phoenix_api.documents import MAX_BYTES


def yaml_of(name: str = "iris", *, version: str = "1", namespace: str = "ml", extra: str = "") -> str:
    return (
        "apiVersion: phoenix-ml.io/v1alpha1\n"
        "kind: PhoenixModel\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        "spec:\n"
        f"  model: {{uri: model.onnx, version: '{version}'}}\n{extra}"
    )


def faults_of(text: str, file: str = "bad.yaml", *, strict: bool = True) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse_manifests(text, file=file, strict=strict)
    assert str(caught.value).splitlines() == [str(fault) for fault in caught.value.faults]
    return [str(fault) for fault in caught.value.faults]


def faults_in(*paths: Path) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read_manifests(paths)
    return [str(fault) for fault in caught.value.faults]


def names(manifests: list[Manifest]) -> list[str]:
    return [manifest.model.metadata.name for manifest in manifests]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_documents_are_numbered_and_other_kinds_beside_a_model_are_passed_over() -> None:
    text = "---\n" + yaml_of("a") + "---\napiVersion: v1\nkind: Service\n---\n---\n" + yaml_of("b")
    read = parse_manifests(text, file="models.yaml")
    assert [(m.model.metadata.name, m.file, m.document) for m in read] == [
        ("a", Path("models.yaml"), 1),
        ("b", Path("models.yaml"), 4),
    ]


def test_list_is_unpacked_and_its_faults_name_the_item() -> None:
    good = json.loads(json.dumps({"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel"}))
    first = good | {"metadata": {"name": "a"}, "spec": {"model": {"uri": "x"}}}
    second = good | {"metadata": {"name": "b"}, "spec": {"model": {"uri": 1}}}
    other = {"apiVersion": "v1", "kind": "ConfigMap"}
    listed = {"apiVersion": "v1", "kind": "List", "items": [first, other]}
    assert names(parse_manifests(json.dumps(listed), file="list.json")) == ["a"]
    listed["items"] = [first, second]
    assert faults_of(json.dumps(listed), "list.json")[0].startswith(
        "list.json: document 1: items[1].spec.model.uri: expected a relative path"
    )


def test_folder_is_read_in_order_and_other_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "model.yml").write_text(yaml_of("deep"))
    (tmp_path / "a.json").write_text(json.dumps({"inputs": [{"name": "x"}]}))
    (tmp_path / "list.json").write_text(json.dumps(["PhoenixModel"]))
    (tmp_path / "c.yaml").write_text("\ufeff" + yaml_of("c"))
    (tmp_path / "chart.yaml").write_text("{{ template }}: [")
    (tmp_path / "service.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: for-PhoenixModel}\n")
    (tmp_path / "notes.txt").write_text("kind: PhoenixModel")
    (tmp_path / "data.json").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden.yaml").write_text("kind: PhoenixModel")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.yaml").write_text("kind: PhoenixModel")
    assert names(read_manifests([tmp_path])) == ["deep", "c"]


def test_large_data_beside_a_manifest_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml_of())
    with (tmp_path / "request.json").open("wb") as data:
        data.truncate(MAX_BYTES + 1)
    assert names(read_manifests([tmp_path])) == ["iris"]


def test_configmap_mount_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "..2026_11_23").mkdir()
    (tmp_path / "..2026_11_23" / "model.yaml").write_text(yaml_of())
    (tmp_path / "..data").symlink_to("..2026_11_23")
    (tmp_path / "model.yaml").symlink_to("..data/model.yaml")
    (found,) = read_manifests([tmp_path])
    assert found.file == tmp_path / "model.yaml"


def test_file_that_is_named_and_in_a_folder_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml_of())
    assert len(read_manifests([tmp_path / "model.yaml", tmp_path, tmp_path / "." / "model.yaml"])) == 1


def test_links_to_folders_are_followed_but_not_round_and_round(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model.yaml").write_text(yaml_of())
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to("real")
    assert names(read_manifests([tmp_path])) == ["iris"]


def test_lenient_reading_ignores_unknown_fields() -> None:
    text = yaml_of(extra="  fromTheFuture: {a: [1]}\n")
    assert names(parse_manifests(text, file="a.yaml", strict=False)) == ["iris"]
    assert "unknown field" in faults_of(text)[0]


def test_yaml_dates_are_strings_as_in_kubernetes() -> None:
    text = yaml_of().replace("version: '1'", "version: 2026-11-23")
    assert parse_manifests(text, file="a.yaml")[0].model.spec.model.version == "2026-11-23"


def test_aliases_and_merge_keys_are_read() -> None:
    text = yaml_of(
        extra="  resources:\n    requests: &amounts {cpu: 1, memory: 1Gi}\n    limits: {<<: *amounts, cpu: 2}\n"
    )
    resources = parse_manifests(text, file="a.yaml")[0].model.spec.resources
    assert (resources.limits["memory"].value, resources.limits["cpu"].value) == (1024**3, 2)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_fault_names_file_document_field_expectation_and_what_came() -> None:
    text = yaml_of("a") + "---\n" + yaml_of("b", extra="  limits:\n    timeoutSeconds: abc\n")
    assert faults_of(text, "examples/bad.yaml") == [
        "examples/bad.yaml: document 2: spec.limits.timeoutSeconds: "
        "expected an integer from 1 to 3600, got 'abc' (line 13)"
    ]


def test_all_faults_of_all_documents_of_all_files_come_at_once(tmp_path: Path) -> None:
    extra = (
        "  batching: {maxRows: 0, maxRow: 1}\n"
        "  autoscaling: {minReplicas: 9, maxReplicas: 2, targetLatency: 0}\n"
        "  bindings: {redis: {}, kafka: {backend: 1}}\n"
    )
    (tmp_path / "one.yaml").write_text(yaml_of("1a", extra=extra) + "---\nkind: PhoenixModel\n---\n[")
    (tmp_path / "two.json").write_text('{"kind": "PhoenixModel", "a": 1, "a": 2}')
    found = [
        line.removeprefix(f"{tmp_path}/")
        for line in faults_in(tmp_path / "one.yaml", tmp_path / "missing.yaml", tmp_path / "two.json")
    ]
    starts = [
        "one.yaml: document 1: metadata.name: expected a name of a-z, 0-9 and -",
        "one.yaml: document 1: spec.batching.maxRows: expected an integer from 1 to 65536, got 0",
        "one.yaml: document 1: spec.batching.maxRow: unknown field, did you mean maxRows?",
        "one.yaml: document 1: spec.autoscaling.minReplicas: expected minReplicas of at most maxReplicas, got 9",
        "one.yaml: document 1: spec.autoscaling.targetLatency: expected a time in seconds",
        "one.yaml: document 1: spec.bindings.redis: expected exactly one of backend and secretRef",
        "one.yaml: document 1: spec.bindings.kafka.backend: expected a DNS label",
        "one.yaml: document 2: apiVersion: expected phoenix-ml.io/v1alpha1, got nothing",
        "one.yaml: document 3: YAML syntax",
        "missing.yaml: cannot be read: No such file or directory",
        "two.json: document 1: expected each key once, got 'a' twice",
    ]
    assert [start for start, line in zip(starts, found, strict=True) if not line.startswith(start)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2", "bad.yaml: document 1: YAML syntax while parsing a flow sequence: did not find expected"),
        ("a: \tb\n\t- c", "bad.yaml: document 1: YAML syntax"),
        ("kind: PhoenixModel\nkind: x\n", "bad.yaml: document 1: kind: expected each key once, got it twice (line 2)"),
        ("a: {b: {c: 1, c: 2}}", "bad.yaml: document 1: a.b.c: expected each key once, got it twice (line 1)"),
        ("a: {1: x}", "bad.yaml: document 1: a: expected a string as key, got 1; quote it (line 1)"),
        ("a: !!python/object:os.system x", "bad.yaml: document 1: YAML syntax: could not determine a constructor"),
        ("- a\n- b", "bad.yaml: document 1: expected a PhoenixModel (apiVersion: phoenix-ml.io/v1alpha1, "
                     "kind: PhoenixModel), got a list (line 1)"),
        ("just text", "bad.yaml: document 1: expected a PhoenixModel"),
        ("", "bad.yaml: expected at least one PhoenixModel (apiVersion: phoenix-ml.io/v1alpha1, kind: PhoenixModel), "
             "found nothing"),
        ("kind: Service\napiVersion: v1", "bad.yaml: expected at least one PhoenixModel (apiVersion: "
                                          "phoenix-ml.io/v1alpha1, kind: PhoenixModel), found Service"),
        ("apiVersion: phoenix-ml.io/v1\nkind: PhoenixModel",
         "bad.yaml: document 1: apiVersion: expected phoenix-ml.io/v1alpha1, got 'phoenix-ml.io/v1' (line 1)"),
        ("apiVersion: phoenix-ml.io/v1alpha1\nkind: Model", "bad.yaml: document 1: kind: expected PhoenixModel"),
        ("apiVersion: v1\nkind: PhoenixModle",
         "bad.yaml: document 1: kind: expected PhoenixModel, got 'PhoenixModle', did you mean PhoenixModel? (line 2)"),
        ("apiVersion: phoenix-ml.io/v1alpha1\n", "bad.yaml: document 1: kind: expected PhoenixModel, got nothing"),
        ("a: &a [*a]", "bad.yaml: document 1: expected at most 200000 values once aliases are expanded"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi",
                                                                                         strict=True)),
         "bad.yaml: document 1: expected at most 200000 values once aliases are expanded"),
        ("- " * 5000, "bad.yaml: document 1: expected a nesting of at most 100 levels"),
        ("[" * 100_000, "bad.yaml: document 1: expected a nesting of at most 100 levels"),
        ("#" * (MAX_BYTES + 1), f"bad.yaml: expected at most {MAX_BYTES} characters, got {MAX_BYTES + 1}"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else None,
)  # fmt: skip
def test_yaml_that_is_no_manifest_is_explained(text: str, expected: str) -> None:
    assert faults_of(text)[0].startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,\n}', "bad.json: document 1: JSON syntax: "),
        ("[" * 100_000, "bad.json: document 1: JSON cannot be read: "),
        ('{"a": ' + "1" * 5000 + "}", "bad.json: document 1: JSON cannot be read: "),
        ('{"a": 1, "a": 2}', "bad.json: document 1: expected each key once, got 'a' twice"),
        ("[]", "bad.json: document 1: expected a PhoenixModel (apiVersion: phoenix-ml.io/v1alpha1, "
               "kind: PhoenixModel), got an empty list"),
    ],
    ids=lambda value: value[:25],
)  # fmt: skip
def test_json_that_is_no_manifest_is_explained(text: str, expected: str) -> None:
    assert faults_of(text, "bad.json")[0].startswith(expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("  modle: {}", "spec.modle: unknown field, did you mean model? (line 6)"),
        ("  xyz: 1", "spec.xyz: unknown field, expected one of model, runtime, batching"),
        ("  limits: 5", "spec.limits: expected an object, got 5 (line 6)"),
        ("  limits: [5]", "spec.limits: expected an object, got a list (line 6)"),
        ("  warmup:\n    rows: [1]", "spec.warmup.rows: expected an integer from 1 to 65536, got a list (line 7)"),
        ("  pod: {env: [{name: A, value: 5}]}",
         "spec.pod.env[0].value: expected a string of at most 32768 characters, got 5; quote it: \"5\" (line 6)"),
        ("  pod: {env: [{name: A, value: true}]}", 'got true; quote it: "true"'),
        ("  pod: {labels: {example.com/a: 1}}", "spec.pod.labels[example.com/a]: expected a Kubernetes label value"),
        ("  pod: {labels: {example.com/a: {}}}", "at most 63 characters, got an empty object"),
        ("  networking: {allowFrom: [null]}", "allowFrom[0]: expected an object of at most 64 entries, got null"),
        ("  pod: {priorityClassName: '" + "a" * 300 + "'}", "… (300 characters)"),
    ],
)  # fmt: skip
def test_field_fault_is_explained(spec: str, expected: str) -> None:
    assert expected in faults_of(yaml_of(extra=spec + "\n"))[0]


def test_password_in_a_uri_is_not_repeated() -> None:
    text = yaml_of().replace("model.onnx", "https://me:geheim@example.com/model.onnx")
    (told,) = faults_of(text)
    assert "geheim" not in told
    assert "got 'https://***@example.com/model.onnx'" in told


def test_same_model_twice_names_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml_of())
    (tmp_path / "b.yaml").write_text(yaml_of("other") + "---\n" + yaml_of())
    assert faults_in(tmp_path) == [
        f"{tmp_path}/b.yaml: document 2: metadata.name: model ml/iris version 1 is already declared in "
        f"{tmp_path}/a.yaml, document 1: change the name or spec.model.version of one"
    ]


def test_same_name_with_another_version_or_namespace_is_allowed() -> None:
    text = "---\n".join([yaml_of(), yaml_of(version="2"), yaml_of(namespace="other")])
    assert len(parse_manifests(text, file="a.yaml")) == 3


def test_missing_model_in_a_folder_is_a_fault(tmp_path: Path) -> None:
    assert faults_in(tmp_path) == [
        f"{tmp_path}: expected a PhoenixModel (apiVersion: phoenix-ml.io/v1alpha1, kind: PhoenixModel) "
        "in *.yaml, *.yml, *.json files below it, found none"
    ]


def test_broken_yaml_in_a_folder_is_a_fault_if_it_speaks_of_models(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("kind: PhoenixModel\n  bad: [")
    assert faults_in(tmp_path)[0].startswith(f"{tmp_path}/model.yaml: document 1: YAML syntax")


def test_file_that_is_not_text_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_bytes(b"kind: \xff")
    assert faults_in(tmp_path / "model.yaml") == [
        f"{tmp_path}/model.yaml: expected UTF-8 text, got something else at byte 6"
    ]


def test_file_without_permission_is_a_fault() -> None:
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        (path / "model.yaml").write_text(yaml_of())
        (path / "model.yaml").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:  # who reads everything
            os.seteuid(nobody)
        try:
            assert faults_in(path) == [f"{path}/model.yaml: cannot be read: Permission denied"]
        finally:
            if is_root:
                os.seteuid(0)


def test_dangling_link_in_a_folder_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").symlink_to("gone.yaml")
    assert faults_in(tmp_path) == [f"{tmp_path}/model.yaml: cannot be read: No such file or directory"]


def test_fault_is_written_without_what_it_lacks() -> None:
    assert str(Fault(Path("a.yaml"), 0, "", "is wrong")) == "a.yaml: is wrong"
    assert str(Fault(Path("a.yaml"), 2, "spec", "is wrong", 7)) == "a.yaml: document 2: spec: is wrong (line 7)"


def test_examples_of_the_repository_are_read() -> None:
    assert {"iris", "digits"} <= set(names(read_manifests([Path(__file__).parents[2] / "examples"])))
