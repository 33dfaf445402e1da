"""GPUs that the node advertises and the scheduler hands out for real; there is no device behind them."""

import json
from collections.abc import Iterator
from typing import Any

import cluster as tools
import pytest
from phoenix_cluster import Phoenix, model


@pytest.fixture
def two_gpus(phoenix: Phoenix) -> Iterator[None]:
    """The node advertises two nvidia.com/gpu."""
    # the pods of the test before may still be ending, and a preference gives way at once where no device is free
    phoenix.wait_for("free devices", lambda: not _holders(phoenix), deadline_s=90)
    tools.lab("gpus", "2")
    yield
    tools.lab("gpus", "0")


def _holders(phoenix: Phoenix) -> list[str]:
    """Return the pods on the node that have a device."""
    pods = json.loads(phoenix.kubectl("get", "pods", "-A", "-o", "json"))["items"]
    return [
        pod["metadata"]["name"]
        for pod in pods
        if any("nvidia.com/gpu" in row["resources"].get("limits", {}) for row in pod["spec"]["containers"])
    ]


def on_gpu(name: str, policy: str, count: int = 1, **spec: Any) -> dict[str, Any]:
    accelerator = {"policy": policy, "resourceName": "nvidia.com/gpu", "count": count}
    return model(name, runtime={"accelerator": accelerator}, **spec)


@pytest.mark.usefixtures("two_gpus")
def test_third_model_has_no_gpu_left_and_says_what_is_short(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, on_gpu("one", "Prefer"), on_gpu("two", "Prefer"))
    for name in ("one", "two"):
        # the pod has its device by the scheduler's count, and the session says truthfully that it found none
        phoenix.wait_condition(namespace, name, "AcceleratorReady", "False", "FellBackToCPU")
    phoenix.apply(namespace, on_gpu("three", "Require"))
    row = phoenix.wait_condition(namespace, "three", "AcceleratorReady", "False", "Unschedulable")
    print(row["message"])
    assert "Insufficient nvidia.com/gpu" in row["message"]
    assert "nvidia.com/gpu asked 1, free 0 of 2" in row["message"]
    ready = phoenix.wait_condition(namespace, "three", "Ready", "False", "Unschedulable")
    assert ready["message"] == row["message"]

    phoenix.delete(namespace, "phx/one")
    # placed now; without a device it refuses to serve
    phoenix.wait_condition(namespace, "three", "AcceleratorReady", "False", "ProviderUnavailable")


@pytest.mark.usefixtures("two_gpus")
def test_required_accelerator_without_device_is_not_served(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, on_gpu("iris", "Require"))
    row = phoenix.wait_condition(namespace, "iris", "AcceleratorReady", "False", "ProviderUnavailable")
    assert "CUDA" in row["message"]
    phoenix.wait_condition(namespace, "iris", "Ready", "False", "ProviderUnavailable")
    phoenix.apply(namespace, on_gpu("iris", "Prefer"))
    phoenix.wait_ready(namespace)


@pytest.mark.usefixtures("two_gpus")
def test_preferred_accelerator_without_device_serves_and_says_so(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, on_gpu("iris", "Prefer"))
    phoenix.start_client(namespace)
    ready = phoenix.wait_ready(namespace)
    assert ready["reason"] == "FellBackToCPU"
    assert phoenix.infer(namespace)["model_name"] == "iris"
    assert "FellBackToCPU" in phoenix.kubectl("get", "phx", "iris", "-n", namespace)
    pod = phoenix.all(namespace, "pods", "-l", "phoenix-ml.io/model=iris")[0]
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_preferred_accelerator_that_no_node_has_serves_on_cpu(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, on_gpu("iris", "Prefer", rollout={"drainSeconds": 1, "strategy": "Surge"}))
    ready = phoenix.wait_ready(namespace)
    assert ready["reason"] == "FellBackToCPU"
    assert "no node has 1 of nvidia.com/gpu to give" in ready["message"]
    pods = phoenix.wait_for("one pod", lambda: _alone(phoenix, namespace))
    assert "nvidia.com/gpu" not in pods[0]["spec"]["containers"][0]["resources"]["limits"]


def _alone(phoenix: Phoenix, namespace: str) -> list[dict[str, Any]] | None:
    pods = phoenix.all(namespace, "pods", "-l", "phoenix-ml.io/model=iris")
    return pods if len(pods) == 1 else None


@pytest.mark.usefixtures("two_gpus")
def test_new_version_takes_over_the_only_gpu_in_place(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, on_gpu("iris", "Prefer", count=2))
    phoenix.wait_ready(namespace)
    changed = on_gpu("iris", "Prefer", count=2, batching={"maxRows": 8})
    phoenix.apply(namespace, changed)
    phoenix.wait_ready(namespace)
    pods = phoenix.wait_for("one pod", lambda: _alone(phoenix, namespace))
    # the device was not given up while the old pod still had it
    assert pods[0]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"


def test_profile_brings_resource_and_node_selector(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(runtime={"accelerator": {"policy": "Require", "profile": "small"}}))
    phoenix.wait_condition(namespace, "iris", "AcceleratorReady", "False", "Unschedulable")
    pod = phoenix.all(namespace, "pods", "-l", "phoenix-ml.io/model=iris")[0]
    assert pod["spec"]["nodeSelector"] == {"gpu": "small"}
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_fake_nodes_take_what_the_real_one_cannot(phoenix: Phoenix, namespace: str) -> None:
    tools.lab("nodes", "2", "--gpus", "4", "--schedulable")
    try:
        phoenix.apply(namespace, on_gpu("iris", "Require", count=4, replicas=3))
        row = phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RollingOut")
        phoenix.wait_for("two pods placed", lambda: len(_placed(phoenix, namespace)) == 2)
        row = phoenix.wait_for("the third is short", lambda: _short(phoenix, namespace))
        assert "asked 4, free 0 of 4" in row
    finally:
        phoenix.delete(namespace, "phx/iris")
        tools.lab("nodes", "0")


def _placed(phoenix: Phoenix, namespace: str) -> set[str]:
    pods = phoenix.all(namespace, "pods", "-l", "phoenix-ml.io/model=iris")
    return {pod["spec"]["nodeName"] for pod in pods if "nodeName" in pod["spec"]}


def _short(phoenix: Phoenix, namespace: str) -> str:
    rows = phoenix.conditions(namespace)
    messages = [row["message"] for row in rows.values() if "asked 4, free 0 of 4" in row["message"]]
    return messages[0] if messages else ""
