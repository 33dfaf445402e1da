"""The manifests of the metrics API: `metrics-api.yaml` beside those of `install`, which they need.

What it may do is little: read the metadata of PhoenixModels, ask who may, and write one Secret and the `caBundle` of
its two APIServices, all by name. The Secret comes empty with the install, so that nobody needs the right to create any.
"""

from collections.abc import Sequence

from phoenix_operator import __version__
from phoenix_operator.desired.deployment import RESTRICTED_CONTAINER, RESTRICTED_POD
from phoenix_operator.desired.naming import OPERATOR
from phoenix_operator.install import NAMESPACE, SETTINGS_FILE, operator_image, rule
from phoenix_operator.kinds import API_SERVICE, PHOENIX_MODEL, SECRET, SUBJECT_ACCESS_REVIEW
from phoenix_operator.metrics_api.names import API_SERVICES, GROUP, NAME, VERSIONS
from phoenix_operator.observed import Object

FILE = "metrics-api.yaml"
HTTPS_PORT, HTTP_PORT = 8443, 8080
# Of Prometheus as it is usually installed; 443 is open for the API server already.
PROMETHEUS_PORTS = (80, 9090)
_RBAC = "rbac.authorization.k8s.io"
_LABELS = {
    "app.kubernetes.io/name": NAME,
    "app.kubernetes.io/part-of": "phoenix",
    "app.kubernetes.io/version": __version__,
}
_SELECTOR = {"app.kubernetes.io/name": NAME}
_ACCOUNT: Object = {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}
_AUTOSCALER: Object = {"kind": "ServiceAccount", "name": "horizontal-pod-autoscaler", "namespace": "kube-system"}


def model_rules() -> list[Object]:
    """Return the rights in the namespaces of models."""
    return [rule(PHOENIX_MODEL, ["list"])]


def cluster_rules() -> list[Object]:
    """Return the rights that concern the whole cluster."""
    return [rule(SUBJECT_ACCESS_REVIEW, ["create"]), rule(API_SERVICE, ["get", "patch"], names=API_SERVICES)]


def own_rules() -> list[Object]:
    """Return the rights in the operator's namespace."""
    return [rule(SECRET, ["get", "update"], names=[NAME])]


def manifests(*, namespaces: Sequence[str] = ()) -> list[Object]:
    """Return every object; with `namespaces` models are read in these only."""
    readers = _ref("Role", "extension-apiserver-authentication-reader")
    autoscaler, autoscaler_rules = f"{NAME}-autoscaler", [_rule_of_metrics()]
    objects: list[Object] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(NAME)},
        {"apiVersion": "v1", "kind": "Secret", "metadata": _metadata(NAME), "type": "Opaque"},
        *_granted("ClusterRole", NAME, None, cluster_rules(), _ACCOUNT),
        *_granted("Role", NAME, NAMESPACE, own_rules(), _ACCOUNT),
    ]
    for place in namespaces or (None,):
        kind = "Role" if place else "ClusterRole"
        objects += _granted(kind, f"{NAME}-models", place, model_rules(), _ACCOUNT)
    return [
        *objects,
        _binding("RoleBinding", f"{NAME}-authentication", "kube-system", readers, _ACCOUNT),
        *_granted("ClusterRole", autoscaler, None, autoscaler_rules, _AUTOSCALER),
        _deployment(),
        _disruption_budget(),
        _service(),
        _network_policy(),
        _policy_of_operator(),
        *(_api_service(version, 100 + index) for index, version in enumerate(reversed(VERSIONS))),
    ]


def _rule_of_metrics() -> Object:
    return {"apiGroups": [GROUP], "resources": ["*"], "verbs": ["get", "list"]}


def _metadata(name: str, namespace: str | None = NAMESPACE) -> Object:
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": dict(_LABELS)}


def _ref(kind: str, name: str) -> Object:
    return {"apiGroup": _RBAC, "kind": kind, "name": name}


def _binding(kind: str, name: str, namespace: str | None, role: Object, account: Object) -> Object:
    metadata = _metadata(name, namespace)
    return {"apiVersion": f"{_RBAC}/v1", "kind": kind, "metadata": metadata, "roleRef": role, "subjects": [account]}


def _granted(kind: str, name: str, namespace: str | None, rules: list[Object], account: Object) -> list[Object]:
    """Return a role and its binding."""
    role = {"apiVersion": f"{_RBAC}/v1", "kind": kind, "metadata": _metadata(name, namespace), "rules": rules}
    return [role, _binding(f"{kind}Binding", name, namespace, _ref(kind, name), account)]


def _deployment() -> Object:
    container = {
        "name": "metrics-api",
        "image": operator_image(),
        "imagePullPolicy": "IfNotPresent",
        "args": ["metrics-api", f"--settings={SETTINGS_FILE}"],
        "ports": [
            {"name": "https", "containerPort": HTTPS_PORT, "protocol": "TCP"},
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
        ],
        "env": [{"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}],
        "resources": {"requests": {"cpu": "50m", "memory": "192Mi"}, "limits": {"memory": "192Mi"}},
        "startupProbe": _probe("/livez", 1, 30),
        "readinessProbe": _probe("/readyz", 5, 2),
        "livenessProbe": _probe("/livez", 10, 3),
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [
            {"name": "settings", "mountPath": SETTINGS_FILE.rpartition("/")[0], "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    apart = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": _SELECTOR}}
    preferred = [{"weight": 100, "podAffinityTerm": apart}]
    pod = {
        "serviceAccountName": NAME,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 30,
        "securityContext": RESTRICTED_POD,
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
        "containers": [container],
        "volumes": [
            {"name": "settings", "configMap": {"name": f"{OPERATOR}-settings"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "16Mi"}},
        ],
    }
    spec = {
        "replicas": 2,
        "selector": {"matchLabels": _SELECTOR},
        # nobody who scales is left alone while it is rolled out
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {"metadata": {"labels": dict(_LABELS)}, "spec": pod},
    }
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _metadata(NAME), "spec": spec}


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
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _metadata(NAME), "spec": spec}


def _service() -> Object:
    ports = [
        {"name": "https", "port": 443, "targetPort": "https"},
        {"name": "http", "port": HTTP_PORT, "targetPort": "http"},
    ]
    spec = {"selector": _SELECTOR, "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(NAME), "spec": spec}


def _network_policy() -> Object:
    """In: the API server (whose address no policy can name), probes, scrapes. Out: DNS, the API server, Prometheus."""
    spec = {
        "podSelector": {"matchLabels": _SELECTOR},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [_tcp(HTTPS_PORT), _tcp(HTTP_PORT)]}],
        "egress": [
            {"ports": [{"protocol": "UDP", "port": 53}, _tcp(53)]},
            {"ports": [_tcp(443), _tcp(6443)]},
            {"ports": [_tcp(port) for port in PROMETHEUS_PORTS]},
        ],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(NAME),
        "spec": spec,
    }


def _policy_of_operator() -> Object:
    """Out: Prometheus, for the latency in the status of models. Policies add up."""
    spec = {
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": OPERATOR}},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [_tcp(port) for port in PROMETHEUS_PORTS]}],
    }
    metadata = _metadata(f"{OPERATOR}-prometheus")
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def _tcp(port: int) -> Object:
    return {"protocol": "TCP", "port": port}


def _api_service(version: str, priority: int) -> Object:
    """Return one without `caBundle`: that is the metrics API's own field, or cert-manager's."""
    spec = {
        "group": GROUP,
        "version": version,
        "groupPriorityMinimum": 100,
        "versionPriority": priority,
        "service": {"name": NAME, "namespace": NAMESPACE, "port": 443},
    }
    return {
        "apiVersion": API_SERVICE.api_version,
        "kind": API_SERVICE.kind,
        "metadata": _metadata(f"{version}.{GROUP}", None),
        "spec": spec,
    }
