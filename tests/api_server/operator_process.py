"""The operator as a process of this machine, with the rights of its own install manifests and nothing more."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from api_client import APPLY, Api, ApiServer

from phoenix_operator import install
from phoenix_operator.desired.naming import OPERATOR

Object = dict[str, Any]
USER = f"system:serviceaccount:{install.NAMESPACE}:{OPERATOR}"
_PATHS = {
    "Namespace": "/api/v1/namespaces/{name}",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts/{name}",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles/{name}",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings/{name}",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles/{name}",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{name}",
}


def write_kubeconfig(server: ApiServer, file: Path, *, bindings: Sequence[str] = ()) -> None:
    """Grant what `install` grants, and write a kubeconfig with a token of the operator's ServiceAccount.

    `bindings` are the admin Secrets that it may read.
    """

    async def grant(api: Api) -> str:
        for manifest in install.manifests(bindings=bindings):
            if manifest["kind"] in _PATHS:
                path = _PATHS[manifest["kind"]].format(**manifest["metadata"])
                await api.must("PATCH", path, manifest, kind=APPLY, fieldManager="tests", fieldValidation="Strict")
        path = f"{_PATHS['ServiceAccount'].format(namespace=install.NAMESPACE, name=OPERATOR)}/token"
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 7200},
        }
        return str((await api.must("POST", path, request))["status"]["token"])

    config = yaml.safe_load(server.kubeconfig.read_text())
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": server.run(grant)}}]
    file.touch(mode=0o600)
    file.write_text(yaml.safe_dump(config))


class OperatorProcess:
    """A running `phoenix-operator run`; `log` is what it wrote."""

    def __init__(self, folder: Path, kubeconfig: Path, settings: Object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "operator.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        file = folder / "settings.yaml"
        file.write_text(yaml.safe_dump(settings | {"httpPort": self._port}))
        command = [str(Path(sys.executable).with_name("phoenix-operator")), "run", f"--settings={file}"]
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=environment | {"KUBECONFIG": str(kubeconfig)}, stdout=out, stderr=subprocess.STDOUT
            )

    def metrics(self) -> "Metrics":
        """Return what /metrics says now. Raises `OSError` while it does not answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
            return Metrics(answer.read().decode())

    def wait_until(self, what: str, holds: Callable[["Metrics"], bool], *, deadline_s: float) -> "Metrics":
        """Wait until the metrics are so for three looks in a row; a process that has ended ends the wait."""
        end, looks, last = time.monotonic() + deadline_s, 0, Metrics("")
        while looks < 3:
            assert self.process.poll() is None, f"the operator ended: {self.tail()}"
            assert time.monotonic() < end, f"{what}: not within {deadline_s:.0f} s: {last}\n{self.tail()}"
            try:
                last = self.metrics()
            except OSError:
                looks = 0
            else:
                looks = looks + 1 if holds(last) else 0
            time.sleep(0.5)
        return last

    def stop(self) -> int:
        """End it as Kubernetes does; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def complaints(self) -> list[str]:
        """Return the lines of the log that are errors or tell of an exception."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if "Traceback" in line or '"level": "ERROR"' in line or "exc_info" in line]


@dataclass(frozen=True)
class Metrics:
    """Samples of the Prometheus text format."""

    text: str

    def value(self, name: str) -> float:
        """Return the sum over all labels."""
        return sum(value for _, value in self._samples(name))

    def requests(self) -> Counter[tuple[str, str]]:
        """Return the number of requests to the API server by verb and code."""
        found: Counter[tuple[str, str]] = Counter()
        for labels, value in self._samples("phoenix_operator_api_requests_total"):
            found[labels["verb"], labels["code"]] += int(value)
        return found

    def _samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        rows = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", self.text, re.MULTILINE)
        return [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in rows]


# --- the audit log ---------------------------------------------------------------------------------------------------


def audited(file: Path, start: int = 0) -> list[Object]:
    """Return the operator's requests in the audit log from an offset on."""
    assert file.stat().st_size >= start, "the audit log was rotated meanwhile"
    with file.open("rb") as log:
        log.seek(start)
        events = [json.loads(line) for line in log]
    return [event for event in events if event["user"]["username"] == USER]


def writes(events: list[Object]) -> list[Object]:
    """Return those that ask for a change, without the lease."""
    verbs = ("create", "update", "patch", "delete", "deletecollection")
    return [event for event in events if event["verb"] in verbs and event["objectRef"]["resource"] != "leases"]
