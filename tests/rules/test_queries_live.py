"""Every query of every panel and alert on a real Prometheus that scrapes a real server under load.

The server serves with features, events and audit on files. The operator and its metrics API are not started: their own
registries, with one of each label set, are served for the scrape, so that names and labels are the product's.
"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import alerts
import boards
import httpx
import phoenix_process
import prometheus_client
import pytest
import queries
import services
import yaml
from lab import processes
from lab.prometheus import Prometheus, Target
from panels import Board
from phoenix_process import Running

from phoenix_operator.metrics import Metrics, MetricsApiMetrics

EXAMPLES = Path(__file__).parents[2] / "examples"
REQUESTS = 60
SYSTEM = "phoenix-system"
# What has no value while every backend answers, nothing comes over Kafka, no pod is lost, and no alert fires.
QUIET_PANELS = (
    "== 0)",
    "phoenix_async_",
    queries.MISSING_PODS,
    "ALERTS{",
)


def expression(query: str) -> str:
    """Put in for Grafana's variables what it would, with "All" chosen."""
    return query.replace("$__rate_interval", "1m").replace("$namespace", ".*").replace("$model", ".*")


def load(server: Running) -> None:
    """Ask both models, and something that is refused."""
    with httpx.Client(base_url=server.rest_url, timeout=30) as client:
        for name in ("iris", "fraud"):
            body = (EXAMPLES / name / "request.json").read_bytes()
            for _ in range(REQUESTS):
                assert client.post(f"/v2/models/{name}/infer", content=body).status_code == 200
        assert client.post("/v2/models/iris/infer", content=b"{}").status_code == 400
        assert client.post("/v2/models/nobody/infer", content=b"{}").status_code == 404


def operator_metrics() -> Metrics:
    """Return those of an operator that leads and has done one of everything."""
    metrics = Metrics()
    metrics.leader.set(1)
    metrics.models.set(2)
    metrics.reconcile_seconds.labels("ok").observe(0.01)
    metrics.on_request("GET", 200, 0.01)
    metrics.watch_events.labels("Deployment", "MODIFIED").inc()
    metrics.missed_events.labels("Deployment")
    metrics.backend_seconds.labels("redis", "ok").observe(0.01)
    return metrics


def metrics_api() -> MetricsApiMetrics:
    """Return those of a metrics API that answers."""
    metrics = MetricsApiMetrics()
    metrics.requests.labels("200").inc()
    metrics.request_seconds.observe(0.01)
    metrics.on_query("ok", 0.01)
    metrics.on_request("POST", 201, 0.01)
    metrics.certificate_expiry.set_to_current_time()
    metrics.certificate_expiry.inc(60 * 86400)
    return metrics


@contextlib.contextmanager
def exposed(metrics: Metrics | MetricsApiMetrics) -> Iterator[Target]:
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", metrics.registry)
    try:
        yield Target(f"127.0.0.1:{server.server_port}", {"namespace": SYSTEM})
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def models(folder: Path) -> list[Path]:
    """Return the manifests of iris, with an objective, and of fraud."""
    manifest = yaml.safe_load((EXAMPLES / "iris" / "model.yaml").read_text())
    manifest["spec"]["autoscaling"] = {"maxReplicas": 2, "targetLatency": "5"}  # which nothing here comes near
    manifest["spec"]["model"]["uri"] = (EXAMPLES / "iris" / "model.onnx").as_uri()
    (folder / "model.yaml").write_text(yaml.safe_dump(manifest))
    return [folder, EXAMPLES / "fraud"]


@pytest.fixture(scope="module")
def world(services_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Running]]:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(phoenix_process.start(models(tmp_path_factory.mktemp("models"))))
        targets = (
            Target(server.rest_url.removeprefix("http://"), {"namespace": "ml"}),
            stack.enter_context(exposed(operator_metrics())),
            stack.enter_context(exposed(metrics_api())),
        )
        prometheus = stack.enter_context(services.running(Prometheus, interval="1s", targets=targets))
        wait_for(prometheus, f"count({queries.CONCURRENCY} == 0) == 2")  # scraped before the load, so that it counts
        load(server)
        wait_for(prometheus, f"{queries.RATIO} > 0")
        yield prometheus, server


def wait_for(prometheus: Prometheus, condition: str) -> None:
    processes.wait_until(
        condition, lambda: bool(prometheus.query(condition)), deadline_s=services.DEADLINE_S, log=prometheus.log
    )


@pytest.mark.parametrize("board", boards.boards(), ids=lambda board: board.uid)
def test_every_query_of_a_board_has_data_or_its_quiet_value(world: tuple[Prometheus, Running], board: Board) -> None:
    prometheus, _ = world
    for panel in board.panels():
        for query in panel.queries:
            asked = expression(query.expr)
            if any(metric in asked for metric in QUIET_PANELS) and " or " not in asked:
                assert prometheus.query(asked) == [], panel.title
            else:
                wait_for(prometheus, asked)


@pytest.mark.parametrize("board", boards.boards(), ids=lambda board: board.uid)
def test_legends_name_labels_that_are_there(world: tuple[Prometheus, Running], board: Board) -> None:
    prometheus, _ = world
    for panel in board.panels():
        for query in panel.queries:
            for found in prometheus.query(expression(query.expr)):
                for label in ("namespace", "model", "job", "outcome", "reason", "code", "kind", "verb", "instance"):
                    if f"{{{{{label}}}}}" in query.legend:
                        assert label in found["metric"], f"{panel.title}: {query.legend}"


@pytest.mark.parametrize("alert", alerts.alerts(), ids=lambda alert: alert.name)
def test_alert_is_quiet_while_all_is_well(world: tuple[Prometheus, Running], alert: alerts.Alert) -> None:
    prometheus, _ = world
    assert prometheus.query(alert.expr) == []


def test_variables_find_namespaces_and_models(world: tuple[Prometheus, Running]) -> None:
    prometheus, _ = world
    for board in boards.boards():
        found = prometheus.query(board.found_by)
        for name in board.variables:
            assert {series["metric"].get(name) for series in found} <= {"ml", SYSTEM, "iris", "fraud"}
        assert found


def test_a_server_that_hangs_is_told_as_down(world: tuple[Prometheus, Running]) -> None:
    """It is well again at the end: its process is paused, and answers no scrape meanwhile."""
    prometheus, server = world
    (down,) = [alert for alert in alerts.alerts() if alert.name == "PhoenixModelDown"]
    with paused(server):
        wait_for(prometheus, f"count({down.expr}) == 2")
    wait_for(prometheus, f"absent({down.expr})")


@contextlib.contextmanager
def paused(server: Running) -> Iterator[None]:
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)
