"""The operator's rights, in both directions: what it does is granted, and what is granted it does."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import kubernetes_validate
import pytest
import yaml
from memory_cluster import Call, MemoryCluster
from objects import NAMESPACE, SETTINGS, loaded
from pod_security import violations
from watch_server import Sink, WatchServer, watching
from world import World

from phoenix_operator import install
from phoenix_operator.app import watched_kinds
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import CHILDREN, DEPLOYMENT, LEASE, OPTIONAL, PHOENIX_MODEL, POD, SECRET, Kind
from phoenix_operator.leader import Lease
from phoenix_operator.observed import Object
from phoenix_operator.queue import KeyedQueue
from phoenix_operator.resync import Resync
from phoenix_operator.settings import Settings

Right = tuple[str, str, str]  # API group, resource or resource/subresource, verb
BACKENDS = Settings.model_validate(
    {
        "backends": [
            {"name": "default", "kind": kind, "adminSecretRef": {"name": f"{kind}-admin"}}
            for kind in ("redis", "kafka", "postgresql")
        ]
    },
    by_alias=True,
    by_name=False,
)
SECRET_NAME = "s3-reader"
EVERYTHING = Settings.model_validate(
    {"routes": {"kind": "Ingress"}, "monitoring": {"kind": "PodMonitor"}}, by_alias=True, by_name=False
)
OTHER_WAYS = Settings.model_validate(
    {
        "routes": {"kind": "HTTPRoute", "gateway": {"name": "web", "namespace": "gateways"}},
        "monitoring": {"kind": "ServiceMonitor"},
        "autoscaling": {"provider": "keda", "prometheus": {"url": "http://prometheus"}},
        "networkPolicies": False,
    },
    by_alias=True,
    by_name=False,
)
CREDENTIALS = {"uri": "s3://models/x.onnx", "credentials": {"secretRef": {"name": SECRET_NAME}}}


def right(call: Call) -> Right:
    resource = f"{call.kind.plural}/{call.subresource}" if call.subresource else call.kind.plural
    return call.kind.group, resource, call.verb


def granted(rules: Iterable[Object]) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def is_allowed(call: Call, rules: Iterable[Object]) -> bool:
    """Decide as RBAC does: a list of names says nothing about lists and creations."""
    return any(
        right(call) in granted([rule])
        and (
            "resourceNames" not in rule or (call.verb not in ("list", "create") and call.name in rule["resourceNames"])
        )
        for rule in rules
    )


class Guarded(MemoryCluster):
    """Refuses what the rules do not grant."""

    def __init__(self, served: Iterable[Kind], rules: Sequence[Object]) -> None:
        super().__init__(served)
        self.denied: list[Call] = []

        def guard(call: Call) -> None:
            if not is_allowed(call, rules):
                self.denied.append(call)
                raise ApiError(403, "Forbidden", f"{right(call)} is forbidden")

        self.refuse = guard


async def lead(cluster: MemoryCluster) -> None:
    lease = Lease(
        cast(Cluster, cluster), namespace=install.NAMESPACE, name="phoenix-operator", identity="a", seconds=15
    )
    await lease.acquire()
    await lease.release()


async def live(cluster: MemoryCluster) -> None:
    """Go through what a model can ask for, and what can happen to it."""
    world = World(EVERYTHING)
    world.cluster = cluster
    world.start()
    world.states.loaded = loaded()
    host = {"networking": {"host": "models.example.com"}}
    accelerator = {"runtime": {"accelerator": {"deviceClassName": "gpu"}}}
    # every kind of child, and a Secret that is missing
    world.create(model=CREDENTIALS, replicas=3, **host, **accelerator)
    await world.reconcile()
    world.cluster.put(SECRET, {"metadata": {"name": SECRET_NAME, "namespace": NAMESPACE}})
    world.no_device("0/1 nodes are available: 1 Insufficient cpu.")
    await world.reconcile()
    world.roll_out()
    await world.reconcile()
    # a repair with its event, twice
    for _ in range(2):
        world.cluster.edit(DEPLOYMENT, "fraud", lambda body: body["spec"].update(replicas=9))
        await world.reconcile()
    # an autoscaler, and none again
    world.settings = SETTINGS
    world.start()
    world.create(autoscaling={"maxReplicas": 3, "targetLatency": "1"})
    await world.reconcile()
    world.create()
    await world.reconcile()
    # the least that a model can be: whatever it need not have goes
    world.create(model={"uri": "configmap://m/x.onnx"}, networking={}, pod={"serviceAccountName": "own"})
    await world.reconcile()
    # other settings, after a restart
    world.settings = OTHER_WAYS
    world.start()
    kafka = {"kafka": {"secretRef": {"name": SECRET_NAME}, "requests": {}}}
    world.secret(SECRET_NAME, type="kafka", bootstrap_servers="k:9092", security_protocol="SASL_SSL")
    world.create(**host, autoscaling={"maxReplicas": 3, "targetLatency": "1"}, bindings=kafka)
    await world.reconcile()
    world.settings = Settings(network_policies=False)
    world.start()
    world.create()
    await world.reconcile()
    assert world.condition("Accepted")[:2] == ("True", "SpecUnderstood")


def bound_to(*names: str) -> Object:
    return {"bindings": {name: {"backend": "default"} for name in names}}


async def live_bound(cluster: MemoryCluster) -> None:
    """Go through what bindings need: made, rotated, removed, released."""
    world = World(BACKENDS)
    for place, body in world.cluster.objects.items():  # the admin Secrets
        cluster.objects[place] = body
    world.cluster = cluster
    world.start()
    world.states.loaded = loaded()
    world.create(**bound_to("redis", "kafka", "postgres"))
    await world.reconcile()
    world.roll_out()
    await world.reconcile()
    world.annotate(rotate="1")
    await world.reconcile()
    world.roll_out()
    await world.reconcile()
    world.create(**bound_to("redis"))
    await world.reconcile()
    world.roll_out()
    await world.reconcile()
    assert world.condition("BindingsReady")[:2] == ("True", "Bound")
    world.delete()
    await world.reconcile()
    assert [service.logins for service in world.services.values() if service.logins] == []


async def look_again(cluster: MemoryCluster, namespaces: Sequence[str] = ()) -> None:
    kinds = (PHOENIX_MODEL, POD, *CHILDREN)
    world = World()
    resync = Resync(
        cast(Cluster, cluster),
        world.store,
        KeyedQueue(),
        world.metrics,
        kinds=kinds,
        namespaces=namespaces,
        every_s=600,
    )
    for kind in kinds:
        await resync._look_at(kind)


def watched(folder: Path, patch: pytest.MonkeyPatch, namespaces: tuple[str, ...] = ()) -> set[Right]:
    """Return what kopf does."""
    kinds = watched_kinds(EVERYTHING, OPTIONAL)
    server = WatchServer(kinds)

    async def talk(_: Sink) -> None:
        await server.watched(kinds, times=len(namespaces) or 1)

    watching(server, folder, patch, talk, settings=OTHER_WAYS, served=OPTIONAL, namespaces=namespaces)
    return {(seen.kind.group, seen.kind.plural, seen.verb) for seen in server.seen}


def used_by(cluster: MemoryCluster) -> set[Right]:
    """Return what the operator's own modules did, and what the API server asks of those who set owners."""
    used = {right(call) for call in cluster.calls}
    owners = [owner for body in cluster.objects.values() for owner in body["metadata"].get("ownerReferences", [])]
    if any(owner.get("blockOwnerDeletion") for owner in owners):
        used.add((PHOENIX_MODEL.group, f"{PHOENIX_MODEL.plural}/finalizers", "update"))
    return used


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phoenix_operator.resync._GRACE_S", 0)


@pytest.mark.usefixtures("short_grace")
def test_cluster_wide_rights_are_those_that_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [*install.model_rules(secrets=None), *install.cluster_rules()]
    cluster = Guarded(OPTIONAL, rules)
    asyncio.run(live(cluster))
    asyncio.run(look_again(cluster))
    assert cluster.denied == []
    used = used_by(cluster) | watched(tmp_path, monkeypatch)
    assert used - granted(rules) == set(), "used and not granted"
    assert granted(rules) - used == set(), "granted and not used"


@pytest.mark.usefixtures("short_grace")
def test_namespaced_rights_are_those_that_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = install.model_rules(secrets=[SECRET_NAME])
    cluster = Guarded(OPTIONAL, rules)
    asyncio.run(live(cluster))
    asyncio.run(look_again(cluster, [NAMESPACE]))
    assert {right(call) for call in cluster.denied} == {("", "nodes", "list")}, "the numbers of the nodes are left out"
    used = used_by(cluster) | watched(tmp_path, monkeypatch, (NAMESPACE,))
    assert used - granted(rules) == {("", "nodes", "list")}
    assert granted(rules) - used == set(), "granted and not used"


def test_rights_of_bindings_are_those_that_are_used() -> None:
    plain = install.model_rules(secrets=None)
    rules = [*plain, *install.binding_rules()]
    own_rules = install.backend_rules(["redis-admin", "kafka-admin", "postgresql-admin"])
    cluster = MemoryCluster(OPTIONAL)
    denied: list[Call] = []

    def guard(call: Call) -> None:
        is_admins = call.kind is SECRET and call.name.endswith("-admin")
        if not is_allowed(call, own_rules if is_admins else rules):
            denied.append(call)
            raise ApiError(403, "Forbidden", f"{right(call)} is forbidden")

    cluster.refuse = guard
    asyncio.run(live_bound(cluster))
    assert denied == []
    added = granted(rules) - granted(plain)
    assert added == {("", "secrets", verb) for verb in ("create", "patch", "delete")} | {
        (PHOENIX_MODEL.group, PHOENIX_MODEL.plural, "patch")
    }
    assert added - used_by(cluster) == set(), "granted and not used"
    assert {call.name for call in cluster.calls if call.kind is SECRET and call.verb != "get"} == {
        "fraud-redis", "fraud-kafka", "fraud-postgresql",
    }  # fmt: skip


def test_rights_about_the_lease_are_those_that_are_used() -> None:
    rules = install.lease_rules()
    cluster = Guarded((), rules)
    asyncio.run(lead(cluster))
    assert cluster.denied == []
    assert used_by(cluster) == granted(rules)
    assert {call.kind for call in cluster.calls} == {LEASE}


@pytest.mark.parametrize("secrets", [(), ("other",)])
def test_model_whose_secret_may_not_be_read_is_served_all_the_same(secrets: tuple[str, ...]) -> None:
    async def main() -> None:
        world = World()
        world.cluster = Guarded(OPTIONAL, install.model_rules(secrets=secrets))
        world.start()
        world.create(model=CREDENTIALS)
        await world.reconcile()
        assert world.condition("Accepted")[0] == "True"
        assert world.child(DEPLOYMENT)
        assert [call.kind for call in cast(Guarded, world.cluster).denied] == [SECRET]

    asyncio.run(main())


# --- what is never granted -------------------------------------------------------------------------------------------


def manifests(*, bindings: Sequence[str] = (), **options: Any) -> list[Object]:
    """Return the whole install, with what bindings need."""
    places = options.get("namespaces", ())
    added = install.binding_manifests(bindings, namespaces=places) if bindings else []
    return [*install.manifests(**options), *added]


def roles(**options: Any) -> list[Object]:
    return [body for body in manifests(**options) if body["kind"] in ("Role", "ClusterRole")]


def rules_of(bodies: Iterable[Object]) -> list[Object]:
    return [rule for body in bodies for rule in body["rules"]]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"bindings": ["redis-admin"]},
    {"namespaces": ["ml", "other"]},
    {"namespaces": ["ml"], "secrets": ["a", "b"]},
    {"namespaces": ["ml"], "bindings": ["redis-admin", "kafka-admin"]},
]
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options) or "cluster")


@each_variant
def test_no_right_leads_to_more_rights(options: dict[str, Any]) -> None:
    for rule in rules_of(roles(**options)):
        words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "*" not in words
        assert not {"bind", "escalate", "impersonate"} & set(rule["verbs"])
        assert "rbac.authorization.k8s.io" not in rule["apiGroups"]
        assert not {"pods/exec", "pods/attach", "pods/portforward", "pods/ephemeralcontainers"} & set(rule["resources"])
        assert not any(resource.startswith("serviceaccounts/") for resource in rule["resources"]), "no tokens"
        if "pods" in rule["resources"]:
            assert set(rule["verbs"]) <= {"get", "list", "watch"}
        if "secrets" in rule["resources"]:
            most = ["get", "create", "patch", "delete"] if "bindings" in options else ["get"]
            assert rule["verbs"] in (["get"], most), "never a list of all Secrets"


def test_namespaced_install_has_roles_only_and_reads_the_secrets_that_it_is_told_of() -> None:
    for options in VARIANTS[2:4]:
        bodies = install.manifests(**options)
        assert not [body for body in bodies if body["kind"].startswith("ClusterRole")]
        wanted = {*options["namespaces"], install.NAMESPACE}
        assert {body["metadata"]["namespace"] for body in bodies if body["kind"] == "Role"} == wanted
        readable = [rule.get("resourceNames") for rule in rules_of(roles(**options)) if "secrets" in rule["resources"]]
        assert readable == ([options["secrets"]] * len(options["namespaces"]) if "secrets" in options else [])


@each_variant
def test_every_role_is_bound_to_the_operator_and_nobody_else(options: dict[str, Any]) -> None:
    bodies = manifests(**options)
    bindings = [body for body in bodies if body["kind"].endswith("Binding")]
    bound = {(body["roleRef"]["kind"], body["metadata"].get("namespace"), body["roleRef"]["name"]) for body in bindings}
    own = {
        (body["kind"], body["metadata"].get("namespace"), body["metadata"]["name"])
        for body in roles(**options)
        if not any("aggregate-to" in label for label in body["metadata"]["labels"])
    }
    assert bound == own
    account = {"kind": "ServiceAccount", "name": "phoenix-operator", "namespace": install.NAMESPACE}
    assert all(body["subjects"] == [account] for body in bindings)


def test_admin_secrets_are_read_by_name_in_the_operators_namespace_only() -> None:
    bodies = manifests(namespaces=["ml"], bindings=["redis-admin", "kafka-admin"])
    (role,) = (body for body in bodies if body["kind"] == "Role" and body["metadata"]["name"].endswith("-backends"))
    assert role["metadata"]["namespace"] == install.NAMESPACE
    (rule,) = role["rules"]
    assert (rule["verbs"], rule["resourceNames"]) == (["get"], ["redis-admin", "kafka-admin"])
    (policy,) = (body for body in bodies if body["kind"] == "NetworkPolicy" and "ingress" not in body["spec"])
    ports = {row["port"] for row in policy["spec"]["egress"][-1]["ports"]}
    assert ports == set(install.BACKEND_PORTS)


def test_builtin_roles_are_extended_with_models_and_nothing_else() -> None:
    edit, view = install.aggregated_roles()
    for body in (edit, view):
        assert {group for rule in body["rules"] for group in rule["apiGroups"]} == {PHOENIX_MODEL.group}
    assert {verb for _, _, verb in granted(view["rules"])} == {"get", "list", "watch"}
    written = {
        resource for _, resource, verb in granted(edit["rules"]) if verb in ("create", "update", "patch", "delete")
    }
    assert written == {"phoenixmodels", "phoenixmodels/scale"}, "the status is the operator's"
    assert {label.rpartition("-")[2] for label in edit["metadata"]["labels"] if "aggregate" in label} == {
        "edit",
        "admin",
    }
    assert {label.rpartition("-")[2] for label in view["metadata"]["labels"] if "aggregate" in label} == {"view"}


# --- the other manifests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
@each_variant
def test_manifests_of_the_operator_are_valid(options: dict[str, Any], version: str) -> None:
    for body in manifests(**options):
        kubernetes_validate.validate(body, version, strict=True)


@each_variant
def test_operator_itself_passes_the_restricted_standard(options: dict[str, Any]) -> None:
    (deployment,) = (body for body in manifests(**options) if body["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert violations(pod) == []
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert any("--namespaces=" in text for text in container["args"]) is ("namespaces" in options)


def test_operator_starts_with_the_settings_that_it_is_installed_with(tmp_path: Path) -> None:
    from phoenix_operator.settings import read_settings

    (config,) = (body for body in install.manifests() if body["kind"] == "ConfigMap")
    file = tmp_path / Path(install.SETTINGS_FILE).name
    file.write_text(config["data"][file.name])
    assert read_settings(file) == Settings()


@each_variant
def test_folder_for_kubectl_names_every_file(options: dict[str, Any]) -> None:
    files = install.files("kind: CustomResourceDefinition\n", **options)
    listed = yaml.safe_load(files["kustomization.yaml"])["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(files)
    texts = [files[name] for name in ("operator.yaml", "bindings.yaml") if name in files]
    assert [body for text in texts for body in yaml.safe_load_all(text)] == manifests(**options)
