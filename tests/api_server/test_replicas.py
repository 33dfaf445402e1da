"""Whose the number of replicas is: an apply of the operator never moves what an autoscaler has set, nor loses it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from api_client import MERGE, Api, ApiServer
from kubernetes.aio import client, config
from objects import rendered, subject
from operator_process import write_kubeconfig

from phoenix_operator.cluster import ApiError, Cluster, Pace
from phoenix_operator.kinds import DEPLOYMENT
from phoenix_operator.observed import Object

NAMESPACE, NAME = "replicas", "fraud"
PATH = DEPLOYMENT.path(NAMESPACE, NAME)
SCALING = {"minReplicas": 2, "maxReplicas": 8, "targetLatency": "200m"}
Work = Callable[["Scene"], Awaitable[None]]


class Scene:
    """The operator's own client, with the rights of its install, and somebody who may do everything."""

    def __init__(self, cluster: Cluster, api: Api) -> None:
        self.cluster, self.api = cluster, api

    async def apply(self, **spec: Any) -> int:
        """Apply the Deployment of a model as `reconcile` does; the replicas afterwards."""
        manifest = deployment(**spec)
        if "autoscaling" in spec:
            await self.cluster.apply_but_replicas(DEPLOYMENT, manifest, first_replicas=2)
        else:
            await self.cluster.apply(DEPLOYMENT, manifest)
        return int((await self.live())["spec"]["replicas"])

    async def scale(self, replicas: int) -> None:
        """As the HPA controller does."""
        await self.api.must("PATCH", f"{PATH}/scale", {"spec": {"replicas": replicas}}, kind=MERGE)

    async def live(self) -> Object:
        return dict(await self.api.must("GET", PATH))

    async def owners(self) -> dict[str, set[str]]:
        """Return the fields of `spec` that each manager's applies own."""
        rows = (await self.live())["metadata"]["managedFields"]
        return {row["manager"]: set(row["fieldsV1"].get("f:spec", {})) for row in rows if row["operation"] == "Apply"}


def deployment(**spec: Any) -> Object:
    bodies = rendered(subject(namespace=NAMESPACE, **spec))
    [body] = [body for body in bodies if body["kind"] == DEPLOYMENT.kind]
    body["metadata"].pop("ownerReferences")
    return body


@pytest.fixture
def play(server: ApiServer, tmp_path: Path) -> Callable[[Work], None]:
    write_kubeconfig(server, tmp_path / "kubeconfig")

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[Cluster]:
        configuration = client.Configuration()
        await config.load_kube_config(str(tmp_path / "kubeconfig"), client_configuration=configuration)
        cluster = Cluster(client.ApiClient(configuration), pace=Pace(1000), timeout_s=30, observer=lambda *_: None)
        try:
            yield cluster
        finally:
            await cluster.close()

    def run(work: Work) -> None:
        async def main() -> None:
            async with connected() as cluster, server.connected() as api:
                await api.make_namespace(NAMESPACE)
                try:
                    await work(Scene(cluster, api))
                finally:
                    await api("DELETE", PATH)

        asyncio.run(main())

    return run


def test_deployment_is_made_with_the_fewest_replicas_and_nobody_applies_them_again(play: Any) -> None:
    async def work(scene: Scene) -> None:
        assert await scene.apply(autoscaling=SCALING) == 2
        owners = await scene.owners()
        assert owners["phoenix-operator-replicas"] == {"f:replicas"}
        assert "f:replicas" not in owners["phoenix-operator"]
        assert "f:template" in owners["phoenix-operator"]
        await scene.scale(3)
        for number in range(50):
            assert await scene.apply(autoscaling=SCALING, pod={"labels": {"n": str(number)}}) == 3
        assert (await scene.live())["spec"]["template"]["metadata"]["labels"]["n"] == "49"

    play(work)


def test_hand_over_both_ways_keeps_the_live_number(play: Any) -> None:
    async def work(scene: Scene) -> None:
        for _ in range(2):
            assert await scene.apply(replicas=4) == 4
            assert await scene.apply(autoscaling=SCALING) == 4
            assert await scene.apply(autoscaling=SCALING, pod={"labels": {"a": "b"}}) == 4
            await scene.scale(6)
            assert await scene.apply(autoscaling=SCALING) == 6
            assert await scene.apply(replicas=6) == 6
            assert await scene.apply(replicas=5) == 5

    play(work)


def test_what_a_wish_leaves_out_goes_although_the_object_was_made_by_another_manager(play: Any) -> None:
    async def work(scene: Scene) -> None:
        await scene.apply(autoscaling=SCALING, pod={"labels": {"gone": "soon"}})
        await scene.apply(autoscaling=SCALING)
        assert "gone" not in (await scene.live())["spec"]["template"]["metadata"]["labels"]

    play(work)


def test_creation_that_was_cut_off_is_finished_by_the_next_apply(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(scene: Scene) -> None:
        async def cut_off(*_: Any, **__: Any) -> None:
            raise ApiError(0, "", "the operator was killed")

        with monkeypatch.context() as patch:
            patch.setattr(scene.cluster, "apply", cut_off)
            with pytest.raises(ApiError, match="killed"):
                await scene.apply(autoscaling=SCALING, pod={"labels": {"gone": "soon"}})
        assert await scene.apply(autoscaling=SCALING) == 2
        assert (await scene.owners())["phoenix-operator-replicas"] == {"f:replicas"}
        assert "gone" not in (await scene.live())["spec"]["template"]["metadata"]["labels"]

    play(work)


def test_reset_of_the_rest_leaves_the_number(play: Any) -> None:
    async def work(scene: Scene) -> None:
        await scene.apply(autoscaling=SCALING)
        await scene.scale(5)
        manifest = deployment(autoscaling=SCALING)
        await scene.cluster.reset(DEPLOYMENT, manifest, await scene.live())
        assert await scene.apply(autoscaling=SCALING) == 5

    play(work)
