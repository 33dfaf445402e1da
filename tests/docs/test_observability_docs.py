"""What the documentation says of alerts, rules and boards: runbooks, configuration, files."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import alerts
import boards
import pytest
import yaml
from rules.known_metrics import reference
from rules.promtool import have_promtool

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "observability.md"
RUNBOOKS = ROOT / "docs" / "runbooks"
NAMES = [alert.name for alert in alerts.alerts()]


def blocks(first_words: str) -> list[str]:
    found = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [text for text in found if text.startswith(f"# {first_words}")]


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    assert {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_runbook_says_cause_signs_and_what_to_do(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    parts = [text.index(f"\n**{part}.** ") for part in ("Cause", "How it shows", "What to do")]
    assert parts == sorted(parts)
    assert "```sh\n" in text
    assert text.count("\n") <= 32
    assert max(map(len, re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines())) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_runbook_names_metrics_panels_and_alerts_that_exist(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    metrics = set(re.findall(r"\b(?:phoenix:|phoenix_|inference_|feature_)[a-z][\w:]+", text))
    requests = {"inference_latency_seconds_concurrency"}  # what the HPA calls it
    assert metrics <= reference() | requests, metrics - reference()
    assert set(re.findall(r"\bPhoenix[A-Z]\w+", text)) <= {*NAMES, "PhoenixModel", "PhoenixModels"}
    titles = {panel.title for board in boards.boards() for panel in board.panels()}
    assert set(re.findall(r"panel `([^`]+)`", text)) <= titles


def test_runbook_address_ends_with_the_page() -> None:
    for alert in alerts.alerts():
        assert alert.runbook_url == f"{alerts.RUNBOOKS}/{alert.name}.md"
    assert alerts.RUNBOOKS in PAGE.read_text()


def test_page_names_every_board() -> None:
    rows = re.findall(r"^\| (\w+) \| [^|]+ \|$", PAGE.read_text(), re.MULTILINE)
    assert {f"Phoenix / {row}" for row in rows} >= {board.title for board in boards.boards()}


def test_files_on_the_page_exist() -> None:
    for path in re.findall(r"dashboards/[\w./*-]+\w", PAGE.read_text()):
        assert list(ROOT.glob(path)), path


def test_prometheus_configuration_is_valid(tmp_path: Path) -> None:
    have_promtool()
    (text,) = blocks("prometheus.yaml")
    (tmp_path / "prometheus.yaml").write_text(text)
    shutil.copytree(ROOT / "dashboards" / "rules", tmp_path / "rules")
    command = ["promtool", "check", "config", "prometheus.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(NAMES)} rules found" in done.stdout


def test_grafana_provisioning_has_its_form() -> None:
    """Grafana itself cannot be had here: the fields are those of its documentation."""
    (dashboards,) = map(yaml.safe_load, blocks("grafana-dashboards.yaml"))
    (provider,) = dashboards["providers"]
    assert (provider["type"], set(provider["options"])) == ("file", {"path"})
    (sources,) = map(yaml.safe_load, blocks("grafana-datasources.yaml"))
    (source,) = sources["datasources"]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / name).read_text()))


def test_prometheus_rule_holds_both_files() -> None:
    (rule,) = documents("dashboards/prometheus-operator/phoenix.yaml")
    (recording,) = documents("dashboards/rules/phoenix.rules.yaml")
    (alerting,) = documents("dashboards/rules/phoenix.alerts.yaml")
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"]["groups"] == [*recording["groups"], *alerting["groups"]]


def test_pod_monitor_selects_operator_and_metrics_api() -> None:
    (monitor,) = documents("dashboards/prometheus-operator/monitors.yaml")
    (chosen,) = monitor["spec"]["selector"]["matchExpressions"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    install = documents("operator/manifests/cluster/operator.yaml") + documents("operator/manifests/metrics-api.yaml")
    pods = [row["spec"]["template"] for row in install if row["kind"] == "Deployment"]
    assert {pod["metadata"]["labels"][chosen["key"]] for pod in pods} == set(chosen["values"])
    for pod in pods:
        ports = [port["name"] for container in pod["spec"]["containers"] for port in container["ports"]]
        assert endpoint["port"] in ports
