"""What cluster tests say to a real Kubernetes: apply a model, await a condition, read the operator's writes."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cluster as tools

Object = dict[str, Any]
OPERATOR = "system:serviceaccount:phoenix-system:phoenix-operator"
TRUTH_S = 15.0  # the longest time in which a fault that the cluster knows of shows in the conditions
_POLL_S = 0.1
_STARTING = ("ContainerCreating", "PodInitializing")


def model(name: str = "iris", **spec: Any) -> Object:
    """Return a small PhoenixModel that serves the iris example of the image; `spec` replaces whole fields."""
    usual = {
        "model": {"uri": "iris/model.onnx"},
        "resources": {"requests": {"cpu": "50m", "memory": "192Mi"}},
        "rollout": {"drainSeconds": 1},
    }
    return {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": name},
        "spec": usual | spec,
    }


class Phoenix:
    """The cluster under test."""

    def __init__(self, kubectl: tools.Kubectl, server_image: str) -> None:
        self.kubectl = kubectl
        self.server_image = server_image

    # --- objects -----------------------------------------------------------------------------------------------------

    def apply(self, namespace: str, *objects: Object) -> None:
        """Apply objects as `kubectl apply -f -` does."""
        self.kubectl(
            "apply",
            "-n",
            namespace,
            "-f",
            "-",
            stdin=json.dumps({"kind": "List", "apiVersion": "v1", "items": objects}),
        )

    def get(self, namespace: str, what: str) -> Object | None:
        """Return `kind/name`, or None if it is not there."""
        text = self.kubectl("get", "-n", namespace, what, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text else None

    def all(self, namespace: str, kinds: str, *arguments: str) -> list[Object]:
        """Return all objects of the kinds."""
        return json.loads(self.kubectl("get", "-n", namespace, kinds, *arguments, "-o", "json"))["items"]  # type: ignore[no-any-return]

    def patch(self, namespace: str, what: str, patch: Object, *, kind: str = "merge") -> None:
        """Patch `kind/name`."""
        self.kubectl("patch", "-n", namespace, what, f"--type={kind}", "-p", json.dumps(patch))

    def delete(self, namespace: str, what: str, *arguments: str) -> None:
        """Delete `kind/name`."""
        self.kubectl("delete", "-n", namespace, what, *arguments)

    # --- waiting -----------------------------------------------------------------------------------------------------

    def wait_for(self, what: str, check: Callable[[], Any], *, deadline_s: float = 60) -> Any:
        """Call `check` until it returns something true, and return that; fail with its last answer otherwise."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                found = check()
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                found, last = None, f"{error} {getattr(error, 'stderr', '')}"
            else:
                last = repr(found)
            if found:
                return found
            if time.monotonic() > end:
                raise AssertionError(f"not within {deadline_s} s: {what}; last seen: {last[:3000]}")
            time.sleep(_POLL_S)

    def wait_for_no(self, what: str, check: Callable[[], list[Any]], *, deadline_s: float = 60) -> None:
        """Call `check` until it finds nothing; fail with what it last found otherwise."""
        found: list[Any] = []

        def is_none() -> bool:
            found[:] = check()
            return not found

        try:
            self.wait_for(f"no {what}", is_none, deadline_s=deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; found: {str(found)[:3000]}") from None

    def conditions(self, namespace: str, name: str = "iris") -> dict[str, Object]:
        """Return the conditions by type, but only once they speak of the newest generation."""
        found = self.get(namespace, f"phoenixmodel/{name}")
        if found is None or found.get("status", {}).get("observedGeneration") != found["metadata"]["generation"]:
            return {}
        return {row["type"]: row for row in found["status"]["conditions"]}

    def wait_condition(
        self, namespace: str, name: str, kind: str, status: str, reason: str | None = None, *, deadline_s: float = 60
    ) -> Object:
        """Wait until a condition of the newest generation is so; return it."""
        end = time.monotonic() + deadline_s
        rows: dict[str, Object] = {}
        while time.monotonic() < end:
            rows = self.conditions(namespace, name)
            row = rows.get(kind)
            if row and row["status"] == status and reason in (None, row["reason"]):
                return row
            time.sleep(_POLL_S)
        short = {kind: (row["status"], row["reason"], row["message"][:300]) for kind, row in rows.items()}
        raise AssertionError(
            f"not within {deadline_s} s: {name} {kind}={status} {reason or ''}; conditions are {short}"
        )

    def wait_ready(self, namespace: str, name: str = "iris", *, deadline_s: float = 90) -> Object:
        """Wait until the newest generation is Ready."""
        return self.wait_condition(namespace, name, "Ready", "True", deadline_s=deadline_s)

    def wait_fault(
        self, namespace: str, name: str, kind: str, reason: str, *words: str, is_known: bool = False
    ) -> Object:
        """Wait until the cluster knows of a fault, then `TRUTH_S` at most for the conditions that tell of it.

        `kind` and `Ready` must be False for this reason, and the message must have these words. `is_known`: there is
        nothing to wait for, because the API server was told all of it. Returns the condition.
        """
        started = time.monotonic()
        if not is_known:
            self.wait_for("trouble", lambda: self.trouble(namespace, name))
        known = time.monotonic()
        row = self.wait_condition(namespace, name, kind, "False", reason, deadline_s=TRUTH_S)
        self.wait_condition(namespace, name, "Ready", "False", reason, deadline_s=1)
        print(f"{kind} {reason} {time.monotonic() - known:.1f} s after it was known, {known - started:.1f} s after it "
              f"was asked for: {row['message']}")  # fmt: skip
        missing = [word for word in words if word not in row["message"]]
        assert not missing, f"{missing} not in {row['message']!r}"
        return row

    def trouble(self, namespace: str, name: str) -> list[str]:
        """Return what Kubernetes itself has to complain of about a model's pods."""
        found = []
        for pod in self.pods(namespace, name):
            status = pod.get("status", {})
            for row in status.get("containerStatuses", []):
                waiting = row["state"].get("waiting", {}).get("reason")
                found += [waiting] if waiting and waiting not in _STARTING else []
                found += [state["terminated"]["reason"] for state in (row["state"], row["lastState"])
                          if "terminated" in state]  # fmt: skip
            found += [row["reason"] for row in status.get("conditions", [])
                      if row["type"] == "PodScheduled" and row["status"] == "False"]  # fmt: skip
        deployment = self.get(namespace, f"deployment/{name}") or {}
        rows = deployment.get("status", {}).get("conditions", [])
        return found + [row["message"] for row in rows if row["type"] == "ReplicaFailure" and row["status"] == "True"]

    def pods(self, namespace: str, name: str = "iris") -> list[Object]:
        """Return the pods of a model that are not going away."""
        pods = self.all(namespace, "pods", "-l", f"phoenix-ml.io/model={name}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    # --- requests ----------------------------------------------------------------------------------------------------

    def start_client(self, namespace: str) -> None:
        """Start the pod from which `infer` asks."""
        self.apply(namespace, tools.client_pod("client", self.server_image))
        self.kubectl("wait", "--for=condition=Ready", "pod/client", "-n", namespace, "--timeout=60s")

    def infer(self, namespace: str, name: str = "iris") -> Object:
        """Ask a model for the iris example from the client pod, through the Service's DNS name.

        It is asked until it answers: kube-proxy learns of a ready pod a moment after everybody else.
        """
        host = f"{name}.{namespace}.svc"
        text = self.wait_for("an answer", lambda: tools.infer(self.kubectl, namespace, host, name), deadline_s=15)
        answer: Object = json.loads(text)
        return answer

    @contextmanager
    def load(self, *command: str, least: int = 0) -> Iterator[Object]:
        """Requests while the block runs; afterwards the object has their number, failures and versions.

        `command` runs Python with the program `load.py` (written `PROGRAM`), its host, model and number of clients.
        """
        program = (Path(__file__).parent / "cluster/load.py").read_text()
        process = subprocess.Popen(
            [part.replace("PROGRAM", program) for part in (*command, str(least))],
            env=self.kubectl.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        result: Object = {}
        try:
            yield result
            out, err = process.communicate(input="", timeout=200)
            assert process.returncode == 0, err
            result |= json.loads(out)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    # --- the operator ------------------------------------------------------------------------------------------------

    def set_settings(self, settings: Object) -> None:
        """Give the operator these settings and wait until it runs with them."""
        tools.configure(self.kubectl, settings)
        self.wait_for("a leader", self.leader)

    def leader(self) -> str:
        """Return the pod that holds the lease; empty while none does."""
        lease = self.get(tools.OPERATOR_NAMESPACE, "lease/phoenix-operator")
        return str(lease["spec"].get("holderIdentity") or "") if lease else ""

    def operator_pods(self) -> list[Object]:
        """Return the operator's pods that are not going away."""
        pods = self.all(tools.OPERATOR_NAMESPACE, "pods", "-l", "app.kubernetes.io/name=phoenix-operator")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    @contextmanager
    def operator_stopped(self) -> Iterator[None]:
        """Run without an operator."""
        where = ("-n", tools.OPERATOR_NAMESPACE)
        self.kubectl("scale", "deployment/phoenix-operator", *where, "--replicas=0")
        self.wait_for("no operator", lambda: not self.operator_pods())
        try:
            yield
        finally:
            self.kubectl("scale", "deployment/phoenix-operator", *where, "--replicas=2")
            self.kubectl("rollout", "status", "deployment/phoenix-operator", *where, "--timeout=120s")
            self.wait_for("a leader", self.leader)

    def kill(self, pod: Object, signum: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the processes of a pod's container as the node sees them; SIGKILL says goodbye to nobody."""
        container = pod["status"]["containerStatuses"][0]["containerID"].partition("://")[2]
        killed = 0
        for group in Path("/proc").glob("[0-9]*/cgroup"):
            with contextlib.suppress(OSError):  # processes end while they are looked at
                if container in group.read_text():
                    os.kill(int(group.parent.name), signum)
                    killed += 1
        assert killed, f"no process of {pod['metadata']['name']} on this machine"

    def operator_metrics(self) -> str:
        """Return /metrics of the leader."""
        path = f"/api/v1/namespaces/{tools.OPERATOR_NAMESPACE}/pods/{self.leader()}:8080/proxy/metrics"
        return self.kubectl("get", "--raw", path)

    def operator_log(self, since: str) -> list[Object]:
        """Return what the operators have logged since a time as in RFC 3339."""
        where = ("-n", tools.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/name=phoenix-operator")
        text = self.kubectl("logs", *where, f"--since-time={since}", "--tail=-1")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def report(self, namespace: str) -> str:
        """Return what helps to understand a failure: models, pods, events, the operator's log."""
        parts = []
        for command in (
            ("get", "phx,deployments,pods", "-n", namespace, "-o", "wide"),
            ("get", "events", "-n", namespace, "--sort-by=.lastTimestamp"),
            ("logs", "-n", tools.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/name=phoenix-operator", "--tail=40"),
        ):
            try:
                parts.append(f"--- kubectl {' '.join(command)}\n{self.kubectl(*command)}")
            except subprocess.CalledProcessError as error:
                parts.append(f"--- kubectl {' '.join(command)} failed: {error.stderr}")
        return "\n".join(parts)
