"""Bindings, one reconcile after another: made once, rotated, released, and whole again after every cut."""

import asyncio
import base64
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from memory_cluster import Call
from objects import NAMESPACE, OPERATOR_NAMESPACE, loaded
from world import KEY, World

from phoenix_operator import bindings
from phoenix_operator.cluster import ApiError
from phoenix_operator.kinds import DEPLOYMENT, NETWORK_POLICY, PHOENIX_MODEL, POD, SECRET
from phoenix_operator.observed import Object
from phoenix_operator.settings import Settings
from phoenix_operator.trouble import REASONS

FINALIZER = "phoenix-ml.io/backends"
BACKENDS: list[Object] = [
    {"name": "default", "kind": "redis", "adminSecretRef": {"name": "redis-admin"}},
    {"name": "default", "kind": "kafka", "adminSecretRef": {"name": "kafka-admin"}},
    {"name": "other", "kind": "kafka", "adminSecretRef": {"name": "other-admin"}},
    {"name": "default", "kind": "postgresql", "adminSecretRef": {"name": "postgres-admin"}},
]
SETTINGS = Settings.model_validate({"backends": BACKENDS}, by_alias=True, by_name=False)
REDIS: Object = {"bindings": {"redis": {"backend": "default"}}}
ALL: Object = {
    "bindings": {name: {"backend": "default"} for name in ("redis", "kafka", "postgres")},
}
HOMES = (("redis", "default"), ("kafka", "default"), ("postgresql", "default"))


def scenario(main: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a test of a coroutine that gets a world with a model on all three backends."""

    def test() -> None:
        world = World(SETTINGS)
        world.create(**ALL)
        asyncio.run(main(world))

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


def values(world: World, kind: str) -> dict[str, str]:
    data = world.child(SECRET, f"fraud-{kind}")["data"]
    return {key: base64.b64decode(text).decode() for key, text in data.items()}


async def serving(world: World) -> None:
    await world.reconcile()
    world.states.loaded = loaded()
    world.roll_out()
    await world.reconcile()
    world.cluster.take_writes()


@scenario
async def test_model_gets_a_login_on_each_backend_and_pods_get_the_secrets(world: World) -> None:
    await serving(world)
    assert world.condition("BindingsReady")[:2] == ("True", "Bound")
    assert world.condition("Ready")[:2] == ("True", "Ready")
    pod = world.child(DEPLOYMENT)["spec"]["template"]["spec"]
    for home in HOMES:
        kind = home[0]
        body = world.child(SECRET, f"fraud-{kind}")
        assert body["type"] == f"servicebinding.io/{kind}"
        assert world.services[home].works(values(world, kind))
        (mount,) = (row for row in pod["containers"][0]["volumeMounts"] if row["name"] == f"binding-{kind}")
        assert mount == {"name": f"binding-{kind}", "mountPath": f"/bindings/{kind}", "readOnly": True}
    model = world.cluster.objects[PHOENIX_MODEL, *KEY]
    assert model["metadata"]["finalizers"] == [FINALIZER]
    (rule,) = (
        row
        for row in world.child(NETWORK_POLICY)["spec"]["egress"]
        if {"protocol": "TCP", "port": 7001} in row["ports"]
    )
    assert {"namespaceSelector": {}} in rule["to"]


@scenario
async def test_second_run_makes_no_write(world: World) -> None:
    await serving(world)
    changes = {home: service.changes for home, service in world.services.items()}
    await world.reconcile()
    world.start()
    await world.reconcile()
    assert world.cluster.writes == []
    assert changes == {home: service.changes for home, service in world.services.items()}


# --- cut off at every step -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The operator's process ends here."""


class Life:
    """A model from its creation to its end, with an operator that is killed before its n-th step and started again.

    Before each step every running pod must be able to log in with what it was given, and with what it would be given
    if it started again. What may have something on a backend must stand on the model.
    """

    def __init__(self, killed_before: int | None, spec: Object) -> None:
        self.world = World(SETTINGS)
        self.world.create(**spec)
        self.world.states.loaded = loaded()
        self.steps, self.killed_before = 0, killed_before
        self.held: list[tuple[tuple[str, str], dict[str, str]]] = []
        self.world.cluster.refuse = lambda call: self.step()
        for service in self.world.services.values():
            service.before = lambda what: self.step()

    def step(self) -> None:
        for home, given in self.held:
            assert self.world.services[home].works(given), f"a running pod cannot log in to {home}"
            self.check_restart(home[0])
        document = self.world.cluster.objects.get((PHOENIX_MODEL, *KEY))
        recorded = bindings.homes_of(document) if document else set()
        assert set(self.logins()) <= recorded, "what may be there is not written down"
        self.steps += 1
        if self.steps == self.killed_before:
            raise Killed

    def check_restart(self, kind: str) -> None:
        """A container that starts again reads the Secret as it is now."""
        body = self.world.cluster.objects.get((SECRET, NAMESPACE, f"fraud-{kind}"))
        if body is not None:
            backend = body["metadata"]["annotations"][bindings.BACKEND]
            assert self.world.services[kind, backend].works(values(self.world, kind)), "a restarted pod cannot log in"

    async def reconcile(self) -> None:
        """Reconcile until nothing is written any more."""
        for _ in range(12):
            try:
                self.world.cluster.take_writes()
                await self.world.reconcile()
            except Killed:
                self.world.start()
                continue
            if not self.world.cluster.writes:
                return
        raise AssertionError("it never comes to rest")

    def homes(self) -> list[tuple[str, str]]:
        bindings = self.world.subject().spec.bindings
        rows = {"redis": bindings.redis, "kafka": bindings.kafka, "postgresql": bindings.postgres} if bindings else {}
        return [(kind, row.backend) for kind, row in rows.items() if row is not None and row.backend is not None]

    def given(self) -> list[tuple[tuple[str, str], dict[str, str]]]:
        return [(home, values(self.world, home[0])) for home in self.homes()]

    async def roll(self) -> None:
        """Replace pods one by one: for a while there are some of both templates."""
        new = self.given()
        before, self.held = self.held, [*self.held, *new]
        (old,) = [self.world.cluster.of_kind(POD)] if before else [[]]
        self.world.roll_out()
        for body in old:
            body["metadata"] |= {"name": f"{body['metadata']['name']}-old", "uid": f"{body['metadata']['uid']}-old"}
            body["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"  # it answers its last requests
            self.world.cluster.put(POD, body)
        await self.reconcile()
        for body in old:
            self.world.cluster.remove(POD, body["metadata"]["name"])
        self.held = new
        await self.reconcile()

    def logins(self) -> dict[tuple[str, str], set[str]]:
        return {home: set(service.logins) for home, service in self.world.services.items() if service.logins}


async def whole_life(killed_before: int | None) -> int:
    life = Life(killed_before, ALL | {"replicas": 2})
    world = life.world
    await life.reconcile()
    first = {kind: values(world, kind) for kind, _ in HOMES}
    await life.roll()
    assert {kind: values(world, kind) for kind, _ in HOMES} == first, "a password is made once"
    assert life.logins() == {home: {"phx.ml.fraud.a"} for home in HOMES}

    world.annotate(rotate="1")
    await life.reconcile()
    for kind, _ in HOMES:
        assert values(world, kind)["username"] == "phx.ml.fraud.b"
        assert values(world, kind)["password"] != first[kind]["password"]
    assert life.logins() == {home: {"phx.ml.fraud.a", "phx.ml.fraud.b"} for home in HOMES}
    await life.roll()
    assert life.logins() == {home: {"phx.ml.fraud.b"} for home in HOMES}, "the login before has gone"

    moved = {"bindings": {"redis": {"backend": "default"}, "kafka": {"backend": "other"}}, "replicas": 2}
    world.create(**moved)
    await life.reconcile()
    await life.roll()
    assert set(life.logins()) == {("redis", "default"), ("kafka", "other")}
    assert (SECRET, NAMESPACE, "fraud-postgresql") not in world.cluster.objects
    assert ("postgresql", "default") not in bindings.homes_of(world.cluster.objects[PHOENIX_MODEL, *KEY])
    assert world.condition("BindingsReady")[:2] == ("True", "Bound")

    life.held = []
    world.delete()
    await life.reconcile()
    assert life.logins() == {}
    assert world.services["redis", "default"].homes == {"fraud": ()}, "data stays"
    assert (PHOENIX_MODEL, *KEY) not in world.cluster.objects, "nothing holds the model any more"
    return life.steps


def test_life_comes_to_the_same_end_wherever_the_operator_is_killed() -> None:
    steps = asyncio.run(whole_life(None))
    assert steps > 60
    for number in range(1, steps + 1):
        asyncio.run(whole_life(number))


# --- deletion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize("is_up", [True, False])
@pytest.mark.parametrize("policy", ["Retain", "Delete"])
def test_deletion_takes_what_the_policy_says(policy: str, is_up: bool, is_forced: bool) -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(bindings=ALL["bindings"] | {"deletionPolicy": policy})
        await serving(world)
        for service in world.services.values():
            service.is_up = is_up
        world.delete()
        if is_forced:
            world.annotate(force_delete="true")
        delay_s = await world.reconcile()
        is_gone = (PHOENIX_MODEL, *KEY) not in world.cluster.objects
        assert is_gone is (is_up or is_forced)
        homes = [world.services[home] for home in HOMES]
        if is_up and not is_forced:
            assert [service.logins for service in homes] == [{}, {}, {}]
            assert all(("fraud" in service.homes) is (policy == "Retain") for service in homes)
            return
        assert all(service.logins for service in homes), "nobody was asked"
        if is_forced:
            assert [service.calls for service in homes if "drop" in str(service.calls)] == []
            return
        status, reason, message = world.condition("BindingsReady")
        assert (status, reason) == ("False", "DeletionBlocked")
        assert "kubectl annotate phx fraud -n ml phoenix-ml.io/force-delete=true" in message
        assert world.condition("Ready")[:2] == ("False", "DeletionBlocked")
        assert ("Warning", "DeletionBlocked", 1) in world.events()
        assert delay_s is not None
        world.cluster.take_writes()
        await world.reconcile()
        assert world.cluster.writes == [], "it is told once"
        for service in world.services.values():
            service.is_up = True
        world.start()  # without its memory of the outage
        await world.reconcile()
        assert (PHOENIX_MODEL, *KEY) not in world.cluster.objects
        assert [service.logins for service in homes] == [{}, {}, {}]

    asyncio.run(main())


def test_deletion_goes_on_where_only_one_backend_is_down() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(**ALL)
        await serving(world)
        world.services["kafka", "default"].is_up = False
        world.delete()
        await world.reconcile()
        assert world.services["redis", "default"].logins == {}
        document = world.cluster.objects[PHOENIX_MODEL, *KEY]
        assert bindings.homes_of(document) == {("kafka", "default")}
        assert "redis" not in world.condition("BindingsReady")[2]
        world.annotate(force_delete="true")
        await world.reconcile()
        assert (PHOENIX_MODEL, *KEY) not in world.cluster.objects

    asyncio.run(main())


def test_model_whose_spec_cannot_be_read_is_let_go_with_its_logins() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(bindings=ALL["bindings"] | {"deletionPolicy": "Delete"})
        await serving(world)
        world.cluster.edit(PHOENIX_MODEL, "fraud", lambda body: body["spec"].update(replicas="many"))
        world.delete()
        await world.reconcile()
        assert (PHOENIX_MODEL, *KEY) not in world.cluster.objects
        assert [world.services[home].logins for home in HOMES] == [{}, {}, {}]
        assert all("fraud" in world.services[home].homes for home in HOMES), "nobody can say that data may go"

    asyncio.run(main())


def test_model_without_backends_has_no_finalizer() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.secret("mine", uri="redis://u:p@redis.example.com:6380/0")
        world.create(bindings={"redis": {"secretRef": {"name": "mine"}}})
        await world.reconcile()
        assert not world.cluster.objects[PHOENIX_MODEL, *KEY]["metadata"].get("finalizers")
        assert world.condition("BindingsReady")[0] == "True"
        assert [name for kind, _, name in world.cluster.objects if kind is SECRET and "fraud" in name] == []

    asyncio.run(main())


def test_other_finalizers_stay() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(**REDIS)
        world.cluster.edit(PHOENIX_MODEL, "fraud", lambda body: body["metadata"].update(finalizers=["example.com/x"]))
        await world.reconcile()
        document = world.cluster.objects[PHOENIX_MODEL, *KEY]
        assert document["metadata"]["finalizers"] == ["example.com/x", FINALIZER]
        world.delete()
        await world.reconcile()
        document = world.cluster.objects[PHOENIX_MODEL, *KEY]
        assert document["metadata"]["finalizers"] == ["example.com/x"]
        assert bindings.RECORD not in document["metadata"]["annotations"]

    asyncio.run(main())


# --- Secrets of the model's own --------------------------------------------------------------------------------------


OWN: Object = {"bindings": {"redis": {"secretRef": {"name": "mine"}}}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Secret mine does not exist"),
        ({"port": "6379"}, "it has no key uri or host"),
        ({"type": "kafka", "uri": "redis://x"}, "its key type should be redis"),
    ],
)
def test_secret_that_is_no_binding_is_named_and_pods_wait_for_it(content: dict[str, str] | None, words: str) -> None:
    async def main() -> None:
        world = World(SETTINGS)
        if content is not None:
            world.secret("mine", **content)
        world.create(**OWN)
        assert await world.reconcile() == 2.0
        status, reason, message = world.condition("BindingsReady")
        assert (status, reason) == ("False", "SecretMissing")
        assert words in message
        assert message.startswith("spec.bindings.redis.secretRef: ")
        assert (DEPLOYMENT, *KEY) not in world.cluster.objects
        world.secret("mine", uri="redis://u:hidden@redis.example.com:6380/0")
        await world.reconcile()
        assert world.condition("BindingsReady")[:2] == ("True", "Bound")
        (volume,) = (
            row
            for row in world.child(DEPLOYMENT)["spec"]["template"]["spec"]["volumes"]
            if row["name"] == "binding-redis"
        )
        assert volume["projected"]["sources"] == [{"secret": {"name": "mine"}}]
        assert {"protocol": "TCP", "port": 6380} in world.child(NETWORK_POLICY)["spec"]["egress"][-1]["ports"]

    asyncio.run(main())


def template(world: World) -> Object:
    found: Object = world.child(DEPLOYMENT)["spec"]["template"]
    return found


def test_changed_secret_rolls_the_pods_and_one_that_goes_leaves_them_alone() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.secret("mine", uri="redis://u:one@redis.example.com/0")
        world.create(**OWN)
        await serving(world)
        first = template(world)
        world.cluster.edit(SECRET, "mine", lambda body: body["metadata"].update(labels={"team": "risk"}))
        await world.reconcile()
        assert template(world) == first, "only content counts"
        world.secret("mine", uri="redis://u:two@redis.example.com/0")
        await world.reconcile()
        second = template(world)
        assert second["metadata"]["annotations"] != first["metadata"]["annotations"]
        assert second["spec"] == first["spec"]
        world.roll_out()
        await world.reconcile()
        policy = world.child(NETWORK_POLICY)
        world.cluster.remove(SECRET, "mine")
        assert await world.reconcile() == 2.0
        assert world.condition("BindingsReady")[:2] == ("False", "SecretMissing")
        assert world.condition("Available")[0] == "True"
        assert world.condition("Progressing")[:2] == ("True", "RolledOut")
        assert template(world) == second
        assert world.child(NETWORK_POLICY) == policy
        world.create(**OWN, replicas=2)
        await world.reconcile()
        assert world.child(DEPLOYMENT)["spec"]["replicas"] == 2, "whatever needs no new Secret goes on"

    asyncio.run(main())


def test_binding_that_is_added_with_a_secret_to_come_leaves_the_running_pods_alone() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create()
        await serving(world)
        before = world.child(DEPLOYMENT)
        world.create(**OWN)
        await world.reconcile()
        assert world.child(DEPLOYMENT) == before
        assert world.condition("BindingsReady")[:2] == ("False", "SecretMissing")
        world.secret("mine", uri="redis://x")
        await world.reconcile()
        assert world.child(DEPLOYMENT) != before

    asyncio.run(main())


def test_secret_that_may_not_be_read_counts_as_there() -> None:
    def refuse(call: Call) -> None:
        if (call.kind, call.verb) == (SECRET, "get"):
            raise ApiError(403, "Forbidden", "secrets is forbidden")

    async def main() -> None:
        world = World(SETTINGS)
        world.cluster.refuse = refuse
        world.create(**OWN)
        await world.reconcile()
        assert world.condition("BindingsReady")[0] == "True"
        assert "may not read" in world.condition("BindingsReady")[2]
        world.child(DEPLOYMENT)

    asyncio.run(main())


# --- backends that do not do what they are asked ---------------------------------------------------------------------


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in ("bindings", "backend_pool"):
        monkeypatch.setattr(f"phoenix_operator.{module}.time", made)
    return made


def test_backend_that_is_down_keeps_no_pod_from_running_and_is_asked_less_and_less(clock: Clock) -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.states.loaded = loaded()
        world.create(**REDIS)
        service = world.services["redis", "default"]
        service.is_up = False
        await world.reconcile()
        status, reason, message = world.condition("BindingsReady")
        assert (status, reason) == ("False", "BackendUnreachable")
        assert message == "spec.bindings.redis: redis default at redis-admin.example.com is down"
        password = values(world, "redis")["password"]
        world.roll_out()
        await world.reconcile()
        assert world.condition("Available")[0] == "True"
        at = []
        for _ in range(600):
            clock.now += 5
            before = len(service.calls)
            await world.reconcile()
            at += [clock.now] * (len(service.calls) - before)
        gaps = [round(later - earlier) for earlier, later in itertools.pairwise(at)]
        assert len(at) < 20
        assert gaps[0] <= 20
        assert 240 <= gaps[-1] <= 370
        service.is_up = True
        clock.now += 361
        await world.reconcile()
        assert world.condition("BindingsReady")[:2] == ("True", "Bound")
        assert values(world, "redis")["password"] == password
        assert service.works(values(world, "redis"))

    asyncio.run(main())


def test_running_deployment_is_untouched_by_a_backend_that_goes_down(clock: Clock) -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(**ALL)
        await serving(world)
        before = world.child(DEPLOYMENT)
        for service in world.services.values():
            service.is_up = False
        clock.now += 2 * SETTINGS.resync_seconds
        await world.reconcile()
        assert world.condition("BindingsReady")[:2] == ("False", "BackendUnreachable")
        assert world.condition("Available")[0] == "True"
        assert world.child(DEPLOYMENT) == before
        world.annotate(rotate="now")
        await world.reconcile()
        assert world.child(DEPLOYMENT) == before, "no rotation to what no backend knows"
        for service in world.services.values():
            service.is_up = True
        clock.now += 361
        await world.reconcile()
        assert values(world, "redis")["username"] == "phx.ml.fraud.b"

    asyncio.run(main())


def test_login_that_the_backend_has_lost_is_made_again_with_the_same_password(clock: Clock) -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(**REDIS)
        await serving(world)
        service = world.services["redis", "default"]
        service.logins.clear()  # a Redis without aclfile was started again
        clock.now += 2 * SETTINGS.resync_seconds
        await world.reconcile()
        assert service.works(values(world, "redis"))
        assert world.cluster.writes == []

    asyncio.run(main())


@pytest.mark.parametrize("reason", ["AccessDenied", "TopicMismatch"])
def test_reason_is_the_backends_own(reason: str) -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(**ALL)
        world.services["kafka", "default"].refuses = REASONS[reason]
        await world.reconcile()
        assert world.condition("BindingsReady") == ("False", reason, "spec.bindings.kafka: kafka default refuses")
        assert ("Warning", reason, 1) in world.events()

    asyncio.run(main())


def test_what_pods_say_of_their_backends_counts() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(**ALL)
        await serving(world)
        for words, reason in (("timed out", "BackendUnreachable"), ("NOAUTH Authentication required", "AccessDenied")):
            world.states.loaded = replace(loaded(), bindings={"redis": words})
            delay_s = await world.reconcile()
            assert world.condition("BindingsReady")[:2] == ("False", reason)
            assert words in world.condition("BindingsReady")[2]
            assert delay_s is not None
            assert delay_s <= 15
        assert world.condition("Available")[0] == "True"

    asyncio.run(main())


@scenario
async def test_admin_secret_that_is_missing_or_says_too_little_is_named(world: World) -> None:
    world.cluster.remove(SECRET, "redis-admin", OPERATOR_NAMESPACE)
    await world.reconcile()
    status, reason, message = world.condition("BindingsReady")
    assert (status, reason) == ("False", "SecretMissing")
    assert "Secret phoenix-system/redis-admin of backend default does not exist" in message
    assert (DEPLOYMENT, *KEY) not in world.cluster.objects
    world.secret("redis-admin", OPERATOR_NAMESPACE, password="x")
    world.start()
    await world.reconcile()
    assert "no host" in world.condition("BindingsReady")[2]
    world.admin("redis-admin")
    world.start()
    await world.reconcile()
    assert world.condition("BindingsReady")[:2] == ("True", "Bound")


@scenario
async def test_backend_that_moves_gives_pods_the_new_address_and_the_same_login(world: World) -> None:
    await serving(world)
    before, first = values(world, "redis"), template(world)
    world.admin("redis-admin", host="elsewhere.example.com", port="7002")
    world.start()
    await world.reconcile()
    after = values(world, "redis")
    assert (after["username"], after["password"]) == (before["username"], before["password"])
    assert "elsewhere.example.com:7002" in after["uri"]
    assert template(world) != first
    assert world.services["redis", "default"].works(after)


def test_backend_without_users_gives_the_admins_credentials() -> None:
    async def main() -> None:
        rows = [{**row, "capabilities": {"manageUsers": False}} for row in BACKENDS]
        world = World(Settings.model_validate({"backends": rows}, by_alias=True, by_name=False))
        world.create(**REDIS)
        await serving(world)
        assert values(world, "redis")["password"] == "of-the-admin"
        await world.reconcile()
        world.start()
        await world.reconcile()
        assert world.cluster.writes == []
        world.settings = SETTINGS
        world.start()
        await world.reconcile()
        assert values(world, "redis")["password"] != "of-the-admin", "the admin's password is nobody's own"
        assert world.services["redis", "default"].works(values(world, "redis"))

    asyncio.run(main())


# --- what is in the way ----------------------------------------------------------------------------------------------


def test_foreign_secret_of_the_name_is_left_alone_and_nothing_is_made() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.secret("fraud-redis", uri="somebody else's")
        world.create(**ALL)
        await world.reconcile()
        assert world.condition("Accepted")[:2] == ("False", "NameClash")
        assert "Secret ml/fraud-redis" in world.condition("Accepted")[2]
        assert not world.cluster.objects[PHOENIX_MODEL, *KEY]["metadata"].get("finalizers")
        assert [service.calls for service in world.services.values() if service.calls] == []
        world.cluster.remove(SECRET, "fraud-redis")
        await world.reconcile()
        assert world.condition("Accepted")[0] == "True"

    asyncio.run(main())


def test_secret_that_was_deleted_is_made_again() -> None:
    async def main() -> None:
        world = World(SETTINGS)
        world.create(**REDIS)
        await serving(world)
        world.cluster.remove(SECRET, "fraud-redis")
        world.start()
        await world.reconcile()
        assert world.services["redis", "default"].works(values(world, "redis"))
        assert world.condition("BindingsReady")[0] == "True"

    asyncio.run(main())


def test_rights_that_are_missing_are_a_condition() -> None:
    def refuse(call: Call) -> None:
        if call.verb == "create" and call.kind is SECRET:
            raise ApiError(403, "Forbidden", "secrets is forbidden")

    async def main() -> None:
        world = World(SETTINGS)
        world.cluster.refuse = refuse
        world.create(**REDIS)
        await world.reconcile()
        assert world.condition("BindingsReady")[0] == "False"
        assert "manifests FOLDER --bindings" in world.condition("BindingsReady")[2]

    asyncio.run(main())


# --- secrecy ---------------------------------------------------------------------------------------------------------


def test_no_password_is_told_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> set[str]:
        world = World(SETTINGS)
        world.create(**ALL)
        known: set[str] = {"of-the-admin"}

        def note() -> None:
            known.update(values(world, kind)["password"] for kind, _ in HOMES)

        await serving(world)
        note()
        world.annotate(rotate="1")
        await world.reconcile()
        note()
        world.roll_out()
        await world.reconcile()
        for home in HOMES:  # a client library that tells all it knows
            service = world.services[home]

            def fail(what: str, told: str = str(known)) -> None:
                raise ValueError(told)

            service.before = fail
        world.annotate(rotate="2")
        world.start()
        await world.reconcile()
        note()
        assert world.condition("BindingsReady")[:2] == ("False", "BackendUnreachable")
        world.delete()
        await world.reconcile()
        told = [repr(body) for (kind, _, _), body in world.cluster.objects.items() if kind is not SECRET]
        told += [*caplog.messages, *(str(record.__dict__) for record in caplog.records)]
        told.append(world.metrics.render().decode())
        for secret in known:
            coded = base64.b64encode(secret.encode()).decode()
            assert not [text for text in told if secret in text or coded in text]
        return known

    caplog.set_level("DEBUG")
    assert len(asyncio.run(main())) >= 7
