"""The second look: what a watch has missed is found, repaired and counted; and every model is looked at again.

kopf's streams can end or fall silent, and a relist after that tells of no deletion. So each kind is listed in turn
(metadata only) and held against the store. A difference that is still there after a grace is a missed message: the
whole kind is listed, the models concerned are reconciled, and a kind that misses twice in a row makes `/healthz` fail.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import Sequence

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.handlers import SELECTOR
from phoenix_operator.kinds import OPTIONAL, PHOENIX_MODEL, Kind
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Object
from phoenix_operator.queue import KeyedQueue
from phoenix_operator.store import Key, Store, model_of

_log = logging.getLogger(__name__)
_BETWEEN_KINDS_S = 20.0
_GRACE_S = 5.0
_STALLED_AFTER = 2


class Resync:
    """Looks again, kind by kind and model by model."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        queue: KeyedQueue[Key],
        metrics: Metrics,
        *,
        kinds: Sequence[Kind],
        namespaces: Sequence[str],
        every_s: float,
    ) -> None:
        self._cluster, self._store, self._queue, self._metrics = cluster, store, queue, metrics
        self._kinds, self._namespaces, self._every_s = tuple(kinds), tuple(namespaces), every_s
        self._misses: dict[Kind, int] = {}
        self.served_kinds: frozenset[Kind] = frozenset()

    @property
    def stalled(self) -> list[Kind]:
        """Kinds whose watch has missed changes twice in a row."""
        return [kind for kind, count in self._misses.items() if count >= _STALLED_AFTER]

    async def discover(self) -> None:
        """Ask which of the optional kinds the cluster serves."""
        self.served_kinds = await self._cluster.served(tuple(OPTIONAL))

    async def look_at_models(self) -> None:
        """Queue every model once in each period, spread over a tenth of it."""
        while True:
            await asyncio.sleep(self._every_s * random.uniform(0.8, 1.2))
            for key in self._store.models():
                self._queue.add_after(key, random.uniform(0, self._every_s / 10))

    async def look_at_kinds(self) -> None:
        """Hold one kind after another against the store."""
        for kind in itertools.cycle(self._kinds):
            await asyncio.sleep(_BETWEEN_KINDS_S)
            try:
                await self.discover()
                if kind not in OPTIONAL or kind in self.served_kinds:
                    await self._look_at(kind)
            except ApiError as error:
                _log.warning("the second look failed", extra={"kind": str(kind), "cause": error.message})

    async def _look_at(self, kind: Kind) -> None:
        if not await self._differs(kind):
            self._misses[kind] = 0
            return
        await asyncio.sleep(_GRACE_S)
        if not await self._differs(kind):
            self._misses[kind] = 0
            return
        bodies, version = await self._list(kind, only_metadata=False)
        missed = self._store.replace(kind, bodies, listed_at=version)
        self._misses[kind] = self._misses.get(kind, 0) + 1 if missed else 0
        self._metrics.missed_events.labels(str(kind)).inc(len(missed))
        if missed:
            _log.warning("the watch missed changes", extra={"kind": str(kind), "models": len(missed)})
        for key in missed:
            self._queue.add(key)

    async def _differs(self, kind: Kind) -> bool:
        """Whether a list shows something newer than the store, or no longer shows what the store has."""
        bodies, version = await self._list(kind, only_metadata=True)
        known = self._store.versions(kind)
        # an object that bears our label and no model's is not in the store either
        ours = [body["metadata"] for body in bodies if model_of(kind, body) is not None]
        listed = {(row["namespace"], row["name"]): row for row in ours}
        is_behind = any(known.get(place, 0) < int(row["resourceVersion"]) for place, row in listed.items())
        return is_behind or any(at <= version for place, at in known.items() if place not in listed)

    async def _list(self, kind: Kind, *, only_metadata: bool) -> tuple[list[Object], int]:
        labels = None if kind is PHOENIX_MODEL else SELECTOR
        bodies: list[Object] = []
        version = None
        for namespace in self._namespaces or (None,):
            page = await self._cluster.list(kind, namespace, labels=labels, only_metadata=only_metadata)
            bodies += page.items
            at = int(page.version or 0)
            version = at if version is None else min(version, at)
        return bodies, version or 0
