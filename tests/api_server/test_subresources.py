"""Status and scale of a PhoenixModel, as a real API server serves them."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from api_client import APPLY, MERGE, Answer, Api, ApiServer, in_turn, models_path
from kubernetes.aio import client, config
from objects import NAME, STAMP, document
from specs import SCALING, SOURCE
from status_cases import CASES, Case, status_of

from phoenix_operator.cluster import Cluster, Pace, as_yaml
from phoenix_operator.kinds import PHOENIX_MODEL
from phoenix_operator.status import unreadable_status

NAMESPACE = "subresources"


@pytest.fixture(scope="session")
def namespace(server: ApiServer) -> str:
    server.run(lambda api: api.make_namespace(NAMESPACE))
    return NAMESPACE


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": name},
        "spec": {"model": SOURCE} | spec,
    }


def make(server: ApiServer, name: str, **spec: Any) -> dict[str, Any]:
    path = models_path(NAMESPACE)
    return server.run(lambda api: api.must("POST", path, manifest(name, **spec), fieldValidation="Strict"))


# --- status ----------------------------------------------------------------------------------------------------------


def write_status(api: Api, name: str, status: dict[str, Any]) -> Awaitable[Answer]:
    """Ask as the operator does, but let the API server also complain of what it would drop."""
    body = manifest(name) | {"status": status}
    del body["spec"]
    path = models_path(NAMESPACE, name, "status")
    manager = {"fieldManager": "phoenix-operator-status", "force": "true"}
    return api("PATCH", path, as_yaml(body), kind=APPLY, fieldValidation="Strict", **manager)


@pytest.fixture(scope="session")
def written(server: ApiServer, namespace: str) -> dict[str, tuple[dict[str, Any], Answer, Answer]]:
    """By case: the status, and what the API server says when it is written once and once more."""
    statuses = {case.id: status_of(*case.seen()) for case in CASES}

    async def ask(api: Api, case: Case) -> tuple[Answer, Answer]:
        name = f"m-{CASES.index(case)}"
        await api.must("POST", models_path(NAMESPACE), manifest(name))
        return await write_status(api, name, statuses[case.id]), await write_status(api, name, statuses[case.id])

    answers = server.run(lambda api: in_turn(ask(api, case) for case in CASES))
    return {case.id: (statuses[case.id], *pair) for case, pair in zip(CASES, answers, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_status_is_stored_as_it_was_written(
    case: Case, written: dict[str, tuple[dict[str, Any], Answer, Answer]]
) -> None:
    status, first, second = written[case.id]
    assert first.is_success, first.message
    assert first.body["status"] == status
    version = first.body["metadata"]["resourceVersion"]
    assert second.body["metadata"]["resourceVersion"] == version, "the same status again is no write"


def test_status_of_any_text_is_stored_as_the_operator_writes_it(server: ApiServer, namespace: str) -> None:
    """The API server reads an apply as YAML, where some characters of JSON end a line or are not allowed."""
    make(server, "any-text")
    hostile = [*range(0xA1), *range(0x2020, 0x2030), 0xD7FF, *range(0xFEF0, 0xFF10), *range(0xFFF0, 0x10000), 0x1F600]
    text = "".join(chr(code) for code in [*hostile, 0x1FFFE, 0x10FFFF])
    status = unreadable_status(document(), f"spec.model.uri: expected {text}", STAMP)

    async def write() -> dict[str, Any]:
        configuration = client.Configuration()
        await config.load_kube_config(str(server.kubeconfig), client_configuration=configuration)
        api = client.ApiClient(configuration)
        cluster = Cluster(api, pace=Pace(100), timeout_s=30, observer=lambda verb, code, seconds: None)
        try:
            return await cluster.apply_status(PHOENIX_MODEL, NAMESPACE, "any-text", status)
        finally:
            await cluster.close()

    assert asyncio.run(write())["status"] == status


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("status.conditions[0].status", lambda status: status["conditions"][0].update(status="Perhaps")),
        ("status.conditions[0].reason", lambda status: status["conditions"][0].update(reason="two words")),
        ("status.conditions[0].lastTransitionTime", lambda status: status["conditions"][0].update(
            lastTransitionTime="yesterday")),
        ("status.replicas.ready", lambda status: status["replicas"].update(ready=-1)),
    ],
)  # fmt: skip
def test_status_that_breaks_its_schema_is_refused(
    server: ApiServer, namespace: str, field: str, change: Callable[[dict[str, Any]], None]
) -> None:
    name = "status-" + field.rpartition(".")[2].lower()
    make(server, name)
    status = json.loads(json.dumps(status_of(*CASES[0].seen())))
    change(status)
    answer = server.run(lambda api: write_status(api, name, status))
    assert answer.code == 422
    assert field in {field for field, _ in answer.causes}


def test_columns_show_the_status(server: ApiServer, namespace: str) -> None:
    case = next(case for case in CASES if case.id == "serving")
    make(server, "columns")

    async def ask(api: Api) -> dict[str, Any]:
        await write_status(api, "columns", status_of(*case.seen()))
        table = "application/json;as=Table;g=meta.k8s.io;v=v1"
        return await api.must("GET", models_path(NAMESPACE, "columns"), accept=table)

    table = server.run(ask)
    cells = dict(zip((column["name"] for column in table["columnDefinitions"]), table["rows"][0]["cells"], strict=True))
    assert cells.pop("AGE")
    assert cells == {
        "Name": "columns",
        "READY": "1/1",
        "STATUS": "Ready",
        "VERSION": "1",
        "DEVICE": "CPUExecutionProvider",
        "P95": None,
        "URI": "iris/model.onnx",
        "ENDPOINT": f"http://{NAME}.ml.svc:8000",
    }


# --- scale -----------------------------------------------------------------------------------------------------------


def scale(server: ApiServer, name: str, replicas: int) -> Answer:
    path = models_path(NAMESPACE, name, "scale")
    return server.run(lambda api: api("PATCH", path, {"spec": {"replicas": replicas}}, kind=MERGE))


def test_scale_reads_ready_pods_and_selector_of_the_status(server: ApiServer, namespace: str) -> None:
    make(server, "scale-read", replicas=3)
    status = {"readyReplicas": 2, "selector": "phoenix-ml.io/model=scale-read"}
    server.run(lambda api: write_status(api, "scale-read", status))
    told = server.ask("GET", models_path(NAMESPACE, "scale-read", "scale"))
    assert told.body["spec"] == {"replicas": 3}
    assert told.body["status"] == {"replicas": 2, "selector": "phoenix-ml.io/model=scale-read"}


def test_scale_sets_replicas(server: ApiServer, namespace: str) -> None:
    make(server, "scale-write")
    assert scale(server, "scale-write", 5).is_success
    told = server.ask("GET", models_path(NAMESPACE, "scale-write")).body
    assert told["spec"]["replicas"] == 5
    assert told["metadata"]["generation"] == 2


def test_scale_above_the_bound_is_refused(server: ApiServer, namespace: str) -> None:
    make(server, "scale-bound")
    told = scale(server, "scale-bound", 1001)
    assert not told.is_success
    assert "spec.replicas" in told.message


def test_scale_of_a_model_that_scales_itself_is_refused_with_the_rule(server: ApiServer, namespace: str) -> None:
    make(server, "scale-auto", autoscaling=SCALING)
    told = scale(server, "scale-auto", 2)
    assert not told.is_success
    assert "autoscaling excludes replicas: remove replicas, or set it to its default 1" in told.message


# --- field selectors -------------------------------------------------------------------------------------------------


def test_models_are_selected_by_uri_and_version(server: ApiServer, namespace: str) -> None:
    make(server, "select-1", model={"uri": "s3://models/selected.onnx", "version": "7"})
    make(server, "select-2", model={"uri": "s3://models/selected.onnx", "version": "8"})
    selector = "spec.model.uri=s3://models/selected.onnx,spec.model.version=7"
    found = server.ask("GET", models_path(NAMESPACE), fieldSelector=selector).body["items"]
    assert [item["metadata"]["name"] for item in found] == ["select-1"]
