"""What stands on a PhoenixModel and on its Secrets about its access to backends: all the state that bindings have.

On the model: which backends may hold something of it, beside the finalizer. On a Secret: whose login it holds, which of
the two, for which wish, what the backend was last made to hold, and the login that is to go. Pure; `bindings` reads and
writes it.
"""

from dataclasses import dataclass

from phoenix_operator.backends import SLOTS, Tenant, Topic
from phoenix_operator.desired import bindings as desired
from phoenix_operator.observed import Object, Subject

FINALIZER = "phoenix-ml.io/backends"
RECORD = "phoenix-ml.io/backends"  # on the PhoenixModel: `kind=backend+backend,…`, all that may have something of it
FORCE = "phoenix-ml.io/force-delete"
# On a Secret: whose login it holds, which of the two, for which wish, what the backend was last made to hold, and the
# login that is to go once no pod uses it.
BACKEND, SLOT = "phoenix-ml.io/backend", "phoenix-ml.io/slot"
ROTATED, PROVISIONED, RETIRING = "phoenix-ml.io/rotated", "phoenix-ml.io/provisioned", "phoenix-ml.io/retiring"

Home = tuple[str, str]  # kind and name of a backend


@dataclass(frozen=True, slots=True)
class SecretMarks:
    """What stands on a Secret: whose login it holds, and how far that is."""

    backend: str
    slot: str
    rotated: str
    provisioned: str
    retiring: str

    @classmethod
    def read(cls, secret: Object) -> "SecretMarks":
        """Read what stands there; whatever somebody else wrote is nothing."""
        marks = secret["metadata"].get("annotations") or {}
        slot = marks.get(SLOT, "")
        return cls(
            backend=marks.get(BACKEND, ""),
            slot=slot if slot in SLOTS else SLOTS[0],
            rotated=marks.get(ROTATED, ""),
            provisioned=marks.get(PROVISIONED, ""),
            retiring=marks.get(RETIRING, ""),
        )

    def annotations(self) -> dict[str, str]:
        """Return what is to stand there."""
        rows = {
            BACKEND: self.backend,
            SLOT: self.slot,
            ROTATED: self.rotated,
            PROVISIONED: self.provisioned,
            RETIRING: self.retiring,
        }
        return {key: text for key, text in rows.items() if text}


def is_to_be_released(document: Object) -> bool:
    """Whether backends are to be asked before a model may go."""
    metadata = document["metadata"]
    is_forced = (metadata.get("annotations") or {}).get(FORCE) == "true"
    return FINALIZER in metadata.get("finalizers", []) and not is_forced


def homes_of(document: Object) -> set[Home]:
    """Return the backends that may hold something of a model."""
    text = (document["metadata"].get("annotations") or {}).get(RECORD, "")
    return {(kind, name) for kind, names in desired.read(text).items() for name in names if kind and name}


def tenant_of(subject: Subject, kind: str, *, is_last: bool = False) -> Tenant:
    """Return what a model needs of a backend of a kind; `is_last`: everything that it may have had there."""
    if kind != "kafka":
        return Tenant(subject.namespace, subject.name, subject.uid)
    kafka = subject.spec.bindings.kafka if subject.spec.bindings else None
    names = list(desired.topics(subject).values())
    if is_last:
        own = [name for name in names if name.startswith(desired.topic_prefix(subject))]
        names = list(dict.fromkeys([*own, *desired.usual_topics(subject)]))
    partitions, hours = (kafka.partitions, kafka.retention_hours) if kafka else (1, 1)
    topics = tuple(Topic(name, partitions, hours) for name in dict.fromkeys(names))
    return Tenant(subject.namespace, subject.name, subject.uid, topics, desired.topic_prefix(subject).rstrip("."))


def tenant_to_release(metadata: Object, subject: Subject | None, kind: str) -> Tenant:
    """Return all that a model may have had on a backend of a kind; without `subject` its spec cannot be read."""
    if subject is not None:
        return tenant_of(subject, kind, is_last=True)
    group = f"phoenix.{metadata['namespace']}.{metadata['name']}" if kind == "kafka" else ""
    return Tenant(metadata["namespace"], metadata["name"], metadata["uid"], group=group)


def was_bound(subject: Subject) -> bool:
    """Whether its status says that all bindings were well."""
    rows = subject.status.get("conditions", [])
    return any(row["type"] == "BindingsReady" and row["status"] == "True" for row in rows)
