"""The manifest as pods get it: only what the server reads, so that scaling or a new route restarts nothing.

One ConfigMap per model holds one manifest per revision that pods still serve. A pod mounts its own revision's key, so
that a pod of the old version that starts again during a rollout still serves the old version.
"""

import json
from typing import Any

import yaml

from phoenix_operator.desired.naming import config_map_name, digest, owned
from phoenix_operator.kinds import CONFIG_MAP
from phoenix_operator.observed import Object, Observed, Subject

MOUNT = "/etc/phoenix/model"
_READ_BY_SERVER = (
    "model",
    "runtime",
    "batching",
    "warmup",
    "limits",
    "autoscaling",
    "features",
    "bindings",
    "networking",
)
_NOT_READ: dict[str, Any] = {
    "model": {"cache"},
    "runtime": {"image"},
    "runtime.accelerator": {"resource_name", "device_class_name", "profile", "count"},
    "networking": {"host", "allow_from"},
    "bindings": {"deletion_policy": True, "kafka": {"partitions", "retention_hours"}},
    "autoscaling": {
        "min_replicas",
        "max_replicas",
        "concurrency_per_replica",
        "metric",
        "behavior",
        "scale_down_stabilization_seconds",
    },
}
_MOST_REVISIONS = 8


def server_manifest(subject: Subject) -> Object:
    """Return the PhoenixModel that the server serves. Defaults are left out: they can never change."""
    excluded: dict[str, Any] = {
        "model": _NOT_READ["model"],
        "runtime": {**dict.fromkeys(_NOT_READ["runtime"], True), "accelerator": _NOT_READ["runtime.accelerator"]},
        "autoscaling": _NOT_READ["autoscaling"],
        "bindings": _NOT_READ["bindings"],
        "networking": _NOT_READ["networking"],
    }
    spec = subject.spec.model_dump(
        mode="json", by_alias=True, include=set(_READ_BY_SERVER), exclude=excluded, exclude_defaults=True
    )
    if subject.spec.runtime.accelerator is not None:
        # an accelerator with nothing but defaults is one all the same
        spec.setdefault("runtime", {}).setdefault("accelerator", {})
    if not spec.get("networking", True):
        del spec["networking"]  # nothing in it that the server reads
    if "autoscaling" in spec:
        spec["autoscaling"]["maxReplicas"] = 1  # a field that must be there, and that no server reads
    return {
        "apiVersion": subject.model.api_version,
        "kind": subject.model.kind,
        "metadata": {"name": subject.name, "namespace": subject.namespace},
        "spec": json.loads(json.dumps(spec)),
    }


def revision(subject: Subject) -> str:
    """Return the hash of what the server serves."""
    return digest(server_manifest(subject))


def key_of(revision: str) -> str:
    """Return the ConfigMap's key of a revision."""
    return f"{revision}.yaml"


def config_map(subject: Subject, observed: Observed) -> Object:
    """Return the ConfigMap: the wanted revision, and those that a rollout may still fall back on."""
    key = key_of(revision(subject))
    # escaped: PyYAML writes some Unicode (U+0085) so that it reads back as something else
    text = yaml.safe_dump(server_manifest(subject), sort_keys=False, width=120)
    older = {name: text for name, text in observed.manifests.items() if name != key and _is_needed(name, observed)}
    kept = dict(list(older.items())[-_MOST_REVISIONS + 1 :])
    return owned(subject, CONFIG_MAP, config_map_name(subject), {"data": kept | {key: text}})


def _is_needed(key: str, observed: Observed) -> bool:
    return not is_rolled_out(observed) or any(key_of(pod.revision) == key for pod in observed.pods)


def is_rolled_out(observed: Observed) -> bool:
    """Whether the Deployment says that every pod is of its newest template."""
    deployment = observed.deployment
    if deployment is None:
        return False
    status = deployment.get("status", {})
    wanted = deployment["spec"].get("replicas", 1)
    is_current = bool(status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0))
    return is_current and all(status.get(f"{which}eplicas", 0) == wanted for which in ("r", "updatedR", "readyR"))
