"""The server without operator: its pods are what the operator makes of a model, and the server reads its manifests."""

import os
import subprocess
import sys
from pathlib import Path

import charts
import pytest
import yaml
from charts import NAMESPACE, Object

from phoenix_api import parse_manifests
from phoenix_operator.desired import bindings, desired_objects
from phoenix_operator.observed import Observed
from phoenix_operator.render import subject_of
from phoenix_operator.settings import Settings
from phoenix_server import settings as server

NAME = "phoenix-server"
STORED: Object = {"model": {"uri": "iris/model.onnx"}}
FETCHED: Object = {"model": {"uri": "s3://a/b", "credentials": {"secretRef": {"name": "s3-reader"}}}}
RESOURCES: Object = {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}}


def standalone(models: Object, **more: object) -> list[Object]:
    return charts.objects({"standalone": {"enabled": True, "models": models, **more}})


def of_operator(spec: Object) -> dict[str, Object]:
    """Return what the operator makes of a model, by kind."""
    body = {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "metadata": {"name": "a"}, "spec": spec}
    (manifest,) = parse_manifests(yaml.safe_dump(body), file="a.yaml")
    made = desired_objects(subject_of(manifest), Observed(), Settings(), operator_namespace=NAMESPACE)
    return {each["kind"]: each for each in made if not each["metadata"]["name"].endswith("-headless")}


def container(deployment: Object) -> Object:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("spec", [STORED, FETCHED], ids=["stored", "fetched"])
def test_pod_is_what_the_operator_makes_of_a_model(spec: Object) -> None:
    theirs = of_operator(spec | {"resources": RESOURCES})["Deployment"]
    ours = charts.one(standalone({"a": spec}), "Deployment", NAME)
    wanted, made = container(theirs), container(ours)
    made["env"] = [row for row in made["env"] if row["name"] != "PHOENIX_LOG_LEVEL"]
    for each in (wanted, made):
        for listed in ("env", "volumeMounts"):
            each[listed] = sorted(each[listed], key=lambda row: row["name"])
    assert made == wanted
    pod, their_pod = ours["spec"]["template"]["spec"], theirs["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is their_pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] == their_pod["terminationGracePeriodSeconds"]
    assert pod["securityContext"] == their_pod["securityContext"]
    for field in ("replicas", "progressDeadlineSeconds", "strategy"):
        assert ours["spec"][field] == theirs["spec"][field]
    volumes = {row["name"]: row for row in pod["volumes"]}
    for volume in their_pod["volumes"]:
        if volume["name"] != "model":
            assert volumes[volume["name"]] == volume


def test_service_has_the_ports_of_the_operators() -> None:
    theirs = of_operator(STORED)["Service"]
    ours = charts.one(standalone({"a": STORED}), "Service", NAME)
    assert ours["spec"]["ports"] == theirs["spec"]["ports"]
    pod = charts.one(standalone({"a": STORED}), "Deployment", NAME)["spec"]["template"]["metadata"]
    assert ours["spec"]["selector"].items() <= pod["labels"].items()


def test_pod_that_ends_has_time_for_its_requests() -> None:
    made = charts.one(standalone({"a": STORED}, drainSeconds=20, longestRequestSeconds=100), "Deployment", NAME)
    environment = {row["name"]: row.get("value") for row in container(made)["env"]}
    needed = int(environment["PHOENIX_DRAIN_SECONDS"]) + int(environment["PHOENIX_SHUTDOWN_SECONDS"])
    assert needed >= 120
    assert made["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed


def test_bindings_lie_where_the_server_looks() -> None:
    made = charts.one(standalone({"a": STORED}, bindingSecrets=["redis-a", "kafka.a"]), "Deployment", NAME)
    assert {"name": bindings.ROOT_VARIABLE, "value": bindings.ROOT} in container(made)["env"]
    mounts = [row["mountPath"] for row in container(made)["volumeMounts"] if row["name"].startswith("binding-")]
    assert mounts == [f"{bindings.ROOT}/redis-a", f"{bindings.ROOT}/kafka.a"]
    secrets = [row["secret"]["secretName"] for row in made["spec"]["template"]["spec"]["volumes"] if "secret" in row]
    assert secrets == ["redis-a", "kafka.a"]


def test_accelerator_takes_the_image_for_it() -> None:
    gpu = STORED | {"runtime": {"accelerator": {"policy": "Prefer", "provider": "CUDA"}}}
    made = charts.one(standalone({"a": STORED, "b": gpu}), "Deployment", NAME)
    assert container(made)["image"] == Settings().server_gpu_image


def test_change_of_a_model_rolls_the_pods() -> None:
    def checksum(spec: Object) -> str:
        made = charts.one(standalone({"a": spec}), "Deployment", NAME)
        return str(made["spec"]["template"]["metadata"]["annotations"]["checksum/models"])

    assert checksum(STORED) == checksum(dict(STORED))
    assert checksum(STORED) != checksum(STORED | {"batching": {"maxRows": 1}})


def test_budget_is_made_only_where_a_drain_can_go_on() -> None:
    budgets = [
        [body["metadata"]["name"] for body in standalone({"a": STORED}, replicas=replicas)
         if body["kind"] == "PodDisruptionBudget"]
        for replicas in (1, 2)
    ]  # fmt: skip
    assert budgets == [["phoenix-operator"], ["phoenix-operator", NAME]]


def test_nothing_of_the_operator_is_there_where_it_is_off() -> None:
    made = charts.objects(charts.read(charts.CHART / "ci" / "standalone-values.yaml"))
    assert {body["metadata"]["name"] for body in made} == {NAME, "phoenix-server-models"}
    assert all(body["metadata"]["namespace"] == NAMESPACE for body in made)


def test_servers_settings_may_be_given_but_those_of_the_pods_wiring() -> None:
    """Each variable is either allowed in `environment`, or set by the chart, or not for a pod."""
    known = {server.Settings.variable(name) for name in server.Settings.model_fields}
    refused = set()
    for name in sorted(known):
        values = {"standalone": {"environment": {name: "1"}}}
        done = charts.run("template", "phoenix", str(charts.CHART), "--values", "-", stdin=yaml.safe_dump(values))
        if done.returncode:
            assert name in done.stderr
            refused.add(name)
    assert refused == {
        *("DATABASE_URL", "PHOENIX_CPUS", "PHOENIX_DRAIN_SECONDS", "PHOENIX_GRPC_PORT", "PHOENIX_HOST"),
        *("PHOENIX_HTTP_PORT", "PHOENIX_LOG_LEVEL", "PHOENIX_MODEL_CREDENTIALS_DIR", "PHOENIX_MODEL_STORE"),
        *("PHOENIX_SHUTDOWN_SECONDS", "PHOENIX_STATE_DIR", "PHOENIX_TERMINATION_LOG", "PHOENIX_WATCH"),
    }


def test_server_serves_the_manifests_of_the_chart(tmp_path: Path) -> None:
    """The real program checks what the ConfigMap holds: it fetches, loads, warms up and measures each model."""
    made = charts.objects(charts.read(charts.CHART / "ci" / "standalone-values.yaml"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in charts.one(made, "ConfigMap", "phoenix-server-models")["data"].items():
        (folder / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
    done = subprocess.run(
        [sys.executable, "-m", "phoenix_server", "check", str(folder)],
        env=environment
        | {"PHOENIX_MODEL_STORE": str(charts.ROOT / "examples"), "PHOENIX_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iris" in done.stdout
    assert "digits" in done.stdout
