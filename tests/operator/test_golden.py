"""What a PhoenixModel becomes: golden files, valid for every supported Kubernetes, restricted, with names that fit."""

import copy
import re

import kubernetes_validate
import pytest
import yaml
from model_scenarios import COMPLETE_CPU, GOLDEN, SCENARIOS, render
from objects import by_place, rendered, subject
from pod_security import violations
from specs import GOOD, Case

from phoenix_operator.desired.naming import labels
from phoenix_operator.kinds import (
    CHILDREN,
    CONFIG_MAP,
    DEPLOYMENT,
    HTTP_ROUTE,
    POD_MONITOR,
    SCALED_OBJECT,
    SERVICE_MONITOR,
    TRIGGER_AUTHENTICATION,
    kind_of,
)
from phoenix_operator.observed import Object

KUBERNETES = ("1.34", "1.35", "1.36", "1.37")
FROM_CRDS = (HTTP_ROUTE, POD_MONITOR, SCALED_OBJECT, SERVICE_MONITOR, TRIGGER_AUTHENTICATION)
each_scenario = pytest.mark.parametrize("name", SCENARIOS)
each_good_spec = pytest.mark.parametrize("case", GOOD, ids=lambda case: case.id)


def is_checked(body: Object, version: str) -> bool:
    """Hold the object against the strict schema; False for kinds that come from CRDs."""
    if kind_of(body) in FROM_CRDS:
        with pytest.raises(kubernetes_validate.SchemaNotFoundError):
            kubernetes_validate.validate(body, version, strict=True)
        return False
    kubernetes_validate.validate(body, version, strict=True)
    return True


def pod_of(objects: list[Object]) -> Object:
    (found,) = (body for body in objects if kind_of(body) is DEPLOYMENT)
    pod: Object = found["spec"]["template"]["spec"]
    return pod


# --- golden ----------------------------------------------------------------------------------------------------------


@each_scenario
def test_objects_are_those_of_the_golden_file(name: str) -> None:
    assert (GOLDEN / f"{name}.yaml").read_text() == render(name), "run `make golden` and look at the difference"


def test_every_golden_file_has_its_scenario_and_says_how_it_was_made() -> None:
    files = {file.stem: file for file in GOLDEN.iterdir()}
    assert files.keys() == SCENARIOS.keys()
    assert all("make golden" in file.read_text().splitlines()[0] for file in files.values())


def test_scenarios_make_every_kind_of_child() -> None:
    made = {kind_of(body) for scenario in SCENARIOS.values() for body in scenario.objects()}
    assert made == set(CHILDREN)


# --- valid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@each_scenario
def test_objects_are_valid_for_every_supported_kubernetes(name: str, version: str) -> None:
    checked = [is_checked(body, version) for body in SCENARIOS[name].objects()]
    assert sum(checked) >= 5


@pytest.mark.parametrize("version", KUBERNETES)
def test_validator_would_see_an_unknown_field(version: str) -> None:
    body = copy.deepcopy(next(body for body in SCENARIOS["minimal"].objects() if kind_of(body) is DEPLOYMENT))
    body["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(body, version, strict=True)


@each_good_spec
def test_every_spec_that_the_api_takes_becomes_valid_objects(case: Case) -> None:
    for body in rendered(subject(**case.spec)):
        is_checked(body, KUBERNETES[-1])


# --- names and labels ------------------------------------------------------------------------------------------------


def all_objects() -> list[list[Object]]:
    longest = subject(name="a" * 40, **COMPLETE_CPU)
    gpu = subject(name="a" * 40, **SCENARIOS["gpu-device-class"].spec)
    routed = [
        rendered(longest, settings=SCENARIOS[name].read_settings())
        for name in ("route-ingress", "route-http", "monitor-pods", "monitor-services")
    ]
    return [*(scenario.objects() for scenario in SCENARIOS.values()), *routed, rendered(gpu)]


def test_names_fit_and_every_object_carries_owner_and_labels() -> None:
    for objects in all_objects():
        assert len(by_place(objects)) == len(objects), "no two of a name"
        for body in objects:
            metadata = body["metadata"]
            assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"])
            assert len(metadata["name"]) <= 63
            (owner,) = metadata["ownerReferences"]
            assert (owner["kind"], owner["controller"]) == ("PhoenixModel", True)
            assert metadata["labels"]["app.kubernetes.io/managed-by"] == "phoenix-operator"
            assert metadata["labels"]["phoenix-ml.io/model"] == owner["name"]
            assert all(len(value) <= 63 for value in metadata["labels"].values())
            assert re.fullmatch("[0-9a-f]{16}", metadata["annotations"]["phoenix-ml.io/hash"])


def test_labels_of_the_user_never_win_over_our_own() -> None:
    own = labels(subject())
    model = subject(pod={"labels": {"team": "risk"}})
    (body,) = (body for body in rendered(model) if kind_of(body) is DEPLOYMENT)
    assert body["spec"]["template"]["metadata"]["labels"] == {"team": "risk"} | own
    assert body["spec"]["selector"]["matchLabels"].items() <= own.items()


def test_pods_of_two_models_are_never_selected_together() -> None:
    first, second = subject(name="fraud"), subject(name="fraud-2")
    for body in rendered(first):
        chosen = body.get("spec", {}).get("selector") or body.get("spec", {}).get("podSelector") or {}
        chosen = chosen.get("matchLabels", chosen)
        assert not chosen or not chosen.items() <= labels(second).items()


# --- pods ------------------------------------------------------------------------------------------------------------


@each_scenario
def test_pods_pass_the_restricted_standard(name: str) -> None:
    pod = pod_of(SCENARIOS[name].objects())
    assert violations(pod) == []
    assert all(container["securityContext"]["readOnlyRootFilesystem"] for container in pod["containers"])
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False


@each_good_spec
def test_no_spec_leads_out_of_the_restricted_standard(case: Case) -> None:
    assert violations(pod_of(rendered(subject(**case.spec)))) == []


def test_check_of_the_standard_sees_what_it_forbids() -> None:
    found = violations(
        {
            "hostNetwork": True,
            "volumes": [{"name": "root", "hostPath": {"path": "/"}}],
            "securityContext": {"sysctls": [{}]},
            "containers": [
                {
                    "name": "a",
                    "ports": [{"hostPort": 80}],
                    "securityContext": {"privileged": True, "capabilities": {"add": ["SYS_ADMIN"]}},
                }
            ],
        }
    )
    assert found == [
        *("hostNetwork", "volume root: hostPath", "sysctls", "a: allowPrivilegeEscalation", "a: privileged"),
        *("a: capabilities.drop", "a: capabilities.add", "a: runAsNonRoot", "a: seccompProfile", "a: hostPort"),
    ]


@each_scenario
def test_memory_limit_is_the_request_unless_asked_and_cpu_has_none(name: str) -> None:
    (container,) = pod_of(SCENARIOS[name].objects())["containers"]
    resources = container["resources"]
    assert "cpu" not in resources["limits"]
    if name != "complete-cpu":
        assert resources["limits"]["memory"] == resources["requests"]["memory"]


@each_scenario
def test_grace_period_covers_drain_longest_request_and_flush(name: str) -> None:
    scenario = SCENARIOS[name]
    spec, pod = scenario.subject().spec, pod_of(scenario.objects())
    environment = {row["name"]: row.get("value") for row in pod["containers"][0]["env"]}
    needed = int(environment["PHOENIX_DRAIN_SECONDS"]) + int(environment["PHOENIX_SHUTDOWN_SECONDS"])
    assert needed >= spec.rollout.drain_seconds + spec.limits.timeout_seconds
    assert pod["terminationGracePeriodSeconds"] > needed


@each_scenario
def test_everything_that_is_mounted_is_a_volume_and_the_other_way_round(name: str) -> None:
    pod = pod_of(SCENARIOS[name].objects())
    mounted = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
    assert sorted(mounted) == sorted(volume["name"] for volume in pod["volumes"])


@each_scenario
def test_pod_mounts_a_manifest_that_the_config_map_has_and_the_server_reads(name: str) -> None:
    from phoenix_api import parse_manifests

    objects = SCENARIOS[name].objects()
    (config_map,) = (body for body in objects if kind_of(body) is CONFIG_MAP)
    (volume,) = (volume for volume in pod_of(objects)["volumes"] if volume["name"] == "model")
    (item,) = volume["configMap"]["items"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    (manifest,) = parse_manifests(config_map["data"][item["key"]], file="model.yaml")
    asked = SCENARIOS[name].subject()
    assert manifest.model.spec.model.uri == asked.spec.model.uri
    assert manifest.model.spec.batching == asked.spec.batching
    assert (manifest.model.spec.runtime.accelerator is None) is (asked.spec.runtime.accelerator is None)


def test_secret_of_the_fetch_reaches_the_fetch_only() -> None:
    pod = pod_of(SCENARIOS["source-https"].objects())
    assert "store-reader" not in yaml.safe_dump(pod["containers"])
    assert "envFrom" not in pod["containers"][0]


def test_user_may_set_any_variable_that_is_not_reserved() -> None:
    model = subject(pod={"env": [{"name": "HOME", "value": "/state"}, {"name": "LEVEL", "value": ""}]})
    rows = pod_of(rendered(model))["containers"][0]["env"]
    assert [row["value"] for row in rows if row["name"] == "HOME"] == ["/state"]
    assert {"name": "LEVEL", "value": ""} in rows


# --- replicas and pace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pace"), [
    ("minimal", {"maxSurge": "25%", "maxUnavailable": 0}),
    ("gpu-surge", {"maxSurge": "25%", "maxUnavailable": 0}),
    ("gpu-extended-resource", {"maxSurge": 0, "maxUnavailable": 1}),
    ("cpu-in-place", {"maxSurge": 0, "maxUnavailable": 1}),
])  # fmt: skip
def test_rollout_needs_no_spare_device_unless_asked(name: str, pace: Object) -> None:
    (body,) = (body for body in SCENARIOS[name].objects() if kind_of(body) is DEPLOYMENT)
    assert body["spec"]["strategy"]["rollingUpdate"] == pace


@pytest.mark.parametrize(("replicas", "is_made"), [(0, False), (1, False), (2, True), (3, True)])
def test_budget_is_made_only_where_a_drain_can_go_on(replicas: int, is_made: bool) -> None:
    kinds = [body["kind"] for body in rendered(subject(replicas=replicas))]
    assert ("PodDisruptionBudget" in kinds) is is_made


# --- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ports"), [
    ("minimal", []), ("source-pvc", []), ("source-configmap", []), ("source-oci", []), ("source-file", []),
    ("source-s3", [443]), ("source-https", [8443]),
])  # fmt: skip
def test_way_out_is_open_to_dns_and_the_models_store_only(name: str, ports: list[int]) -> None:
    (policy,) = (body for body in SCENARIOS[name].objects() if body["kind"] == "NetworkPolicy")
    dns, *others = policy["spec"]["egress"]
    assert {row["port"] for row in dns["ports"]} == {53}
    assert [row["port"] for rule in others for row in rule["ports"]] == ports
    metadata_services = {"169.254.169.254/32", "fd00:ec2::254/128"}
    assert all(set(peer["ipBlock"]["except"]) <= metadata_services for rule in others for peer in rule["to"])
    assert all(peer["ipBlock"]["except"] for rule in others for peer in rule["to"])


@pytest.mark.parametrize("uri", ["https://h:99999/x", "https://h:port/x", "https://[h/x"])
def test_address_that_cannot_be_read_goes_out_by_the_usual_port(uri: str) -> None:
    policy = by_place(rendered(subject(model={"uri": uri})))
    egress = next(body for body in policy.values() if body["kind"] == "NetworkPolicy")["spec"]["egress"]
    assert egress[1]["ports"] == [{"protocol": "TCP", "port": 443}]


# --- accelerators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("provider", "resource"), [
    ("CUDA", "nvidia.com/gpu"), ("TensorRT", "nvidia.com/gpu"), ("ROCm", "amd.com/gpu"), ("MIGraphX", "amd.com/gpu"),
    ("OpenVINO", "gpu.intel.com/i915"),
])  # fmt: skip
def test_provider_has_its_vendors_resource(provider: str, resource: str) -> None:
    pod = pod_of(rendered(subject(runtime={"accelerator": {"provider": provider, "count": 3}})))
    assert pod["containers"][0]["resources"]["limits"][resource] == "3"


def test_profile_gives_nodes_tolerations_and_runtime_class_and_the_model_adds_to_them() -> None:
    scenario = SCENARIOS["gpu-profile"]
    own = {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "x", "operator": "Exists"}], "runtimeClassName": "mine"}
    pod = pod_of(rendered(scenario.subject(pod=own), settings=scenario.read_settings()))
    assert pod["nodeSelector"] == {"example.com/accelerator": "l4", "a": "b"}
    assert [row["key"] for row in pod["tolerations"]] == ["nvidia.com/gpu", "x"]
    assert pod["runtimeClassName"] == "mine"


def test_model_that_goes_without_asks_for_no_device_anywhere() -> None:
    pod = pod_of(SCENARIOS["gpu-prefer-withheld"].objects())
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]
    assert "resourceClaims" not in pod
