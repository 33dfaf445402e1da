"""Runs scenarios through promtool, Prometheus' own tester of rules: the series they make, and the file it is given."""

import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import services
from lab import LabError, machine
from rules.scenarios import NAMESPACE, STEP_S, Pod, Scenario, Stretch

from phoenix_server.metrics import Metrics, ModelMetrics

_TIMEOUT_S = 60
_READ = ("inference_latency_seconds", "inference_inflight_requests", "phoenix_model_slo_seconds")
_KEY = f'{{namespace="{NAMESPACE}",model="fraud"}}'
Labels = tuple[tuple[str, str], ...]
Values = dict[tuple[str, Labels], list[str]]


def have_promtool() -> None:
    """Install it where it is missing, or skip with the reason; fail where PHOENIX_REQUIRE forbids to skip."""
    if shutil.which("promtool"):
        return
    try:
        machine.install(["prometheus"])
    except LabError as error:
        services.skip_or_fail(f"no promtool: {error}")


def run(folder: Path, rules: str, scenarios: Sequence[Scenario]) -> subprocess.CompletedProcess[str]:
    """Run scenarios against a rule file's text; promtool names those that fail."""
    (folder / "rules.yaml").write_text(rules)
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": f"{STEP_S}s",
        "tests": [_test(scenario) for scenario in scenarios],
    }
    (folder / "test.yaml").write_text(json.dumps(document))  # JSON is YAML too
    command = ["promtool", "test", "rules", "test.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)


def _test(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "interval": f"{STEP_S}s",
        "input_series": [
            {"series": f"{name}{{{_shown(labels)}}}", "values": " ".join(values)}
            for number, pod in enumerate(scenario.pods, start=1)
            for (name, labels), values in _series(pod, number).items()
        ],
        "promql_expr_test": [
            {
                # as many digits as the expectation is written with; series have no more labels than these two
                "expr": f'round({rule}{{namespace="{NAMESPACE}"}}, 0.0001)',
                "eval_time": f"{int(minute * 60)}s",
                "exp_samples": [] if value is None else [{"labels": _KEY, "value": value}],
            }
            for minute, expected in scenario.expected.items()
            for rule, value in expected.items()
        ],
    }


def _shown(labels: Labels) -> str:
    return ",".join(f'{name}="{value}"' for name, value in labels)


def _series(pod: Pod, number: int) -> Values:
    """Return what Prometheus would hold of a pod: a value for each step, or why there is none."""
    target = {
        "namespace": pod.namespace,
        "job": "phoenix-models",
        "instance": f"10.0.0.{number}:8000",
        "pod": f"fraud-{number}",
    }
    if pod.track:
        target["track"] = pod.track
    series: Values = {}
    up: list[str] = []
    for step, (stretch, scraped) in enumerate(_scrapes(pod)):
        up.append({"up": "1", "down": "0", "gone": "stale", "unwatched": "_"}[stretch.state])
        missing = "_" if stretch.state == "unwatched" else "stale"
        for key, value in scraped.items() if stretch.state == "up" else ():
            labels = tuple(sorted((target | dict(key[1])).items()))
            series.setdefault((key[0], labels), ["_"] * step).append(value)
        for values in series.values():
            values += [missing] * (step + 1 - len(values))
    series["up", tuple(sorted(target.items()))] = up
    return series


def _scrapes(pod: Pod) -> Iterator[tuple[Stretch, dict[tuple[str, Labels], str]]]:
    """Yield for each step what the pod does, and what a scrape would find."""
    metrics, model = _started(pod)
    yield pod.stretches[0], _page(metrics)  # at 0, before anything was asked
    for stretch in pod.stretches:
        if stretch.is_restart:
            metrics, model = _started(pod)
        for _ in range(round(stretch.minutes * 60 / STEP_S)):
            for answers in stretch.answers:
                for _ in range(answers.count):
                    model.observe_request(answers.outcome, "rest", answers.seconds, (1, 0, 0))
            model.inflight = stretch.inflight  # type: ignore[assignment]  # the mean of many scrapes
            yield stretch, _page(metrics) if stretch.is_loaded else {}


def _started(pod: Pod) -> tuple[Metrics, ModelMetrics]:
    metrics = Metrics()
    return metrics, metrics.model("fraud", pod.version, pod.objective)


def _page(metrics: Metrics) -> dict[tuple[str, Labels], str]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): _number(sample.value)
        for family in metrics.collect()
        if family.name in _READ
        for sample in family.samples
    }


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else "+Inf"
