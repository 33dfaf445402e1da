"""Each alert fires where it should, with words that help, and stays quiet where it should; promtool says so."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import alerts
import pytest
from rules.alert_scenarios import FIRES, QUIET, Fires, Quiet, Series
from rules.known_metrics import names_in, reference
from rules.promtool import have_promtool

RULES = Path(alerts.__file__).parent / "rules" / "phoenix.alerts.yaml"
BY_NAME = {alert.name: alert for alert in alerts.alerts()}


@pytest.fixture(autouse=True, scope="module")
def _promtool() -> None:
    have_promtool()


def check(folder: Path, alert: str, series: Series, minute: int, expected: list[dict[str, Any]]) -> None:
    """Have promtool feed the series to the alerts, and compare those that fire at that minute."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": expected}],
    }
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yaml").write_text(json.dumps(document))  # JSON is YAML too
    command = ["promtool", "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", FIRES, ids=lambda case: f"{case.alert} {case.minute}")
def test_alert_fires(tmp_path: Path, case: Fires) -> None:
    alert = BY_NAME[case.alert]
    fired = {
        "exp_labels": {**case.labels, "severity": alert.severity},
        "exp_annotations": {
            "summary": alert.summary,
            "description": case.description,
            "runbook_url": alert.runbook_url,
        },
    }
    check(tmp_path, case.alert, case.series, case.minute, [fired])


@pytest.mark.parametrize("case", QUIET, ids=lambda case: f"{case.alert}: {case.why}")
def test_alert_stays_quiet(tmp_path: Path, case: Quiet) -> None:
    check(tmp_path, case.alert, case.series, case.minute, [])


def test_every_alert_has_both_scenarios() -> None:
    assert {case.alert for case in FIRES} == {case.alert for case in QUIET} == set(BY_NAME)
    assert len(BY_NAME) == len(alerts.alerts())


def test_alerts_read_metrics_that_exist() -> None:
    for alert in alerts.alerts():
        unknown = names_in(alert.expr) - reference()
        assert not unknown, f"{alert.name} reads {sorted(unknown)}"


def test_scenarios_are_of_metrics_that_exist() -> None:
    series = {re.match(r"[\w:]+", name)[0] for case in (*FIRES, *QUIET) for name in case.series}  # type: ignore[index]
    assert series <= reference()


def test_alert_file_pleases_promtool() -> None:
    command = ["promtool", "check", "rules", "--lint=all", "--lint-fatal", RULES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(BY_NAME)} rules found" in done.stdout
