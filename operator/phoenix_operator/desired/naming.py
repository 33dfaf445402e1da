"""Names, labels, owner references and hashes of everything that a PhoenixModel becomes."""

import hashlib
import json
from typing import Any

from phoenix_operator.kinds import PHOENIX_MODEL, Kind
from phoenix_operator.observed import HASH, Object, Subject

MODEL = "phoenix-ml.io/model"
MANAGED_BY = "app.kubernetes.io/managed-by"
OPERATOR = "phoenix-operator"
HTTP_PORT, GRPC_PORT = 8000, 8001


def selector(name: str) -> dict[str, str]:
    """Return the labels that select the pods of a model. A Deployment's selector can never change, so it is one."""
    return {MODEL: name}


def labels(subject: Subject) -> dict[str, str]:
    """Return the labels of every object of a model."""
    return {
        "app.kubernetes.io/name": "phoenix-server",
        "app.kubernetes.io/instance": subject.name,
        "app.kubernetes.io/part-of": "phoenix",
        MANAGED_BY: OPERATOR,
        **selector(subject.name),
    }


def config_map_name(subject: Subject) -> str:
    """Return the name of the ConfigMap with the manifests that pods serve."""
    return f"{subject.name}-model"


def service_account_name(subject: Subject) -> str:
    """Return the ServiceAccount of the pods: the user's where one is named, else our own."""
    return subject.spec.pod.service_account_name or subject.name


def claim_template_name(subject: Subject) -> str:
    """Return the name of the ResourceClaimTemplate."""
    return f"{subject.name}-accelerator"


def owned(
    subject: Subject, kind: Kind, name: str, body: dict[str, Any], *, annotations: Object | None = None
) -> Object:
    """Return a whole object: identity, labels, owner and `body`."""
    metadata: Object = {
        "name": name,
        "namespace": subject.namespace,
        "labels": labels(subject),
        "ownerReferences": [owner_reference(subject)],
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, **body}


def owner_reference(subject: Subject) -> Object:
    """Return the reference by which the garbage collector knows whose the object is."""
    return {
        "apiVersion": PHOENIX_MODEL.api_version,
        "kind": PHOENIX_MODEL.kind,
        "name": subject.name,
        "uid": subject.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def is_owned(subject: Subject, body: Object) -> bool:
    """Whether the object belongs to this model, by uid."""
    return _owner(body).get("uid") == subject.uid


def is_of_predecessor(subject: Subject, body: Object) -> bool:
    """Whether a model of the same name, deleted since, owned the object: the garbage collector is about to take it."""
    owner = _owner(body)
    is_same = (owner.get("apiVersion"), owner.get("kind"), owner.get("name")) == (
        PHOENIX_MODEL.api_version,
        PHOENIX_MODEL.kind,
        subject.name,
    )
    return is_same and owner.get("uid") != subject.uid


def _owner(body: Object) -> Object:
    return next((row for row in body["metadata"].get("ownerReferences", []) if row.get("controller")), {})


def digest(value: Any) -> str:
    """Return 16 hex digits that stand for a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spec_hash(subject: Subject) -> str:
    """Return a hash of the whole spec: it stands for what the user last asked for."""
    return digest(subject.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True))


def sealed(manifest: Object) -> Object:
    """Return the object with its own hash as annotation, by which a changed wish is told from an unchanged one."""
    metadata = manifest["metadata"]
    annotations = metadata.get("annotations", {}) | {HASH: digest(manifest)}
    return manifest | {"metadata": metadata | {"annotations": annotations}}
