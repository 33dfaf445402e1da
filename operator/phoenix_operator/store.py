"""What the watches have told so far: PhoenixModels, their children and their pods, by model.

Bodies are kept as packed JSON without `managedFields`: a thousand models with their pods are ten thousand objects, and
as dicts they would take twenty times the memory. A stale message never replaces a newer one. Filled by `handlers`, and
by `reconcile` with what its own writes returned, so that a reconcile never acts on what it has itself outdated.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from phoenix_operator.desired.naming import MODEL
from phoenix_operator.kinds import PHOENIX_MODEL, Kind
from phoenix_operator.observed import Object

Key = tuple[str, str]  # namespace and name of a PhoenixModel
_Id = tuple[str, str]  # namespace and name of any object


class _Record:
    __slots__ = ("key", "packed", "uid", "version")

    def __init__(self, kind: Kind, body: Object, key: Key) -> None:
        metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
        # members of a list come without their kind
        whole = {"apiVersion": kind.api_version, "kind": kind.kind, **body, "metadata": metadata}
        self.packed = zlib.compress(json.dumps(whole, separators=(",", ":")).encode(), level=1)
        self.version = _version(body)
        self.uid = metadata["uid"]
        self.key = key

    def body(self) -> Object:
        body: Object = json.loads(zlib.decompress(self.packed))
        return body


class Store:
    """The latest known state of every object that concerns a PhoenixModel."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[_Id, _Record]] = defaultdict(dict)
        self._by_model: dict[Key, set[tuple[Kind, _Id]]] = defaultdict(set)

    def put(self, kind: Kind, body: Object) -> set[Key]:
        """Take in an object unless as new a one is known; return the models it concerns, none if it is stale.

        An object whose label was changed or taken away concerns the model that it belonged to as well.
        """
        place, key = _id(body), model_of(kind, body)
        known = self._objects[kind].get(place)
        # resource versions of one kind are ordered (KEP 5504), those of a predecessor of the same name too
        if known is not None and known.version >= _version(body):
            return set()
        concerned = set()
        if known is not None:
            concerned.add(self._drop(kind, place))
        if key is not None:
            self._objects[kind][place] = _Record(kind, body, key)
            self._by_model[key].add((kind, place))
            concerned.add(key)
        return concerned

    def discard(self, kind: Kind, body: Object) -> set[Key]:
        """Forget an object that is gone; return the model it belonged to, none if its successor is known already."""
        place = _id(body)
        known = self._objects[kind].get(place)
        if known is None:
            key = model_of(kind, body)
            return {key} if key is not None else set()
        if known.uid != body["metadata"]["uid"]:
            return set()
        return {self._drop(kind, place)}

    def _drop(self, kind: Kind, place: _Id) -> Key:
        record = self._objects[kind].pop(place)
        members = self._by_model[record.key]
        members.discard((kind, place))
        if not members:
            del self._by_model[record.key]
        return record.key

    def model(self, key: Key) -> Object | None:
        """Return a PhoenixModel."""
        record = self._objects[PHOENIX_MODEL].get(key)
        return record.body() if record else None

    def models(self) -> list[Key]:
        """Return the keys of all PhoenixModels."""
        return list(self._objects[PHOENIX_MODEL])

    def of_model(self, key: Key, kinds: Iterable[Kind]) -> Iterator[tuple[Kind, Object]]:
        """Yield the objects of these kinds that belong to a model."""
        wanted = set(kinds)
        for kind, place in sorted(self._by_model.get(key, ()), key=lambda member: (member[0].kind, member[1])):
            if kind in wanted:
                yield kind, self._objects[kind][place].body()

    def replace(self, kind: Kind, bodies: list[Object], *, listed_at: int) -> set[Key]:
        """Take in a whole list; return the models of objects that the watch had missed.

        `listed_at` is the list's resourceVersion: what the store knows of later moments is kept.
        """
        missed = {key for body in bodies for key in self.put(kind, body)}
        listed = {_id(body) for body in bodies}
        for place, record in list(self._objects[kind].items()):
            if place not in listed and record.version <= listed_at:
                missed.add(self._drop(kind, place))
        return missed

    def versions(self, kind: Kind) -> dict[_Id, int]:
        """Return the resourceVersion of every known object of a kind."""
        return {place: record.version for place, record in self._objects[kind].items()}


def model_of(kind: Kind, body: Object) -> Key | None:
    """Return the model that an object says it belongs to."""
    metadata = body["metadata"]
    if kind == PHOENIX_MODEL:
        return metadata["namespace"], metadata["name"]
    name = (metadata.get("labels") or {}).get(MODEL)
    return (metadata["namespace"], name) if name else None


def _id(body: Object) -> _Id:
    return body["metadata"]["namespace"], body["metadata"]["name"]


def _version(body: Object) -> int:
    return int(body["metadata"].get("resourceVersion") or 0)
