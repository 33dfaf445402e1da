"""Rotation and deletion of a model's access, on the cluster and the real services beside it."""

import base64
from typing import Any

import pytest
import redis
from lab import state
from lab.services import together
from phoenix_cluster import Phoenix, model

Keys = dict[str, str]
BINDINGS: dict[str, Any] = {
    "redis": {"backend": "default"},
    "kafka": {"backend": "default"},
    "postgres": {"backend": "default", "audit": {"mode": "Durable"}},
}
KINDS = ("redis", "kafka", "postgresql")
SETTINGS = {"bindingCheckSeconds": 5}


def secret(phoenix: Phoenix, namespace: str, kind: str) -> dict[str, Any]:
    found = phoenix.get(namespace, f"secret/iris-{kind}")
    assert found is not None
    return found


def values(phoenix: Phoenix, namespace: str, kind: str) -> Keys:
    data = secret(phoenix, namespace, kind)["data"]
    return {key: base64.b64decode(text).decode() for key, text in data.items()}


def users_of(admin: dict[str, Keys], namespace: str) -> set[str]:
    """Return the Redis users of the namespace's models."""
    with redis.Redis.from_url(admin["redis"]["uri"], ssl_ca_data=admin["redis"]["certificates"]) as client:
        return {name for name in map(str, client.acl_users()) if f":{namespace}:" in name}


def is_retired(phoenix: Phoenix, namespace: str) -> bool:
    return all(
        "phoenix-ml.io/retiring" not in secret(phoenix, namespace, kind)["metadata"]["annotations"] for kind in KINDS
    )


@pytest.fixture
def bound(phoenix: Phoenix, namespace: str, admin: dict[str, Keys]) -> str:
    """The namespace, with two replicas of iris on all three services and a client pod in it."""
    rollout = {"drainSeconds": 10, "progressDeadlineSeconds": 300}
    phoenix.apply(namespace, model(replicas=2, rollout=rollout, bindings=BINDINGS))
    phoenix.start_client(namespace)
    phoenix.wait_condition(namespace, "iris", "BindingsReady", "True", "Bound", deadline_s=120)
    phoenix.wait_ready(namespace, deadline_s=180)
    phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut", deadline_s=120)
    return namespace


def test_rotation_under_load_fails_no_request_and_takes_the_login_before_away(
    phoenix: Phoenix, bound: str, admin: dict[str, Keys]
) -> None:
    before = {kind: values(phoenix, bound, kind) for kind in KINDS}
    command = ("kubectl", "exec", "-i", "client", "-n", bound, "--", "python", "-c", "PROGRAM")
    with phoenix.load(*command, f"iris.{bound}.svc", "iris", "4", least=2_000) as result:
        phoenix.patch(bound, "phoenixmodel/iris", {"metadata": {"annotations": {"phoenix-ml.io/rotate": "1"}}})
        phoenix.wait_for(
            "new logins",
            lambda: all(values(phoenix, bound, kind)["username"] != before[kind]["username"] for kind in KINDS),
        )
        phoenix.wait_for("the logins before to go", lambda: is_retired(phoenix, bound), deadline_s=180)
    print(f"rotation under load: {result}")
    assert result["failed"] == 0, result["failures"]
    assert result["requests"] >= 2_000
    assert users_of(admin, bound) == {f"phx:{bound}:iris:b"}
    row = phoenix.wait_condition(bound, "iris", "BindingsReady", "True", "Bound", deadline_s=90)
    print(row["message"])


@pytest.mark.timeout(600)
def test_service_that_hangs_or_dies_is_told_and_comes_back_without_a_restart(phoenix: Phoenix, bound: str) -> None:
    before = {pod["metadata"]["uid"] for pod in phoenix.pods(bound)}
    for kind, service in together.running(state.Lab("default")).items():
        for fault, mend in ((service.pause, service.resume), (service.kill, service.start)):
            fault()
            try:
                row = phoenix.wait_condition(bound, "iris", "BindingsReady", "False", deadline_s=90)
                assert row["reason"] == "BackendUnreachable", row
                assert kind in row["message"], row
                assert phoenix.get(bound, "deployment/iris")["status"]["readyReplicas"] == 2, (
                    "readiness is the pods' own"
                )
                if kind != "postgresql":  # a Durable audit answers nothing that it cannot record
                    phoenix.infer(bound)
            finally:
                mend()
            phoenix.wait_condition(bound, "iris", "BindingsReady", "True", "Bound", deadline_s=120)
            phoenix.infer(bound)
            print(f"{kind} {fault.__name__}: {row['message']}")
    pods = phoenix.pods(bound)
    assert {pod["metadata"]["uid"] for pod in pods} == before
    assert not any(row["restartCount"] for pod in pods for row in pod["status"]["containerStatuses"])


def test_deleted_model_leaves_no_login(phoenix: Phoenix, bound: str, admin: dict[str, Keys]) -> None:
    assert users_of(admin, bound) == {f"phx:{bound}:iris:a"}
    phoenix.kubectl("delete", "phx", "iris", "-n", bound, "--timeout=120s", timeout_s=150)
    assert users_of(admin, bound) == set()
    phoenix.wait_for("its Secrets to go", lambda: phoenix.get(bound, "secret/iris-redis") is None)


def test_deletion_waits_for_a_backend_that_is_down_and_no_longer(
    phoenix: Phoenix, bound: str, admin: dict[str, Keys]
) -> None:
    service = together.running(state.Lab("default"))["redis"]
    service.kill()
    try:
        phoenix.delete(bound, "phx/iris", "--wait=false")
        row = phoenix.wait_condition(bound, "iris", "BindingsReady", "False", "DeletionBlocked", deadline_s=120)
        assert "redis" in row["message"], row
    finally:
        service.start()
    phoenix.wait_for("the model to go", lambda: phoenix.get(bound, "phx/iris") is None, deadline_s=90)
    assert users_of(admin, bound) == set()
