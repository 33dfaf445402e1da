"""A new version under load: nobody notices. A bad version: nobody notices either, and the status says what is wrong."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phoenix_cluster import Phoenix, model

LEAST_REQUESTS = 20_000
PROGRAM = (Path(__file__).parent / "load.py").read_text()


class Load:
    """Requests from a pod while the block runs; afterwards `result` has their number, failures and versions."""

    result: dict[str, Any]


@contextlib.contextmanager
def load(phoenix: Phoenix, namespace: str, *, least: int, clients: int = 4) -> Iterator[Load]:
    command = ["kubectl", "exec", "-i", "client", "-n", namespace, "--", "python", "-c", PROGRAM]
    command += [f"iris.{namespace}.svc", "iris", str(clients), str(least)]
    process = subprocess.Popen(
        command,
        env=phoenix.kubectl.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = Load()
    try:
        yield found
        out, err = process.communicate(input="", timeout=200)
        assert process.returncode == 0, err
        found.result = json.loads(out)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def served(phoenix: Phoenix, namespace: str) -> str:
    """The namespace, with two replicas of iris and a client pod in it."""
    phoenix.apply(namespace, iris("1"))
    phoenix.start_client(namespace)
    phoenix.wait_ready(namespace)
    phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut")
    return namespace


def iris(version: str, **source: Any) -> dict[str, Any]:
    return model(
        model={"uri": "iris/model.onnx", "version": version, **source},
        replicas=2,
        rollout={"drainSeconds": 10, "progressDeadlineSeconds": 300},
    )


def test_new_version_under_load_fails_no_request(phoenix: Phoenix, served: str) -> None:
    with load(phoenix, served, least=LEAST_REQUESTS) as under_way:
        phoenix.apply(served, iris("2"))
        phoenix.wait_condition(served, "iris", "Progressing", "True", "RolledOut", deadline_s=120)
        # the last pods of the old version drain
        phoenix.wait_for("two pods", lambda: len(phoenix.all(served, "pods", "-l", "phoenix-ml.io/model=iris")) == 2)
    result = under_way.result
    print(f"rollout under load: {result}")
    assert result["failed"] == 0, result["failures"]
    assert result["requests"] >= LEAST_REQUESTS
    assert set(result["versions"]) == {"1", "2"}


def test_bad_version_under_load_never_replaces_the_good_one(phoenix: Phoenix, served: str) -> None:
    with load(phoenix, served, least=2_000, clients=2) as under_way:
        phoenix.apply(served, iris("2", sha256="0" * 64))
        verified = phoenix.wait_condition(served, "iris", "ModelVerified", "False", "DigestMismatch")
        available = phoenix.wait_condition(served, "iris", "Available", "True")
        progressing = phoenix.wait_condition(served, "iris", "Progressing", "True", "RollingOut")
        # a pod of the good version that ends meanwhile comes back with the good version
        old = [
            pod["metadata"]["name"]
            for pod in phoenix.all(served, "pods", "-l", "phoenix-ml.io/model=iris")
            if all(row["ready"] for row in pod["status"]["containerStatuses"])
        ]
        phoenix.delete(served, f"pod/{old[0]}")
        phoenix.wait_for("two ready pods", lambda: _ready_replicas(phoenix, served) == 2)
    result = under_way.result
    print(f"bad version under load: {result}; {progressing['message']}")
    assert result["failed"] == 0, result["failures"]
    assert set(result["versions"]) == {"1"}
    assert "version 1 keeps serving" in verified["message"]
    assert "DigestMismatch" in progressing["message"]
    assert available["message"].startswith("2 of 2 replicas answer")

    phoenix.apply(served, iris("3"))
    phoenix.wait_ready(served)
    phoenix.wait_condition(served, "iris", "Progressing", "True", "RolledOut", deadline_s=120)
    # pods of the old version answer while they drain, until kube-proxy has heard of it
    phoenix.wait_for("version 3 answers", lambda: phoenix.infer(served)["model_version"] == "3", deadline_s=30)
    manifests = phoenix.wait_for("one revision left", lambda: _only_revision(phoenix, served))
    assert len(manifests) == 1


def _ready_replicas(phoenix: Phoenix, namespace: str) -> int:
    found = phoenix.get(namespace, "phoenixmodel/iris")
    return found["status"]["readyReplicas"] if found else 0


def _only_revision(phoenix: Phoenix, namespace: str) -> dict[str, str] | None:
    found = phoenix.get(namespace, "configmap/iris-model")
    data: dict[str, str] = found["data"] if found else {}
    return data if len(data) == 1 else None


def test_scaling_restarts_nothing(phoenix: Phoenix, served: str) -> None:
    before = {pod["metadata"]["uid"] for pod in phoenix.all(served, "pods", "-l", "phoenix-ml.io/model=iris")}
    phoenix.kubectl("scale", "phx/iris", "-n", served, "--replicas=3")
    phoenix.wait_for("three ready pods", lambda: _ready_replicas(phoenix, served) == 3)
    after = {pod["metadata"]["uid"] for pod in phoenix.all(served, "pods", "-l", "phoenix-ml.io/model=iris")}
    assert before < after
    assert len(after) == 3
    phoenix.kubectl("scale", "phx/iris", "-n", served, "--replicas=0")
    phoenix.wait_condition(served, "iris", "Available", "False", "ScaledToZero")
