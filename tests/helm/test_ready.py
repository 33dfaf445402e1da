"""What `helm test` runs: the program itself against real sockets, and the pod that it runs in."""

import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import charts
import pytest
from charts import Object
from lab import certificates

from phoenix_operator.metrics_api.metrics import METRICS
from phoenix_operator.metrics_api.names import RESOURCE

PROGRAM = charts.CHART / "files" / "ready.py"
TOLD = [f"{RESOURCE}/{name}" for name in METRICS]


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers as the operator and the API server do; `ready_after` requests are refused first."""

    told: list[str]
    ready_after: int
    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        is_ready = len(self.seen) > self.ready_after
        body = json.dumps({"resources": [{"name": name} for name in self.told]}).encode()
        self.send_response(200 if is_ready else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(*, told: list[str] = TOLD, ready_after: int = 0, pki: Path | None = None) -> Iterator[tuple[int, Answers]]:
    """Serve on a free port, with TLS if there is a folder with certificates; yield the port and what was asked."""
    handler = type("Handler", (Answers,), {"told": told, "ready_after": ready_after, "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if pki is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(pki / "server.crt", pki / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1], handler  # type: ignore[misc]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pod finds with its token, and what the API server has."""
    folder = tmp_path_factory.mktemp("pki")
    certificates.make_authority(folder, "ca")
    certificates.make_certificate(folder, "server", subject="/CN=server", authority="ca", names=("IP:127.0.0.1",))
    (folder / "token").write_text("a-token\n")
    return folder


def ask(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.read_text()],
        env={"PATH": os.environ["PATH"], "DEADLINE_SECONDS": "0", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_ready_operator_passes() -> None:
    with serving() as (port, operator):
        done = ask(READY_URLS=f"http://127.0.0.1:{port}/readyz")
    assert (done.returncode, done.stdout) == (0, f"ready: http://127.0.0.1:{port}/readyz\n")
    assert operator.seen == [("/readyz", None)]


def test_operator_that_is_not_ready_yet_is_asked_again() -> None:
    with serving(ready_after=1) as (port, operator):
        done = ask(READY_URLS=f"http://127.0.0.1:{port}/readyz", DEADLINE_SECONDS="30")
    assert done.returncode == 0
    assert len(operator.seen) == 2


def test_operator_that_is_not_ready_fails_with_its_answer() -> None:
    with serving(ready_after=99) as (port, _):
        done = ask(READY_URLS=f"http://127.0.0.1:{port}/readyz")
    assert done.returncode == 1
    assert "all_are_ready: HTTP Error 503" in done.stderr


def test_metrics_are_asked_for_with_the_pods_token_over_trusted_tls(pki: Path) -> None:
    with serving() as (port, _), serving(pki=pki) as (secure, api):
        done = ask(
            READY_URLS=f"http://127.0.0.1:{port}/readyz",
            METRICS_URL=f"https://127.0.0.1:{secure}/apis/custom.metrics.k8s.io/v1beta2",
            CREDENTIALS=str(pki),
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "the metrics API tells of 3 metrics"
    assert api.seen == [("/apis/custom.metrics.k8s.io/v1beta2", "Bearer a-token")]


def test_api_server_of_another_authority_gets_no_token(pki: Path, tmp_path: Path) -> None:
    certificates.make_authority(tmp_path, "ca")
    (tmp_path / "token").write_text("a-token")
    with serving() as (port, _), serving(pki=pki) as (secure, api):
        done = ask(
            READY_URLS=f"http://127.0.0.1:{port}/readyz",
            METRICS_URL=f"https://127.0.0.1:{secure}/",
            CREDENTIALS=str(tmp_path),
        )
    assert done.returncode == 1
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr
    assert api.seen == []


@pytest.mark.parametrize("missing", TOLD)
def test_metric_that_is_not_told_fails_by_its_name(pki: Path, missing: str) -> None:
    told = [name for name in TOLD if name != missing]
    with serving() as (port, _), serving(pki=pki, told=told) as (secure, _):
        done = ask(
            READY_URLS=f"http://127.0.0.1:{port}/readyz",
            METRICS_URL=f"https://127.0.0.1:{secure}/",
            CREDENTIALS=str(pki),
        )
    assert done.returncode == 1
    assert f"expected {missing} among the custom metrics" in done.stderr


# --- the pod ---------------------------------------------------------------------------------------------------------


def hooks(values: Object) -> list[Object]:
    made = charts.objects(values)
    return [body for body in charts.objects(values, hooks=True) if body not in made]


@pytest.mark.parametrize("has_metrics", [False, True])
def test_pod_runs_the_program_without_rights(has_metrics: bool) -> None:
    values = {"metricsApi": {"enabled": has_metrics}, "autoscaling": {"prometheus": {"url": "http://prometheus:9090"}}}
    account, pod = hooks(values)
    assert (account["kind"], pod["kind"]) == ("ServiceAccount", "Pod")
    assert (
        account["metadata"]["annotations"]["helm.sh/hook"] == pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    )
    bound = [subject["name"] for body in charts.objects(values) for subject in body.get("subjects", [])]
    assert account["metadata"]["name"] not in bound
    assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert pod["spec"]["automountServiceAccountToken"] is has_metrics
    (container,) = pod["spec"]["containers"]
    assert container["args"] == [PROGRAM.read_text()]
    environment = {row["name"]: row["value"] for row in container["env"]}
    assert environment["READY_URLS"] == "http://phoenix-operator.phoenix-system.svc:8080/readyz"
    assert ("METRICS_URL" in environment) is has_metrics


def test_pod_is_open_to_no_policy_of_ours() -> None:
    """Else it would have the operator's ways in and out, and no others."""
    (_, pod) = hooks({})
    for body in charts.objects({}):
        if body["kind"] == "NetworkPolicy":
            wanted = body["spec"]["podSelector"]["matchLabels"]
            assert not wanted.items() <= pod["metadata"]["labels"].items()
