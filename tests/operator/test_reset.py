"""What somebody put beside our fields and no apply can mend: the spec is replaced whole, and owned by apply again."""

import virtual_time
from api_server import Answer, ApiServer, connected, failure
from memory_cluster import Call
from objects import NAMESPACE
from world import World

from phoenix_operator.cluster import ApiError
from phoenix_operator.kinds import DEPLOYMENT, SERVICE
from phoenix_operator.observed import Object

WANTED: Object = {"metadata": {"name": "fraud", "namespace": NAMESPACE}, "spec": {"paused": False}}
LIVE: Object = {"metadata": {"uid": "u-1"}, "spec": {"paused": True, "minReadySeconds": 5, "replicas": 7}}


def test_reset_replaces_the_spec_and_forgets_who_wrote_it() -> None:
    owners = [{"manager": name} for name in ("phoenix-operator", "kubectl-edit", "phoenix-operator-reset")]
    stored = Answer({"metadata": {"resourceVersion": "9", "managedFields": owners}})
    touched = Answer({"metadata": {"resourceVersion": "10", "managedFields": owners[1:]}})
    server = ApiServer(stored, failure(409, "Conflict"), touched, Answer())

    async def main() -> None:
        async with connected(server) as (cluster, _):
            await cluster.reset(DEPLOYMENT, WANTED, LIVE)

    virtual_time.run(main())
    first, second, read, third = server.asked
    assert first.headers["Content-Type"] == "application/json-patch+json"
    assert first.body == [
        {"op": "test", "path": "/metadata/uid", "value": "u-1"},
        # `replicas` may be an autoscaler's
        {"op": "replace", "path": "/spec", "value": {"paused": False, "replicas": 7}},
    ]
    assert second.headers["Content-Type"] == third.headers["Content-Type"] == "application/merge-patch+json"
    assert second.body == {"metadata": {"resourceVersion": "9", "managedFields": owners[:2]}}
    # its own controller was faster
    assert read.method == "GET"
    assert third.body == {"metadata": {"resourceVersion": "10", "managedFields": owners[1:2]}}


def test_child_that_no_apply_can_mend_is_reset() -> None:
    async def main() -> None:
        world = World()
        world.create()
        await world.reconcile()
        world.cluster.edit(SERVICE, "fraud", lambda body: body["spec"]["ports"].append({"name": "http", "port": 80}))
        clashes = iter([ApiError(422, "Invalid", 'spec.ports[2].name: Duplicate value: "http"')])
        patch = Call("patch", SERVICE, "fraud")

        def refuse(call: Call) -> None:
            if call == patch and (clash := next(clashes, None)):
                raise clash

        world.cluster.refuse = refuse
        world.cluster.take_writes()
        await world.reconcile()
        assert world.condition("Accepted")[:2] == ("True", "SpecUnderstood")
        assert world.cluster.take_writes().count(patch) == 3, "apply, reset, apply"
        assert [port["name"] for port in world.child(SERVICE)["spec"]["ports"]] == ["http", "grpc"]

    virtual_time.run(main())


def test_wish_that_is_refused_itself_is_told_in_the_first_words() -> None:
    async def main() -> None:
        world = World()
        world.create()
        await world.reconcile()
        answers = iter(["spec.affinity: no such operator", "the test failed"])

        def refuse(call: Call) -> None:
            if call == Call("patch", DEPLOYMENT, "fraud"):
                raise ApiError(422, "Invalid", next(answers))

        world.create(pod={"affinity": {"nodeAffinity": {}}})
        world.cluster.refuse = refuse
        await world.reconcile()
        assert world.condition("Accepted")[:2] == ("False", "ObjectRefused")
        assert "no such operator" in world.condition("Accepted")[2]

    virtual_time.run(main())
