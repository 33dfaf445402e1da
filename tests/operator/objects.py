"""Builders of what the operator sees: PhoenixModels as the API server stores them, pods in any state, children."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from phoenix_operator.desired import desired_objects
from phoenix_operator.desired.bindings import asked
from phoenix_operator.desired.deployment import template_hash
from phoenix_operator.desired.naming import HTTP_PORT, labels, sealed
from phoenix_operator.kinds import DEPLOYMENT, HORIZONTAL_POD_AUTOSCALER, OPTIONAL, Kind, kind_of
from phoenix_operator.observed import REVISION, TEMPLATE, BindingSeen, Loaded, Object, Observed, Pod, Subject, stamp
from phoenix_operator.settings import AutoscalingProvider, AutoscalingSettings, Settings

NAME, NAMESPACE, UID = "fraud", "ml", "0f0e0d0c-0000-4000-8000-000000000001"
OPERATOR_NAMESPACE = "phoenix-system"
DIGEST = "0123456789abcdef" * 4
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
STAMP, EARLIER = "2026-11-24T12:00:00Z", "2026-11-24T11:00:00Z"
SETTINGS = Settings(autoscaling=AutoscalingSettings(provider=AutoscalingProvider.BUILTIN))
__all__ = ["HTTP_PORT", "sealed"]


def document(
    *,
    name: str = NAME,
    namespace: str = NAMESPACE,
    uid: str = UID,
    generation: int = 1,
    created: str = "2026-11-24T10:00:00Z",
    status: Object | None = None,
    **spec: Any,
) -> Object:
    """Return a PhoenixModel as it is stored; without `model` it comes from a path of the model store."""
    body: Object = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "generation": generation,
            "creationTimestamp": created,
            "resourceVersion": "10",
        },
        "spec": {"model": {"uri": "fraud/model.onnx"}} | spec,
    }
    return body | ({"status": status} if status is not None else {})


def subject(**parts: Any) -> Subject:
    """Return the model as the pure half of the operator gets it; the same arguments as `document`."""
    return Subject.read(document(**parts))


def rendered(subject: Subject, observed: Observed | None = None, settings: Settings = SETTINGS) -> list[Object]:
    """Return all that the model becomes, on a cluster that serves every kind, its Secrets there."""
    observed = observed or Observed(served_kinds=OPTIONAL, bindings=bound(subject))
    return desired_objects(subject, observed, settings, operator_namespace=OPERATOR_NAMESPACE)


def bound(subject: Subject) -> dict[str, BindingSeen]:
    """Return the bindings of a model as they are when all is well."""
    kinds = [each.kind for each in asked(subject)]
    return {kind: BindingSeen(kind, digest=f"{kind}-content", message=f"{kind}: bound") for kind in kinds}


def by_place(objects: Iterable[Object]) -> dict[tuple[Kind, str], Object]:
    return {(kind_of(body), body["metadata"]["name"]): body for body in objects}


def deployment(
    subject: Subject,
    *,
    status: Object | None = None,
    conditions: Iterable[Object] = (),
    is_rolled_out: bool = False,
    annotations: dict[str, str] | None = None,
) -> Object:
    """Return the model's Deployment as the cluster has it."""
    body = by_place(rendered(subject))[DEPLOYMENT, subject.name]
    replicas = subject.spec.replicas
    done = {"replicas": replicas, "updatedReplicas": replicas, "readyReplicas": replicas} if is_rolled_out else {}
    body["metadata"] |= {"generation": 1, "uid": "d", "resourceVersion": "20"}
    body["metadata"]["annotations"] |= annotations or {}
    body["status"] = {"observedGeneration": 1, "conditions": list(conditions)} | done | (status or {})
    return body


def seen(subject: Subject, pods: Iterable[Pod] = (), *, deployment: Object | None = None, **others: Any) -> Observed:
    """Return the cluster around a model: its children with this Deployment, and these pods."""
    children = by_place(rendered(subject))
    del children[DEPLOYMENT, subject.name]
    if deployment is not None:
        children[DEPLOYMENT, subject.name] = deployment
    return Observed(children=children, pods=list(pods), served_kinds=OPTIONAL, now=NOW, **others)


def loaded(provider: str = "CPUExecutionProvider", version: str = "1", sha256: str = DIGEST, **measured: Any) -> Loaded:
    """Return what a pod says of itself; `measured` are `load_s` and `capacity`."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    return Loaded(sha256=sha256, version=version, provider=provider, inputs=[tensor], outputs=[tensor], **measured)


def hpa(
    subject: Subject,
    *,
    targets: Mapping[str, Object] | None = None,
    values: Mapping[str, str] | None = None,
    conditions: Iterable[tuple[str, str, str]] = (),
    replicas: int = 1,
    window_s: int | None = None,
    annotations: dict[str, str] | None = None,
) -> Object:
    """Return the model's HPA as the cluster has it: what it targets, what it last read, and its conditions."""
    body = by_place(rendered(subject))[HORIZONTAL_POD_AUTOSCALER, subject.name]
    body["metadata"] |= {"uid": "h", "resourceVersion": "25"}
    body["metadata"]["annotations"] |= annotations or {}
    if targets is not None:
        body["spec"]["metrics"] = [
            {"type": "Object", "object": {"metric": {"name": name}, "target": target}}
            for name, target in targets.items()
        ]
    if window_s is not None:
        body["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] = window_s
    body["status"] = {
        "currentReplicas": replicas,
        "desiredReplicas": replicas,
        "conditions": [
            {"type": kind, "status": status, "reason": reason, "message": f"words about {reason}"}
            for kind, status, reason in conditions
        ],
        "currentMetrics": [
            {
                "type": "Object",
                "object": {
                    "metric": {"name": name},
                    "current": {"averageValue" if name.endswith("concurrency") else "value": value},
                },
            }
            for name, value in (values or {}).items()
        ],
    }
    return body


# --- pods -----------------------------------------------------------------------------------------------------------


def pod(
    subject: Subject,
    name: str = "fraud-1",
    *,
    container: Object | None = None,
    phase: str = "Running",
    conditions: Iterable[Object] = (),
    template: str | None = None,
    **status: Any,
) -> Pod:
    """Return a pod of the model's present template, or of another one."""
    annotations = {
        TEMPLATE: template
        if template is not None
        else template_hash(subject, Observed(bindings=bound(subject)), SETTINGS),
        REVISION: "r",
    }
    return Pod(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": subject.namespace,
                "uid": f"uid-{name}",
                "resourceVersion": "30",
                "labels": labels(subject),
                "annotations": annotations,
            },
            "spec": {"containers": [{"name": "server"}]},
            "status": {
                "phase": phase,
                "conditions": list(conditions),
                "containerStatuses": [{"name": "server", "restartCount": 0, **container}] if container else [],
                **status,
            },
        }
    )


def ready(subject: Subject, name: str = "fraud-1", *, since: str | None = None, **parts: Any) -> Pod:
    told = {"type": "Ready", "status": "True"} | ({"lastTransitionTime": since} if since else {})
    return pod(
        subject,
        name,
        conditions=[told],
        container={"state": {"running": {}}, "ready": True} | parts.pop("container", {}),
        podIP="10.1.2.3",
        **parts,
    )


def loading(subject: Subject, name: str = "fraud-1", **parts: Any) -> Pod:
    return pod(
        subject, name, conditions=[{"type": "Ready", "status": "False"}], container={"state": {"running": {}}}, **parts
    )


def waiting(subject: Subject, reason: str, message: str = "", name: str = "fraud-1", **parts: Any) -> Pod:
    return pod(
        subject,
        name,
        phase="Pending",
        container={"state": {"waiting": {"reason": reason, "message": message}}, **parts.pop("container", {})},
        **parts,
    )


def ended(
    subject: Subject,
    name: str = "fraud-1",
    *,
    reason: str = "Error",
    message: str = "",
    exit_code: int | None = 1,
    restarts: int = 3,
    **parts: Any,
) -> Pod:
    """Return a pod in a crash loop: its container ended and waits to be started again."""
    terminated = {"reason": reason, "message": message} | ({} if exit_code is None else {"exitCode": exit_code})
    container = {"restartCount": restarts, "lastState": {"terminated": terminated}}
    return waiting(subject, "CrashLoopBackOff", "back-off", name, container=container, **parts)


def own_words(reason: str, message: str) -> str:
    """Return a termination message of the server."""
    return json.dumps({"reason": reason, "message": message})


def unplaced(subject: Subject, words: str, name: str = "fraud-1", *, for_s: float = 60, **parts: Any) -> Pod:
    since = stamp(NOW - timedelta(seconds=for_s))
    condition = {
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words,
        "lastTransitionTime": since,
    }  # fmt: skip
    return pod(subject, name, phase="Pending", conditions=[condition], **parts)


def evicted(subject: Subject, name: str = "fraud-1", **parts: Any) -> Pod:
    return pod(
        subject, name, phase="Failed", reason="Evicted", message="The node was low on resource: memory.", **parts
    )
