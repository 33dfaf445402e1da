"""The Deployment: the pod that serves one model, and how a new version replaces the old one.

The pod passes Pod Security `restricted`, has no token of the API server and a read-only root. Memory's limit is its
request, CPU has no limit (throttling shows in the p99). There is no `preStop`: the server itself goes on answering for
`drainSeconds` after SIGTERM and sends `Connection: close`, which a sleeping container could not.
"""

from typing import Any

from phoenix_api import Quantity, RolloutStrategy
from phoenix_operator.desired import bindings, config
from phoenix_operator.desired.accelerator import CLAIM, Ask, ask, prefers
from phoenix_operator.desired.autoscaling import is_autoscaled
from phoenix_operator.desired.naming import (
    GRPC_PORT,
    HTTP_PORT,
    claim_template_name,
    config_map_name,
    digest,
    labels,
    owned,
    selector,
    service_account_name,
    spec_hash,
)
from phoenix_operator.desired.source import CREDENTIALS, STATE, source
from phoenix_operator.kinds import DEPLOYMENT
from phoenix_operator.observed import BINDINGS, CONTAINER, REVISION, TEMPLATE, WITHHELD, Object, Observed, Pod, Subject
from phoenix_operator.settings import Settings

USER = 10001  # of the images
# What Pod Security `restricted` asks for, and a read-only root.
RESTRICTED_POD: Object = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
RESTRICTED_CONTAINER: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
# What the pod's own wiring depends on: `spec.pod.env` may set any other variable.
RESERVED_ENV = (
    "PHOENIX_HOST",
    "PHOENIX_HTTP_PORT",
    "PHOENIX_GRPC_PORT",
    "PHOENIX_TERMINATION_LOG",
    "PHOENIX_WATCH",
    bindings.ROOT_VARIABLE,
)
_PROBE_PERIOD_S = 5
# How long a preferred device is waited for: pods that ended a moment ago still hold theirs in the scheduler's books.
PATIENCE_S = 5
_FLUSH_S = 10  # between the last answer and the end of the process


def deployment(subject: Subject, observed: Observed, settings: Settings) -> Object:
    """Return the Deployment of a model. Under autoscaling it says nothing about replicas."""
    spec = subject.spec
    template = pod_template(subject, observed, settings)
    body = {
        "spec": {
            **({} if is_autoscaled(subject) else {"replicas": spec.replicas}),
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": spec.rollout.progress_deadline_seconds,
            "selector": {"matchLabels": selector(subject.name)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _pace(subject)},
            "template": template,
        }
    }
    annotations = {WITHHELD: spec_hash(subject)} if is_withheld(subject, observed, settings) else None
    return owned(subject, DEPLOYMENT, subject.name, body, annotations=annotations)


def pod_template(subject: Subject, observed: Observed, settings: Settings) -> Object:
    """Return the pod template, with its own hash as annotation: by it pods of this version are told from others."""
    spec = subject.spec
    metadata: Object = {
        "labels": spec.pod.labels | labels(subject),
        "annotations": spec.pod.annotations | {REVISION: config.revision(subject)},
    }
    if given := bindings.given(subject, observed):
        metadata["annotations"][BINDINGS] = given
    template: Object = {"metadata": metadata, "spec": _pod(subject, observed, settings)}
    metadata["annotations"][TEMPLATE] = digest(template)
    return template


def template_hash(subject: Subject, observed: Observed, settings: Settings) -> str:
    """Return the hash that pods of the wanted version carry."""
    return str(pod_template(subject, observed, settings)["metadata"]["annotations"][TEMPLATE])


def is_settled(subject: Subject, observed: Observed, settings: Settings) -> bool:
    """Whether no pod of an older template is left, not even one that still answers its last requests."""
    wanted = template_hash(subject, observed, settings)
    if any(pod.template != wanted and not pod.has_ended for pod in observed.pods):
        return False
    current = observed.deployment
    if current is None:
        return True
    annotations = current["spec"]["template"]["metadata"].get("annotations", {})
    return annotations.get(TEMPLATE) == wanted and config.is_rolled_out(observed)


def is_withheld(subject: Subject, observed: Observed, settings: Settings) -> bool:
    """Whether pods go without the accelerator that they would prefer, because no node has one to give.

    It is decided when the scheduler has said so for `PATIENCE_S`, and stands until the spec changes: going back and
    forth would restart pods whenever a device comes free for a moment.
    """
    asked, current = ask(subject, settings), observed.deployment
    if asked is None or current is None or not prefers(subject):
        return False
    if current["metadata"].get("annotations", {}).get(WITHHELD) == spec_hash(subject):
        return True
    annotations = current["spec"]["template"]["metadata"].get("annotations", {})
    if annotations.get(REVISION) != config.revision(subject):
        return False
    newest = [pod for pod in observed.pods if pod.template == annotations.get(TEMPLATE) and not pod.is_leaving]
    if any(pod.is_ready for pod in newest):
        return False  # a sister has one: the others wait for theirs
    # nor is a device that an old pod still holds a reason to go without: it is about to be given back
    is_held = any(_holds_device(pod, asked) for pod in observed.pods if pod not in newest)
    return not is_held and any(_lacks_device(pod.unschedulable, asked) and _has_waited(pod, observed) for pod in newest)


def _has_waited(pod: Pod, observed: Observed) -> bool:
    since = pod.unplaced_since
    return since is None or observed.now is None or (observed.now - since).total_seconds() >= PATIENCE_S


def _lacks_device(words: str | None, asked: Ask) -> bool:
    """Whether the scheduler's words say that devices are what is missing."""
    if words is None:
        return False
    return (f"Insufficient {asked.resource_name}" if asked.resource_name else "cannot allocate all claims") in words


def _holds_device(pod: Pod, asked: Ask) -> bool:
    spec = pod.body.get("spec", {})
    if asked.device_class_name:
        return bool(spec.get("resourceClaims"))
    containers = spec.get("containers", [])
    return any(asked.resource_name in row.get("resources", {}).get("limits", {}) for row in containers)


def is_in_place(subject: Subject) -> bool:
    """Whether old pods end before new ones start, because there is no spare accelerator for both."""
    strategy, has_accelerator = subject.spec.rollout.strategy, subject.spec.runtime.accelerator is not None
    return strategy is RolloutStrategy.IN_PLACE or (strategy is RolloutStrategy.AUTO and has_accelerator)


def _pace(subject: Subject) -> Object:
    if is_in_place(subject):
        return {"maxSurge": 0, "maxUnavailable": 1}
    return {"maxSurge": "25%", "maxUnavailable": 0}


def _pod(subject: Subject, observed: Observed, settings: Settings) -> Object:
    spec, wished = subject.spec, subject.spec.pod
    asked = None if is_withheld(subject, observed, settings) else ask(subject, settings)
    where = source(subject)
    volumes = [
        {
            "name": "model",
            "configMap": {
                "name": config_map_name(subject),
                "items": [{"key": config.key_of(config.revision(subject)), "path": "model.yaml"}],
            },
        },
        {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "state", "emptyDir": {}},
        *where.volumes,
        *bindings.volumes(subject),
    ]
    pod: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "serviceAccountName": service_account_name(subject),
        "terminationGracePeriodSeconds": spec.rollout.drain_seconds + spec.limits.timeout_seconds + _FLUSH_S,
        "securityContext": {
            **RESTRICTED_POD,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
        },
        "topologySpreadConstraints": [_spread(subject, key) for key in ("topology.kubernetes.io/zone", _HOST)],
        "volumes": volumes,
        "containers": [_container(subject, asked, settings)],
    }
    if asked is not None and asked.device_class_name:
        pod["resourceClaims"] = [{"name": CLAIM, "resourceClaimTemplateName": claim_template_name(subject)}]
    optional = {
        "nodeSelector": (asked.node_selector if asked else {}) | wished.node_selector,
        "tolerations": [*(asked.tolerations if asked else []), *_dump(wished.tolerations)],
        "affinity": wished.affinity,
        "priorityClassName": wished.priority_class_name,
        "imagePullSecrets": _dump(wished.image_pull_secrets),
        "runtimeClassName": wished.runtime_class_name or (asked.runtime_class_name if asked else None),
    }
    return pod | {key: value for key, value in optional.items() if value}


_HOST = "kubernetes.io/hostname"


def _spread(subject: Subject, key: str) -> Object:
    return {
        "maxSkew": 1,
        "topologyKey": key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector(subject.name)},
        "matchLabelKeys": ["pod-template-hash"],
    }


def _container(subject: Subject, asked: Ask | None, settings: Settings) -> Object:
    spec = subject.spec
    usual = settings.server_gpu_image if spec.runtime.accelerator else settings.server_image
    return {
        "name": CONTAINER,
        "image": spec.runtime.image or usual,
        "imagePullPolicy": settings.image_pull_policy,
        "args": ["serve", config.MOUNT],
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": "grpc", "containerPort": GRPC_PORT, "protocol": "TCP"},
        ],
        "env": _environment(subject),
        "resources": _resources(subject, asked, settings),
        # sized to the load: a model may take as long as a rollout may
        "startupProbe": _probe("ready", 1, spec.rollout.progress_deadline_seconds),
        "readinessProbe": _probe("ready", _PROBE_PERIOD_S, 2),
        "livenessProbe": _probe("live", _PROBE_PERIOD_S, 6),
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [
            {"name": "model", "mountPath": config.MOUNT, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "state", "mountPath": STATE},
            *source(subject).mounts,
            *bindings.mounts(subject),
        ],
    }


def _probe(what: str, period_s: int, failures: int) -> Object:
    return {
        "httpGet": {"path": f"/v2/health/{what}", "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": 2,
        "failureThreshold": failures,
    }


def _environment(subject: Subject) -> list[Object]:
    spec = subject.spec
    values: dict[str, Any] = {
        "PHOENIX_STATE_DIR": STATE,
        "PHOENIX_DRAIN_SECONDS": str(spec.rollout.drain_seconds),
        "PHOENIX_SHUTDOWN_SECONDS": str(spec.limits.timeout_seconds + _FLUSH_S // 2),
        # a new version is a new pod: the running one must not change under its readers
        "PHOENIX_WATCH": "false",
        "TMPDIR": "/tmp",
        "HOME": "/tmp",
    }
    where = source(subject)
    if where.store:
        values["PHOENIX_MODEL_STORE"] = where.store
    if spec.model.credentials is not None:
        values["PHOENIX_MODEL_CREDENTIALS_DIR"] = CREDENTIALS
    if bindings.asked(subject):
        values[bindings.ROOT_VARIABLE] = bindings.ROOT
    rows: dict[str, Object] = {name: {"name": name, "value": value} for name, value in values.items()}
    cpu = {"containerName": CONTAINER, "resource": "requests.cpu", "divisor": "1"}
    rows["PHOENIX_CPUS"] = {"name": "PHOENIX_CPUS", "valueFrom": {"resourceFieldRef": cpu}}
    rows |= {row.name: row.model_dump(mode="json", by_alias=True, exclude_none=True) for row in spec.pod.env}
    return list(rows.values())


def _resources(subject: Subject, asked: Ask | None, settings: Settings) -> Object:
    own, usual = subject.spec.resources, settings.default_resources
    requests = {**usual.requests, **own.requests}
    limits = {**usual.limits, **own.limits}
    if "memory" not in own.requests and "memory" in own.limits:
        requests["memory"] = own.limits["memory"]
    if "cpu" not in own.requests and "cpu" in own.limits:
        requests["cpu"] = own.limits["cpu"]
    if "memory" in requests and "memory" not in own.limits:
        limits["memory"] = requests["memory"]
    amounts: Object = {"requests": _plain(requests), "limits": _plain(limits)}
    if asked is not None and asked.resource_name:
        # extended resources: request equals limit, so one of them is enough
        amounts["limits"][asked.resource_name] = str(asked.count)
    if asked is not None and asked.device_class_name:
        amounts["claims"] = [{"name": CLAIM}]
    return {key: value for key, value in amounts.items() if value}


def _plain(amounts: dict[str, Quantity]) -> dict[str, str]:
    return {name: str(amount) for name, amount in amounts.items()}


def _dump(rows: list[Any]) -> list[Object]:
    return [row.model_dump(mode="json", by_alias=True, exclude_none=True) for row in rows]
