"""Whatever somebody deletes or edits of what a model became comes back within seconds, and an event tells of it."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import cluster as tools
import pytest
from phoenix_cluster import TRUTH_S, Object, Phoenix, model

CHILDREN = (
    "serviceaccount/iris",
    "configmap/iris-model",
    "networkpolicy/iris",
    "service/iris",
    "service/iris-headless",
    "deployment/iris",
    "poddisruptionbudget/iris",
    "ingress/iris",
)


@pytest.fixture(scope="module")
def kept(phoenix: Phoenix) -> Iterator[str]:
    """A namespace with one model that has a child of every usual kind; the tests leave it as they found it."""
    name = f"t{os.getpid()}-repairs"
    tools.make_namespace(phoenix.kubectl, name)
    phoenix.apply(name, model(replicas=2, networking={"host": f"{name}.example.com"}))
    phoenix.start_client(name)
    phoenix.wait_ready(name)
    phoenix.wait_condition(name, "iris", "Progressing", "True", "RolledOut")
    yield name
    phoenix.kubectl("delete", "namespace", name, "--wait=false")


def of_ours(body: Object) -> Object:
    """Return the fields of an object that the operator owns, or might."""
    fields: Object = {key: body[key] for key in ("spec", "data", "automountServiceAccountToken") if key in body}
    metadata = body["metadata"]
    hashed = metadata.get("annotations", {}).get("phoenix-ml.io/hash")
    return fields | {"labels": metadata.get("labels"), "owners": metadata.get("ownerReferences"), "hash": hashed}


def wait_for_repair(phoenix: Phoenix, namespace: str, what: str, before: Object, started: float) -> None:
    phoenix.wait_for("the repair", lambda: is_repaired(phoenix, namespace, what, before), deadline_s=TRUTH_S)
    print(f"{what} was as before after {time.monotonic() - started:.2f} s")


def is_repaired(phoenix: Phoenix, namespace: str, what: str, before: Object) -> bool:
    found = phoenix.get(namespace, what)
    if found is None:
        return False
    wanted = of_ours(before)
    if before["metadata"]["uid"] != found["metadata"]["uid"] and before["kind"] == "Service":
        # made again, with an address of its own
        for body in (wanted, found):
            if body["spec"].get("clusterIP") != "None":
                body["spec"] = {key: value for key, value in body["spec"].items() if not key.startswith("clusterIP")}
    return of_ours(found) == wanted


def wait_for_event(phoenix: Phoenix, namespace: str, *words: str) -> None:
    def told() -> bool:
        lines = phoenix.kubectl("describe", "phx/iris", "-n", namespace).splitlines()
        return any("Repaired" in line and all(word in line for word in words) for line in lines)

    phoenix.wait_for("the event", told, deadline_s=TRUTH_S)


@pytest.mark.parametrize("what", CHILDREN)
def test_deleted_child_is_made_again(phoenix: Phoenix, kept: str, what: str) -> None:
    before = phoenix.get(kept, what)
    assert before is not None
    started = time.monotonic()
    phoenix.delete(kept, what, "--wait=false")
    phoenix.wait_for("another one", lambda: is_another(phoenix, kept, what, before), deadline_s=TRUTH_S)
    wait_for_repair(phoenix, kept, what, before, started)
    wait_for_event(phoenix, kept, f"{before['kind']} {before['metadata']['name']} had been deleted")


def is_another(phoenix: Phoenix, namespace: str, what: str, before: Object) -> bool:
    found = phoenix.get(namespace, what)
    return found is not None and found["metadata"]["uid"] != before["metadata"]["uid"]


CONTAINER = "/spec/template/spec/containers/0"
OURS = "app.kubernetes.io~1managed-by"
MODEL = "phoenix-ml.io~1model"


def replace(path: str, value: Any) -> Object:
    return {"op": "replace", "path": path, "value": value}


def remove(path: str) -> Object:
    return {"op": "remove", "path": path}


POD_NAME = {"fieldRef": {"fieldPath": "metadata.name"}}
OTHER_BUDGET = {"minAvailable": 1, "selector": {"matchLabels": {"phoenix-ml.io/model": "iris"}}}
EDITS: dict[str, tuple[str, Object]] = {
    "token": ("serviceaccount/iris", replace("/automountServiceAccountToken", True)),
    "manifest": ("configmap/iris-model", {}),  # its key is the revision: filled in by the test
    "open-ingress": ("networkpolicy/iris", replace("/spec/ingress", [{}])),
    "open-egress": ("networkpolicy/iris", {"op": "add", "path": "/spec/egress/-", "value": {}}),
    "selector": ("service/iris", replace("/spec/selector/phoenix-ml.io~1model", "other")),
    "more-selector": ("service/iris", {"op": "add", "path": "/spec/selector/more", "value": "narrow"}),
    "port": ("service/iris-headless", replace("/spec/ports/0/port", 8080)),
    "replicas": ("deployment/iris", replace("/spec/replicas", 3)),
    "image": ("deployment/iris", replace(f"{CONTAINER}/image", "registry.invalid/other:1")),
    "args": ("deployment/iris", replace(f"{CONTAINER}/args", ["serve", "/elsewhere"])),
    "env": ("deployment/iris", replace(f"{CONTAINER}/env/1/value", "999")),
    "env-removed": ("deployment/iris", remove(f"{CONTAINER}/env/1")),
    "readiness": ("deployment/iris", replace(f"{CONTAINER}/readinessProbe/httpGet/path", "/")),
    "readiness-handler": (
        "deployment/iris",
        replace(f"{CONTAINER}/readinessProbe", {"tcpSocket": {"port": "http"}, "periodSeconds": 5}),
    ),
    "env-from": (
        "deployment/iris",
        replace(f"{CONTAINER}/env/1", {"name": "PHOENIX_DRAIN_SECONDS", "valueFrom": POD_NAME}),
    ),
    "container-port": ("deployment/iris", replace(f"{CONTAINER}/ports/0/containerPort", 8080)),
    "volume": ("deployment/iris", replace("/spec/template/spec/volumes/1", {"name": "tmp", "hostPath": {"path": "/"}})),
    "liveness-removed": ("deployment/iris", remove(f"{CONTAINER}/livenessProbe")),
    "memory": ("deployment/iris", replace(f"{CONTAINER}/resources/requests/memory", "64Mi")),
    "security": ("deployment/iris", replace(f"{CONTAINER}/securityContext/readOnlyRootFilesystem", False)),
    "strategy": ("deployment/iris", replace("/spec/strategy", {"type": "Recreate"})),
    "budget-other-way": ("poddisruptionbudget/iris", replace("/spec", OTHER_BUDGET)),
    "budget": ("poddisruptionbudget/iris", replace("/spec/maxUnavailable", 2)),
    "host": ("ingress/iris", replace("/spec/rules/0/host", "other.example.com")),
    "ours-label": ("networkpolicy/iris", remove(f"/metadata/labels/{OURS}")),
    "ours-label-of-deployment": ("deployment/iris", remove(f"/metadata/labels/{OURS}")),
    "model-label": ("service/iris", replace(f"/metadata/labels/{MODEL}", "other")),
    "hash": ("configmap/iris-model", remove("/metadata/annotations/phoenix-ml.io~1hash")),
    "block-owner": ("ingress/iris", replace("/metadata/ownerReferences/0/blockOwnerDeletion", False)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_child_is_set_back(phoenix: Phoenix, kept: str, edit: str) -> None:
    what, operation = EDITS[edit]
    before = phoenix.get(kept, what)
    assert before is not None
    if edit == "manifest":
        key = next(iter(before["data"]))
        operation = replace(f"/data/{key}", before["data"][key].replace("iris/model.onnx", "other/model.onnx"))
    started = time.monotonic()
    changed = phoenix.kubectl("patch", what, "-n", kept, "--type=json", "-o=json", "-p", json.dumps([operation]))
    assert of_ours(json.loads(changed)) != of_ours(before), "the edit changes nothing"
    wait_for_repair(phoenix, kept, what, before, started)
    wait_for_event(phoenix, kept, f"{before['kind']} {before['metadata']['name']} had been changed")
    whole = json.loads(phoenix.kubectl("get", what, "-n", kept, "-o", "json", "--show-managed-fields"))
    managers = {row["manager"] for row in whole["metadata"]["managedFields"]}
    assert "phoenix-operator-reset" not in managers


def test_serves_after_all_that(phoenix: Phoenix, kept: str) -> None:
    phoenix.wait_ready(kept)
    phoenix.wait_condition(kept, "iris", "Progressing", "True", "RolledOut")
    assert phoenix.infer(kept)["model_name"] == "iris"
    described = phoenix.kubectl("describe", "phx/iris", "-n", kept)
    print(described[described.index("Events:") :])


def test_child_without_its_owner_belongs_to_somebody_else(phoenix: Phoenix, kept: str) -> None:
    patch = json.dumps({"metadata": {"ownerReferences": None}})
    phoenix.kubectl("patch", "service/iris-headless", "-n", kept, "--type=merge", "-p", patch)
    words = (f"Service {kept}/iris-headless", "belongs to somebody else")
    phoenix.wait_fault(kept, "iris", "Accepted", "NameClash", *words, is_known=True)
    phoenix.wait_condition(kept, "iris", "Available", "True")
    phoenix.delete(kept, "service/iris-headless")
    phoenix.wait_ready(kept)
