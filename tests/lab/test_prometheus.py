"""The lab's Prometheus: what it scrapes and may do, and a real one with a fixed target: rules, faults, TLS."""

import base64
import http.server
import json
import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import services
from lab import LabError, certificates, cluster, control_plane, machine, pod_discovery, processes, prometheus
from lab.prometheus import ApiServer, Prometheus, Target
from lab.state import Facts, Lab

from phoenix_server.metrics import Metrics, Objective

LABELS = {"namespace": "ml", "pod": "fraud-1"}


@pytest.fixture(scope="module")
def target(services_here):
    """The address of a server whose metrics are those of a model with three requests in flight."""
    metrics = Metrics()
    metrics.model("fraud", "1", Objective(0.2, 95)).inflight = 3

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page, content_type = metrics.exposition()
            self.send_response(200)
            self.send_header("content-type", content_type)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def server(target):
    with services.running(Prometheus, interval="1s", targets=(Target(target, LABELS),)) as server:
        yield server


def wait_for(server: Prometheus, expression: str, value: str) -> None:
    processes.wait_until(
        f"{expression} is {value}",
        lambda: [each["value"][1] for each in server.query(expression)] == [value],
        deadline_s=services.DEADLINE_S,
    )


def test_pods_are_scraped_on_the_port_of_rest_with_the_labels_that_the_rules_read(tmp_path):
    services.have(Prometheus)
    made = prometheus.config(interval="5s", rules=prometheus.RULES, pods=tmp_path / "pods.yaml", targets=())
    (tmp_path / "config.yaml").write_text(json.dumps(made))
    done = subprocess.run(["promtool", "check", "config", tmp_path / "config.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert made["global"] == {"scrape_interval": "5s", "scrape_timeout": "5s", "evaluation_interval": "5s"}


def pod(
    name: str, *, address: str = "", labels: dict[str, str] | None = None, phase: str = "Running"
) -> dict[str, Any]:
    ports = [{"name": "http", "containerPort": 8000}, {"name": "grpc", "containerPort": 8001}]
    return {
        "metadata": {
            "namespace": "ml", "name": name, "uid": f"uid-{name}",
            "labels": {"phoenix-ml.io/model": "fraud", **(labels or {})},
        },
        "spec": {"nodeName": "lab", "containers": [{"name": "server", "ports": ports}, {"name": "sidecar"}]},
        "status": {"phase": phase, "conditions": [{"type": "Ready", "status": "True"}]}
        | ({"podIP": address} if address else {}),
    }  # fmt: skip


def test_discovery_gives_each_port_the_labels_of_prometheus_own():
    found = pod_discovery.groups([pod("b", address="fd00::7"), pod("a", address="10.244.0.7"), pod("no-address-yet")])
    assert [group["targets"] for group in found] == [
        ["10.244.0.7:8000"], ["10.244.0.7:8001"], ["[fd00::7]:8000"], ["[fd00::7]:8001"],
    ]  # fmt: skip
    assert found[0]["labels"] == {
        "__meta_kubernetes_namespace": "ml",
        "__meta_kubernetes_pod_name": "a",
        "__meta_kubernetes_pod_uid": "uid-a",
        "__meta_kubernetes_pod_phase": "Running",
        "__meta_kubernetes_pod_ready": "true",
        "__meta_kubernetes_pod_node_name": "lab",
        "__meta_kubernetes_pod_label_phoenix_ml_io_model": "fraud",
        "__meta_kubernetes_pod_container_name": "server",
        "__meta_kubernetes_pod_container_port_name": "http",
        "__meta_kubernetes_pod_container_port_number": "8000",
    }


def test_account_may_look_for_pods_and_nothing_else():
    made = {each["kind"]: each for each in prometheus.objects()}
    assert made["ClusterRole"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    (subject,) = made["ClusterRoleBinding"]["subjects"]
    account = made["ServiceAccount"]["metadata"]
    assert (subject["kind"], subject["namespace"], subject["name"]) == (
        "ServiceAccount", account["namespace"], account["name"],
    )  # fmt: skip
    assert made["ClusterRoleBinding"]["roleRef"]["name"] == made["ClusterRole"]["metadata"]["name"]


@pytest.mark.parametrize("interval", ["0s", "61s", "5", "1m", "5s "])
def test_interval_that_is_none_is_refused(tmp_path, interval):
    with pytest.raises(LabError, match="interval: expected"):
        Prometheus(tmp_path / "server", interval=interval)


def test_rules_are_evaluated_over_what_is_scraped(server):
    wait_for(server, 'phoenix:inference_concurrency{namespace="ml",model="fraud"}', "3")
    wait_for(server, 'phoenix:inference_slo_pressure{namespace="ml",model="fraud"}', "0")
    (found,) = server.active_targets()
    assert found["labels"].items() >= LABELS.items()
    assert found["health"] == "up"


def test_data_and_port_survive_its_sudden_end(server):
    wait_for(server, "count(phoenix:inference_concurrency)", "1")
    before, port = float(server.query("vector(time())")[0]["value"][1]), server.port
    server.kill()
    assert not server.is_running
    with pytest.raises(OSError, match="refused"):
        server.query("up")
    server.start()
    assert server.port == port
    assert server.query(f"phoenix:inference_concurrency @ {before}")


def test_answers_nothing_while_paused_and_goes_on(server, monkeypatch):
    server.pause()
    with monkeypatch.context() as patch:
        patch.setattr(prometheus, "_QUERY_DEADLINE_S", 0.2)
        with pytest.raises(OSError, match="timed out"):
            server.query("up")
    assert server.is_running
    server.resume()
    wait_for(server, "count(up)", "1")


def test_stops_in_order_and_starts_again(server):
    server.stop()
    assert not server.is_running
    server.start()
    wait_for(server, "count(up)", "1")


def test_query_that_is_none_is_an_error_with_its_reason(server):
    with pytest.raises(LabError, match=r"400.*parse error"):
        server.query("sum(")


def test_tls_is_under_an_authority_of_its_own(services_here):
    with services.running(Prometheus, is_secure=True) as server:
        assert server.url.startswith("https://")
        assert server.query("vector(1)")[0]["value"][1] == "1"
        context = ssl.create_default_context(cafile=str(server.authority))
        with (
            socket.create_connection((server.host, server.port), timeout=services.DEADLINE_S) as raw,
            context.wrap_socket(raw, server_hostname=server.host) as connection,
        ):
            assert connection.version() is not None


# Pods


class PodsApi:
    """An API server that knows only the list of pods, behind TLS and a token."""

    def __init__(self, folder: Path) -> None:
        self.pods: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.files = ApiServer("", folder / "ca.crt", folder / "token")
        self.files.token.write_text("let me in")
        certificates.make_authority(folder, "ca")
        certificates.make_certificate(folder, "server", subject="/CN=api", authority="ca", names=("IP:127.0.0.1",))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.asked.append((self.path, self.headers["authorization"]))
                self.send_response(200 if api.pods else 503)
                self.end_headers()
                self.wfile.write(json.dumps({"items": api.pods}).encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.files = replace(self.files, url=f"https://127.0.0.1:{self._server.server_port}")

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api(tmp_path):
    api = PodsApi(tmp_path)
    yield api
    api.close()


def test_pods_are_found_as_they_come_and_stay_while_the_api_server_does_not_answer(api, services_here):
    api.pods = [
        pod("stable", address="127.0.0.2"),
        pod("canary", address="127.0.0.3", labels={"phoenix-ml.io/track": "canary"}),
        pod("done", address="127.0.0.4", phase="Succeeded"),
    ]
    with services.running(Prometheus, interval="1s", api_server=api.files) as server:

        def seen() -> dict[str, dict[str, str]]:
            return {found["labels"].pop("instance"): found["labels"] for found in server.active_targets()}

        def wait_for_targets(*addresses: str) -> None:
            processes.wait_until(
                f"targets are {addresses}", lambda: set(seen()) == set(addresses), deadline_s=services.DEADLINE_S
            )

        wait_for_targets("127.0.0.2:8000", "127.0.0.3:8000")
        common = {"job": "models", "namespace": "ml", "phoenix_ml_io_model": "fraud"}
        assert seen() == {
            "127.0.0.2:8000": common | {"pod": "stable"},
            "127.0.0.3:8000": common | {"pod": "canary", "track": "canary"},
        }
        path, authorization = api.asked[0]
        assert path.startswith("/api/v1/pods?labelSelector=phoenix-ml.io%2Fmodel")
        assert authorization == "Bearer let me in"
        api.pods = api.pods[:1]
        wait_for_targets("127.0.0.2:8000")
        api.pods, log = [], server.folder / "discovery.log"
        processes.wait_until("it said so", lambda: "503" in log.read_text(), deadline_s=services.DEADLINE_S)
        assert set(seen()) == {"127.0.0.2:8000"}
        server.kill()
        api.pods = [pod("another", address="127.0.0.5")]
        server.start()
        wait_for_targets("127.0.0.5:8000")
        record = processes.read(server.folder / "discovery.json")
        server.stop()
        assert record is not None
        assert not record.is_running()


# Of a lab


@pytest.fixture
def lab(tmp_path, monkeypatch, services_here):
    services.have(Prometheus)
    monkeypatch.setattr("lab.state.HOME", tmp_path)
    monkeypatch.delenv(cluster.GIVEN, raising=False)
    monkeypatch.setattr(prometheus, "_USUAL_PORT", None)  # left to whoever else uses this machine
    lab = Lab("unit")
    lab.folder.mkdir()
    yield lab
    prometheus.down(lab)


@pytest.fixture
def asked(lab, monkeypatch):
    """A cluster that only exists on paper: what kubectl was asked."""
    lab.write(Facts(mode="full", kubernetes="1.36.3", host_ip=machine.host_ip(), ports={}, components=[]))
    asked: list[tuple[str, ...]] = []

    def kubectl(_: Lab, *arguments: str, stdin: str | None = None) -> str:
        asked.append(arguments)
        if arguments[0] == "config":
            authority = base64.b64encode(b"an authority").decode()
            found = {"server": "https://127.0.0.1:9", "certificate-authority-data": authority}
            return json.dumps({"clusters": [{"cluster": found}]})
        return f"token {len(asked)}\n" if arguments[:2] == ("create", "token") else ""

    monkeypatch.setattr(control_plane, "kubectl", kubectl)
    return asked


def test_up_says_where_it_is_and_lets_pods_reach_it(lab, asked):
    url = prometheus.up(lab, is_for_pods=True, interval="5s")
    server = prometheus.running(lab)
    assert url == f"http://{machine.host_ip()}:{server.port}"
    assert server.query("vector(1)")
    assert "interval: 5s" in (server.folder / "rules.yaml").read_text()
    token = server.api_server.token
    assert token.stat().st_mode & 0o777 == 0o600
    assert prometheus.status(lab) == (
        [f"the Prometheus of the lab 'unit', on {machine.host_ip()}, every 5s: {url}  runs"], True,
    )  # fmt: skip


def test_up_again_brings_it_back_with_another_token_and_refuses_other_wishes(lab, asked):
    url = prometheus.up(lab, is_for_pods=False, interval="5s")
    server = prometheus.running(lab)
    first = server.api_server.token.read_text()
    server.kill()
    assert not prometheus.status(lab)[1]
    assert prometheus.up(lab, is_for_pods=False, interval="5s") == url
    assert server.is_running
    assert server.api_server.token.read_text() != first
    discovery = processes.read(server.folder / "discovery.json")
    assert prometheus.up(lab, is_for_pods=False, interval="5s") == url
    assert discovery is not None
    assert not discovery.is_running()
    assert processes.is_running(server.folder / "discovery.json")
    with pytest.raises(LabError, match=r"is up on 127\.0\.0\.1, every 5s; take it down first"):
        prometheus.up(lab, is_for_pods=False, interval="1s")


def test_down_takes_process_data_and_rights(lab, asked):
    prometheus.up(lab, is_for_pods=False, interval="15s")
    server = prometheus.running(lab)
    prometheus.down(lab)
    assert not server.is_running
    assert not server.folder.exists()
    assert asked[-1][0] == "delete"
    assert prometheus.status(lab) == (["the Prometheus of the lab 'unit' is not up"], False)
    with pytest.raises(LabError, match="is not up"):
        prometheus.running(lab)


def test_wish_that_cannot_be_leaves_nothing(lab, asked):
    with pytest.raises(LabError, match="expected whole seconds from 1s to 60s, got '5m'"):
        prometheus.up(lab, is_for_pods=False, interval="5m")
    assert asked == []
    assert not (lab.folder / "prometheus").exists()


def test_cluster_that_is_not_the_labs_is_left_alone(lab, monkeypatch, tmp_path):
    given = tmp_path / "kubeconfig"
    given.touch()
    monkeypatch.setenv(cluster.GIVEN, str(given))
    with pytest.raises(LabError, match="gives nobody rights on it"):
        prometheus.up(lab, is_for_pods=False, interval="15s")


def test_without_a_cluster_there_is_nothing_to_scrape(lab):
    with pytest.raises(LabError, match="the lab 'unit' is not up"):
        prometheus.up(lab, is_for_pods=False, interval="15s")
    assert not (lab.folder / "prometheus").exists()
