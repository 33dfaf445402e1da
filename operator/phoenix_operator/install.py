"""The operator's own manifests: namespace, rights, settings, Deployment. For `kubectl apply -k`, later for the chart.

The rights follow from the table of kinds and from nothing else, so that a new kind cannot be forgotten; a test holds
them against what `desired` emits and the modules call, in both directions. A namespaced install has Roles only, and
reads Secrets by the names it is told. Rights to write Secrets and PhoenixModels come with bindings only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from phoenix_operator.desired.deployment import RESTRICTED_CONTAINER
from phoenix_operator.desired.naming import OPERATOR
from phoenix_operator.install_program import API_SERVER, DNS, IMAGE, NAMESPACE, SETTINGS_FILE, Program, probe, rule, tcp
from phoenix_operator.kinds import (
    CHILDREN,
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    LEASE,
    NODE,
    PHOENIX_MODEL,
    POD,
    SECRET,
    SERVICE,
)
from phoenix_operator.observed import Object
from phoenix_operator.render import as_yaml

_PROGRAM = Program(OPERATOR)
_MODEL_PODS = {"app.kubernetes.io/part-of": "phoenix"}
_WATCH = ["list", "watch"]
# Server-side apply is a patch, and a create where the object is not there.
_OWN = ["get", *_WATCH, "create", "patch"]
# Every model has these, so they are never taken away from one: they go with their owner.
_LASTING = frozenset({CONFIG_MAP, SERVICE, DEPLOYMENT})
# Of PostgreSQL, Redis and Kafka, without and with TLS, as they are usually installed.
BACKEND_PORTS = (5432, 6379, 6380, 9092, 9093)


def model_rules(*, secrets: Sequence[str] | None) -> list[Object]:
    """Return the rights in the namespaces of models. `secrets` are the names that may be read; None: any."""
    readable = [] if secrets is not None and not secrets else [rule(SECRET, ["get"], names=secrets or ())]
    return [
        rule(PHOENIX_MODEL, _WATCH),
        rule(PHOENIX_MODEL, ["patch"], subresource="status"),
        # owner references with blockOwnerDeletion ask for it where OwnerReferencesPermissionEnforcement is on
        rule(PHOENIX_MODEL, ["update"], subresource="finalizers"),
        *(rule(kind, _OWN if kind in _LASTING else [*_OWN, "delete"]) for kind in CHILDREN),
        rule(POD, _WATCH),
        *readable,
        rule(EVENT, ["get", "create", "update"]),
    ]


def cluster_rules() -> list[Object]:
    """Return the rights that only a cluster-wide install has: why a pod cannot be placed, and which kinds there are."""
    return [
        rule(NODE, ["list"]),
        {"apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"], "verbs": _WATCH},
    ]


def lease_rules() -> list[Object]:
    """Return the rights in the operator's own namespace."""
    return [
        rule(LEASE, ["create"]),
        rule(LEASE, ["get", "update"], names=[OPERATOR]),
    ]


def binding_rules() -> list[Object]:
    """Return what bindings need in the namespaces of models: a Secret for each, and a finalizer on the model.

    The Secret's name begins with the model's, which no role can foresee.
    """
    return [rule(SECRET, ["get", "create", "patch", "delete"]), rule(PHOENIX_MODEL, ["patch"])]


def backend_rules(names: Sequence[str]) -> list[Object]:
    """Return the right to read the admin Secrets of backends, in the operator's own namespace."""
    return [rule(SECRET, ["get"], names=names)]


def binding_manifests(bindings: Sequence[str], *, namespaces: Sequence[str] = ()) -> list[Object]:
    """Return what an install needs besides, so that models can bind to backends with these admin Secrets.

    Policies and roles add up, so that the objects of `manifests` stay as they are.
    """
    name, places = f"{OPERATOR}-bindings", namespaces or (None,)
    objects: list[Object] = []
    for place in places:
        objects += _PROGRAM.granted("Role" if place else "ClusterRole", name, place, binding_rules())
    objects += _PROGRAM.granted("Role", f"{OPERATOR}-backends", NAMESPACE, backend_rules(bindings))
    return [*objects, _PROGRAM.network_policy(name=name, egress=[tcp(*BACKEND_PORTS)])]


def manifests(*, namespaces: Sequence[str] = (), secrets: Sequence[str] = ()) -> list[Object]:
    """Return everything but the CRD. Without `namespaces` the install is cluster-wide."""
    objects: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _PROGRAM.metadata()},
        *_PROGRAM.granted("Role", f"{OPERATOR}-lease", NAMESPACE, lease_rules()),
    ]
    if namespaces:
        for namespace in namespaces:
            objects += _PROGRAM.granted("Role", OPERATOR, namespace, model_rules(secrets=secrets))
    else:
        rules = [*model_rules(secrets=None), *cluster_rules()]
        objects += _PROGRAM.granted("ClusterRole", OPERATOR, None, rules)
        objects += aggregated_roles()
    settings = {"settings.yaml": "# See docs/reference/operator-settings.md\n{}\n"}
    objects.append(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _PROGRAM.metadata(f"{OPERATOR}-settings"),
            "data": settings,
        }
    )
    objects += [
        _deployment(namespaces),
        _PROGRAM.disruption_budget(),
        _PROGRAM.service([{"name": "http", "port": 8080, "targetPort": "http"}]),
        _network_policy(),
    ]
    return objects


def aggregated_roles() -> list[Object]:
    """Return what the built-in roles admin, edit and view are extended with."""
    write = ["create", "update", "patch", "delete", "deletecollection"]
    read = ["get", *_WATCH]
    roles = {"edit": [*read, *write], "view": read}
    found = []
    for name, verbs in roles.items():
        labels = {f"rbac.authorization.k8s.io/aggregate-to-{name}": "true"}
        if name == "edit":
            labels["rbac.authorization.k8s.io/aggregate-to-admin"] = "true"
        rules = [rule(PHOENIX_MODEL, verbs), rule(PHOENIX_MODEL, ["get"], subresource="status")]
        if name == "edit":
            rules.append(rule(PHOENIX_MODEL, ["get", "update", "patch"], subresource="scale"))
        metadata = _PROGRAM.metadata(f"phoenixmodels-{name}", None)
        metadata["labels"] |= labels
        found.append(
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": metadata, "rules": rules}
        )
    return found


def _deployment(namespaces: Sequence[str]) -> Object:
    arguments = ["run", f"--settings={SETTINGS_FILE}"]
    if namespaces:
        arguments.append(f"--namespaces={','.join(namespaces)}")
    container = {
        "name": "operator",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments,
        "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "256Mi"}},
        "startupProbe": probe("/healthz", 1, 30),
        "readinessProbe": probe("/readyz", 5, 2),
        "livenessProbe": probe("/healthz", 10, 3),
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [
            {"name": "settings", "mountPath": str(Path(SETTINGS_FILE).parent), "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    return _PROGRAM.deployment(container, tmp="64Mi")


def _network_policy() -> Object:
    """In: scrapes and probes. Out: DNS, the API server (whose address no policy can name) and the models' pods."""
    models = {"namespaceSelector": {}, "podSelector": {"matchLabels": dict(_MODEL_PODS)}}
    return _PROGRAM.network_policy(ingress=[tcp(8080)], egress=[DNS, API_SERVER, {"to": [models], **tcp(8000)}])


def kustomization(resources: Sequence[str]) -> dict[str, Any]:
    """Return the kustomization.yaml of a folder."""
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": list(resources)}


def files(
    crd: str,
    *,
    namespaces: Sequence[str] = (),
    secrets: Sequence[str] = (),
    bindings: Sequence[str] = (),
    more: Mapping[str, Sequence[Object]] | None = None,
) -> dict[str, str]:
    """Return the files of an install folder by name; `crd` is the text of the CRD, `more` objects of further files."""
    header = "# GENERATED by `phoenix-operator manifests`: change the code, then run `make manifests`.\n"
    install = as_yaml(manifests(namespaces=namespaces, secrets=secrets))
    found = {"phoenixmodels.yaml": crd, "operator.yaml": header + install}
    if bindings:
        found["bindings.yaml"] = header + as_yaml(binding_manifests(bindings, namespaces=namespaces))
    for name, objects in (more or {}).items():
        found[name] = header + as_yaml(objects)
    listed = yaml.safe_dump(kustomization(list(found)), sort_keys=False)
    return found | {"kustomization.yaml": header + listed}
