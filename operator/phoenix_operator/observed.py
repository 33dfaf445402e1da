"""What the pure half of the operator is told: a PhoenixModel as it stands in the cluster, and what was seen around it.

`reconcile` fills these; `desired` and `status` read them and nothing else. Kubernetes objects stay plain dicts; the
few facts about pods that more than one module asks for are computed here, once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from phoenix_api import PhoenixModel, PhoenixModelSpec, Reason
from phoenix_operator.kinds import CONFIG_MAP, DEPLOYMENT, HORIZONTAL_POD_AUTOSCALER, SCALED_OBJECT, Kind

Object = dict[str, Any]
CONTAINER = "server"  # the container of ours in a pod; a mesh may put others beside it
REVISION = "phoenix-ml.io/revision"  # hash of the manifest that a pod serves; its key in the ConfigMap
TEMPLATE = "phoenix-ml.io/template"  # hash of the whole pod template
HASH = "phoenix-ml.io/hash"  # hash of a whole object as the operator wants it
BINDINGS = "phoenix-ml.io/bindings"  # on the pod template: which Secrets with which content its pods have been given
PORTS = "phoenix-ml.io/binding-ports"  # on the NetworkPolicy: the ports of backends, by kind
ROTATE = "phoenix-ml.io/rotate"  # on the PhoenixModel: a new value asks for new passwords
GUARD_OFF = "phoenix-ml.io/latency-guard-off"  # on the HPA: spec hash for which latency adds no replicas
WITHHELD = "phoenix-ml.io/accelerator-withheld"  # on the Deployment: spec hash for which no accelerator is asked


def stamp(now: datetime) -> str:
    """Write a time as the API does: RFC 3339, UTC, whole seconds."""
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Subject:
    """A PhoenixModel with what the API server added to it."""

    model: PhoenixModel
    uid: str
    generation: int
    created: str
    status: Object

    @property
    def name(self) -> str:
        """Its name."""
        return self.model.metadata.name

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return self.model.metadata.namespace

    @property
    def spec(self) -> PhoenixModelSpec:
        """Its spec."""
        return self.model.spec

    @property
    def annotations(self) -> Mapping[str, str]:
        """Its annotations."""
        return self.model.metadata.annotations

    @classmethod
    def read(cls, document: Object) -> "Subject":
        """Parse a stored object; unknown fields are ignored. Raises pydantic's `ValidationError`."""
        metadata = document["metadata"]
        known = {key: metadata[key] for key in ("name", "namespace", "annotations") if key in metadata}
        bare = {key: document[key] for key in ("apiVersion", "kind", "spec") if key in document}
        return cls(
            model=PhoenixModel.read(bare | {"metadata": known}, strict=False),
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            created=metadata.get("creationTimestamp", ""),
            status=document.get("status", {}),
        )


class Reference(StrEnum):
    """An object of the user's that pods need before they can start."""

    SECRET = "Secret"
    CONFIG_MAP = "ConfigMap"


@dataclass(frozen=True, slots=True)
class Missing:
    """A referenced object that is not there, or lacks a key; `field` is the one of the manifest that names it."""

    kind: Reference
    name: str
    field: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the API server said to an object that the operator wanted."""

    kind: Kind
    name: str
    code: int
    message: str
    is_quota: bool = False
    wish: str = ""  # hash of the object


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a ready pod says at `/v2/models/<name>/state`: the fields that the status repeats."""

    sha256: str | None
    version: str | None
    provider: str | None
    inputs: list[Object]
    outputs: list[Object]
    load_s: float = 0.0  # from the fetch to the end of the warm-up
    capacity: int | None = None  # requests at once beyond which throughput stops growing; measured while it is idle
    # what its bindings cannot do, by kind (redis, kafka, postgresql); those that work are left out
    bindings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BindingSeen:
    """A binding that the spec asks for, as far as the operator got with it."""

    kind: str  # redis, kafka or postgresql
    digest: str = ""  # of the Secret's content; empty while there is no Secret that pods could use
    ports: tuple[int, ...] = ()  # TCP ports of the backend
    access: Mapping[str, str] = field(default_factory=dict)  # what of the Secret is no secret, for who else may log in
    reason: Reason = Reason.BOUND
    message: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the last container of a pod ended, in the server's own words where it left some."""

    reason: str
    message: str
    exit_code: int | None
    is_own: bool  # from the termination message


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of the model."""

    body: Object

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.body["metadata"]["name"])

    @property
    def uid(self) -> str:
        """Its uid."""
        return str(self.body["metadata"]["uid"])

    @property
    def ip(self) -> str | None:
        """Its address, once it has one."""
        return self._status.get("podIP")

    @property
    def template(self) -> str:
        """Hash of the template it was made from."""
        return str(self._annotations.get(TEMPLATE, ""))

    @property
    def revision(self) -> str:
        """Hash of the manifest it serves."""
        return str(self._annotations.get(REVISION, ""))

    @property
    def is_leaving(self) -> bool:
        """Whether it is being deleted or has ended for good (evicted, for example)."""
        return "deletionTimestamp" in self.body["metadata"] or self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether none of its containers will run again."""
        return self._status.get("phase") in ("Failed", "Succeeded")

    @property
    def is_ready(self) -> bool:
        """Whether it answers requests."""
        return not self.is_leaving and self._condition("Ready").get("status") == "True"

    @property
    def restarts(self) -> int:
        """How often its container was started again."""
        return int(self._container.get("restartCount", 0))

    @property
    def unschedulable(self) -> str | None:
        """The scheduler's words, if no node has room for it."""
        condition = self._condition("PodScheduled")
        if condition.get("status") == "False" and condition.get("reason") == "Unschedulable":
            return str(condition.get("message", ""))
        return None

    @property
    def unplaced_since(self) -> datetime | None:
        """When the scheduler first found no node for it, if it still has none."""
        since = self._condition("PodScheduled").get("lastTransitionTime")
        return datetime.fromisoformat(since) if since and self.unschedulable is not None else None

    @property
    def ready_since(self) -> str | None:
        """When it became ready, if it is."""
        return self._condition("Ready").get("lastTransitionTime") if self.is_ready else None

    @property
    def waiting(self) -> tuple[str, str] | None:
        """Reason and message of a container that waits, for example `ErrImagePull`."""
        waiting = self._container.get("state", {}).get("waiting")
        return (waiting.get("reason", ""), waiting.get("message", "")) if waiting else None

    @property
    def evicted(self) -> str | None:
        """Why the kubelet ended the whole pod, if it did."""
        if self._status.get("phase") == "Failed" and self._status.get("reason"):
            return f"{self._status['reason']}: {self._status.get('message', '')}"
        return None

    @property
    def failure(self) -> Failure | None:
        """Why its container last ended; None if it never did, or did as it should."""
        container = self._container
        for state in (container.get("state", {}), container.get("lastState", {})):
            if ended := state.get("terminated"):
                own = _own_words(ended.get("message", ""))
                reason, message = own or (ended.get("reason", "Error"), ended.get("message", ""))
                if own is None and ended.get("exitCode") == 0:
                    return None
                return Failure(reason, message, ended.get("exitCode"), own is not None)
        return None

    @property
    def _status(self) -> Object:
        return self.body.get("status", {})  # type: ignore[no-any-return]

    @property
    def _annotations(self) -> Object:
        return self.body["metadata"].get("annotations", {})  # type: ignore[no-any-return]

    @property
    def _container(self) -> Object:
        return next((row for row in self._status.get("containerStatuses", []) if row["name"] == CONTAINER), {})

    def _condition(self, kind: str) -> Object:
        return next((row for row in self._status.get("conditions", []) if row["type"] == kind), {})


def _own_words(message: str) -> tuple[str, str] | None:
    """Read the server's termination message, `{"reason", "message"}`."""
    try:
        words = json.loads(message)
        return str(words["reason"]), str(words["message"])
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Observed:
    """The cluster around one PhoenixModel at one moment. `children` are those that it owns."""

    children: Mapping[tuple[Kind, str], Object] = field(default_factory=dict)
    pods: Sequence[Pod] = ()
    loaded: Mapping[str, Loaded] = field(default_factory=dict)  # by the pod's uid
    served_kinds: frozenset[Kind] = frozenset()
    missing: Sequence[Missing] = ()
    refusals: Sequence[Refusal] = ()
    foreign: Sequence[tuple[Kind, str]] = ()  # objects of a name that the model needs, owned by somebody else
    bindings: Mapping[str, BindingSeen] = field(default_factory=dict)  # by kind; empty until they have been looked at
    unreleased: Sequence[str] = ()  # why access that nobody asks for any more is not yet taken away
    host_owner: str | None = None  # namespace/name of an older model with the same host and path
    latency_s: float | None = None  # the percentile of the spec, as it was last recorded
    shortfall: str = ""  # what the nodes lack for a pod that cannot be placed
    now: datetime | None = None

    @property
    def deployment(self) -> Object | None:
        """The model's Deployment."""
        return self._child(DEPLOYMENT)

    @property
    def autoscaler(self) -> Object | None:
        """The model's HorizontalPodAutoscaler."""
        return self._child(HORIZONTAL_POD_AUTOSCALER)

    @property
    def scaled_object(self) -> Object | None:
        """The model's ScaledObject."""
        return self._child(SCALED_OBJECT)

    @property
    def manifests(self) -> Mapping[str, str]:
        """The manifests that the model's ConfigMap holds, by key."""
        return (self._child(CONFIG_MAP) or {}).get("data", {})  # type: ignore[no-any-return]

    def has_passed(self, seconds: float, *moments: str | None) -> bool:
        """Whether all of these times, as the API writes them, are so long ago; None was never."""
        now = self.now
        return now is not None and all(
            (now - datetime.fromisoformat(moment)).total_seconds() >= seconds for moment in moments if moment
        )

    def _child(self, wanted: Kind) -> Object | None:
        return next((body for (kind, _), body in self.children.items() if kind is wanted), None)
