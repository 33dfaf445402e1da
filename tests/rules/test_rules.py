"""The recording rules say of each scenario what they should, by promtool; and each part of them is needed for it."""

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import queries
from queries import (
    BUCKETS,
    BUSY,
    CONCURRENCY,
    LATENCY,
    PERCENTILE,
    PRESSURE,
    RATIO,
    SAMPLES,
    SEEN_CONCURRENCY,
    SLO,
    STUCK,
)
from rules.promtool import have_promtool, run
from rules.scenarios import SCENARIOS

from phoenix_server.metrics import Metrics, Objective

RULES = Path(queries.__file__).parent / "rules" / "phoenix.rules.yaml"


@pytest.fixture(autouse=True, scope="module")
def _promtool() -> None:
    have_promtool()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_rules_say(tmp_path, scenario):
    done = run(tmp_path, RULES.read_text(), [scenario])
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Mutation:
    """A part of the rules is replaced, in the rule `record` or in all; the scenario is the one that needs the part."""

    what: str
    record: str
    old: str
    new: str
    scenario: str

    def applied(self) -> str:
        rules = queries.autoscaling_rules()
        changed = [
            replace(rule, expr=rule.expr.replace(self.old, self.new)) if self.record in ("", rule.record) else rule
            for rule in rules
        ]
        assert changed != rules, f"{self.old!r} is in no rule {self.record}"
        return queries.rule_file(changed)


_IDLE = "(0 * phoenix:model_slo_seconds unless (phoenix:inference_latency_seconds_count:increase2m >= 20))"
_TARGETS = "and on (namespace, job, instance)"
_LARGER = f"({BUSY} > {STUCK})"
_ANSWERING = 'group by (namespace, model) (inference_inflight_requests{track!="canary"})'
MUTATIONS = (
    Mutation("idle branch of the pressure dropped", PRESSURE, f"\nor {_IDLE}", "", "idle for long is 0"),
    Mutation("idle branch of the latency dropped", LATENCY, f"\nor {_IDLE}", "", "idle for long is 0"),
    Mutation("sample guard dropped", "", ">= 20", ">= 0", "few samples"),
    Mutation("clamp dropped", PRESSURE, f"clamp_max({RATIO}, 2)", RATIO, "far over the objective"),
    Mutation("hold zone dropped", PRESSURE, f"\nor (0 * ({RATIO} >= 0.7) + 1)", "", "near the objective"),
    Mutation("in-flight branch dropped", SEEN_CONCURRENCY, f"{_LARGER} or {STUCK} or ", "", "a pod that hangs"),
    Mutation("Little's law dropped", SEEN_CONCURRENCY, f"{_LARGER} or ", "", "requests that fail"),
    Mutation("ok filter dropped", "", 'outcome="ok",', "", "fast failures"),
    Mutation("canary filter dropped", "", 'track!="canary"', "", "canary pods"),
    Mutation("missing pods not counted", CONCURRENCY, "(1 + ", "(1 + 0 * ", "one pod of two"),
    Mutation("missing pods counted for ever", "", "[10m]", "[1h]", "a pod that has not answered for long"),
    Mutation("pods counted that never answered", "", f"{_TARGETS} (up == 0", "or (up == 0", "a pod that is starting"),
    Mutation("mean of the gauge taken", STUCK, "min_over_time", "avg_over_time", "a gauge that jumps about"),
    Mutation("hung pods kept that are gone", STUCK, f"\n{_TARGETS} up", "", "a pod that hung is forgotten"),
    Mutation("old load kept when no pod answers", SEEN_CONCURRENCY, f"\nand {_ANSWERING}", "", "no pod answers"),
    Mutation("no number not left out", STUCK, " >= 0 < Inf", "", "a gauge that is no number"),
    Mutation("counter reset not seen", BUCKETS, "rate(", "1/120 * delta(", "a container that restarts"),
    Mutation("higher SLO of two versions", SLO, "min by", "max by", "two versions"),
    Mutation("lower percentile of two versions", PERCENTILE, 'percentile="99"', 'percentile="9"', "two versions"),
    Mutation("a fixed percentile", "", "histogram_quantile(0.50", "histogram_quantile(0.95", "model's: p50"),
    Mutation("unknown taken for idle", PRESSURE, _IDLE, _IDLE.replace(SLO, SAMPLES), "unknown is not idle"),
)  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_rules_would_fail_with(tmp_path, mutation):
    (scenario,) = (each for each in SCENARIOS if mutation.scenario in each.name)
    done = run(tmp_path, mutation.applied(), [scenario])
    assert done.returncode == 1, done.stdout + done.stderr
    # a wrong value, and not a rule that cannot be read
    assert "got:" in done.stdout + done.stderr


def test_every_name_in_a_rule_is_a_metric_or_recorded_before():
    metrics = Metrics()
    metrics.model("fraud", "1", Objective(0.1, 95))
    names = {sample.name for family in metrics.collect() for sample in family.samples} | {"up"}
    rules = queries.autoscaling_rules()
    recorded: set[str] = set()
    for rule in rules:
        # what stands before a selector, a range or an operator, and is no function, keyword, label or duration
        text = re.sub(r'\{[^}]*\}|\b(by|on|group_left) \([^)]*\)|"[^"]*"|\[[^]]*\]', " ", rule.expr)
        words = set(re.findall(r"(?<![\w:])[a-z_][\w:]*(?![\w:]|\s*\()", text)) - {"and", "or", "unless"}
        assert words <= names | recorded, f"{rule.record} reads {sorted(words - names - recorded)}"
        recorded.add(rule.record)
    assert {CONCURRENCY, LATENCY, RATIO, PRESSURE} <= recorded


def test_rule_file_keeps_the_order_in_one_group_and_takes_another_interval():
    text = queries.rule_file(queries.autoscaling_rules(), interval="5s")
    assert text == RULES.read_text().partition("\n")[2].replace("interval: 15s", "interval: 5s")


def test_rule_file_pleases_promtool():
    command = ["promtool", "check", "rules", "--lint=all", "--lint-fatal", RULES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
