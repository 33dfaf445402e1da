"""The manifests of the metrics API: what it does is granted and nothing else; the values of prometheus-adapter."""

import asyncio
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from aiohttp import web
from metrics_api_world import FrontProxy, World, model, path, until
from pod_security import violations

from phoenix_operator import install, install_metrics_api
from phoenix_operator.__main__ import main
from phoenix_operator.metrics_api import adapter
from phoenix_operator.metrics_api.metrics import METRICS
from phoenix_operator.metrics_api.names import API_SERVICES, NAME
from phoenix_operator.observed import Object

ROOT = Path(__file__).parents[2]
VERBS = {"GET": "get", "PUT": "update", "PATCH": "patch", "POST": "create"}
each_install = pytest.mark.parametrize("namespaces", [(), ("ml", "other")], ids=["cluster", "namespaces"])


def of_kind(kind: str, namespaces: tuple[str, ...] = ()) -> list[Object]:
    return [body for body in install_metrics_api.manifests(namespaces=namespaces) if body["kind"] == kind]


def written(folder: Path, *options: str) -> list[Object]:
    assert main(["manifests", str(folder), *options]) == 0
    assert "- metrics-api.yaml" in (folder / "kustomization.yaml").read_text()
    return list(yaml.safe_load_all((folder / "metrics-api.yaml").read_text()))


# --- rights ----------------------------------------------------------------------------------------------------------


def rights(rules: list[Object]) -> set[tuple[str, str, str]]:
    """Return plural, verb and name of each right."""
    return {
        (resource, verb, name)
        for rule in rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    }


def test_what_it_does_is_granted_and_what_is_granted_it_does(tmp_path: Path) -> None:
    world = World(FrontProxy(tmp_path))
    world.kubernetes.models["ml"] = [model("fraud")]
    world.prometheus.put("phoenix:inference_concurrency", "1")
    done: set[tuple[str, str, str]] = set()

    def note(request: web.Request) -> None:
        parts = request.path.strip("/").split("/")
        verb, is_one = VERBS[request.method], parts[-2] in ("secrets", "apiservices", "configmaps")
        if is_one:
            done.add((parts[-2], verb, parts[-1]))
        else:
            done.add((parts[-1], "list" if verb == "get" else verb, ""))

    world.kubernetes.before = note

    async def live() -> None:
        async with world.running_api():
            assert (await world.ask(path())).code == 200
            assert (await world.ask(path(name="*"))).code == 200
            await until(lambda: bool(done))

    asyncio.run(live())
    config_map = ("configmaps", "get", "extension-apiserver-authentication")
    rules = [*install_metrics_api.model_rules(), *install_metrics_api.cluster_rules(), *install_metrics_api.own_rules()]
    assert done - {config_map} == rights(rules)
    assert config_map in done, "which the role of kube-system grants"


@each_install
def test_each_role_is_bound_to_whom_it_is_for(namespaces: tuple[str, ...]) -> None:
    bodies = install_metrics_api.manifests(namespaces=namespaces)
    bound = {
        (body["roleRef"]["name"], body["metadata"].get("namespace")): body["subjects"]
        for body in bodies
        if body["kind"].endswith("Binding")
    }
    own = [{"kind": "ServiceAccount", "name": NAME, "namespace": install.NAMESPACE}]
    places = namespaces or (None,)
    assert bound == {
        (NAME, None): own,
        (NAME, install.NAMESPACE): own,
        **{(f"{NAME}-models", place): own for place in places},
        ("extension-apiserver-authentication-reader", "kube-system"): own,
        (f"{NAME}-autoscaler", None): [
            {"kind": "ServiceAccount", "name": "horizontal-pod-autoscaler", "namespace": "kube-system"}
        ],
    }


def test_secrets_and_api_services_are_written_by_name_only() -> None:
    rules = [*install_metrics_api.cluster_rules(), *install_metrics_api.own_rules()]
    named = {rule["resources"][0]: rule.get("resourceNames") for rule in rules}
    assert named == {"subjectaccessreviews": None, "apiservices": list(API_SERVICES), "secrets": [NAME]}
    assert not any("create" in rule["verbs"] for rule in rules if rule["resources"] == ["secrets"])


def test_secret_comes_empty_so_that_applying_it_again_takes_nothing() -> None:
    (secret,) = of_kind("Secret")
    assert (secret["metadata"]["name"], secret["type"]) == (NAME, "Opaque")
    assert not {"data", "stringData"} & set(secret)


def test_bundle_of_the_api_services_is_not_in_the_manifests() -> None:
    services = of_kind("APIService")
    assert {body["metadata"]["name"] for body in services} == set(API_SERVICES)
    assert not [body for body in services if {"caBundle", "insecureSkipTLSVerify"} & set(body["spec"])]
    priorities = {body["spec"]["version"]: body["spec"]["versionPriority"] for body in services}
    assert priorities["v1beta2"] > priorities["v1beta1"]


# --- the other manifests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
@each_install
def test_manifests_are_valid(namespaces: tuple[str, ...], version: str) -> None:
    for body in install_metrics_api.manifests(namespaces=namespaces):
        kubernetes_validate.validate(body, version, strict=True)


def test_pods_pass_the_restricted_standard_and_outlive_a_node() -> None:
    (deployment,) = of_kind("Deployment")
    spec = deployment["spec"]
    assert violations(spec["template"]["spec"]) == []
    assert (spec["replicas"], spec["strategy"]["rollingUpdate"]["maxUnavailable"]) == (2, 0)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    (budget,) = of_kind("PodDisruptionBudget")
    assert budget["spec"]["selector"] == spec["selector"]


def test_image_and_settings_are_the_operators(tmp_path: Path) -> None:
    bodies = [*install.manifests(), *of_kind("Deployment")]
    operator, api = (body["spec"]["template"]["spec"] for body in bodies if body["kind"] == "Deployment")
    assert operator["containers"][0]["image"] == api["containers"][0]["image"]
    assert operator["volumes"][0] == api["volumes"][0]
    assert api["containers"][0]["args"] == ["metrics-api", f"--settings={install.SETTINGS_FILE}"]


def test_ports_lead_from_the_api_server_to_the_container() -> None:
    (deployment,), (service,), (policy, _) = (of_kind(kind) for kind in ("Deployment", "Service", "NetworkPolicy"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {row["name"]: row["containerPort"] for row in container["ports"]}
    assert ports == {"https": 8443, "http": 8080}
    assert {row["port"]: row["targetPort"] for row in service["spec"]["ports"]} == {443: "https", 8080: "http"}
    assert {row["port"] for row in policy["spec"]["ingress"][0]["ports"]} == set(ports.values())
    for body in of_kind("APIService"):
        target = {"name": NAME, "namespace": install.NAMESPACE, "port": 443}
        assert body["spec"]["service"] == target


def test_manifests_in_the_repository_are_those_of_the_command(tmp_path: Path) -> None:
    written(tmp_path, "--metrics-api")
    kept = (ROOT / "operator/manifests/metrics-api.yaml").read_text()
    assert (tmp_path / "metrics-api.yaml").read_text() == kept, "run `make generate`"
    assert kept.startswith("# GENERATED")


def test_namespaced_install_reads_models_in_its_namespaces_only(tmp_path: Path) -> None:
    bodies = written(tmp_path, "--metrics-api", "--namespaces", "ml,other")
    readers = [body for body in bodies if body["metadata"]["name"] == f"{NAME}-models" and "rules" in body]
    assert {(body["kind"], body["metadata"]["namespace"]) for body in readers} == {("Role", "ml"), ("Role", "other")}


def test_install_without_it_has_nothing_of_it(tmp_path: Path) -> None:
    assert main(["manifests", str(tmp_path)]) == 0
    assert "metrics-api" not in "".join(file.read_text() for file in tmp_path.iterdir())


# --- prometheus-adapter ----------------------------------------------------------------------------------------------


def test_values_of_the_adapter_map_every_metric() -> None:
    found: Any = yaml.safe_load((ROOT / "dashboards/prometheus-adapter/values.yaml").read_text())
    assert found["rules"]["default"] is False
    assert {row["name"]["as"]: row["seriesQuery"] for row in found["rules"]["custom"]} == {
        metric.name: f'{metric.series}{{namespace!="",model!=""}}' for metric in METRICS.values()
    }
    for row in found["rules"]["custom"]:
        assert row["resources"]["overrides"] == {
            "namespace": {"resource": "namespace"},
            "model": {"group": "phoenix-ml.io", "resource": "phoenixmodel"},
        }
        assert row["metricsQuery"] == adapter.query()


def test_query_of_the_adapter_uses_its_template_only() -> None:
    filled = (
        adapter.query()
        .replace("<<.Series>>", "phoenix:x")
        .replace("<<.LabelMatchers>>", 'namespace="ml",model="fraud"')
        .replace("<<.GroupBy>>", "model")
    )
    assert "<<" not in filled
    assert filled.count("(") == filled.count(")")
