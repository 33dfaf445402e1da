"""Makes the cluster hold what one PhoenixModel asks for: the one function that joins the pure half and the cluster.

Level-based: every trigger leads here, whatever happened; a second run with nothing changed makes no write. Errors of
the moment are raised and come back by the queue's backoff; what the user must mend becomes a condition.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pydantic import ValidationError

from phoenix_api import Reason
from phoenix_api.faults import explain, path_of
from phoenix_operator.binding_marks import is_to_be_released
from phoenix_operator.bindings import Bindings
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.desired import desired_objects
from phoenix_operator.desired.accelerator import prefers
from phoenix_operator.desired.acceptance import faults, is_left_alone
from phoenix_operator.desired.autoscaling import first_replicas, is_autoscaled
from phoenix_operator.desired.bindings import asked
from phoenix_operator.desired.deployment import PATIENCE_S, deployment
from phoenix_operator.desired.naming import is_of_predecessor, is_owned, sealed
from phoenix_operator.desired.network import path_prefix
from phoenix_operator.desired.source import config_map_source
from phoenix_operator.difference import is_as_wanted
from phoenix_operator.kinds import (
    CHILDREN,
    CONFIG_MAP,
    DEPLOYMENT,
    HORIZONTAL_POD_AUTOSCALER,
    IMMUTABLE,
    PHOENIX_MODEL,
    POD,
    SCALED_OBJECT,
    SECRET,
    Kind,
    kind_of,
)
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import HASH, Missing, Object, Observed, Pod, Reference, Refusal, Subject, stamp
from phoenix_operator.placement import Placement
from phoenix_operator.pod_state import PodStates
from phoenix_operator.recorder import Happening, Recorder, happenings
from phoenix_operator.settings import Settings
from phoenix_operator.status import blocked_status, next_status, unreadable_status
from phoenix_operator.store import Key, Store

_log = logging.getLogger(__name__)
_SOON_S, _LATER_S, _REFUSED_S = 2.0, 15.0, 30.0
_AUTOSCALERS = (HORIZONTAL_POD_AUTOSCALER, SCALED_OBJECT)
_LAST_PODS_S = 60  # for pods to be ended, besides their drain and their longest request


@dataclass(frozen=True, slots=True)
class Parts:
    """What a reconcile works with."""

    cluster: Cluster
    store: Store
    settings: Settings
    metrics: Metrics
    states: PodStates
    placement: Placement
    recorder: Recorder
    bindings: Bindings
    operator_namespace: str
    served_kinds: Callable[[], frozenset[Kind]]
    latency_s: Callable[[Subject], Awaitable[float | None]]  # of a model that is autoscaled


class Reconciler:
    """Reconciles models by key."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._refused: dict[Key, dict[tuple[Kind, str], Refusal]] = {}

    async def __call__(self, key: Key) -> float | None:
        """Reconcile one model; return in how many seconds it should be looked at again, or None.

        Raises `ApiError` for what another try may mend.
        """
        started = time.monotonic()
        result = "error"
        try:
            delay_s = await self._reconcile(key)
            result = "refused" if self._refused.get(key) else "ok"
        except ApiError as error:
            if not error.is_namespace_ending:
                _log.error("reconcile failed", extra={"model": "/".join(key), "cause": error.message})
                raise
            return None  # the namespace takes the model with it
        except Exception:
            _log.exception("reconcile failed", extra={"model": "/".join(key)})
            raise
        finally:
            self._parts.metrics.reconcile_seconds.labels(result).observe(time.monotonic() - started)
        return delay_s

    async def _reconcile(self, key: Key) -> float | None:
        document = self._parts.store.model(key)
        if document is None or "deletionTimestamp" in document["metadata"]:
            # its children have it as owner and go with it
            self._refused.pop(key, None)
            return None if document is None else await self._release(key, document)
        try:
            subject = Subject.read(document)
        except ValidationError as error:
            words = "; ".join(f"{path_of(location)}: {message}" for location, message in explain(error))
            await self._write_status(document, unreadable_status(document, words, stamp(_now())))
            return None
        observed = await self._observe(key, subject)
        found = faults(subject, observed, self._parts.settings)
        if not is_left_alone(found):
            observed = await self._parts.bindings.settle(subject, document, observed)
            if not observed.foreign:
                observed = await self._apply_all(key, subject, observed)
                observed = await self._parts.bindings.tidy(subject, document, observed)
            found = faults(subject, observed, self._parts.settings)
        status = next_status(subject, observed, self._parts.settings, found)
        await self._tell(subject, document, status)
        return self._look_again(key, subject, observed, not_accepted=bool(found))

    async def _release(self, key: Key, document: Object) -> float | None:
        """Let go of a model that is being deleted, once nothing of it is left on backends."""
        try:
            subject = Subject.read(document)
        except ValidationError:
            subject = None
        if subject is not None and is_to_be_released(document) and await self._has_pods(key, subject, document):
            return _SOON_S
        unreleased = await self._parts.bindings.release(document, subject)
        if not unreleased:
            return None
        status = blocked_status(document, unreleased, stamp(_now()))
        if subject is not None:
            await self._tell(subject, document, status)
        else:
            await self._write_status(document, status)
        return _LATER_S

    async def _has_pods(self, key: Key, subject: Subject, document: Object) -> bool:
        """Have the pods end, and return whether to wait for them: what they still do needs their credentials.

        One that does not end within its grace period (its node is lost) holds up no deletion.
        """
        store, cluster = self._parts.store, self._parts.cluster
        children = {
            (kind, body["metadata"]["name"]): body
            for kind, body in store.of_model(key, CHILDREN)
            if is_owned(subject, body)
        }
        pods = [pod for pod in (Pod(body) for _, body in store.of_model(key, (POD,))) if not pod.has_ended]
        observed = Observed(children=children, pods=pods)
        live = observed.deployment
        if live is not None and live["spec"].get("replicas", 1) > 0:
            wanted = deployment(subject, observed, self._parts.settings)
            wanted["spec"]["replicas"] = 0
            wanted = sealed(wanted)
            wanted["metadata"]["uid"] = live["metadata"]["uid"]  # one that is gone is not made again
            try:
                store.put(DEPLOYMENT, await cluster.apply(DEPLOYMENT, wanted))
            except ApiError as error:
                if not error.is_refusal:
                    raise
                _log.warning("pods are not ended", extra={"model": subject.name, "cause": error.message})
                return False
        grace_s = subject.spec.rollout.drain_seconds + subject.spec.limits.timeout_seconds + _LAST_PODS_S
        since = datetime.fromisoformat(document["metadata"]["deletionTimestamp"])
        return bool(pods) and (_now() - since).total_seconds() < grace_s

    # --- observe -----------------------------------------------------------------------------------------------------

    async def _observe(self, key: Key, subject: Subject) -> Observed:
        parts = self._parts
        children = {
            (kind, body["metadata"]["name"]): body
            for kind, body in parts.store.of_model(key, CHILDREN)
            if is_owned(subject, body)
        }
        pods = [Pod(body) for _, body in parts.store.of_model(key, (POD,))]
        loaded, missing, shortfall, latency_s = await asyncio.gather(
            parts.states.of(subject.name, pods, is_bound=bool(asked(subject)), is_autoscaled=is_autoscaled(subject)),
            self._missing(subject),
            parts.placement.shortfall(pods),
            parts.latency_s(subject) if is_autoscaled(subject) else _nothing(),
        )
        return Observed(
            children=children,
            pods=pods,
            loaded=loaded,
            served_kinds=parts.served_kinds(),
            missing=missing,
            refusals=list(self._refused.get(key, {}).values()),
            host_owner=self._host_owner(subject),
            shortfall=shortfall,
            latency_s=latency_s,
            now=_now(),
        )

    async def _missing(self, subject: Subject) -> list[Missing]:
        """Return what the pods refer to and is not there. Only existence is asked: a Secret's content stays away."""
        looks = []
        if subject.spec.model.credentials is not None:
            looks.append(self._missing_secret(subject, subject.spec.model.credentials.secret_ref.name))
        if named := config_map_source(subject.spec.model.uri):
            looks.append(self._missing_config_map(subject, *named))
        return [missing for missing in await asyncio.gather(*looks) if missing is not None]

    async def _missing_secret(self, subject: Subject, name: str) -> Missing | None:
        if await self._parts.cluster.exists(SECRET, subject.namespace, name):
            return None
        return Missing(Reference.SECRET, name, "spec.model.credentials.secretRef")

    async def _missing_config_map(self, subject: Subject, name: str, key: str) -> Missing | None:
        body = await self._parts.cluster.get(CONFIG_MAP, subject.namespace, name)
        if body is not None and key in body.get("data", {}) | body.get("binaryData", {}):
            return None
        return Missing(Reference.CONFIG_MAP, name, "spec.model.uri", key=None if body is None else key)

    def _host_owner(self, subject: Subject) -> str | None:
        """Return the older model that has the same host and path; models of other namespaces may have the same name."""
        host = subject.spec.networking.host
        if host is None:
            return None
        for namespace, name in self._parts.store.models():
            if name != subject.name or namespace == subject.namespace:
                continue
            other = self._parts.store.model((namespace, name))
            if other is None or other["spec"].get("networking", {}).get("host") != host:
                continue
            metadata = other["metadata"]
            if (metadata["creationTimestamp"], metadata["uid"]) < (subject.created, subject.uid):
                return f"{namespace}/{name} ({host}{path_prefix(subject)})"
        return None

    # --- apply -------------------------------------------------------------------------------------------------------

    async def _apply_all(self, key: Key, subject: Subject, observed: Observed) -> Observed:
        """Apply what differs and prune what is not wanted; return what was seen, with the answers taken in."""
        parts = self._parts
        wanted = desired_objects(subject, observed, parts.settings, operator_namespace=parts.operator_namespace)
        live = dict(observed.children)
        new = [manifest for manifest in wanted if _place(manifest) not in live]
        found = await asyncio.gather(*(self._find(manifest) for manifest in new))
        late, foreign = {}, []
        for manifest, body in zip(new, found, strict=True):
            if body is None:
                continue
            if is_owned(subject, body):
                late[_place(manifest)] = body
            elif is_of_predecessor(subject, body):
                raise ApiError(409, "Conflict", f"{_place(manifest)[0]} of the deleted model is still going away")
            else:
                foreign.append(_place(manifest))
        if foreign:
            return replace(observed, foreign=foreign)
        if late:
            # the watch is late, or somebody took our label away; what is wanted depends on what is there
            return await self._apply_all(key, subject, replace(observed, children={**observed.children, **late}))
        is_first = not observed.children
        refused = self._refused.setdefault(key, {})
        places = {_place(manifest) for manifest in wanted}
        # an autoscaler that is not wanted any more goes before the number it would change back
        await self._prune(subject, live, {place for place in live if place[0] in _AUTOSCALERS} - places)
        for manifest in wanted:
            place = _place(manifest)
            body = live.get(place)
            if body is not None and is_as_wanted(manifest, body):
                refused.pop(place, None)
                continue
            stored = await self._apply(subject, manifest, body, refused)
            if stored is not None:
                live[place] = stored
                if body is not None or not is_first:
                    await self._tell_repair(subject, manifest, body)
        for place in refused.keys() - places:
            del refused[place]
        # every model has a Deployment: one that is not among the wishes waits for what its pods need
        await self._prune(subject, live, {place for place in live if place[0] is not DEPLOYMENT} - places)
        if not refused:
            self._refused.pop(key)
        return replace(observed, children=live, refusals=list(refused.values()))

    async def _prune(
        self, subject: Subject, live: dict[tuple[Kind, str], Object], unwanted: set[tuple[Kind, str]]
    ) -> None:
        for place in sorted(unwanted, key=lambda place: (place[0].kind, place[1])):
            body = live.pop(place)
            await self._parts.cluster.delete(place[0], subject.namespace, place[1], uid=body["metadata"]["uid"])
            self._parts.store.discard(place[0], body)

    async def _find(self, manifest: Object) -> Object | None:
        kind, name = _place(manifest)
        return await self._parts.cluster.get(kind, manifest["metadata"]["namespace"], name)

    async def _apply(
        self, subject: Subject, manifest: Object, live: Object | None, refused: dict[tuple[Kind, str], Refusal]
    ) -> Object | None:
        """Apply one object; None if the API server refuses it, which is then remembered with the reason."""
        kind, name = place = _place(manifest)
        try:
            stored = await self._apply_or_reset(subject, kind, manifest, live)
        except ApiError as error:
            if not error.is_refusal or error.is_namespace_ending:
                raise
            wish = manifest["metadata"]["annotations"][HASH]
            before = refused.get(place)
            if not (error.is_unfit and before is not None and before.wish == wish):
                refused[place] = Refusal(kind, name, error.code, error.message, error.is_quota, wish)
            return None
        refused.pop(place, None)
        self._parts.store.put(kind, stored)
        return stored

    async def _apply_or_reset(self, subject: Subject, kind: Kind, manifest: Object, live: Object | None) -> Object:
        cluster = self._parts.cluster
        try:
            return await self._apply_once(subject, kind, manifest, is_first=live is None)
        except ApiError as error:
            if live is None or error.code != 422 or "spec" not in manifest:
                raise
            if kind in IMMUTABLE:
                metadata = live["metadata"]
                await cluster.delete(kind, metadata["namespace"], metadata["name"], uid=metadata["uid"])
                return await cluster.apply(kind, manifest, is_first=True)
            try:
                await cluster.reset(kind, manifest, live)
            except ApiError as another:
                if another.is_refusal:
                    raise error from another  # it is our own wish that the API server refuses
                raise
        return await self._apply_once(subject, kind, manifest, is_first=False)

    async def _apply_once(self, subject: Subject, kind: Kind, manifest: Object, *, is_first: bool) -> Object:
        if kind is DEPLOYMENT and "replicas" not in manifest["spec"]:
            first = first_replicas(subject)
            return await self._parts.cluster.apply_but_replicas(kind, manifest, first_replicas=first)
        return await self._parts.cluster.apply(kind, manifest, is_first=is_first)

    async def _tell_repair(self, subject: Subject, manifest: Object, before: Object | None) -> None:
        """Tell of an object that somebody else had changed or deleted; our own new wishes are no repair."""
        if before is not None:
            annotations = before["metadata"].get("annotations") or {}
            if annotations.get(HASH) != manifest["metadata"]["annotations"][HASH]:
                return
        elif subject.status.get("observedGeneration") != subject.generation:
            return
        kind, name = _place(manifest)
        what = "had been deleted and was made again" if before is None else "had been changed and was set back"
        await self._parts.recorder.record(
            subject, Happening("Normal", "Repaired", f"{kind} {name} {what}; change the PhoenixModel instead"), _now()
        )

    # --- tell --------------------------------------------------------------------------------------------------------

    async def _tell(self, subject: Subject, document: Object, status: Object) -> None:
        before = document.get("status", {})
        if not await self._write_status(document, status):
            return
        for happened in happenings(before.get("conditions", []), status["conditions"]):
            await self._parts.recorder.record(subject, happened, _now())

    async def _write_status(self, document: Object, status: Object) -> bool:
        """Write the status if it differs; return whether it did."""
        if document.get("status") == status:
            return False
        metadata = document["metadata"]
        try:
            stored = await self._parts.cluster.apply_status(
                PHOENIX_MODEL, metadata["namespace"], metadata["name"], status
            )
        except ApiError as error:
            if error.code == 404:
                return False  # deleted meanwhile
            raise
        self._parts.store.put(PHOENIX_MODEL, stored)
        return True

    def _look_again(self, key: Key, subject: Subject, observed: Observed, *, not_accepted: bool) -> float | None:
        """Return when to look again for what no watch tells."""
        delays = [self._soon(subject, observed, not_accepted=not_accepted)]
        if observed.bindings or observed.unreleased:
            is_bound = not observed.unreleased and all(
                seen.reason is Reason.BOUND and not any(kind in pod.bindings for pod in observed.loaded.values())
                for kind, seen in observed.bindings.items()
            )
            check_s = self._parts.settings.binding_check_seconds
            delays += [self._parts.bindings.look_again_s(key), check_s if is_bound else min(_LATER_S, check_s)]
        return min((delay for delay in delays if delay is not None), default=None)

    def _soon(self, subject: Subject, observed: Observed, *, not_accepted: bool) -> float | None:
        if observed.missing:
            return _SOON_S
        if observed.foreign or observed.host_owner:
            return _SOON_S
        if not_accepted or observed.refusals:  # a quota refuses objects of a spec that is accepted
            return _REFUSED_S
        if any(pod.is_ready and pod.ip and pod.uid not in observed.loaded for pod in observed.pods):
            return _LATER_S
        if is_autoscaled(subject) and any(loaded.capacity is None for loaded in observed.loaded.values()):
            return _LATER_S
        if observed.shortfall:  # PATIENCE_S of a preferred device ends without an event
            return PATIENCE_S if prefers(subject) else _LATER_S
        return None


def _place(manifest: Object) -> tuple[Kind, str]:
    return kind_of(manifest), manifest["metadata"]["name"]


async def _nothing() -> None:
    return None


def _now() -> datetime:
    return datetime.now(UTC)
