"""One reconcile after another, on a cluster in memory."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cluster import Call, MemoryCluster
from objects import NAMESPACE, document, ended, loaded, waiting
from pydantic import ValidationError
from specs import SCALING
from world import KEY, World

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.difference import is_as_wanted
from phoenix_operator.kinds import (
    CHILDREN,
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    HORIZONTAL_POD_AUTOSCALER,
    NETWORK_POLICY,
    PHOENIX_MODEL,
    POD_DISRUPTION_BUDGET,
    RESOURCE_CLAIM_TEMPLATE,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    Kind,
)
from phoenix_operator.observed import Object
from phoenix_operator.settings import RouteKind, Routes, Settings

CREATED = [
    (SERVICE_ACCOUNT, "fraud"), (CONFIG_MAP, "fraud-model"), (NETWORK_POLICY, "fraud"), (SERVICE, "fraud"),
    (SERVICE, "fraud-headless"), (DEPLOYMENT, "fraud"),
]  # fmt: skip
CREDENTIALS = {"model": {"uri": "s3://models/x.onnx", "credentials": {"secretRef": {"name": "s3-reader"}}}}


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def scenario(main: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a test of a coroutine that gets a world with one model in it."""

    def test() -> None:
        world = World()
        world.create()
        asyncio.run(main(world))

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


async def serving(world: World) -> None:
    """Bring the model to where it serves and everybody knows."""
    await world.reconcile()
    world.states.loaded = loaded()
    world.roll_out()
    await world.reconcile()
    world.cluster.take_writes()


def places(calls: list[Call], verb: str) -> list[tuple[Kind, str]]:
    return [(call.kind, call.name) for call in calls if call.verb == verb]


def refusal(code: int, message: str, *, of: Kind, verb: str = "patch") -> Callable[[Call], None]:
    def refuse(call: Call) -> None:
        if (call.kind, call.verb) == (of, verb):
            raise ApiError(code, "Forbidden", message)

    return refuse


def test_cluster_in_memory_has_the_methods_of_the_real_one() -> None:
    for name, method in inspect.getmembers(Cluster, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(method) == inspect.signature(getattr(MemoryCluster, name)), name


# --- create, and then leave alone ------------------------------------------------------------------------------------


@scenario
async def test_first_run_creates_what_pods_need_before_the_deployment_and_then_tells(world: World) -> None:
    assert await world.reconcile() is None
    writes = world.cluster.take_writes()
    assert places(writes, "create") == CREATED
    assert writes[-1] == Call("patch", PHOENIX_MODEL, "fraud", "status")
    assert world.condition("Accepted")[:2] == ("True", "SpecUnderstood")
    assert world.condition("Ready")[:2] == ("False", "Loading")
    assert world.counted("ok") == 1


@scenario
async def test_second_run_makes_no_write(world: World) -> None:
    await world.reconcile()
    world.cluster.take_writes()
    await world.reconcile()
    assert world.cluster.writes == []


@scenario
async def test_second_run_makes_no_write_while_the_watches_are_late(world: World) -> None:
    await world.reconcile()
    world.cluster.take_writes()
    await world.reconcile_blindly()
    assert world.cluster.writes == []


@scenario
async def test_restarted_operator_makes_no_write(world: World) -> None:
    await serving(world)
    world.start()
    await world.reconcile()
    assert world.cluster.writes == []


@scenario
async def test_restarted_operator_that_knows_only_the_model_makes_no_write(world: World) -> None:
    await serving(world)
    world.start()
    world.store.put(PHOENIX_MODEL, world.cluster.objects[PHOENIX_MODEL, "ml", "fraud"])
    await world.reconcile_blindly()
    children = [call for call in world.cluster.writes if call.kind in CHILDREN]
    assert children == []


@scenario
async def test_rollout_is_told_with_one_write_and_one_event(world: World) -> None:
    await world.reconcile()
    world.states.loaded = loaded()
    world.roll_out()
    world.cluster.take_writes()
    await world.reconcile()
    assert [(call.verb, call.kind) for call in world.cluster.take_writes()] == [
        ("patch", PHOENIX_MODEL), ("create", EVENT), ("create", EVENT),
    ]  # fmt: skip
    assert world.condition("Ready")[:2] == ("True", "Ready")
    assert sorted(world.events()) == [("Normal", "Ready", 1), ("Normal", "RolledOut", 1)]
    await world.reconcile()
    assert world.cluster.writes == []


@scenario
async def test_metadata_of_others_is_no_reason_to_write(world: World) -> None:
    await serving(world)
    for kind, name in CREATED:
        world.cluster.edit(kind, name, lambda body: body["metadata"]["labels"].update({"team": "risk"}))
    await world.reconcile()
    assert world.cluster.writes == []


# --- change ----------------------------------------------------------------------------------------------------------


@scenario
async def test_new_version_changes_config_map_and_deployment_only(world: World) -> None:
    await serving(world)
    world.create(model={"uri": "fraud/2.onnx", "version": "2"})
    await world.reconcile()
    writes = [call for call in world.cluster.take_writes() if call.kind in CHILDREN]
    assert [(call.kind, call.name) for call in writes] == [(CONFIG_MAP, "fraud-model"), (DEPLOYMENT, "fraud")]
    assert len(world.child(CONFIG_MAP, "fraud-model")["data"]) == 2
    assert world.condition("Progressing")[:2] == ("True", "RollingOut")
    world.roll_out()
    await world.reconcile()
    assert len(world.child(CONFIG_MAP, "fraud-model")["data"]) == 1, "no pod of version 1 is left"
    assert ("Normal", "Repaired", 1) not in world.events(), "an own wish is no repair"
    world.cluster.take_writes()
    await world.reconcile()
    assert world.cluster.writes == []


@scenario
async def test_what_is_no_longer_wanted_is_deleted(world: World) -> None:
    world.create(replicas=3)
    await serving(world)
    world.child(POD_DISRUPTION_BUDGET)
    world.create(replicas=1)
    await world.reconcile()
    assert places(world.cluster.take_writes(), "delete") == [(POD_DISRUPTION_BUDGET, "fraud")]
    assert world.cluster.of_kind(POD_DISRUPTION_BUDGET) == []
    await world.reconcile()
    assert places(world.cluster.writes, "delete") == []


# --- replicas of an autoscaler ---------------------------------------------------------------------------------------


@scenario
async def test_autoscaler_has_the_replicas_for_itself(world: World) -> None:
    world.create(autoscaling=SCALING | {"minReplicas": 2})
    await serving(world)
    assert world.child(DEPLOYMENT)["spec"]["replicas"] == 2
    world.cluster.edit(DEPLOYMENT, "fraud", lambda body: body["spec"].update(replicas=3))
    for _ in range(50):
        await world.reconcile()
    assert world.child(DEPLOYMENT)["spec"]["replicas"] == 3
    world.create(autoscaling=SCALING, model={"uri": "x", "version": "2"})
    await world.reconcile()
    assert world.child(DEPLOYMENT)["spec"]["replicas"] == 3
    assert world.status()["replicas"]["desired"] == 3


@scenario
async def test_recorded_latency_is_told_whatever_the_autoscaler_reads(world: World) -> None:
    world.create(autoscaling=SCALING)
    world.latency_s = 0.12345
    await serving(world)
    assert world.status()["autoscaling"] == {"latencyP95": "120m"}
    world.create()
    await world.reconcile()
    assert "autoscaling" not in world.status()


@scenario
async def test_autoscaler_goes_before_the_replicas_are_set(world: World) -> None:
    world.create(autoscaling=SCALING)
    await serving(world)
    world.cluster.take_writes()
    world.create(replicas=5)
    await world.reconcile()
    writes = [call for call in world.cluster.writes if call.kind in (DEPLOYMENT, HORIZONTAL_POD_AUTOSCALER)]
    assert [(call.verb, call.kind) for call in writes] == [
        ("delete", HORIZONTAL_POD_AUTOSCALER), ("patch", DEPLOYMENT),
    ]  # fmt: skip
    assert world.child(DEPLOYMENT)["spec"]["replicas"] == 5


@scenario
async def test_pod_is_asked_again_until_its_capacity_is_measured(world: World) -> None:
    world.create(autoscaling=SCALING)
    world.states.loaded = loaded()
    await serving(world)
    assert await world.reconcile() == 15
    world.states.loaded = loaded(capacity=10)
    assert await world.reconcile() is None
    metrics = world.child(HORIZONTAL_POD_AUTOSCALER)["spec"]["metrics"]
    assert [row["object"]["target"].get("averageValue") for row in metrics] == ["7", None]


@scenario
async def test_what_is_not_ours_is_never_deleted(world: World) -> None:
    await serving(world)
    ours = world.child(SERVICE)["metadata"]
    for name, owners in (("other", []), ("theirs", [ours["ownerReferences"][0] | {"uid": "another"}])):
        metadata = {"name": name, "namespace": "ml", "labels": ours["labels"], "ownerReferences": owners}
        world.cluster.put(SERVICE, {"metadata": metadata})
    await world.reconcile()
    assert world.cluster.writes == []


@scenario
async def test_object_that_was_replaced_meanwhile_is_not_deleted(world: World) -> None:
    world.create(replicas=3)
    await serving(world)
    world.create(replicas=1)
    world.watch()
    body = world.child(POD_DISRUPTION_BUDGET)
    body["metadata"]["uid"] = "another"
    world.cluster.put(POD_DISRUPTION_BUDGET, body)
    await world.reconcile_blindly()
    assert world.child(POD_DISRUPTION_BUDGET)["metadata"]["uid"] == "another"


@scenario
async def test_deleted_model_is_left_to_the_garbage_collector(world: World) -> None:
    await serving(world)
    world.cluster.edit(PHOENIX_MODEL, "fraud", lambda body: body["metadata"].update(deletionTimestamp="now"))
    assert await world.reconcile() is None
    world.cluster.remove(PHOENIX_MODEL, "fraud")
    assert await world.reconcile() is None
    assert world.cluster.writes == []


@scenario
async def test_model_that_vanishes_before_its_status_is_written_is_no_error(world: World) -> None:
    world.watch()
    world.cluster.remove(PHOENIX_MODEL, "fraud")
    assert await world.reconcile_blindly() is None


# --- repair ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CREATED, ids=lambda part: str(part))
def test_deleted_child_is_made_again_and_told(kind: Kind, name: str) -> None:
    async def main() -> None:
        world = World()
        world.create()
        await serving(world)
        world.cluster.remove(kind, name)
        await world.reconcile()
        assert places(world.cluster.take_writes(), "create")[0] == (kind, name)
        assert ("Normal", "Repaired", 1) in world.events()
        assert any(f"{kind} {name} had been deleted" in body["message"] for body in world.cluster.of_kind(EVENT))

    asyncio.run(main())


def spoil_spec(body: Object) -> None:
    body["spec"]["replicas" if "replicas" in body["spec"] else "selector"] = None


EDITS: dict[str, tuple[Kind, str, Callable[[Object], None]]] = {
    "replicas": (DEPLOYMENT, "fraud", lambda body: body["spec"].update(replicas=9)),
    "image": (
        DEPLOYMENT, "fraud",
        lambda body: body["spec"]["template"]["spec"]["containers"][0].update(image="example.com/other"),
    ),
    "selector": (SERVICE, "fraud", lambda body: body["spec"]["selector"].update(app="other")),
    "policy-selector": (
        NETWORK_POLICY, "fraud", lambda body: body["spec"]["podSelector"]["matchLabels"].update(app="other"),
    ),
    "policy": (NETWORK_POLICY, "fraud", lambda body: body["spec"].update(egress=[{}])),
    "manifest": (CONFIG_MAP, "fraud-model", lambda body: body["data"].update(dict.fromkeys(body["data"], "x"))),
    "token": (SERVICE_ACCOUNT, "fraud", lambda body: body.update(automountServiceAccountToken=True)),
    "annotations": (DEPLOYMENT, "fraud", lambda body: body["metadata"].update(annotations={})),
    "model-label": (DEPLOYMENT, "fraud", lambda body: body["metadata"]["labels"].pop("phoenix-ml.io/model")),
    "manager-label": (SERVICE, "fraud", lambda body: body["metadata"]["labels"].pop("app.kubernetes.io/managed-by")),
    "all-labels": (SERVICE, "fraud", lambda body: body["metadata"].pop("labels")),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edited_child_is_set_back(edit: str) -> None:
    async def main() -> None:
        world = World()
        world.create()
        await serving(world)
        kind, name, change = EDITS[edit]
        before = world.child(kind, name)
        world.cluster.edit(kind, name, change)
        await world.reconcile()
        after = world.child(kind, name)
        assert is_as_wanted(
            {key: before[key] for key in before if key != "status"}
            | {"metadata": {key: before["metadata"][key] for key in ("labels", "annotations", "ownerReferences")}},
            after,
        )
        writes = [call for call in world.cluster.take_writes() if call.kind in CHILDREN]
        assert writes == [Call("patch", kind, name)]
        await world.reconcile()
        assert [call for call in world.cluster.writes if call.kind in CHILDREN] == []

    asyncio.run(main())


@scenario
async def test_repair_is_told_once_and_counted_up(world: World) -> None:
    await serving(world)
    for _ in range(3):
        world.cluster.edit(SERVICE, "fraud", lambda body: body["spec"].update(selector={}))
        await world.reconcile()
    assert ("Normal", "Repaired", 3) in world.events()


@scenario
async def test_first_run_that_was_cut_off_is_finished_by_the_next(world: World) -> None:
    def cut(call: Call) -> None:
        if (call.kind, call.verb) == (DEPLOYMENT, "patch"):
            raise ApiError(0, "", "no answer")

    world.cluster.refuse = cut
    with pytest.raises(ApiError):
        await world.reconcile()
    assert world.counted("error") == 1
    world.cluster.refuse = lambda call: None
    world.cluster.take_writes()
    await world.reconcile()
    assert places(world.cluster.take_writes(), "create") == [(DEPLOYMENT, "fraud")]
    assert world.events() == [], "what was never there was not deleted by anybody"


# --- what the user must mend -----------------------------------------------------------------------------------------


@scenario
async def test_foreign_object_is_a_clash_and_stays_untouched(world: World) -> None:
    foreign = world.cluster.put(
        DEPLOYMENT, {"metadata": {"name": "fraud", "namespace": "ml", "labels": {"app": "x"}}, "spec": {"replicas": 5}}
    )
    assert await world.reconcile() == 2
    assert [call.kind for call in world.cluster.take_writes() if call.kind in CHILDREN] == []
    assert world.condition("Accepted")[:2] == ("False", "NameClash")
    assert world.condition("Ready")[:2] == ("False", "NameClash")
    assert "Deployment ml/fraud" in world.condition("Ready")[2]
    assert world.child(DEPLOYMENT) == foreign
    assert ("Warning", "NameClash", 1) in world.events()
    world.cluster.remove(DEPLOYMENT, "fraud")
    assert await world.reconcile() is None
    assert world.condition("Accepted")[0] == "True"


@scenario
async def test_foreign_object_that_bears_our_labels_is_a_clash_too(world: World) -> None:
    labels = {"phoenix-ml.io/model": "fraud", "app.kubernetes.io/managed-by": "phoenix-operator"}
    world.cluster.put(SERVICE, {"metadata": {"name": "fraud", "namespace": "ml", "labels": labels}})
    await world.reconcile()
    assert world.condition("Accepted")[:2] == ("False", "NameClash")


@scenario
async def test_object_that_appears_at_the_last_moment_is_not_overwritten(world: World) -> None:
    def appear(call: Call) -> None:
        if (call.kind, call.verb) == (SERVICE, "patch"):
            world.cluster.refuse = lambda call: None
            metadata = {"name": "fraud", "namespace": "ml", "labels": {"app.kubernetes.io/name": "theirs"}}
            world.cluster.put(SERVICE, {"metadata": metadata, "spec": {"selector": {"a": "b"}}})

    world.cluster.refuse = appear
    with pytest.raises(ApiError) as caught:
        await world.reconcile()
    assert caught.value.code == 409
    assert world.child(SERVICE)["spec"] == {"selector": {"a": "b"}}
    await world.reconcile()
    assert world.condition("Accepted")[:2] == ("False", "NameClash")


@scenario
async def test_child_of_a_predecessor_is_waited_for(world: World) -> None:
    await serving(world)
    for kind, name in CREATED:
        world.cluster.edit(kind, name, lambda body: body["metadata"]["ownerReferences"][0].update(uid="predecessor"))
    before = world.child(DEPLOYMENT)
    with pytest.raises(ApiError, match="of the deleted model is still going away"):
        await world.reconcile()
    assert world.child(DEPLOYMENT) == before
    for kind, name in CREATED:
        world.cluster.remove(kind, name)
    await world.reconcile()
    assert world.condition("Accepted")[0] == "True"
    assert world.child(DEPLOYMENT)["metadata"]["ownerReferences"][0]["uid"] == world.subject().uid


def test_spec_that_cannot_be_parsed_is_told_and_nothing_else_is_done() -> None:
    async def main() -> None:
        world = World()
        world.create(replicas=-1, batching={"maxRows": "many"})
        assert await world.reconcile() is None
        assert world.cluster.take_writes() == [Call("patch", PHOENIX_MODEL, "fraud", "status")]
        status, reason, message = world.condition("Accepted")
        assert (status, reason) == ("False", "InvalidSpec")
        assert "spec.replicas" in message
        assert "spec.batching.maxRows" in message
        await world.reconcile()
        assert world.cluster.writes == []

    asyncio.run(main())


@scenario
async def test_spec_that_becomes_unreadable_leaves_what_serves_alone(world: World) -> None:
    await serving(world)
    before = world.child(DEPLOYMENT)
    world.create(replicas=-1)
    await world.reconcile()
    assert [call for call in world.cluster.writes if call.kind in CHILDREN] == []
    assert world.child(DEPLOYMENT) == before
    assert world.condition("Available")[0] == "True"
    assert world.condition("Ready")[:2] == ("False", "InvalidSpec")


@scenario
async def test_rate_limit_is_handed_to_the_server(world: World) -> None:
    world.create(networking={"rateLimit": {"requestsPerSecond": 5, "per": "Model"}})
    await world.reconcile()
    assert world.condition("Accepted")[0] == "True"
    (text,) = world.child(CONFIG_MAP, "fraud-model")["data"].values()
    assert "rateLimit" in text


def test_empty_bindings_ask_for_nothing() -> None:
    async def main() -> None:
        world = World()
        world.create(bindings={})
        await world.reconcile()
        assert world.condition("Accepted")[0] == "True"

    asyncio.run(main())


@scenario
async def test_refused_object_is_told_while_the_others_are_applied_and_later_recovers(world: World) -> None:
    words = 'deployments.apps "fraud" is forbidden: admission webhook says no'
    world.cluster.refuse = refusal(403, words, of=DEPLOYMENT)
    assert await world.reconcile() == 30
    assert [call.name for call in world.cluster.take_writes() if call.verb == "create"] == [
        *(name for kind, name in CREATED if kind is not DEPLOYMENT), *(body["metadata"]["name"] for body in
                                                                      world.cluster.of_kind(EVENT)),
    ]  # fmt: skip
    assert world.condition("Accepted")[:2] == ("False", "ObjectRefused")
    assert words in world.condition("Accepted")[2]
    assert world.counted("refused") == 1
    assert await world.reconcile() == 30, "it is tried again, and told only once"
    assert world.events() == [("Warning", "ObjectRefused", 1)]
    world.cluster.refuse = lambda call: None
    assert await world.reconcile() is None
    assert world.condition("Accepted")[:2] == ("True", "SpecUnderstood")
    assert world.child(DEPLOYMENT)


@scenario
async def test_object_that_does_not_fit_its_schema_is_told_once_whatever_field_the_server_names(world: World) -> None:
    def unfit(field: str) -> Callable[[Call], None]:
        return refusal(
            500, f"failed to create typed patch object (ml/fraud): .spec.{field}: not declared", of=DEPLOYMENT
        )

    world.cluster.refuse = unfit("b")
    await world.reconcile()
    assert ".spec.b" in world.condition("Accepted")[2]
    world.cluster.take_writes()
    world.cluster.refuse = unfit("a")
    await world.reconcile()
    assert [call.kind for call in world.cluster.take_writes()] == [DEPLOYMENT], "the one that is refused, no status"
    world.create(replicas=3)
    await world.reconcile()
    assert ".spec.a" in world.condition("Accepted")[2], "another wish, another word"


@scenario
async def test_claim_template_that_can_never_change_is_made_anew(world: World) -> None:
    def ask_for(count: int) -> None:
        world.create(runtime={"accelerator": {"deviceClassName": "gpu.example.com", "count": count}})

    def templates() -> list[Object]:
        return world.cluster.of_kind(RESOURCE_CLAIM_TEMPLATE)

    def unchangeable(call: Call) -> None:
        if (call.kind, call.verb) == (RESOURCE_CLAIM_TEMPLATE, "patch") and templates():
            raise ApiError(422, "Invalid", "spec: field is immutable")

    ask_for(1)
    await world.reconcile()
    (before,) = templates()
    world.cluster.refuse = unchangeable
    ask_for(2)
    await world.reconcile()
    (after,) = templates()
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"] == 2
    assert world.condition("Accepted")[0] == "True"


@scenario
async def test_refused_object_that_is_no_longer_wanted_is_forgotten(world: World) -> None:
    world.create(replicas=2)
    world.cluster.refuse = refusal(422, "no budgets here", of=POD_DISRUPTION_BUDGET)
    await world.reconcile()
    assert world.condition("Accepted")[:2] == ("False", "ObjectRefused")
    world.create(replicas=1)
    assert await world.reconcile() is None
    assert world.condition("Accepted")[0] == "True"


@scenario
async def test_quota_is_told_as_such(world: World) -> None:
    world.cluster.refuse = refusal(403, "exceeded quota: small, requested: services=1", of=SERVICE)
    assert await world.reconcile() == 30
    assert world.condition("Accepted")[0] == "True"
    assert world.condition("Available")[:2] == ("False", "QuotaExceeded")
    assert "exceeded quota: small, requested: services=1" in world.condition("Ready")[2]
    world.cluster.refuse = lambda call: None
    assert await world.reconcile() is None
    assert world.condition("Available")[:2] == ("False", "Loading")


@pytest.mark.parametrize("code", [0, 409, 429, 500, 503])
def test_error_of_the_moment_is_raised_for_the_queue_to_try_again(code: int) -> None:
    async def main() -> None:
        world = World()
        world.create()
        world.cluster.refuse = refusal(code, "later", of=SERVICE)
        with pytest.raises(ApiError):
            await world.reconcile()
        assert world.counted("error") == 1
        assert [call for call in world.cluster.writes if call.kind is PHOENIX_MODEL] == []

    asyncio.run(main())


@pytest.mark.parametrize("of", [SERVICE, PHOENIX_MODEL])
def test_namespace_that_is_being_deleted_is_left_in_silence(of: Kind) -> None:
    async def main() -> None:
        world = World()
        world.create()
        words = "unable to create new content in namespace ml because it is being terminated"
        world.cluster.refuse = refusal(403, words, of=of)
        assert await world.reconcile() is None
        assert world.events() == []

    asyncio.run(main())


# --- what pods refer to ----------------------------------------------------------------------------------------------


def test_missing_secret_is_told_asked_for_again_and_found() -> None:
    async def main() -> None:
        world = World()
        world.create(**CREDENTIALS)
        assert await world.reconcile() == 2
        assert world.condition("ModelVerified")[:2] == ("False", "SecretMissing")
        assert world.child(DEPLOYMENT), "pods start by themselves once it is there"
        world.cluster.put(SECRET, {"metadata": {"name": "s3-reader", "namespace": NAMESPACE}, "data": {"KEY": "aGk="}})
        assert await world.reconcile() is None
        assert world.condition("ModelVerified")[0] == "Unknown"
        assert "aGk=" not in str(world.cluster.of_kind(PHOENIX_MODEL) + world.cluster.of_kind(EVENT))

    asyncio.run(main())


def test_missing_config_map_of_a_model_is_told() -> None:
    async def main() -> None:
        world = World()
        world.create(model={"uri": "configmap://fraud-onnx/model.onnx"})
        assert await world.reconcile() == 2
        assert world.condition("ModelVerified")[:2] == ("False", "NotFound")

    asyncio.run(main())


def test_secret_that_the_operator_may_not_read_is_taken_to_be_there() -> None:
    """A namespaced install reads only the Secrets that it is told of; the pods may well be able to mount others."""

    async def main() -> None:
        world = World()
        world.create(**CREDENTIALS)
        world.cluster.refuse = refusal(403, "secrets is forbidden", of=SECRET, verb="get")
        assert await world.reconcile() is None
        assert world.child(DEPLOYMENT)
        assert world.condition("Accepted")[0] == "True"

    asyncio.run(main())


# --- hosts -----------------------------------------------------------------------------------------------------------

ROUTED = Settings(routes=Routes(kind=RouteKind.INGRESS))
HOST = {"networking": {"host": "models.example.com"}}


def test_host_belongs_to_the_older_of_two_models_with_one_path() -> None:
    async def main() -> None:
        world = World(ROUTED)
        world.create(**HOST, created="2026-11-24T10:00:01Z", uid="younger")
        world.create(**HOST, namespace="other", created="2026-11-24T10:00:00Z", uid="older")
        assert await world.reconcile() == 2
        assert await world.reconcile(("other", "fraud")) is None
        assert world.condition("Accepted")[:2] == ("False", "NameClash")
        assert "other/fraud (models.example.com/v2/models/fraud)" in world.condition("Accepted")[2]
        assert world.condition("Accepted", ("other", "fraud"))[0] == "True"
        world.cluster.remove(PHOENIX_MODEL, "fraud", "other")
        assert await world.reconcile() is None
        assert world.condition("Accepted")[0] == "True"

    asyncio.run(main())


@pytest.mark.parametrize(
    "other",
    [
        {"name": "other", **HOST},
        {"namespace": "other"},
        {"namespace": "other", "networking": {"host": "else.example.com"}},
        {"namespace": "other", "created": "2026-11-24T11:00:00Z", **HOST},
    ],
    ids=["other-path", "no-host", "other-host", "younger"],
)
def test_host_is_no_clash_without_the_same_path_of_an_older_model(other: Object) -> None:
    async def main() -> None:
        world = World(ROUTED)
        world.create(**HOST)
        world.create(**{"created": "2026-11-24T09:00:00Z", "uid": "another"} | other)
        await world.reconcile()
        assert world.condition("Accepted")[0] == "True"

    asyncio.run(main())


def test_models_of_one_second_agree_on_who_is_older() -> None:
    async def main() -> None:
        world = World(ROUTED)
        world.create(**HOST, uid="b")
        world.create(**HOST, namespace="other", uid="a")
        await world.reconcile()
        await world.reconcile(("other", "fraud"))
        assert world.condition("Accepted")[0] == "False"
        assert world.condition("Accepted", ("other", "fraud"))[0] == "True"

    asyncio.run(main())


# --- pods ------------------------------------------------------------------------------------------------------------


def test_preferred_device_that_nobody_has_is_given_up_once() -> None:
    async def main() -> None:
        world = World()
        world.create(runtime={"accelerator": {"policy": "Prefer"}})
        await world.reconcile()
        world.no_device()
        await world.reconcile()
        container = world.child(DEPLOYMENT)["spec"]["template"]["spec"]["containers"][0]
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
        assert ("Warning", "FellBackToCPU", 1) in world.events()
        world.states.loaded = loaded()
        world.roll_out()
        await world.reconcile()
        assert world.condition("Ready")[:2] == ("True", "FellBackToCPU")
        world.cluster.take_writes()
        await world.reconcile()
        assert world.cluster.writes == []

    asyncio.run(main())


@scenario
async def test_pod_that_did_not_say_what_it_loaded_is_asked_again(world: World) -> None:
    await world.reconcile()
    world.roll_out()
    assert await world.reconcile() == 15
    world.states.loaded = loaded()
    assert await world.reconcile() is None
    assert world.status()["model"]["provider"] == "CPUExecutionProvider"


@scenario
async def test_failing_pods_are_told_as_they_change(world: World) -> None:
    await world.reconcile()
    world.pods(lambda model, name, template: waiting(model, "ErrImagePull", "no such image", name, template=template))
    await world.reconcile()
    assert world.condition("Ready")[:2] == ("False", "ImagePullFailed")
    world.pods(lambda model, name, template: ended(model, name, reason="OOMKilled", template=template))
    await world.reconcile()
    assert world.condition("Ready")[:2] == ("False", "OutOfMemory")
    assert sorted(world.events()) == [("Warning", "ImagePullFailed", 1), ("Warning", "OutOfMemory", 1)]


# --- whatever happens ------------------------------------------------------------------------------------------------

SPECS: list[Object] = [
    {}, {"replicas": 3}, {"replicas": 0}, {"model": {"uri": "x", "version": "2"}}, {"autoscaling": SCALING},
    {"runtime": {"accelerator": {"deviceClassName": "gpu"}}}, {"pod": {"serviceAccountName": "own"}},
    {"replicas": -1},
]  # fmt: skip
DEEDS = st.lists(
    st.one_of(
        st.tuples(st.just("spec"), st.sampled_from(SPECS)),
        st.tuples(st.just("edit"), st.sampled_from(sorted(EDITS))),
        st.tuples(st.just("delete"), st.sampled_from(CREATED)),
        st.tuples(st.sampled_from(["roll_out", "restart", "reconcile", "blind", "crash"]), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(DEEDS)
def test_whatever_happens_the_next_runs_mend_it_and_then_rest(deeds: list[tuple[str, Any]]) -> None:
    async def main() -> None:
        world = World()
        world.create()
        await world.reconcile()
        for what, detail in deeds:
            await do(world, what, detail)
        world.create()
        for _ in range(2):
            await world.reconcile()
        world.roll_out()
        for _ in range(2):
            await world.reconcile()
        world.cluster.take_writes()
        await world.reconcile()
        assert world.cluster.writes == []
        there = [(kind, body["metadata"]["name"]) for kind in CHILDREN for body in world.cluster.of_kind(kind)]
        assert sorted(there, key=str) == sorted(CREATED, key=str)
        fresh = World()
        fresh.create()
        await fresh.reconcile()
        for kind, name in CREATED:
            wanted = fresh.child(kind, name)
            assert world.child(kind, name)["metadata"]["annotations"] == wanted["metadata"]["annotations"]
            assert world.child(kind, name).get("spec") == wanted.get("spec")

    asyncio.run(main())


async def do(world: World, what: str, detail: Any) -> None:
    if what == "spec":
        world.create(**detail)
    elif what == "edit" and (EDITS[detail][0], "ml", EDITS[detail][1]) in world.cluster.objects:
        with suppress(KeyError):  # a deed before took the field away
            world.cluster.edit(*EDITS[detail])
    elif what == "delete" and (detail[0], "ml", detail[1]) in world.cluster.objects:
        world.cluster.remove(*detail)
    elif what == "roll_out" and (DEPLOYMENT, "ml", "fraud") in world.cluster.objects:
        with suppress(ValidationError):
            world.roll_out()
    elif what == "restart":
        world.start()
    elif what == "reconcile":
        await world.reconcile()
    elif what == "blind":
        await world.reconcile_blindly()
    elif what == "crash":
        count = 0

        def crash(call: Call) -> None:
            nonlocal count
            count += call.verb == "patch"
            if count > 1:
                raise ApiError(0, "", "killed")

        world.cluster.refuse = crash
        with suppress(ApiError):
            await world.reconcile()
        world.start()
        world.cluster.refuse = lambda call: None


def test_document_without_a_name_of_its_own_is_the_model_of_the_tests() -> None:
    assert (document()["metadata"]["namespace"], document()["metadata"]["name"]) == KEY
    assert RESOURCE_CLAIM_TEMPLATE in CHILDREN
