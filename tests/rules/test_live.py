"""The rules on a real Prometheus that scrapes a real server: load, pressure, and nothing once it has ended."""

import contextlib
from pathlib import Path

import httpx
import phoenix_process
import queries
import services
import yaml
from lab import processes
from lab.prometheus import Prometheus, Target

IRIS = Path(__file__).parents[2] / "examples" / "iris"
REQUESTS = 60


def wait_for(prometheus: Prometheus, condition: str) -> None:
    processes.wait_until(
        condition, lambda: bool(prometheus.query(condition)), deadline_s=services.DEADLINE_S, log=prometheus.log
    )


def test_signals_follow_a_server_and_are_gone_with_it(services_here: None, tmp_path: Path) -> None:
    manifest = yaml.safe_load((IRIS / "model.yaml").read_text())
    # an objective that nothing over a socket meets
    manifest["spec"]["autoscaling"] = {"maxReplicas": 2, "targetLatency": "1u", "percentile": 99}
    manifest["spec"]["model"]["uri"] = (IRIS / "model.onnx").as_uri()
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(manifest))
    body = (IRIS / "request.json").read_bytes()
    with contextlib.ExitStack() as serving:
        server = serving.enter_context(phoenix_process.start([tmp_path]))
        target = Target(server.rest_url.removeprefix("http://"), {"namespace": "ml"})
        with services.running(Prometheus, interval="1s", targets=(target,)) as prometheus:
            wait_for(prometheus, f'{queries.CONCURRENCY}{{namespace="ml",model="iris"}} == 0')
            wait_for(prometheus, f"{queries.PRESSURE} == 0")  # warm-up and measured capacity are no requests
            with httpx.Client(base_url=server.rest_url, timeout=30) as client:
                for _ in range(REQUESTS):
                    assert client.post("/v2/models/iris/infer", content=body).status_code == 200
            wait_for(prometheus, f"{queries.PRESSURE} == 2")
            assert prometheus.query(f"{queries.CONCURRENCY} > 0")
            assert prometheus.query(f'{queries.QUANTILE}{{percentile="99"}} > 0')
            serving.close()
            for signal in (queries.CONCURRENCY, queries.LATENCY, queries.PRESSURE):
                wait_for(prometheus, f"absent({signal})")
