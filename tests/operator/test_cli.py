"""The command line, as people call it; and the files that it generates."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from phoenix_operator import __version__, logs
from phoenix_operator.__main__ import main

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*/model.yaml"))
MODEL = """\
apiVersion: phoenix-ml.io/v1alpha1
kind: PhoenixModel
metadata: {name: fraud, namespace: ml}
spec: {model: {uri: fraud/model.onnx}}
"""


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phoenix_operator", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def render(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, list[dict[str, Any]], str]:
    code = main(["render", *map(str, arguments)])
    told = capsys.readouterr()
    return code, list(yaml.safe_load_all(told.out)), told.err


@pytest.mark.parametrize("manifest", EXAMPLES, ids=lambda file: file.parent.name)
def test_every_example_is_rendered(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, objects, told = render(capsys, manifest)
    assert (code, told) == (0, "")
    assert [body["kind"] for body in objects] == [
        *("ServiceAccount", "ConfigMap", "NetworkPolicy", "Service", "Service", "Deployment"),
    ]
    name = yaml.safe_load(manifest.read_text())["metadata"]["name"]
    assert objects[-1]["metadata"]["name"] == name


def test_folder_is_rendered_whole_and_as_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    done = program("render", str(ROOT / "examples"))
    assert (done.returncode, done.stderr) == (0, "")
    documents = list(yaml.safe_load_all(done.stdout))
    assert len(documents) == 6 * len(EXAMPLES)
    assert render(capsys, *EXAMPLES)[1] == documents


def test_rendering_heeds_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, settings = tmp_path / "model.yaml", tmp_path / "settings.yaml"
    manifest.write_text(MODEL)
    settings.write_text("serverImage: example.com/server:7\nnetworkPolicies: false\nmonitoring: {kind: PodMonitor}\n")
    code, objects, _ = render(capsys, manifest, "--settings", settings)
    assert code == 0
    kinds = [body["kind"] for body in objects]
    assert "NetworkPolicy" not in kinds
    assert "PodMonitor" in kinds
    (deployment,) = (body for body in objects if body["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "example.com/server:7"


def test_model_that_would_not_be_accepted_is_told_and_not_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "model.yaml"
    manifest.write_text(MODEL.replace("spec: {", "spec: {networking: {host: a.example.com}, "))
    code, objects, told = render(capsys, manifest)
    assert (code, objects) == (1, [])
    assert f"{manifest}: fraud: InvalidSpec: spec.networking.host" in told


def test_good_model_beside_a_bad_one_is_rendered_whatever_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = MODEL.replace("name: fraud", "name: bad").replace("spec: {", "spec: {networking: {host: a.example.com}, ")
    for documents in ([bad, MODEL], [MODEL, bad]):
        file = tmp_path / "models.yaml"
        file.write_text("---\n".join(documents))
        code, objects, _ = render(capsys, file)
        assert code == 1
        assert {body["metadata"]["namespace"] for body in objects} == {"ml"}
        assert len(objects) == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MODEL.replace("uri:", "url:"), "spec.model"),
        ("kind: [", "YAML"),
        (MODEL.replace("fraud/model.onnx", "http://x/y"), "use https://"),
    ],
)
def test_manifest_that_cannot_be_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    manifest = tmp_path / "model.yaml"
    manifest.write_text(text)
    code, objects, told = render(capsys, manifest)
    assert (code, objects) == (1, [])
    assert words in told


def test_missing_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, told = render(capsys, tmp_path / "missing.yaml")
    assert code == 1
    assert "missing.yaml" in told


@pytest.mark.parametrize("command", [["render", "x.yaml"], ["run"]])
def test_wrong_settings_end_the_program_with_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("workers: 0\nmore: 1\n")
    assert main([*command, "--settings", str(settings)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"phoenix-operator: {settings}: ")
    assert "workers: " in told
    assert "more: " in told


def test_operator_without_a_cluster_ends_with_1_and_says_why(tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text("apiVersion: v1\nkind: Config\nclusters: []\ncontexts: []\nusers: []\n")
    settings = tmp_path / "settings.yaml"
    settings.write_text("httpPort: 0\n")
    done = program("run", "--settings", str(settings), KUBECONFIG=str(config))
    assert done.returncode == 1
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "ERROR"
    assert "started again" in last["message"]
    assert last["exception"]


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["render"], ["manifests"], ["run", "--log-level", "loud"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: phoenix-operator" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["render"], ["manifests"]])
def test_help_says_what_the_command_does(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "phoenix-operator" in capsys.readouterr().out


def test_version_is_that_of_the_package() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout) == (0, f"phoenix-operator {__version__}\n")


# --- manifests -------------------------------------------------------------------------------------------------------


def test_manifests_in_the_repository_are_those_of_the_command(tmp_path: Path) -> None:
    assert main(["manifests", str(tmp_path / "new" / "folder")]) == 0
    kept = ROOT / "operator" / "manifests" / "cluster"
    made = {file.name: file.read_text() for file in (tmp_path / "new" / "folder").iterdir()}
    assert made == {file.name: file.read_text() for file in kept.iterdir()}, "run `make manifests`"


def test_namespaced_manifests_are_written_as_asked(tmp_path: Path) -> None:
    assert main(["manifests", str(tmp_path), "--namespaces", "ml,,other", "--secrets", "a,b"]) == 0
    objects = list(yaml.safe_load_all((tmp_path / "operator.yaml").read_text()))
    assert "ClusterRole" not in {body["kind"] for body in objects}
    (deployment,) = (body for body in objects if body["kind"] == "Deployment")
    assert "--namespaces=ml,other" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("name", ["operator.yaml", "kustomization.yaml", "phoenixmodels.yaml"])
def test_generated_manifest_says_so_in_line_1(name: str) -> None:
    assert "GENERATED" in (ROOT / "operator" / "manifests" / "cluster" / name).read_text().splitlines()[0]


# --- logs ------------------------------------------------------------------------------------------------------------


def test_logs_are_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    before = logging.root.handlers[:], logging.root.level
    try:
        logs.configure("info")
        logger = logging.getLogger("phoenix_operator.test")
        logger.debug("not shown")
        logger.info("reconciled", extra={"model": "ml/fraud"})
        logging.getLogger("kopf.objects").info("not shown")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        logging.captureWarnings(False)
        logging.root.handlers, logging.root.level = before
    assert [(line["level"], line["message"], line["model"]) for line in lines] == [("INFO", "reconciled", "ml/fraud")]
    assert lines[0]["time"].endswith("Z")
    assert lines[0]["logger"] == "phoenix_operator.test"


# --- bindings --------------------------------------------------------------------------------------------------------

BOUND = """\
apiVersion: phoenix-ml.io/v1alpha1
kind: PhoenixModel
metadata: {name: fraud, namespace: ml}
spec:
  model: {uri: fraud/model.onnx}
  bindings:
    redis: {backend: default}
    postgres: {secretRef: {name: audit}}
"""


def test_secrets_are_rendered_without_anything_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, settings = tmp_path / "model.yaml", tmp_path / "settings.yaml"
    manifest.write_text(BOUND)
    settings.write_text("backends: [{name: default, kind: redis, adminSecretRef: {name: redis-admin}}]\n")
    code, objects, told = render(capsys, manifest, "--settings", settings)
    assert (code, told) == (0, "")
    (secret,) = (body for body in objects if body["kind"] == "Secret")
    assert (secret["metadata"]["name"], secret["type"]) == ("fraud-redis", "servicebinding.io/redis")
    assert "data" not in secret
    assert secret["stringData"]["password"] == "<made once by the operator>"
    assert secret["stringData"]["host"] == "<of backend default>"
    assert objects[-1]["kind"] == "Deployment"


def test_backend_that_no_settings_name_is_told_when_rendering(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "model.yaml"
    manifest.write_text(BOUND)
    code, objects, told = render(capsys, manifest)
    assert (code, objects) == (1, [])
    assert "UnknownBackend: spec.bindings.redis.backend" in told


def test_manifests_with_bindings_have_the_rights(tmp_path: Path) -> None:
    assert main(["manifests", str(tmp_path), "--bindings", "redis-admin,kafka-admin"]) == 0
    text = (tmp_path / "operator.yaml").read_text()
    assert "phoenix-operator-backends" in text
    assert "- kafka-admin" in text
