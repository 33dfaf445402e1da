"""The operator's own manifests: namespace, rights, settings, Deployment. For `kubectl apply -k`, later for the chart.

The rights follow from the table of kinds and from nothing else, so that a new kind cannot be forgotten; a test holds
them against what `desired` emits and the modules call, in both directions. A namespaced install has Roles only, and
reads Secrets by the names it is told. Rights to write Secrets and PhoenixModels come with bindings only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from phoenix_operator import __version__
from phoenix_operator.desired.deployment import RESTRICTED_CONTAINER, RESTRICTED_POD
from phoenix_operator.desired.naming import OPERATOR
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
    Kind,
)
from phoenix_operator.observed import Object
from phoenix_operator.render import as_yaml

NAMESPACE = "phoenix-system"
SETTINGS_FILE = "/etc/phoenix-operator/settings.yaml"
_IMAGE = f"phoenix-ml/phoenix-operator:{__version__}"
_LABELS = {
    "app.kubernetes.io/name": OPERATOR,
    "app.kubernetes.io/part-of": "phoenix",
    "app.kubernetes.io/version": __version__,
}
_ACCOUNT: Object = {"kind": "ServiceAccount", "name": OPERATOR, "namespace": NAMESPACE}
_SELECTOR = {"app.kubernetes.io/name": OPERATOR}
_MODEL_PODS = {"app.kubernetes.io/part-of": "phoenix"}
_WATCH = ["list", "watch"]
# Server-side apply is a patch, and a create where the object is not there.
_OWN = ["get", *_WATCH, "create", "patch"]
# Every model has these, so they are never taken away from one: they go with their owner.
_LASTING = frozenset({CONFIG_MAP, SERVICE, DEPLOYMENT})
# Of PostgreSQL, Redis and Kafka, without and with TLS, as they are usually installed.
BACKEND_PORTS = (5432, 6379, 6380, 9092, 9093)


def operator_image() -> str:
    """Return the image that the operator's programs run in."""
    return _IMAGE


def rule(kind: Kind, verbs: Sequence[str], *, subresource: str = "", names: Sequence[str] = ()) -> Object:
    """Return an RBAC rule about one kind."""
    resource = f"{kind.plural}/{subresource}" if subresource else kind.plural
    found: Object = {"apiGroups": [kind.group], "resources": [resource], "verbs": list(verbs)}
    return found | ({"resourceNames": list(names)} if names else {})


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
        objects += _granted("Role" if place else "ClusterRole", name, place, binding_rules(), _ACCOUNT)
    objects += _granted("Role", f"{OPERATOR}-backends", NAMESPACE, backend_rules(bindings), _ACCOUNT)
    ports = [{"protocol": "TCP", "port": port} for port in BACKEND_PORTS]
    spec = {"podSelector": {"matchLabels": _SELECTOR}, "policyTypes": ["Egress"], "egress": [{"ports": ports}]}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": _metadata(name), "spec": spec}
    return [*objects, policy]


def manifests(*, namespaces: Sequence[str] = (), secrets: Sequence[str] = ()) -> list[Object]:
    """Return everything but the CRD. Without `namespaces` the install is cluster-wide."""
    account = _ACCOUNT
    objects: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(OPERATOR)},
        *_granted("Role", f"{OPERATOR}-lease", NAMESPACE, lease_rules(), account),
    ]
    if namespaces:
        for namespace in namespaces:
            objects += _granted("Role", OPERATOR, namespace, model_rules(secrets=secrets), account)
    else:
        rules = [*model_rules(secrets=None), *cluster_rules()]
        objects += _granted("ClusterRole", OPERATOR, None, rules, account)
        objects += aggregated_roles()
    settings = {"settings.yaml": "# See docs/reference/operator-settings.md\n{}\n"}
    objects.append(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(f"{OPERATOR}-settings"), "data": settings}
    )
    objects += [
        _deployment(namespaces),
        _disruption_budget(),
        _service(),
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
        metadata = _metadata(f"phoenixmodels-{name}", None)
        metadata["labels"] |= labels
        found.append(
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": metadata, "rules": rules}
        )
    return found


def _metadata(name: str, namespace: str | None = NAMESPACE) -> Object:
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": dict(_LABELS)}


def _granted(kind: str, name: str, namespace: str | None, rules: list[Object], account: Object) -> list[Object]:
    """Return a role and its binding."""
    api = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": f"{api}/v1", "kind": kind, "metadata": _metadata(name, namespace), "rules": rules},
        {
            "apiVersion": f"{api}/v1",
            "kind": f"{kind}Binding",
            "metadata": _metadata(name, namespace),
            "roleRef": {"apiGroup": api, "kind": kind, "name": name},
            "subjects": [account],
        },
    ]


def _deployment(namespaces: Sequence[str]) -> Object:
    arguments = ["run", f"--settings={SETTINGS_FILE}"]
    if namespaces:
        arguments.append(f"--namespaces={','.join(namespaces)}")
    container = {
        "name": "operator",
        "image": _IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments,
        "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "256Mi"}},
        "startupProbe": _probe("/healthz", 1, 30),
        "readinessProbe": _probe("/readyz", 5, 2),
        "livenessProbe": _probe("/healthz", 10, 3),
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [
            {"name": "settings", "mountPath": str(Path(SETTINGS_FILE).parent), "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    pod = {
        "serviceAccountName": OPERATOR,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 30,
        "securityContext": RESTRICTED_POD,
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "podAffinityTerm": {
                            "topologyKey": "kubernetes.io/hostname",
                            "labelSelector": {"matchLabels": _SELECTOR},
                        },
                    }
                ]
            }
        },
        "containers": [container],
        "volumes": [
            {"name": "settings", "configMap": {"name": f"{OPERATOR}-settings"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
        ],
    }
    spec = {
        "replicas": 2,
        "selector": {"matchLabels": _SELECTOR},
        "template": {"metadata": {"labels": dict(_LABELS)}, "spec": pod},
    }
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _metadata(OPERATOR), "spec": spec}


def _probe(path: str, period_s: int, failures: int) -> Object:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _disruption_budget() -> Object:
    spec = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": _SELECTOR},
    }
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(OPERATOR),
        "spec": spec,
    }


def _service() -> Object:
    spec = {"selector": _SELECTOR, "ports": [{"name": "http", "port": 8080, "targetPort": "http"}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(OPERATOR), "spec": spec}


def _network_policy() -> Object:
    """In: scrapes and probes. Out: DNS, the API server (whose address no policy can name) and the models' pods."""
    spec = {
        "podSelector": {"matchLabels": _SELECTOR},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"protocol": "TCP", "port": 8080}]}],
        "egress": [
            {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
            {"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]},
            {
                "to": [
                    {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "phoenix"}}}
                ],
                "ports": [{"protocol": "TCP", "port": 8000}],
            },
        ],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(OPERATOR),
        "spec": spec,
    }


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
