"""The watches: kopf as the source of events, and nothing else of kopf.

Only `on.event` is used, so kopf writes no annotation, adds no finalizer and swallows no retry: an event's object goes
into the store, and its model's key into the queue. Relists after a broken stream arrive here like any other event.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import kopf

from phoenix_operator.desired.naming import MANAGED_BY, OPERATOR
from phoenix_operator.kinds import PHOENIX_MODEL, Kind
from phoenix_operator.observed import Object
from phoenix_operator.settings import Settings

SELECTOR = f"{MANAGED_BY}={OPERATOR}"
# Told of each event: kind, type (None: listed), object.
Sink = Callable[[Kind, str | None, Object], None]


async def watch(
    kinds: Sequence[Kind],
    sink: Sink,
    settings: Settings,
    *,
    namespaces: Sequence[str],
    stop: asyncio.Event,
    ready: asyncio.Event,
) -> None:
    """Watch until `stop` is set; `ready` is set once the watches are up. Without namespaces the whole cluster.

    Raises what kopf raises when a stream cannot go on: the process should end and be started again.
    """
    await kopf.operator(
        registry=_registry(kinds, sink),
        settings=_settings(kinds, settings, is_namespaced=bool(namespaces)),
        standalone=True,  # no peering: the lease decides who works
        clusterwide=not namespaces,
        namespaces=list(namespaces),
        stop_flag=stop,
        ready_flag=ready,
    )


def _registry(kinds: Sequence[Kind], sink: Sink) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> Any:
        # one way in, not whichever client library happens to be installed
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    for kind in kinds:
        _watch_kind(registry, kind, sink)
    return registry


def _watch_kind(registry: kopf.OperatorRegistry, kind: Kind, sink: Sink) -> None:
    @kopf.on.event(kind.group, kind.version, kind.plural, registry=registry, id=f"on_{kind.plural}")
    async def on_event(event: Any, **_: Any) -> None:
        sink(kind, event["type"], event["object"])


class _NoDifferences(kopf.DiffBaseStorage):
    """Keeps kopf from copying each object to find what changed: nobody here asks."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass


def _settings(kinds: Sequence[Kind], settings: Settings, *, is_namespaced: bool) -> kopf.OperatorSettings:
    ours = kopf.OperatorSettings()
    ours.watching.server_timeout, ours.watching.client_timeout = 290, 310
    ours.watching.connect_timeout, ours.watching.reconnect_backoff = 10, 1.0
    ours.watching.chunk_size = 100  # all kinds are listed at once, and a page of parsed objects takes megabytes
    for kind in kinds:
        if kind is not PHOENIX_MODEL:
            ours.watching.label_selectors[kind.group, kind.version, kind.plural] = SELECTOR
    ours.networking.request_timeout = settings.request_timeout_seconds
    ours.posting.enabled = False
    # a handler takes microseconds: its task need not wait for more, with the whole object in its hands
    ours.queueing.idle_timeout = 0.05
    ours.persistence.diffbase_storage = _NoDifferences()
    ours.process.ultimate_exiting_timeout = 20
    # looking for new CRDs needs a cluster-wide right
    ours.scanning.disabled = is_namespaced
    return ours
