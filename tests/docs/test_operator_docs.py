"""What the documentation says of the operator: reasons, manifests, settings, commands."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from phoenix_api import CONDITIONS, Reason, parse_manifests
from phoenix_operator import __main__ as program
from phoenix_operator.metrics import Metrics, MetricsApiMetrics
from phoenix_operator.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
REASONS = ROOT / "docs" / "reasons"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
# Also the indented blocks of list items.
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """Yield page and text of each block in a language."""
    for page in PAGES:
        for indent, name, text in BLOCK.findall(page.read_text()):
            if name == language:
                yield page, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)


def shell_lines() -> Iterator[tuple[Path, str]]:
    """Yield each command of the `sh` blocks, continued lines joined."""
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip():
                yield page, line.strip()


def where(cases: list[tuple[Path, str]]) -> list[str]:
    return [f"{page.relative_to(ROOT)}:{text.strip().splitlines()[0][:40]}" for page, text in cases]


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_every_reason_has_a_page_and_every_page_a_reason() -> None:
    assert {page.stem for page in REASONS.glob("*.md")} - {"README"} == {str(reason) for reason in Reason}


@pytest.mark.parametrize("reason", list(Reason))
def test_page_of_a_reason_says_cause_signs_and_what_to_do(reason: Reason) -> None:
    text = (REASONS / f"{reason}.md").read_text()
    assert text.startswith(f"# {reason}\n")
    parts = [text.index(f"\n**{part}.** ") for part in ("Cause", "How it shows", "What to do")]
    assert parts == sorted(parts)
    assert "```sh\n" in text
    assert text.count("\n") <= 32


@pytest.mark.parametrize("reason", list(Reason))
def test_page_of_a_reason_names_its_conditions(reason: Reason) -> None:
    if "This release never sets it" in (REASONS / f"{reason}.md").read_text():
        return
    of = [str(kind) for kind, row in CONDITIONS.items() if reason in (*row.when_true, *row.otherwise)]
    shown = (REASONS / f"{reason}.md").read_text()
    for kind in of:
        assert f"`{kind}`" in shown, kind


# --- manifests and settings ------------------------------------------------------------------------------------------

YAML = list(blocks("yaml"))
MODELS = [case for case in YAML if "kind: PhoenixModel" in case[1]]
SETTINGS = [case for case in YAML if case[1].startswith("# settings.yaml\n")]
# test_observability_docs.py holds these
MONITORING = [case for case in YAML if re.match(r"# (prometheus|grafana-\w+)\.yaml\b", case[1])]
VALUES = [case for case in YAML if case[1].startswith("# values.yaml\n")]  # tests/helm renders them
KUSTOMIZATIONS = [case for case in YAML if case[1].startswith("# kustomization.yaml\n")]


def test_every_yaml_block_is_of_a_known_sort() -> None:
    assert MODELS
    assert SETTINGS
    unknown = [case for case in YAML if case not in (*MODELS, *SETTINGS, *VALUES, *KUSTOMIZATIONS, *MONITORING)]
    assert not unknown, (
        "begin it with `# settings.yaml`, `# values.yaml` or `# kustomization.yaml`, or make it a PhoenixModel"
    )


@pytest.mark.parametrize(("page", "text"), MODELS, ids=where(MODELS))
def test_model_on_a_page_is_valid(page: Path, text: str) -> None:
    assert parse_manifests(text, file=page.with_suffix(".yaml"), strict=True)


@pytest.mark.parametrize(("page", "text"), SETTINGS, ids=where(SETTINGS))
def test_settings_on_a_page_are_valid(page: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert read_settings(file) != Settings()


@pytest.mark.parametrize(("page", "text"), KUSTOMIZATIONS, ids=where(KUSTOMIZATIONS))
def test_kustomization_on_a_page_names_what_is_there(page: Path, text: str) -> None:
    found = yaml.safe_load(text)
    install = list(yaml.safe_load_all((ROOT / "operator/manifests/cluster/operator.yaml").read_text()))
    names = {(row["kind"], row["metadata"]["name"]) for row in install}
    images = {
        container["image"].rpartition(":")[0]
        for row in install
        if row["kind"] == "Deployment"
        for container in row["spec"]["template"]["spec"]["containers"]
    }
    for row in found.get("images", []):
        assert row["name"] in images
    for row in found.get("configMapGenerator", []):
        assert ("ConfigMap", row["name"]) in names
    for row in found.get("patches", []):
        assert (row["target"]["kind"], row["target"]["name"]) in names


# --- commands --------------------------------------------------------------------------------------------------------


def operator_commands() -> Iterator[tuple[Path, str]]:
    """Yield each use of `phoenix-operator` with arguments: in `sh` blocks, and in text between backquotes."""
    for page, line in shell_lines():
        if found := re.match(r"(?:\S*/)?(phoenix-operator .*)", line):
            yield page, found[1]
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text())
        for found in re.finditer(r"`(phoenix-operator\s[^`]+)`", prose):
            yield page, " ".join(found[1].split())


OPERATOR = sorted(set(operator_commands()))
# Named as what a later release brings.
LATER = ("phoenix-operator control-api",)
USED = [case for case in OPERATOR if not case[1].startswith(LATER) and "|" not in shlex.split(case[1])[1]]


def exit_code(command: str) -> int:
    """Have the program's own parser read a command. One that is only named has to have a `--help`."""
    words = shlex.split(re.split(r" [|>] ?", command)[0])[1:]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            program._parser().parse_args(words if len(words) > 1 else [*words, "--help"])
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.mark.parametrize(("page", "command"), USED, ids=where(USED))
def test_operator_command_on_a_page_exists(page: Path, command: str) -> None:
    assert exit_code(command) == 0


def test_pages_name_every_operator_command() -> None:
    named = {shlex.split(command)[1] for _, command in USED}
    assert {"run", "metrics-api", "render", "manifests"} <= named


def test_operator_commands_that_come_later_are_not_there_yet() -> None:
    assert [exit_code(command) for command in LATER] == [2]


def test_make_targets_on_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page}: make {target}"


def test_files_that_commands_apply_exist() -> None:
    for page, line in shell_lines():
        for path in re.findall(r"(?:operator/manifests|examples|inference_server)/[\w./-]+", line):
            assert (ROOT / path).exists(), f"{page}: {line}"


def test_commands_on_pages_close_their_quotes() -> None:
    for page, line in shell_lines():
        try:
            shlex.split(line)
        except ValueError as error:
            pytest.fail(f"{page}: {line}: {error}")


@pytest.mark.parametrize(
    ("page", "metrics"), [("operations.md", Metrics()), ("autoscaling/metrics-api.md", MetricsApiMetrics())]
)
def test_metrics_on_pages_exist(page: str, metrics: Metrics | MetricsApiMetrics) -> None:
    known = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()}
    shown = (ROOT / "docs" / page).read_text()
    assert set(re.findall(r"`(phoenix_(?:operator|metrics_api)_\w+)`", shown)) == known


def test_render_of_the_page_prints_every_always_made_kind() -> None:
    """The table of what a PhoenixModel becomes is right about what is there always."""
    done = subprocess.run(
        [sys.executable, "-m", "phoenix_operator", "render", "examples/iris"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    made = {(row["kind"], row["metadata"]["name"]) for row in yaml.safe_load_all(done.stdout)}
    assert made == {
        ("ConfigMap", "iris-model"),
        ("Deployment", "iris"),
        ("NetworkPolicy", "iris"),
        ("Service", "iris"),
        ("Service", "iris-headless"),
        ("ServiceAccount", "iris"),
    }
