"""Bindings on a real API server, with the rights of the install manifests: Secrets, finalizer, deletion.

No controllers run: nothing collects garbage here, so that what is gone was taken away by the operator.
"""

import asyncio
import base64
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from api_client import MERGE, Api, ApiServer, models_path
from kubernetes.aio import client, config
from memory_backend import MemoryBackend, Service
from operator_process import write_kubeconfig
from specs import SOURCE
from world import States

from phoenix_operator.backend_pool import BackendPool
from phoenix_operator.binding_marks import FINALIZER
from phoenix_operator.bindings import Bindings
from phoenix_operator.cluster import ApiError, Cluster, Pace
from phoenix_operator.install import NAMESPACE as OPERATOR_NAMESPACE
from phoenix_operator.kinds import CHILDREN, PHOENIX_MODEL, SECRET
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Object
from phoenix_operator.placement import Placement
from phoenix_operator.pod_state import PodStates
from phoenix_operator.reconcile import Parts, Reconciler
from phoenix_operator.recorder import Recorder
from phoenix_operator.settings import BackendSettings, Settings
from phoenix_operator.store import Store

NAMESPACE, NAME, ADMIN = "bindings", "fraud", "redis-admin"
KEY = (NAMESPACE, NAME)
SETTINGS = Settings.model_validate(
    {"backends": [{"name": "default", "kind": "redis", "adminSecretRef": {"name": ADMIN}}]},
    by_alias=True,
    by_name=False,
)
BOUND: Object = {"model": SOURCE, "bindings": {"redis": {"backend": "default"}}}
_WRITES = {"APPLY", "PATCH", "POST", "PUT", "DELETE", "CREATE", "STATUS", "RESET"}


class Operator:
    """A reconciler on the API server, whose store is filled by asking; the backend is in memory."""

    def __init__(self, cluster: Cluster, api: Api, requests: Counter[str]) -> None:
        self.cluster, self.api, self.requests = cluster, api, requests
        self.service = Service("redis")
        self.start()

    def start(self) -> None:
        metrics, cluster = Metrics(), self.cluster
        self.store = Store()
        recorder = Recorder(cluster, metrics, host="test")

        def open_backend(config: BackendSettings, admin: Any) -> MemoryBackend:
            return MemoryBackend(self.service, config, admin)

        pool = BackendPool(cluster, SETTINGS, metrics, namespace=OPERATOR_NAMESPACE, make=open_backend)
        states = cast(PodStates, States())
        self._reconcile = Reconciler(
            Parts(
                cluster=cluster,
                store=self.store,
                settings=SETTINGS,
                metrics=metrics,
                states=states,
                placement=Placement(cluster),
                recorder=recorder,
                bindings=Bindings(cluster, self.store, pool, recorder, SETTINGS),
                operator_namespace=OPERATOR_NAMESPACE,
                served_kinds=frozenset,
                latency_s=_no_latency,
            )
        )

    async def reconcile(self) -> int:
        """Reconcile; return how many writes there were."""
        for kind in (PHOENIX_MODEL, *CHILDREN):
            answer = await self.api("GET", kind.path(NAMESPACE))
            if answer.is_success:
                for item in answer.body["items"]:
                    self.store.put(kind, item)
        before = sum(self.requests[verb] for verb in _WRITES)
        await self._reconcile(KEY)
        return sum(self.requests[verb] for verb in _WRITES) - before

    async def model(self) -> Object | None:
        answer = await self.api("GET", models_path(NAMESPACE, NAME))
        return answer.body if answer.is_success else None

    async def secret(self) -> Object:
        return await self.api.must("GET", SECRET.path(NAMESPACE, "fraud-redis"))


async def _no_latency(_: Any) -> None:
    return None


@pytest.fixture
def operate(server: ApiServer, tmp_path: Path) -> Callable[[Callable[[Operator], Awaitable[None]]], None]:
    """Run work with an operator that has the rights of an install with bindings, and a model on Redis."""
    kubeconfig = tmp_path / "kubeconfig"
    write_kubeconfig(server, kubeconfig, bindings=[ADMIN])

    def run(work: Callable[[Operator], Awaitable[None]]) -> None:
        async def main() -> None:
            requests: Counter[str] = Counter()
            configuration = client.Configuration()
            await config.load_kube_config(str(kubeconfig), client_configuration=configuration)
            cluster = Cluster(
                client.ApiClient(configuration),
                pace=Pace(1000),
                timeout_s=30,
                observer=lambda verb, code, seconds: requests.update([verb]),
            )
            async with server.connected() as api:
                await api.make_namespace(NAMESPACE)
                admin = {"host": "redis.example.com", "username": "admin", "password": "of-the-admin"}
                body = {"metadata": {"name": ADMIN}, "stringData": admin}
                await api("POST", SECRET.path(OPERATOR_NAMESPACE), body)
                await api.must(
                    "POST",
                    models_path(NAMESPACE),
                    {
                        "apiVersion": PHOENIX_MODEL.api_version,
                        "kind": PHOENIX_MODEL.kind,
                        "metadata": {"name": NAME},
                        "spec": BOUND,
                    },
                )
                try:
                    await work(Operator(cluster, api, requests))
                finally:
                    await cluster.close()
                    await clean(api)

        asyncio.run(main())

    return run


async def clean(api: Api) -> None:
    await api("PATCH", models_path(NAMESPACE, NAME), {"metadata": {"finalizers": None}}, kind=MERGE)
    await api("DELETE", models_path(NAMESPACE, NAME))
    for kind in (SECRET, *CHILDREN):
        await api("DELETE", kind.path(NAMESPACE))


def test_secret_is_made_once_with_its_type_and_owner(operate: Any) -> None:
    async def work(operator: Operator) -> None:
        await operator.reconcile()
        secret, model = await operator.secret(), await operator.model()
        assert model is not None
        assert model["metadata"]["finalizers"] == [FINALIZER]
        assert secret["type"] == "servicebinding.io/redis"
        (owner,) = secret["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (model["metadata"]["uid"], True)
        values = {key: base64.b64decode(text).decode() for key, text in secret["data"].items()}
        assert operator.service.works(values)
        assert await operator.reconcile() == 0
        operator.start()
        assert await operator.reconcile() == 0
        assert (await operator.secret())["metadata"]["resourceVersion"] == secret["metadata"]["resourceVersion"]

    operate(work)


def test_what_somebody_changes_in_the_secret_is_set_back(operate: Any) -> None:
    async def work(operator: Operator) -> None:
        await operator.reconcile()
        before = await operator.secret()
        wrong = {"data": {"uri": base64.b64encode(b"redis://elsewhere").decode()}}
        await operator.api.must("PATCH", SECRET.path(NAMESPACE, "fraud-redis"), wrong, kind=MERGE)
        await operator.reconcile()
        assert (await operator.secret())["data"] == before["data"]

    operate(work)


def test_rotation_writes_a_new_login_and_the_template_that_rolls_the_pods(operate: Any) -> None:
    async def work(operator: Operator) -> None:
        await operator.reconcile()
        deployments = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/fraud"
        before, secret = await operator.api.must("GET", deployments), await operator.secret()
        rotate = {"metadata": {"annotations": {"phoenix-ml.io/rotate": "1"}}}
        await operator.api.must("PATCH", models_path(NAMESPACE, NAME), rotate, kind=MERGE)
        await operator.reconcile()
        after = await operator.api.must("GET", deployments)
        assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1
        assert (await operator.secret())["data"]["username"] != secret["data"]["username"]
        assert set(operator.service.logins) == {"phx.bindings.fraud.a", "phx.bindings.fraud.b"}
        assert await operator.reconcile() == 0, "nobody runs the new pods here, so both logins stay"

    operate(work)


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_deletion_waits_for_the_backend_and_then_the_model_is_gone(operate: Any, propagation: str) -> None:
    async def work(operator: Operator) -> None:
        await operator.reconcile()
        operator.service.is_up = False
        path = models_path(NAMESPACE, NAME)
        await operator.api.must("DELETE", path, {"kind": "DeleteOptions", "propagationPolicy": propagation})
        await operator.reconcile()
        model = await operator.model()
        assert model is not None
        reasons = {row["type"]: row["reason"] for row in model["status"]["conditions"]}
        assert reasons["BindingsReady"] == reasons["Ready"] == "DeletionBlocked"
        operator.service.is_up = True
        operator.start()
        await operator.reconcile()
        model = await operator.model()
        left = [] if model is None else model["metadata"]["finalizers"]
        assert FINALIZER not in left
        assert operator.service.logins == {}

    operate(work)


def test_command_that_the_condition_names_lets_the_model_go(operate: Any) -> None:
    async def work(operator: Operator) -> None:
        await operator.reconcile()
        operator.service.is_up = False
        await operator.api.must("DELETE", models_path(NAMESPACE, NAME))
        await operator.reconcile()
        force = {"metadata": {"annotations": {"phoenix-ml.io/force-delete": "true"}}}
        await operator.api.must("PATCH", models_path(NAMESPACE, NAME), force, kind=MERGE)
        await operator.reconcile()
        assert await operator.model() is None

    operate(work)


def test_finalizer_is_not_set_on_a_model_that_has_changed_since(operate: Any) -> None:
    async def work(operator: Operator) -> None:
        model = await operator.model()
        assert model is not None
        label = {"metadata": {"labels": {"team": "risk"}}}
        await operator.api.must("PATCH", models_path(NAMESPACE, NAME), label, kind=MERGE)
        with pytest.raises(ApiError) as caught:
            await operator.cluster.patch_metadata(PHOENIX_MODEL, model["metadata"], finalizers=[], annotations={})
        assert caught.value.code == 409
        gone = model["metadata"] | {"name": "nobody"}
        assert await operator.cluster.patch_metadata(PHOENIX_MODEL, gone, finalizers=[], annotations={}) is None

    operate(work)


def test_secret_of_somebody_else_is_left_alone(operate: Any) -> None:
    async def work(operator: Operator) -> None:
        foreign = {"metadata": {"name": "fraud-redis"}, "stringData": {"password": "theirs"}}
        await operator.api.must("POST", SECRET.path(NAMESPACE), foreign)
        before = await operator.secret()
        await operator.reconcile()
        assert await operator.secret() == before
        model = await operator.model()
        assert model is not None
        assert model["status"]["conditions"][0]["reason"] == "NameClash"
        assert "finalizers" not in model["metadata"]

    operate(work)
