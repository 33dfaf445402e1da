"""Scaling for real: the HPA controller of Kubernetes, a Prometheus, the metrics API, and pods that are busy.

With PHOENIX_RECORD=FOLDER the run is written there, as a table and as a picture.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import busy_model
import cluster as tools
import pytest
from lab import prometheus as lab_prometheus
from lab import state
from lab.prometheus import Prometheus
from phoenix_cluster import Object, Phoenix, model
from scaling_record import SIGNALS, Record

API = "/apis/custom.metrics.k8s.io/v1beta2"
OBJECTIVE_S = 0.25
# Up as the operator has it; down all at once, but no sooner.
BEHAVIOR: Object = {
    "scaleUp": {
        "stabilizationWindowSeconds": 0,
        "policies": [
            {"type": "Percent", "value": 100, "periodSeconds": 60},
            {"type": "Pods", "value": 4, "periodSeconds": 60},
        ],
    },
    "scaleDown": {
        "stabilizationWindowSeconds": 120,
        "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
    },
}
SCALING: Object = {"maxReplicas": 5, "targetLatency": "250m", "concurrencyPerReplica": 2}
# One replica answers some twenty-five requests a second: a quarter of a core, ten milliseconds of work for each.
BUSY: Object = {
    "model": {"uri": "configmap://busy/model.onnx"},
    "resources": {"requests": {"cpu": "50m", "memory": "192Mi"}, "limits": {"cpu": "250m"}},
    "batching": {"maxRows": 1},
}
_ITERATIONS = 12_000
_CALLERS = 9  # nearly all of them in the servers: four replicas, at two for each
CONCURRENCY, PRESSURE, LATENCY = SIGNALS


@pytest.fixture(scope="module")
def prometheus(phoenix: Phoenix, usual_settings: dict[str, Any]) -> Iterator[Prometheus]:
    """A Prometheus and the metrics API, and the operator told of them."""
    tools.lab("prometheus", "down")
    url = tools.prometheus()
    settings = {
        **usual_settings,
        "autoscaling": {"provider": "builtin", "prometheus": {"url": url}, "cacheSeconds": 1},
    }
    phoenix.set_settings(settings)
    tools.metrics_api(phoenix.kubectl, settings)
    yield lab_prometheus.running(state.Lab("default"))
    tools.lab("prometheus", "down")
    phoenix.kubectl("delete", "-f", str(tools.ROOT / "operator/manifests/metrics-api.yaml"), "--wait=false")
    phoenix.set_settings(usual_settings)


def busy(**scaling: Any) -> Object:
    return model("busy", autoscaling=SCALING | scaling, **BUSY)


def replicas(phoenix: Phoenix, namespace: str, name: str = "busy") -> int:
    found = phoenix.get(namespace, f"deployment/{name}")
    return int(found["spec"]["replicas"]) if found else 0


def targets(phoenix: Phoenix, namespace: str, name: str = "busy") -> str:
    """What `kubectl get hpa` shows between the reference and the bounds."""
    return " ".join(phoenix.kubectl("get", "hpa", name, "-n", namespace, "--no-headers").split()[2:-4])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_replicas_follow_the_load_and_nothing_else(phoenix: Phoenix, namespace: str, prometheus: Prometheus) -> None:
    """Load, Prometheus dead, a pod that hangs, no load: up, frozen, kept, and down to the fewest."""
    phoenix.apply(namespace, busy_model.config_map(_ITERATIONS), busy(behavior=BEHAVIOR))
    phoenix.start_client(namespace)
    phoenix.wait_condition(namespace, "busy", "AutoscalingReady", "True", "MetricsRead", deadline_s=180)
    command = ("kubectl", "exec", "-i", "client", "-n", namespace, "--", "python", "-c", "PROGRAM")
    with _recorded(Record(phoenix, prometheus, namespace, "busy")) as record:
        record.begin("idle")
        time.sleep(20)
        with phoenix.load(*command, f"busy.{namespace}.svc", "busy", str(_CALLERS), "new", least=1000) as result:
            record.begin("load")
            _goes_up(phoenix, namespace, record)
            record.begin("Prometheus dead")
            _freezes(phoenix, namespace, prometheus, record)
            record.begin("a pod hangs")
            _keeps_replicas_of_a_pod_that_hangs(phoenix, namespace, record)
        record.begin("no load")
        _goes_down(phoenix, namespace)
        record.begin("idle again")
        time.sleep(10)
    print(f"load: {result['requests']} answers, {result['failed']} failed")
    assert max(row["replicas"] for row in record.rows) <= SCALING["maxReplicas"]
    assert min(row["replicas"] for row in record.rows) >= 1


@contextmanager
def _recorded(record: Record) -> Iterator[Record]:
    try:
        with record:
            yield record
    finally:
        if folder := os.environ.get("PHOENIX_RECORD"):
            record.write(Path(folder) / "run.csv")
            record.draw(Path(folder) / "run.svg", objective_s=OBJECTIVE_S)


def _goes_up(phoenix: Phoenix, namespace: str, record: Record) -> None:
    started = time.monotonic()
    phoenix.wait_for("four replicas", lambda: replicas(phoenix, namespace) >= 4, deadline_s=240)
    print(f"four replicas {time.monotonic() - started:.0f} s after the load came")
    phoenix.wait_for(
        "the latency to be under its objective",
        lambda: (record.value(LATENCY) or 9) < OBJECTIVE_S and (record.value(PRESSURE) or 0) <= 1,
        deadline_s=300,
    )
    print(f"objective met {time.monotonic() - started:.0f} s after the load came")
    worst = max(row[LATENCY] or 0 for row in record.rows)
    assert worst > OBJECTIVE_S, "one replica should have been too few"
    told = phoenix.get(namespace, "phx/busy")["status"]["autoscaling"]  # type: ignore[index]
    assert told["desiredReplicas"] >= 4
    assert "concurrency" in told


def _freezes(phoenix: Phoenix, namespace: str, prometheus: Prometheus, record: Record) -> None:
    phoenix.wait_condition(namespace, "busy", "AutoscalingReady", "True", "MetricsRead", deadline_s=180)
    before = replicas(phoenix, namespace)
    prometheus.kill()
    try:
        row = phoenix.wait_condition(namespace, "busy", "AutoscalingReady", "False", deadline_s=90)
        assert row["reason"] == "MetricsUnavailable", row
        frozen = record.begin("Prometheus dead, told")
        time.sleep(60)
        assert {row["replicas"] for row in record.since(frozen)} == {before}
        assert "<unknown>" in targets(phoenix, namespace)
    finally:
        prometheus.start()
    phoenix.wait_condition(namespace, "busy", "AutoscalingReady", "True", "MetricsRead", deadline_s=180)


def _keeps_replicas_of_a_pod_that_hangs(phoenix: Phoenix, namespace: str, record: Record) -> None:
    before = replicas(phoenix, namespace)
    hung = record.since(0)[-1]["seconds"]
    phoenix.kill(phoenix.pods(namespace, "busy")[0], signal.SIGSTOP)  # until its liveness probe ends it
    time.sleep(90)
    assert min(row["replicas"] for row in record.since(hung)) >= before


def _goes_down(phoenix: Phoenix, namespace: str) -> None:
    started = time.monotonic()
    phoenix.wait_for("one replica", lambda: replicas(phoenix, namespace) == 1, deadline_s=600)
    print(f"one replica {time.monotonic() - started:.0f} s after the load went")
    shown = targets(phoenix, namespace)
    print(f"kubectl get hpa: {shown}")
    assert "<unknown>" not in shown


def test_metrics_api_answers_those_who_may_ask(phoenix: Phoenix, namespace: str, prometheus: Prometheus) -> None:
    phoenix.apply(namespace, model(autoscaling=SCALING))
    phoenix.start_client(namespace)
    phoenix.wait_condition(namespace, "iris", "AutoscalingReady", "True", "MetricsRead", deadline_s=180)
    listed = json.loads(phoenix.kubectl("get", "--raw", API))
    metric = "inference_latency_seconds_concurrency"
    assert f"phoenixmodels.phoenix-ml.io/{metric}" in {row["name"] for row in listed["resources"]}
    path = f"{API}/namespaces/{namespace}/phoenixmodels.phoenix-ml.io/iris/{metric}"
    answer = json.loads(phoenix.kubectl("get", "--raw", path))
    [item] = answer["items"]
    assert answer["kind"] == "MetricValueList"
    assert (item["describedObject"]["name"], item["value"]) == ("iris", "0")
    stranger = f"--as=system:serviceaccount:{namespace}:default"
    assert "Forbidden" in refusal(phoenix, "get", "--raw", path, stranger)
    assert "NotFound" in refusal(phoenix, "get", "--raw", path.replace("/iris/", "/nobody/"))
    # past the API server, without the certificate of its front proxy
    program = (
        "import ssl, urllib.request, urllib.error\n"
        "context = ssl._create_unverified_context()\n"
        f"url = 'https://phoenix-metrics-api.{tools.OPERATOR_NAMESPACE}.svc{path}'\n"
        "request = urllib.request.Request(url, headers={'X-Remote-User': 'system:admin'})\n"
        "try: urllib.request.urlopen(request, context=context, timeout=10)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
    )
    said = phoenix.kubectl("exec", "client", "-n", namespace, "--", "python", "-c", program)
    assert said.strip() == "401"


def refusal(phoenix: Phoenix, *arguments: str) -> str:
    import subprocess

    with pytest.raises(subprocess.CalledProcessError) as caught:
        phoenix.kubectl(*arguments)
    return str(caught.value.stderr)


def test_autoscaling_is_switched_on_and_off_without_a_jump(
    phoenix: Phoenix, namespace: str, prometheus: Prometheus
) -> None:
    phoenix.apply(namespace, model(replicas=3))
    phoenix.wait_ready(namespace)
    with Record(phoenix, prometheus, namespace, "iris") as record:
        scaled = {**SCALING, "minReplicas": 3, "maxReplicas": 6}
        phoenix.patch(namespace, "phx/iris", {"spec": {"replicas": None, "autoscaling": scaled}})
        phoenix.wait_condition(namespace, "iris", "AutoscalingReady", "True", "MetricsRead", deadline_s=180)
        phoenix.patch(namespace, "hpa/iris", {"spec": {"maxReplicas": 50}})  # by hand: it is set back
        phoenix.wait_for("the HPA as it was", lambda: phoenix.get(namespace, "hpa/iris")["spec"]["maxReplicas"] == 6)  # type: ignore[index]
        phoenix.patch(namespace, "phx/iris", {"spec": {"replicas": 3, "autoscaling": None}})
        phoenix.wait_for("no HPA", lambda: phoenix.get(namespace, "hpa/iris") is None)
        phoenix.wait_ready(namespace)
        time.sleep(20)
    assert {row["replicas"] for row in record.rows} == {3}
