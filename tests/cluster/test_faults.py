"""What keeps pods from serving: each fault shows in the conditions within seconds, with its reason and the next step.

Every test breaks something, waits for the exact condition and reason, mends it, and waits until the model is Ready.
"""

import base64
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from phoenix_cluster import Object, Phoenix, model
from server.artifact_models import external_model

GOOD_SHA256 = "e800fa4e95fd2cde90f4ac82e940545d02c07c60203ba73d329e90d7c8775736"


def config_map(name: str, file: str, content: bytes) -> Object:
    """Return a ConfigMap with one file."""
    data = {file: base64.b64encode(content).decode()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": data}


def model_of_opset(version: int) -> bytes:
    """Return a whole ONNX file that asks for this opset."""
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", rows[:1], rows[1:])
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=9)
    return made.SerializeToString()


def mend(phoenix: Phoenix, namespace: str, **spec: Any) -> None:
    """Apply a spec without the fault; wait until the model is Ready."""
    phoenix.apply(namespace, model(**spec))
    phoenix.wait_ready(namespace)


def test_image_that_is_not_there(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(runtime={"image": "registry.invalid/none:1"}))
    words = ("registry.invalid/none:1", "spec.runtime.image")
    phoenix.wait_fault(namespace, "iris", "Available", "ImagePullFailed", *words)
    mend(phoenix, namespace)


def test_digest_of_another_file(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(model={"uri": "iris/model.onnx", "sha256": "0" * 64}))
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "DigestMismatch", "0" * 64, GOOD_SHA256)
    mend(phoenix, namespace, model={"uri": "iris/model.onnx", "sha256": GOOD_SHA256})


def test_model_file_that_is_not_there(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(model={"uri": "iris/mode.onnx"}))
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "NotFound", "iris/mode.onnx is not found; looked at")
    mend(phoenix, namespace)


def test_file_that_is_no_model(phoenix: Phoenix, namespace: str) -> None:
    files = config_map("files", "model.onnx", b"<!DOCTYPE html><html>moved</html>")
    phoenix.apply(namespace, files, model(model={"uri": "configmap://files/model.onnx"}))
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "InvalidModel", "not an ONNX model", "HTML")
    mend(phoenix, namespace)


def test_opset_of_the_future(phoenix: Phoenix, namespace: str) -> None:
    files = config_map("files", "model.onnx", model_of_opset(99))
    phoenix.apply(namespace, files, model(model={"uri": "configmap://files/model.onnx"}))
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "UnsupportedOpset", "ai.onnx 99", "older opset")
    # another file under the same name is not noticed by a Deployment: its name is what a new version changes
    phoenix.apply(namespace, config_map("older", "model.onnx", model_of_opset(17)))
    mend(phoenix, namespace, model={"uri": "configmap://older/model.onnx"})


def test_weights_file_that_is_not_there(phoenix: Phoenix, namespace: str) -> None:
    files = config_map("files", "model.onnx", external_model("weights.bin"))
    phoenix.apply(namespace, files, model(model={"uri": "configmap://files/model.onnx"}))
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "ExternalDataMissing", "weights.bin")
    weights = numpy_helper.from_array(np.zeros((1, 4), np.float32)).raw_data
    phoenix.patch(namespace, "configmap/files", {"binaryData": {"weights.bin": base64.b64encode(weights).decode()}})
    # nothing of the model changed: the next start of the container finds the file
    phoenix.wait_ready(namespace)


def test_memory_limit_that_is_too_low(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(resources={"requests": {"cpu": "50m", "memory": "40Mi"}}))
    words = ("memory limit of 40Mi", "spec.resources.requests.memory")
    phoenix.wait_fault(namespace, "iris", "Available", "OutOfMemory", *words)
    mend(phoenix, namespace)


def test_setting_that_is_wrong(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(pod={"env": [{"name": "PHOENIX_LOG_LEVEL", "value": "loud"}]}))
    phoenix.wait_fault(namespace, "iris", "Available", "InvalidSetting", "PHOENIX_LOG_LEVEL", "loud", "spec.pod.env")
    mend(phoenix, namespace, pod={"env": [{"name": "PHOENIX_LOG_LEVEL", "value": "debug"}]})


def test_crash_loop_after_having_been_ready_ends_by_itself(phoenix: Phoenix, namespace: str) -> None:
    phoenix.start_client(namespace)
    mend(phoenix, namespace)
    kill_server(phoenix, namespace, restarts=0)
    # the first restart is immediate; only the second end makes the kubelet wait
    phoenix.wait_for("the restarted server", lambda: running_after(phoenix, namespace, restarts=1))
    kill_server(phoenix, namespace, restarts=1)
    phoenix.wait_for("the back-off", lambda: "CrashLoopBackOff" in phoenix.trouble(namespace, "iris"))
    row = phoenix.wait_fault(namespace, "iris", "Available", "CrashLoop", "exit code 137", "kubectl logs")
    verified = phoenix.conditions(namespace)["ModelVerified"]
    assert (verified["status"], verified["reason"]) == ("True", "Verified")
    assert "restarted once" in row["message"]
    phoenix.wait_ready(namespace, deadline_s=60)
    assert phoenix.infer(namespace)["model_name"] == "iris"


def kill_server(phoenix: Phoenix, namespace: str, *, restarts: int) -> None:
    phoenix.kill(running_after(phoenix, namespace, restarts=restarts))


def running_after(phoenix: Phoenix, namespace: str, *, restarts: int) -> Object | None:
    """Return the model's pod if its container runs after so many restarts."""
    pod = phoenix.pods(namespace)[0]
    state = pod["status"]["containerStatuses"][0]
    return pod if "running" in state["state"] and state["restartCount"] == restarts else None


def test_variable_from_a_secret_that_appears_later(phoenix: Phoenix, namespace: str) -> None:
    source = {"secretKeyRef": {"name": "later", "key": "level"}}
    phoenix.apply(namespace, model(pod={"env": [{"name": "PHOENIX_LOG_LEVEL", "valueFrom": source}]}))
    words = ('secret "later" not found', "spec.pod.env", "starts by itself")
    phoenix.wait_fault(namespace, "iris", "Available", "ConfigurationMissing", *words)
    phoenix.kubectl("create", "secret", "generic", "later", "--from-literal=level=info", "-n", namespace)
    phoenix.wait_ready(namespace)


def test_variable_from_a_key_that_appears_later(phoenix: Phoenix, namespace: str) -> None:
    phoenix.kubectl("create", "configmap", "there", "-n", namespace)
    source = {"configMapKeyRef": {"name": "there", "key": "level"}}
    phoenix.apply(namespace, model(pod={"env": [{"name": "PHOENIX_LOG_LEVEL", "valueFrom": source}]}))
    words = ("couldn't find key level", "spec.pod.env", "starts by itself")
    phoenix.wait_fault(namespace, "iris", "Available", "ConfigurationMissing", *words)
    phoenix.patch(namespace, "configmap/there", {"data": {"level": "info"}})
    phoenix.wait_ready(namespace)


def test_bad_version_keeps_the_good_one_serving_and_fails_by_its_deadline(phoenix: Phoenix, namespace: str) -> None:
    good = {"model": {"uri": "iris/model.onnx", "version": "1"}, "rollout": {"drainSeconds": 1}}
    phoenix.start_client(namespace)
    mend(phoenix, namespace, **good)
    bad = {"model": {"uri": "iris/model.onnx", "version": "2", "sha256": "0" * 64}}
    phoenix.apply(namespace, model(**bad, rollout={"drainSeconds": 1, "progressDeadlineSeconds": 8}))
    row = phoenix.wait_fault(
        namespace, "iris", "ModelVerified", "DigestMismatch", "version 2", "version 1 keeps serving"
    )
    phoenix.wait_condition(namespace, "iris", "Available", "True", "ReplicasAvailable")
    assert phoenix.infer(namespace)["model_version"] == "1"
    assert "0" * 64 in row["message"]
    row = phoenix.wait_condition(namespace, "iris", "Progressing", "False", "DeadlineExceeded", deadline_s=25)
    print(row["message"])
    for words in ("version 2 made no progress for 8 s", "DigestMismatch", "version 1 keeps serving"):
        assert words in row["message"]
    assert phoenix.infer(namespace)["model_version"] == "1"
    # the good version's server may end, too: what it serves is kept for it
    good_pod = serving_pod(phoenix, namespace)
    assert good_pod is not None
    phoenix.kill(good_pod)
    phoenix.wait_for("the good version again", lambda: answers(phoenix, namespace, version="1"))
    mend(phoenix, namespace, model={"uri": "iris/model.onnx", "version": "3"})
    phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut")
    phoenix.wait_for("version 3 answers", lambda: answers(phoenix, namespace, version="3"))


def serving_pod(phoenix: Phoenix, namespace: str) -> Object | None:
    """Return the pod whose container is ready, if there is one."""
    pods = phoenix.pods(namespace)
    return next((pod for pod in pods if all(row["ready"] for row in pod["status"]["containerStatuses"])), None)


def answers(phoenix: Phoenix, namespace: str, *, version: str) -> bool:
    return serving_pod(phoenix, namespace) is not None and phoenix.infer(namespace)["model_version"] == version
