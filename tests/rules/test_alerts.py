"""Each alert fires where it should, with words that help, and stays quiet where it should; promtool says so."""

import json
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import alerts
import pytest
from rules.alert_scenarios import FIRES, QUIET, Fires, Quiet
from rules.known_metrics import names_in, reference
from rules.promtool import have_promtool

RULES = Path(alerts.__file__).parent / "rules" / "phoenix.alerts.yaml"
BY_NAME = {alert.name: alert for alert in alerts.alerts()}


@pytest.fixture(autouse=True, scope="module")
def _promtool() -> None:
    have_promtool()


def outcome(folder: Path, rules: str, case: Fires | Quiet) -> subprocess.CompletedProcess[str]:
    """Have promtool feed a case's series to the alerts of a rule file's text, and compare those that fire."""
    (folder / "alerts.yaml").write_text(rules)
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": f"{case.minute}m", "alertname": case.alert, "exp_alerts": expected(case)},
        ],
    }
    document = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yaml").write_text(json.dumps(document))  # JSON is YAML too
    command = ["promtool", "test", "rules", "test.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def expected(case: Fires | Quiet) -> list[dict[str, Any]]:
    """Return the alert that a case expects, with all that is sent."""
    if isinstance(case, Quiet):
        return []
    alert = BY_NAME[case.alert]
    return [
        {
            "exp_labels": {**case.labels, "severity": alert.severity},
            "exp_annotations": {
                "summary": alert.summary,
                "description": case.description,
                "runbook_url": alert.runbook_url,
            },
        }
    ]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: f"{case.alert} {case.minute}")
def test_alert_fires(tmp_path: Path, case: Fires) -> None:
    done = outcome(tmp_path, RULES.read_text(), case)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", QUIET, ids=lambda case: f"{case.alert}: {case.why}")
def test_alert_stays_quiet(tmp_path: Path, case: Quiet) -> None:
    done = outcome(tmp_path, RULES.read_text(), case)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Mutation:
    """A part of an alert is replaced; some case of the alert then has to fail."""

    alert: str
    old: str
    new: str


MUTATIONS = (
    Mutation("PhoenixModelDown", "unless group by", "or group by"),
    Mutation("PhoenixModelDown", "(up == 0)", "(up >= 0)"),
    Mutation("PhoenixPodDown", "wait 5m", "wait 0m"),
    Mutation("PhoenixLatencyOverObjective", "> 1", "> 0.9"),
    Mutation("PhoenixLatencyOverObjective", "wait 10m", "wait 5m"),
    Mutation("PhoenixRequestsFail", "error|timeout", "error|client_error"),
    Mutation("PhoenixRequestsFail", "error|timeout", "error"),
    Mutation("PhoenixRequestsFail", ">= 5", ">= 0"),
    Mutation("PhoenixRequestsRefused", "> 0.01", "> 0.0001"),
    Mutation("PhoenixFeaturesMissing", "> 0.05", "> 0"),
    Mutation("PhoenixFeaturesMissing", "namespace, model, reason", "namespace, model"),
    Mutation("PhoenixBindingDown", "wait 2m", "wait 0m"),
    Mutation("PhoenixEventsDropped", "[10m]", "[1h]"),
    Mutation("PhoenixAuditRowsDropped", "[10m]", "[1h]"),
    Mutation("PhoenixAuditOutboxGrows", "max by", "sum by"),
    Mutation("PhoenixAuditOutboxGrows", "> 1000", "> 0"),
    Mutation("PhoenixAuditOutboxGrows", "\nand ", "\nor "),
    Mutation("PhoenixAsyncLagGrows", "\nand ", "\nor "),
    Mutation("PhoenixAsyncLagGrows", "sum by", "max by"),
    Mutation("PhoenixAsyncDeadLetters", "unless last", "and last"),
    Mutation("PhoenixAsyncDeadLetters", "or increase", "unless increase"),
    Mutation("PhoenixOperatorHasNoLeader", "!= 1", "== 0"),
    Mutation("PhoenixOperatorHasNoLeader", "[6h]", "[1m]"),
    Mutation("PhoenixOperatorReconcilesFail", "wait 10m", "wait 1m"),
    Mutation("PhoenixOperatorQueueStuck", "> 60", "> 10"),
    Mutation("PhoenixOperatorMissesEvents", ">= 5", ">= 1"),
    Mutation("PhoenixOperatorReachesNoPods", "* 600 >= 5", "> 0"),
    Mutation("PhoenixMetricsApiPrometheusFails", "> 0.5", "> 0"),
    Mutation("PhoenixMetricsApiCertificateEnds", "< 259200", "< 2592000"),
    Mutation("PhoenixScalingFrozen", '{reason!="no_model"}', ""),
    Mutation("PhoenixScalingFrozen", "wait 10m", "wait 5m"),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.alert}: {mutation.new}")
def test_alert_would_fail_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    alert = BY_NAME[mutation.alert]
    if mutation.old.startswith("wait "):
        assert alert.wait == mutation.old.removeprefix("wait ")
        changed = replace(alert, wait=mutation.new.removeprefix("wait "))
    else:
        assert mutation.old in alert.expr
        changed = replace(alert, expr=alert.expr.replace(mutation.old, mutation.new))
    monkeypatch.setattr(alerts, "alerts", lambda: [changed])
    rules = alerts.rule_file()
    cases = [case for case in (*FIRES, *QUIET) if case.alert == mutation.alert]
    outputs = [outcome(tmp_path, rules, case) for case in cases]
    failed = [done.stdout + done.stderr for done in outputs if done.returncode]
    assert failed, "no case needs this part"
    # wrong alerts, and not a rule that cannot be read
    assert all("got:" in text for text in failed)


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
