"""What the chart makes: the objects of the install manifests, valid for every supported Kubernetes, restricted."""

import copy
import json
from pathlib import Path
from typing import Any

import chart
import charts
import kubernetes_validate
import pytest
import yaml
from charts import CI_VALUES, NAMESPACE, Object
from pod_security import violations

from phoenix_operator import install, install_metrics_api
from phoenix_operator.metrics_api.names import API_SERVICES
from phoenix_operator.settings import Settings, read_settings

KUBERNETES = ("1.34", "1.35", "1.36", "1.37")
FROM_CRDS = ("PodMonitor", "ServiceMonitor", "PrometheusRule")
URL = "http://prometheus.monitoring.svc:9090"
METRICS_API: Object = {"metricsApi": {"enabled": True}, "autoscaling": {"prometheus": {"url": URL}}}
SECRETS = {"redis": "redis-admin", "kafka": "kafka-admin", "postgresql": "postgresql-admin"}
BACKENDS: Object = {
    "backends": [{"name": kind, "kind": kind, "existingSecret": secret} for kind, secret in SECRETS.items()]
}
each_values_file = pytest.mark.parametrize("file", CI_VALUES, ids=lambda file: file.stem)


def settings_of(bodies: list[Object], folder: Path) -> Settings:
    """Return what the operator reads from the ConfigMap."""
    file = folder / "settings.yaml"
    file.write_text(charts.one(bodies, "ConfigMap", "phoenix-operator-settings")["data"]["settings.yaml"])
    return read_settings(file)


# --- the same as the install manifests -------------------------------------------------------------------------------


def comparable(bodies: list[Object]) -> dict[tuple[str, str, str], Object]:
    """Return objects by kind, namespace and name, without what Helm or a namespace in a name makes different."""
    found: dict[tuple[str, str, str], Object] = {}
    for body in copy.deepcopy(bodies):
        metadata = body["metadata"]
        del metadata["labels"]
        for named in (metadata, body.get("roleRef", {})):
            if "name" in named:
                named["name"] = named["name"].removesuffix(f":{NAMESPACE}")
        if body["kind"] == "Deployment":
            body["spec"]["template"]["metadata"].pop("annotations", None)
        if "rules" in body:
            body["rules"].sort(key=lambda rule: json.dumps(rule, sort_keys=True))
        key = (body["kind"], metadata.get("namespace", ""), metadata["name"])
        assert key not in found, f"{key} twice"
        found[key] = body
    return found


@pytest.mark.parametrize(("values", "options"), [
    ({}, {}),
    (METRICS_API, {"metrics_api": True}),
    ({"namespaces": ["team-a", "team-b"]}, {"namespaces": ("team-a", "team-b")}),
    ({"namespaces": ["team-a"], "secrets": ["s3", "own"]}, {"namespaces": ("team-a",), "secrets": ("s3", "own")}),
    (BACKENDS, {"bindings": tuple(SECRETS.values())}),
    ({"namespaces": ["team-a", "team-b"], **METRICS_API, **BACKENDS},
     {"namespaces": ("team-a", "team-b"), "metrics_api": True, "bindings": tuple(SECRETS.values())}),
], ids=["cluster", "metrics-api", "namespaces", "secrets", "bindings", "namespaces-metrics-api-bindings"])  # fmt: skip
def test_objects_are_those_of_the_install_manifests(values: Object, options: Any) -> None:
    namespaces, bindings = options.get("namespaces", ()), options.get("bindings", ())
    wanted = install.manifests(namespaces=namespaces, secrets=options.get("secrets", ()))
    if bindings:
        wanted += install.binding_manifests(bindings, namespaces=namespaces)
    if options.get("metrics_api"):
        wanted += install_metrics_api.manifests(namespaces=namespaces)
    # a chart does not make the namespace that it lies in; the CRD and the settings have tests of their own
    apart = ("Namespace", "CustomResourceDefinition", "ConfigMap")
    made = comparable([body for body in charts.objects(values) if body["kind"] not in apart])
    expected = comparable([body for body in wanted if body["kind"] not in apart])
    assert made.keys() == expected.keys()
    for key, body in expected.items():
        assert made[key] == body, key


@each_values_file
def test_labels_are_those_of_the_install_manifests_and_helms(file: Path) -> None:
    wanted = [*install.manifests(), *install_metrics_api.manifests()]
    pods = {body["metadata"]["name"]: body["metadata"]["labels"] for body in wanted if body["kind"] == "Deployment"}
    for body in charts.objects(charts.read(file)):
        if body["kind"] == "CustomResourceDefinition":
            continue
        labels = body["metadata"]["labels"]
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/part-of"] == "phoenix"
        if body["kind"] == "Deployment" and body["metadata"]["name"] != "phoenix-server":
            assert body["spec"]["template"]["metadata"]["labels"] == pods[body["metadata"]["name"]]


def test_aggregated_roles_carry_the_labels_by_which_they_are_found() -> None:
    bodies = charts.objects({})
    for role in install.aggregated_roles():
        made = charts.one(bodies, "ClusterRole", f"{role['metadata']['name']}:{NAMESPACE}")
        assert role["metadata"]["labels"].items() <= made["metadata"]["labels"].items()
    assert not [body for body in charts.objects({"rbac": {"aggregate": False}}) if "aggregat" in json.dumps(body)]


# --- the CRD ---------------------------------------------------------------------------------------------------------


def test_crd_is_the_one_of_the_api_and_stays_when_the_release_goes() -> None:
    made = charts.one(charts.objects({}), "CustomResourceDefinition", "phoenixmodels.phoenix-ml.io")
    assert made["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert made == yaml.safe_load((charts.ROOT / "crds" / "phoenixmodels.yaml").read_text())


def test_crd_can_be_left_to_another_release() -> None:
    kinds = [body["kind"] for body in charts.objects({"crds": {"install": False}})]
    assert "CustomResourceDefinition" not in kinds
    assert "Deployment" in kinds


# --- several releases ------------------------------------------------------------------------------------------------


def shared(bodies: list[Object], *, own: str) -> set[tuple[str, str, str]]:
    """Return the objects that lie outside the release's own namespace."""
    places = {(body["kind"], body["metadata"].get("namespace", ""), body["metadata"]["name"]) for body in bodies}
    return {place for place in places if place[1] != own}


def test_releases_of_two_namespaces_have_no_name_in_common() -> None:
    first = charts.objects({"namespaces": ["team-a"], **BACKENDS, **METRICS_API}, namespace="phoenix-a", hooks=True)
    other = {"namespaces": ["team-b"], "crds": {"install": False}, **BACKENDS}
    second = charts.objects(other, namespace="phoenix-b", hooks=True)
    assert len(shared(first, own="phoenix-a")) > 8
    assert len(shared(second, own="phoenix-b")) == 4
    assert not shared(first, own="phoenix-a") & shared(second, own="phoenix-b")


def test_release_for_some_namespaces_needs_nothing_outside_them() -> None:
    bodies = charts.objects({"namespaces": ["team-a"], "crds": {"install": False}, **BACKENDS}, hooks=True)
    assert {body["metadata"].get("namespace") for body in bodies} == {NAMESPACE, "team-a"}


def test_cluster_wide_releases_have_nothing_in_common_but_what_a_cluster_has_once() -> None:
    first = charts.objects(METRICS_API | BACKENDS, namespace="phoenix-a")
    second = charts.objects(METRICS_API | BACKENDS, namespace="phoenix-b")
    both = shared(first, own="phoenix-a") & shared(second, own="phoenix-b")
    assert both == {
        ("CustomResourceDefinition", "", "phoenixmodels.phoenix-ml.io"),
        *(("APIService", "", name) for name in API_SERVICES),
    }


def test_accounts_are_of_the_releases_own_namespace() -> None:
    for body in charts.objects({"namespaces": ["team-a"], **BACKENDS, **METRICS_API}, namespace="elsewhere"):
        for subject in body.get("subjects", []):
            is_autoscaler = subject["name"] == "horizontal-pod-autoscaler"
            assert subject["namespace"] == ("kube-system" if is_autoscaler else "elsewhere")
        assert NAMESPACE not in json.dumps(body)


# --- every values file -----------------------------------------------------------------------------------------------


@each_values_file
def test_chart_passes_helms_own_check(file: Path) -> None:
    done = charts.run("lint", "--strict", str(charts.CHART), "--values", str(file), "--namespace", NAMESPACE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
@each_values_file
def test_objects_are_valid_for_every_supported_kubernetes(file: Path, version: str) -> None:
    bodies = charts.objects(charts.read(file), hooks=True)
    checked = 0
    for body in bodies:
        if body["kind"] in FROM_CRDS:
            with pytest.raises(kubernetes_validate.SchemaNotFoundError):
                kubernetes_validate.validate(body, version, strict=True)
        else:
            kubernetes_validate.validate(body, version, strict=True)
            checked += 1
    assert checked >= 7


@each_values_file
def test_no_object_comes_twice_and_each_says_where_it_lies(file: Path) -> None:
    bodies = charts.objects(charts.read(file), hooks=True)
    comparable([body for body in bodies if "labels" in body["metadata"]])  # fails where one comes twice
    everywhere = ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "APIService")
    for body in bodies:
        assert ("namespace" not in body["metadata"]) is (body["kind"] in everywhere), body["metadata"]["name"]


@each_values_file
def test_pods_pass_the_restricted_standard(file: Path) -> None:
    found = dict(charts.pods(charts.objects(charts.read(file), hooks=True)))
    assert "phoenix-test" in found
    assert {"phoenix-operator", "phoenix-server"} & found.keys()
    for name, pod in found.items():
        assert violations(pod) == [], name
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
        assert mounts == [volume["name"] for volume in pod.get("volumes", [])]
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


@each_values_file
def test_operator_reads_the_settings(file: Path, tmp_path: Path) -> None:
    values = charts.read(file)
    if not values.get("operator", {}).get("enabled", True):
        assert "phoenix-operator-settings" not in charts.template(values)
        return
    read = settings_of(charts.objects(values), tmp_path)
    asked = Settings.model_validate(values.get("settings", {}), by_alias=True, by_name=False)
    for name, field in Settings.model_fields.items():
        if field.alias not in chart.OF_THE_CHART:
            assert getattr(read, name) == getattr(asked, name), name
    secrets = [backend["existingSecret"] for backend in values.get("backends", [])]
    assert [backend.admin_secret_ref.name for backend in read.backends] == secrets
    assert read.autoscaling.provider == values.get("autoscaling", {}).get("provider")
    assert read.monitoring.kind == values.get("monitoring", {}).get("kind")


def test_settings_of_the_defaults_are_the_operators_own_defaults(tmp_path: Path) -> None:
    assert settings_of(charts.objects({}), tmp_path) == Settings()


def test_settings_say_what_all_values_say(tmp_path: Path) -> None:
    values = charts.read(charts.CHART / "ci" / "all-values.yaml")
    settings = settings_of(charts.objects(values), tmp_path)
    digest = values["images"]["server"]["digest"]
    asked = {
        **values["settings"],
        "serverImage": f"registry.example.com:5000/phoenix-ml/phoenix-server@{digest}",
        "serverGpuImage": f"{values['images']['serverGpu']['repository']}:0.1.0-gpu",
        "imagePullPolicy": "Always",
        "autoscaling": values["autoscaling"],
        "monitoring": {name: value for name, value in values["monitoring"].items() if name != "rules"},
        "backends": [
            {name: value for name, value in row.items() if name != "existingSecret"}
            | {"adminSecretRef": {"name": row["existingSecret"]}}
            for row in values["backends"]
        ],
    }
    assert settings == Settings.model_validate(asked, by_alias=True, by_name=False)


# --- single values ---------------------------------------------------------------------------------------------------


def test_change_of_the_settings_rolls_the_pods_and_no_other_change_does() -> None:
    def checksum(values: Object) -> str:
        operator = charts.one(charts.objects(values), "Deployment", "phoenix-operator")
        found: str = operator["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]
        return found

    assert checksum({}) == checksum({"operator": {"replicas": 3}, "crds": {"install": False}})
    assert checksum({}) != checksum({"settings": {"workers": 3}})
    assert checksum({}) != checksum(BACKENDS)


def test_programs_read_the_settings_that_the_chart_writes() -> None:
    for name, pod in charts.pods(charts.objects(METRICS_API)):
        (container,) = pod["containers"]
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "settings")
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "settings")
        assert f"--settings={install.SETTINGS_FILE}" in container["args"], name
        assert mount["mountPath"] == str(Path(install.SETTINGS_FILE).parent)
        assert volume["configMap"]["name"] == "phoenix-operator-settings"


@pytest.mark.parametrize(("image", "address"), [
    ({}, "phoenix-ml/phoenix-operator:0.1.0"),
    ({"tag": "0.2.0-rc1"}, "phoenix-ml/phoenix-operator:0.2.0-rc1"),
    ({"repository": "registry:5000/o"}, "registry:5000/o:0.1.0"),
    ({"tag": "1", "digest": f"sha256:{'a' * 64}"}, f"phoenix-ml/phoenix-operator@sha256:{'a' * 64}"),
])  # fmt: skip
def test_image_is_named_by_tag_or_digest(image: Object, address: str) -> None:
    bodies = charts.objects({"images": {"operator": image}} | METRICS_API, hooks=True)
    assert {pod["containers"][0]["image"] for _, pod in charts.pods(bodies)} == {address}


def test_cluster_may_choose_the_user() -> None:
    bodies = charts.objects({"podSecurity": {"runAsUser": None, "runAsGroup": None}} | METRICS_API, hooks=True)
    for _, pod in charts.pods(bodies):
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_policies_open_the_ports_that_values_name() -> None:
    ports = {"networkPolicies": {"prometheusPorts": [9091], "backendPorts": [7000]}}
    bodies = charts.objects(ports | METRICS_API | BACKENDS)
    opened = {
        body["metadata"]["name"]: [port["port"] for rule in body["spec"]["egress"] for port in rule["ports"]]
        for body in bodies
        if body["kind"] == "NetworkPolicy"
    }
    assert opened == {
        "phoenix-operator": [53, 53, 443, 6443, 8000],
        "phoenix-operator-bindings": [7000],
        "phoenix-operator-prometheus": [9091],
        "phoenix-metrics-api": [53, 53, 443, 6443, 9091],
    }
    switched_off = charts.objects({"networkPolicies": {"enabled": False}} | METRICS_API | BACKENDS)
    assert not [body for body in switched_off if body["kind"] == "NetworkPolicy"]


def test_operator_reaches_prometheus_wherever_it_is_to_ask_it() -> None:
    keda = {"autoscaling": {"provider": "keda", "prometheus": {"url": URL}}}
    assert charts.one(charts.objects(keda), "NetworkPolicy", "phoenix-operator-prometheus")


# --- monitoring ------------------------------------------------------------------------------------------------------

RULES = charts.ROOT / "dashboards" / "rules" / "phoenix.rules.yaml"


@pytest.mark.parametrize("kind", ["PrometheusRule", "ConfigMap"])
def test_rules_are_those_of_the_rule_file(kind: str) -> None:
    values = {"monitoring": {"rules": {"kind": kind}, "labels": {"release": "prometheus"}}}
    body = charts.one(charts.objects(values), kind, "phoenix-rules")
    assert body["metadata"]["labels"]["release"] == "prometheus"
    made = body["spec"] if kind == "PrometheusRule" else yaml.safe_load(body["data"]["phoenix.rules.yaml"])
    assert made == yaml.safe_load(RULES.read_text())


def test_rules_come_only_if_asked_for() -> None:
    assert "phoenix-rules" not in charts.template({})


def test_adapter_gets_the_values_of_the_repository() -> None:
    bodies = charts.objects({"autoscaling": {"provider": "prometheus-adapter"}})
    made = charts.one(bodies, "ConfigMap", "phoenix-prometheus-adapter-values")["data"]["values.yaml"]
    assert made == (charts.ROOT / "dashboards" / "prometheus-adapter" / "values.yaml").read_text()


@pytest.mark.parametrize(("kind", "field"), [("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")])
def test_monitors_select_what_is_there(kind: str, field: str) -> None:
    values = {"monitoring": {"kind": kind, "labels": {"release": "prometheus"}, "interval": "30s"}} | METRICS_API
    bodies = charts.objects(values)
    for name in ("phoenix-operator", "phoenix-metrics-api"):
        monitor = charts.one(bodies, kind, name)
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        assert monitor["spec"][field] == [{"port": "http", "interval": "30s"}]
        deployment, service = charts.one(bodies, "Deployment", name), charts.one(bodies, "Service", name)
        found = deployment["spec"]["template"] if kind == "PodMonitor" else service
        assert monitor["spec"]["selector"]["matchLabels"].items() <= found["metadata"]["labels"].items()
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert "http" in [port["name"] for port in container["ports"]]
        assert "http" in [port["name"] for port in service["spec"]["ports"]]


# --- notes -----------------------------------------------------------------------------------------------------------


def notes(values: Object) -> str:
    arguments = ("--dry-run=client", "phoenix", str(charts.CHART), "--namespace", NAMESPACE, "--values", "-")
    done = charts.run("install", *arguments, stdin=yaml.safe_dump(values))
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


def test_notes_print_the_next_commands() -> None:
    text = notes({})
    assert "kubectl rollout status deployment/phoenix-operator -n phoenix-system" in text
    assert "helm test phoenix -n phoenix-system" in text
    assert "kubectl create namespace ml\n  kubectl apply -n ml -f examples/iris/model.yaml\n" in text
    assert "metrics API" not in text
    assert "\n\n\n" not in text


def test_notes_of_a_server_without_operator_name_it_only() -> None:
    text = notes(charts.read(charts.CHART / "ci" / "standalone-values.yaml"))
    assert text.startswith("Phoenix 0.1.0 serves digits, iris by a server of its own.\n")
    assert "deployment/phoenix-server" in text
    assert "phoenix-operator" not in text
    assert "PhoenixModel" not in text
    assert "\n\n\n" not in text


def test_notes_tell_what_is_still_missing() -> None:
    text = notes({"autoscaling": {"provider": "prometheus-adapter"}, "namespaces": ["team-a"]} | BACKENDS)
    assert "kubectl get secret kafka-admin -n phoenix-system" in text
    assert "phoenix-prometheus-adapter-values" in text
    assert "monitoring.rules.kind is none" in text
    assert "create namespace" not in text
    assert "metricsApi.enabled is false" in notes({"autoscaling": {"provider": "builtin"}})
    assert "apiservice/v1beta2.custom.metrics.k8s.io" in notes(METRICS_API)
