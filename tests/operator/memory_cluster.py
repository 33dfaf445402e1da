"""An API server in memory with the methods of `Cluster`, which remembers what was asked of it.

It keeps what matters to the operator: uids, resource versions, generations, server-side apply that merges and removes
what its owner no longer sends, preconditions, selectors. What it is told to refuse, it refuses.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phoenix_operator.cluster import ApiError, Page
from phoenix_operator.desired.naming import MANAGED_BY, OPERATOR
from phoenix_operator.kinds import CHILDREN, PHOENIX_MODEL, POD, Kind
from phoenix_operator.observed import Object

_Place = tuple[Kind, str | None, str]
_WRITES = ("create", "update", "patch", "delete")


@dataclass(frozen=True)
class Call:
    """A request, in the words of RBAC."""

    verb: str
    kind: Kind
    name: str = ""
    subresource: str = ""


class MemoryCluster:
    """What the operator's modules need of a cluster."""

    def __init__(self, served: Iterable[Kind] = ()) -> None:
        self.calls: list[Call] = []
        self.objects: dict[_Place, Object] = {}
        # asked before each request; what it raises is the answer
        self.refuse: Callable[[Call], None] = lambda call: None
        self._served = frozenset(served)
        self._wishes: dict[_Place, Object] = {}
        self._number = itertools.count(100)

    # --- for tests -----------------------------------------------------------------------------------------------

    @property
    def writes(self) -> list[Call]:
        return [call for call in self.calls if call.verb in _WRITES]

    def take_writes(self) -> list[Call]:
        """Return the writes so far, and forget every call."""
        found, self.calls = self.writes, []
        return found

    def put(self, kind: Kind, body: Object) -> Object:
        """Store an object as somebody else would: without a trace in `calls`."""
        metadata = body["metadata"]
        place = (kind, metadata.get("namespace"), metadata["name"])
        known = self.objects.get(place)
        stored = {"apiVersion": kind.api_version, "kind": kind.kind} | copy.deepcopy(body)
        stored["metadata"].setdefault("uid", known["metadata"]["uid"] if known else f"uid-{next(self._number)}")
        stored["metadata"]["resourceVersion"] = str(next(self._number))
        self.objects[place] = stored
        return copy.deepcopy(stored)

    def edit(self, kind: Kind, name: str, change: Callable[[Object], None], namespace: str = "ml") -> None:
        """Change a stored object as somebody else would."""
        body = copy.deepcopy(self.objects[kind, namespace, name])
        change(body)
        self.put(kind, body)

    def remove(self, kind: Kind, name: str, namespace: str = "ml") -> None:
        """Delete an object as somebody else would."""
        del self.objects[kind, namespace, name]
        self._wishes.pop((kind, namespace, name), None)

    def of_kind(self, kind: Kind) -> list[Object]:
        return [copy.deepcopy(body) for (found, _, _), body in self.objects.items() if found == kind]

    def watched(self) -> dict[Kind, list[Object]]:
        """Return what the watches would show."""
        shown: dict[Kind, list[Object]] = {PHOENIX_MODEL: self.of_kind(PHOENIX_MODEL)}
        for kind in (POD, *CHILDREN):
            bodies = self.of_kind(kind)
            shown[kind] = [body for body in bodies if body["metadata"].get("labels", {}).get(MANAGED_BY) == OPERATOR]
        return shown

    @property
    def version(self) -> int:
        return next(self._number)

    # --- the methods of Cluster ----------------------------------------------------------------------------------

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        self._ask("get", kind, name)
        return copy.deepcopy(self.objects.get((kind, namespace, name)))

    async def exists(self, kind: Kind, namespace: str, name: str) -> bool:
        try:
            self._ask("get", kind, name)
        except ApiError as error:
            if error.code != 403:
                raise
            return True
        return (kind, namespace, name) in self.objects

    async def list(
        self,
        kind: Kind,
        namespace: str | None,
        *,
        labels: str | None = None,
        fields: str | None = None,
        only_metadata: bool = False,
    ) -> Page:
        self._ask("list", kind)
        wanted = dict(part.split("=") for part in labels.split(",")) if labels else {}
        bodies = [
            body
            for body in self.of_kind(kind)
            if namespace in (None, body["metadata"].get("namespace"))
            and wanted.items() <= body["metadata"].get("labels", {}).items()
        ]
        if only_metadata:
            bodies = [{"metadata": body["metadata"]} for body in bodies]
        return Page(bodies, str(self.version))

    async def apply(self, kind: Kind, manifest: Object, *, is_first: bool = False) -> Object:
        metadata = manifest["metadata"]
        place = (kind, metadata["namespace"], metadata["name"])
        self._ask("patch", kind, metadata["name"])
        live = self.objects.get(place)
        if live is None:
            self._ask("create", kind, metadata["name"])
        elif is_first and not _is_within(manifest, live):
            raise ApiError(409, "Conflict", "conflict with another manager")
        if metadata.get("resourceVersion") not in (None, live and live["metadata"]["resourceVersion"]):
            raise ApiError(409, "Conflict", "the object has been modified")
        after = _merged(live or {}, self._wishes.get(place, {}), manifest)
        self._wishes[place] = copy.deepcopy(manifest)
        if after != live:
            after["metadata"]["generation"] = (live or after)["metadata"].get("generation", 0) + 1
            self.put(kind, after)
        return copy.deepcopy(self.objects[place])

    async def apply_but_replicas(self, kind: Kind, manifest: Object, *, first_replicas: int) -> Object:
        metadata = manifest["metadata"]
        place = (kind, metadata["namespace"], metadata["name"])
        live = self.objects.get(place)
        replicas = first_replicas if live is None else live["spec"].get("replicas", 1)
        stored = await self.apply(kind, manifest)
        stored["spec"]["replicas"] = replicas  # which nobody's wish has
        return self.put(kind, stored) if stored != self.objects[place] else stored

    async def reset(self, kind: Kind, manifest: Object, live: Object) -> None:
        metadata = manifest["metadata"]
        self._ask("patch", kind, metadata["name"])
        found = self.objects.get((kind, metadata["namespace"], metadata["name"]))
        if found is None or found["metadata"]["uid"] != live["metadata"]["uid"]:
            raise ApiError(422, "Invalid", "the test failed")
        self.put(kind, found | {"spec": copy.deepcopy(manifest["spec"])})

    async def apply_status(self, kind: Kind, namespace: str, name: str, status: Object) -> Object:
        self._ask("patch", kind, name, "status")
        if (kind, namespace, name) not in self.objects:
            raise ApiError(404, "NotFound", f"{name} not found")
        return self.put(kind, self.objects[kind, namespace, name] | {"status": copy.deepcopy(status)})

    async def patch_metadata(
        self, kind: Kind, metadata: Object, *, finalizers: Sequence[str], annotations: Mapping[str, str | None]
    ) -> Object | None:
        name, namespace = metadata["name"], metadata["namespace"]
        self._ask("patch", kind, name)
        live = copy.deepcopy(self.objects.get((kind, namespace, name)))
        if live is None:
            return None
        if live["metadata"]["resourceVersion"] != metadata["resourceVersion"]:
            raise ApiError(409, "Conflict", "the object has been modified")
        kept = live["metadata"].get("annotations", {}) | annotations
        live["metadata"]["annotations"] = {key: value for key, value in kept.items() if value is not None}
        live["metadata"]["finalizers"] = list(finalizers)
        if "deletionTimestamp" in live["metadata"] and not finalizers:
            self.remove(kind, name, namespace)
            return live
        return self.put(kind, live)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str) -> None:
        self._ask("delete", kind, name)
        body = self.objects.get((kind, namespace, name))
        if body is not None and body["metadata"]["uid"] == uid:
            self.remove(kind, name, namespace)

    async def create(self, kind: Kind, manifest: Object) -> Object:
        metadata = manifest["metadata"]
        self._ask("create", kind, metadata["name"])
        if (kind, metadata["namespace"], metadata["name"]) in self.objects:
            raise ApiError(409, "AlreadyExists", f"{metadata['name']} already exists")
        return self.put(kind, manifest)

    async def replace(self, kind: Kind, manifest: Object) -> Object:
        metadata = manifest["metadata"]
        self._ask("update", kind, metadata["name"])
        live = self.objects.get((kind, metadata["namespace"], metadata["name"]))
        if live is None:
            raise ApiError(404, "NotFound", f"{metadata['name']} not found")
        if metadata.get("resourceVersion") not in (None, live["metadata"]["resourceVersion"]):
            raise ApiError(409, "Conflict", "the object has been modified")
        return self.put(kind, manifest)

    async def served(self, kinds: tuple[Kind, ...]) -> frozenset[Kind]:
        return self._served & frozenset(kinds)

    async def close(self) -> None:
        pass

    def _ask(self, verb: str, kind: Kind, name: str = "", subresource: str = "") -> None:
        call = Call(verb, kind, name, subresource)
        self.calls.append(call)
        self.refuse(call)


def _is_within(wanted: Any, live: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(live, dict):
        return all(key not in live or _is_within(value, live[key]) for key, value in wanted.items())
    return bool(wanted == live)


def _merged(live: Any, before: Any, wanted: Any, field: str = "") -> Any:
    """Return the live value with what is wanted, and without what only an earlier wish asked for."""
    if not isinstance(wanted, dict) or field.lower().endswith("selector"):  # these are kept whole
        return copy.deepcopy(wanted)
    live = live if isinstance(live, dict) else {}
    before = before if isinstance(before, dict) else {}
    kept = {key: value for key, value in live.items() if key not in before or key in wanted}
    return copy.deepcopy(kept) | {
        key: _merged(live.get(key), before.get(key), value, key) for key, value in wanted.items()
    }
