"""A reconciler with a cluster in memory: what the watches show reaches its store before each run."""

import base64
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from memory_backend import MemoryBackend, Service
from memory_cluster import MemoryCluster
from objects import NAME, NAMESPACE, OPERATOR_NAMESPACE, SETTINGS, document, ready, unplaced

from phoenix_api import Reason
from phoenix_operator.backend_pool import BackendPool, Maker
from phoenix_operator.backends import BackendError
from phoenix_operator.bindings import Bindings
from phoenix_operator.cluster import Cluster
from phoenix_operator.desired.naming import labels
from phoenix_operator.kinds import DEPLOYMENT, EVENT, OPTIONAL, PHOENIX_MODEL, POD, SECRET, Kind
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import REVISION, TEMPLATE, Loaded, Object, Pod, Subject
from phoenix_operator.placement import Placement
from phoenix_operator.pod_state import PodStates
from phoenix_operator.reconcile import Parts, Reconciler
from phoenix_operator.recorder import Recorder
from phoenix_operator.settings import BackendSettings, Settings
from phoenix_operator.store import Key, Store

KEY = (NAMESPACE, NAME)


class States:
    """What pods say, without asking them."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None

    async def of(
        self, model: str, pods: Sequence[Pod], *, is_bound: bool = False, is_autoscaled: bool = False
    ) -> dict[str, Loaded]:
        return {pod.uid: self.loaded for pod in pods if pod.is_ready and self.loaded is not None}


class World:
    """Everything around one reconciler."""

    def __init__(
        self, settings: Settings = SETTINGS, served: Iterable[Kind] = OPTIONAL, *, make: Maker | None = None
    ) -> None:
        self._make = make or self._open
        self.served = frozenset(served)
        self.cluster = MemoryCluster(self.served)
        self.store, self.states, self.metrics = Store(), States(), Metrics()
        self.latency_s: float | None = None
        self.settings = settings
        self.services = {(str(row.kind), row.name): Service(str(row.kind)) for row in settings.backends}
        for row in settings.backends:
            self.admin(row.admin_secret_ref.name)
        self.start()

    def start(self) -> None:
        """Start the operator, again or for the first time: it remembers nothing."""
        self.store = Store()
        cluster = cast(Cluster, self.cluster)
        recorder = Recorder(cluster, self.metrics, host="test")
        self.pool = BackendPool(cluster, self.settings, self.metrics, namespace=OPERATOR_NAMESPACE, make=self._make)
        self._reconciler = Reconciler(
            Parts(
                cluster=cluster,
                store=self.store,
                settings=self.settings,
                metrics=self.metrics,
                states=cast(PodStates, self.states),
                placement=Placement(cluster),
                recorder=recorder,
                bindings=Bindings(cluster, self.store, self.pool, recorder, self.settings),
                operator_namespace=OPERATOR_NAMESPACE,
                served_kinds=lambda: self.served,
                latency_s=self._latency,
            )
        )

    async def _latency(self, subject: Subject) -> float | None:
        return self.latency_s

    def _open(self, config: BackendSettings, admin: Mapping[str, str]) -> MemoryBackend:
        if "host" not in admin:
            raise BackendError(Reason.SECRET_MISSING, f"backend {config.name}: its admin Secret has no host")
        return MemoryBackend(self.services[str(config.kind), config.name], config, admin)

    def admin(self, name: str, **values: str) -> None:
        """Write an admin Secret."""
        values = {"host": f"{name}.example.com", "username": "admin", "password": "of-the-admin"} | values
        self.secret(name, OPERATOR_NAMESPACE, **values)

    # --- what users do -------------------------------------------------------------------------------------------

    def create(self, **parts: Any) -> None:
        """Create a PhoenixModel, or change its spec: then its generation is the next."""
        body = document(**parts)
        place = (PHOENIX_MODEL, body["metadata"]["namespace"], body["metadata"]["name"])
        if known := self.cluster.objects.get(place):
            body["metadata"]["generation"] = known["metadata"]["generation"] + 1
            body["status"] = known.get("status", {})
            kept = {key: known["metadata"][key] for key in ("annotations", "finalizers") if key in known["metadata"]}
            body["metadata"] |= kept
        self.cluster.put(PHOENIX_MODEL, body)

    def secret(self, name: str, namespace: str = NAMESPACE, **values: str) -> None:
        """Write a Secret; an underscore stands for a hyphen."""
        data = {key.replace("_", "-"): base64.b64encode(text.encode()).decode() for key, text in values.items()}
        self.cluster.put(SECRET, {"metadata": {"name": name, "namespace": namespace}, "data": data})

    def annotate(self, **annotations: str) -> None:
        """Annotate the model in the group of Phoenix; an underscore stands for a hyphen."""
        rows = {f"phoenix-ml.io/{key.replace('_', '-')}": text for key, text in annotations.items()}
        change = lambda body: body["metadata"].setdefault("annotations", {}).update(rows)  # noqa: E731
        self.cluster.edit(PHOENIX_MODEL, NAME, change)

    def delete(self, name: str = NAME, *, at: str = "2026-11-24T12:00:00Z") -> None:
        """Delete the model: with a finalizer it stays until that is gone."""
        if self.cluster.objects[PHOENIX_MODEL, NAMESPACE, name]["metadata"].get("finalizers"):
            mark = lambda body: body["metadata"].update(deletionTimestamp=at)  # noqa: E731
            self.cluster.edit(PHOENIX_MODEL, name, mark)
        else:
            self.cluster.remove(PHOENIX_MODEL, name)

    # --- what the cluster does -----------------------------------------------------------------------------------

    def pods(self, make: Any = ready, *, count: int | None = None, name: str = NAME, **parts: Any) -> None:
        """Replace the model's pods by those of its Deployment's present template."""
        for body in self.cluster.of_kind(POD):
            if body["metadata"]["labels"].get("phoenix-ml.io/model") == name:
                self.cluster.remove(POD, body["metadata"]["name"])
        model = self.subject(name)
        live = self.child(DEPLOYMENT, name)
        annotations = live["spec"]["template"]["metadata"]["annotations"]
        for number in range(live["spec"]["replicas"] if count is None else count):
            pod = make(model, f"{name}-{number}", template=annotations[TEMPLATE], **parts)
            pod.body["metadata"]["annotations"][REVISION] = annotations[REVISION]
            pod.body["metadata"]["labels"] = labels(model)
            pod.body["metadata"]["uid"] = f"{pod.name}-{annotations[TEMPLATE]}"
            self.cluster.put(POD, pod.body)

    def roll_out(self, name: str = NAME) -> None:
        """Let every pod become ready, and the Deployment say so."""
        self.pods(name=name)

        def tell(body: Object) -> None:
            replicas = body["spec"]["replicas"]
            counts = {f"{which}eplicas": replicas for which in ("r", "updatedR", "readyR", "availableR")}
            body["status"] = {"observedGeneration": body["metadata"]["generation"]} | counts

        self.cluster.edit(DEPLOYMENT, name, tell)

    def no_device(self, words: str = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.") -> None:
        self.pods(lambda model, name, template: unplaced(model, words, name, template=template))

    # --- what the operator does ----------------------------------------------------------------------------------

    def watch(self) -> None:
        """Let the watches catch up."""
        for kind, bodies in self.cluster.watched().items():
            self.store.replace(kind, bodies, listed_at=self.cluster.version)

    async def reconcile(self, key: Key = KEY) -> float | None:
        self.watch()
        return await self._reconciler(key)

    async def reconcile_blindly(self, key: Key = KEY) -> float | None:
        """Reconcile while the watches are late."""
        return await self._reconciler(key)

    # --- what is to be seen --------------------------------------------------------------------------------------

    def subject(self, name: str = NAME) -> Subject:
        return Subject.read(self.cluster.objects[PHOENIX_MODEL, NAMESPACE, name])

    def child(self, kind: Kind, name: str = NAME) -> Object:
        return copy.deepcopy(self.cluster.objects[kind, NAMESPACE, name])

    def status(self, key: Key = KEY) -> Object:
        status: Object = self.cluster.objects[PHOENIX_MODEL, key[0], key[1]]["status"]
        return status

    def condition(self, kind: str, key: Key = KEY) -> tuple[str, str, str]:
        row = next(row for row in self.status(key)["conditions"] if row["type"] == kind)
        return row["status"], row["reason"], row["message"]

    def events(self) -> list[tuple[str, str, int]]:
        """Return type, reason and count of every event."""
        return [(body["type"], body["reason"], body["count"]) for body in self.cluster.of_kind(EVENT)]

    def counted(self, result: str) -> float:
        name = "phoenix_operator_reconcile_seconds_count"
        return self.metrics.registry.get_sample_value(name, {"result": result}) or 0
