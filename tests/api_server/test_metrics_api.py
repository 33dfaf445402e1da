"""The metrics API behind a real API server: registered, trusted, asked through it and past it.

It runs as a process of this machine with the rights of its own manifests and nothing more. The Service is one that
leads to this machine by name, since there is no network of pods; Prometheus is one that says what it is told.
"""

import asyncio
import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from api_client import APPLY, Api, ApiServer, models_path
from lab import binaries
from lab.state import Lab
from metrics_api_world import HPA, Prometheus, on_socket, path
from specs import SOURCE

from phoenix_operator import install, install_metrics_api
from phoenix_operator.kinds import API_SERVICE
from phoenix_operator.metrics_api.names import API_SERVICES, NAME

NAMESPACE = "metrics-api"
ROOTS = {
    "Namespace": "/api/v1/namespaces/{name}",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts/{name}",
    "Secret": "/api/v1/namespaces/{namespace}/secrets/{name}",
    "Service": "/api/v1/namespaces/{namespace}/services/{name}",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps/{name}",
    "Deployment": "/apis/apps/v1/namespaces/{namespace}/deployments/{name}",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/{name}",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/{name}",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles/{name}",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings/{name}",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles/{name}",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{name}",
    "APIService": API_SERVICE.path(None, "{name}"),
}


@dataclass
class Told:
    """What kubectl said: its exit code and its text, or the JSON that it printed."""

    code: int
    body: Any


class Place:
    """A running metrics API behind the API server."""

    def __init__(self, server: ApiServer, port: int) -> None:
        self.server, self.port = server, port

    async def raw(self, asked: str, *, user: str | None = None) -> Told:
        """Ask as somebody who uses kubectl."""
        command = [binaries.kubectl(), f"--kubeconfig={self.server.kubeconfig}", "--request-timeout=30s"]
        command += [f"--as={user}"] if user else []
        process = await asyncio.create_subprocess_exec(
            *command, "get", "--raw", asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        said, complaint = await process.communicate()
        return Told(process.returncode or 0, complaint.decode() if process.returncode else json.loads(said))

    async def past(self, asked: str, bundle: bytes, *, certificate: bool) -> tuple[int, Any]:
        """Ask without the API server in between, on behalf of somebody without rights."""
        context = ssl.create_default_context(cadata=bundle.decode())
        if certificate:
            context.load_cert_chain(Lab("tests").pki / "front-proxy.crt", Lab("tests").pki / "front-proxy.key")
        connector = aiohttp.TCPConnector(ssl=context)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get(
                f"https://127.0.0.1:{self.port}{asked}",
                headers={"X-Remote-User": "eve", "X-Remote-Group": "system:authenticated"},
                server_hostname=f"{NAME}.{install.NAMESPACE}.svc",
            ) as response,
        ):
            return response.status, await response.json()


def manifests(port: int) -> list[dict[str, Any]]:
    """Return the install, with a Service that leads to this machine."""
    found = [body for body in install.manifests() if body["kind"] == "Namespace"]
    for body in install_metrics_api.manifests():
        if body["kind"] == "Service":
            body = body | {"spec": {"type": "ExternalName", "externalName": "localhost"}}
        if body["kind"] == "APIService":
            body = body | {"spec": body["spec"] | {"service": body["spec"]["service"] | {"port": port}}}
        found.append(body)
    return found


async def installed(api: Api, port: int) -> str:
    """Apply everything; return a token of the metrics API's ServiceAccount."""
    for body in manifests(port):
        where = ROOTS[body["kind"]].format(**body["metadata"])
        await api.must("PATCH", where, body, kind=APPLY, fieldManager="tests", force="true", fieldValidation="Strict")
    await api.make_namespace(NAMESPACE)
    for name in ("fraud", "churn"):
        model = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "metadata": {"name": name}}
        model |= {"metadata": {"name": name, "labels": {"team": name}}, "spec": {"model": SOURCE}}
        answer = await api("POST", models_path(NAMESPACE), model)
        assert answer.is_success or answer.code == 409, answer.message
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    account = ROOTS["ServiceAccount"].format(namespace=install.NAMESPACE, name=NAME)
    return str((await api.must("POST", f"{account}/token", request))["status"]["token"])


@asynccontextmanager
async def running(server: ApiServer, folder: Path, port: int, token: str, source: str) -> AsyncIterator[None]:
    """Run `phoenix-operator metrics-api` with that token."""
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    (folder / "kubeconfig").touch(mode=0o600)
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    settings = {"httpPort": 0, "autoscaling": {"prometheus": {"url": source}, "httpsPort": port}}
    (folder / "settings.yaml").write_text(json.dumps(settings))
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "phoenix_operator", "metrics-api", f"--settings={folder / 'settings.yaml'}"),
            env=environment | {"KUBECONFIG": str(folder / "kubeconfig"), "POD_NAMESPACE": install.NAMESPACE},
            stderr=log,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0, (folder / "log").read_text()


async def available(api: Api, folder: Path) -> bytes:
    """Wait until the API server has reached it for both versions; return whom it trusts then."""
    states: list[Any] = []
    async with asyncio.timeout(60):
        while not states or not all("Available=True" in state for state in states):
            await asyncio.sleep(0.2)
            services = [await api.must("GET", API_SERVICE.path(None, name)) for name in API_SERVICES]
            rows = [body.get("status", {}).get("conditions", []) for body in services]
            states = [[f"{row['type']}={row['status']}" for row in each] for each in rows]
    log = (folder / "log").read_text()
    assert '"level": "ERROR"' not in log, log

    return base64.b64decode(services[0]["spec"]["caBundle"])


@pytest.fixture(scope="session")
def told(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that is asked, and what came."""
    folder = tmp_path_factory.mktemp("metrics-api")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    prometheus = Prometheus()
    prometheus.put("phoenix:inference_concurrency", "2.5", namespace=NAMESPACE)
    prometheus.put("phoenix:inference_concurrency", "0", namespace=NAMESPACE, model="churn")
    mine, place = path(namespace=NAMESPACE), Place(server, port)

    async def main() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with server.connected() as api, on_socket(prometheus.answer) as source:
            token = await installed(api, port)
            async with running(server, folder, port, token, source):
                found["bundle"] = bundle = await available(api, folder)
                found["discovery"] = await place.raw("/apis/custom.metrics.k8s.io/v1beta2")
                found["admin"] = await place.raw(mine)
                found["autoscaler"] = await place.raw(mine, user=HPA)
                found["older"] = await place.raw(path(namespace=NAMESPACE, version="v1beta1"), user=HPA)
                every = path(namespace=NAMESPACE, name="*")
                found["all"] = await place.raw(every, user=HPA)
                found["selected"] = await place.raw(every + "?labelSelector=team%3Dchurn", user=HPA)
                found["unknown"] = await place.raw(path("requests", namespace=NAMESPACE), user=HPA)
                found["no model"] = await place.raw(path(namespace=NAMESPACE, name="nobody"), user=HPA)
                found["stranger"] = await place.raw(mine, user="eve")
                found["past: stranger"] = await place.past(mine, bundle, certificate=True)
                found["past: nobody"] = await place.past(mine, bundle, certificate=False)
                await api.must(
                    "PATCH",
                    ROOTS["Secret"].format(namespace=install.NAMESPACE, name=NAME),
                    json.dumps([{"op": "remove", "path": "/data"}]),
                    kind="application/json-patch+json",
                )
        (folder / "again").mkdir()
        async with (
            server.connected() as api,
            on_socket(prometheus.answer) as source,
            running(server, folder / "again", port, token, source),
        ):
            async with asyncio.timeout(60):
                renewed = await place.raw(mine, user=HPA)
                while renewed.code:
                    await asyncio.sleep(0.5)
                    renewed = await place.raw(mine, user=HPA)
            found["renewed"], found["new bundle"] = renewed, await available(api, folder / "again")
        return found

    return asyncio.run(main())


def test_api_server_finds_out_what_is_served(told: dict[str, Any]) -> None:
    listed = [row["name"] for row in told["discovery"].body["resources"]]
    assert "phoenixmodels.phoenix-ml.io/inference_latency_seconds_pressure" in listed


@pytest.mark.parametrize("who", ["admin", "autoscaler"])
def test_kubectl_gets_the_metric_of_a_model(told: dict[str, Any], who: str) -> None:
    (item,) = told[who].body["items"]
    assert (item["describedObject"]["name"], item["value"]) == ("fraud", "2500m")


def test_both_versions_are_answered(told: dict[str, Any]) -> None:
    assert told["older"].body["items"][0]["metricName"] == "inference_latency_seconds_concurrency"


def test_models_are_chosen_by_their_labels(told: dict[str, Any]) -> None:
    names = {key: [row["describedObject"]["name"] for row in told[key].body["items"]] for key in ("all", "selected")}
    assert names == {"all": ["churn", "fraud"], "selected": ["churn"]}


@pytest.mark.parametrize("asked", ["unknown", "no model"])
def test_what_is_not_there_is_not_found(told: dict[str, Any], asked: str) -> None:
    assert told[asked].code != 0
    assert "(NotFound)" in told[asked].body


def test_caller_without_rights_is_refused_by_both(told: dict[str, Any]) -> None:
    assert "(Forbidden)" in told["stranger"].body
    code, body = told["past: stranger"]
    assert (code, body["reason"]) == (403, "Forbidden")
    assert 'User "eve" cannot get' in body["message"]


def test_caller_past_the_api_server_gets_401(told: dict[str, Any]) -> None:
    code, body = told["past: nobody"]
    assert (code, body["kind"], body["reason"]) == (401, "Status", "Unauthorized")


def test_certificate_that_is_lost_is_made_again_and_trusted(told: dict[str, Any]) -> None:
    (item,) = told["renewed"].body["items"]
    assert item["value"] == "2500m"
    assert told["new bundle"] != told["bundle"]
