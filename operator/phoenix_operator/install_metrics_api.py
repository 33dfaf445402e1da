"""The manifests of the metrics API: `metrics-api.yaml` beside those of `install`, which they need.

What it may do is little: read the metadata of PhoenixModels, ask who may, and write one Secret and the `caBundle` of
its two APIServices, all by name. The Secret comes empty with the install, so that nobody needs the right to create any.
"""

from collections.abc import Sequence

from phoenix_operator.desired.deployment import RESTRICTED_CONTAINER
from phoenix_operator.desired.naming import OPERATOR
from phoenix_operator.install_program import API_SERVER, DNS, IMAGE, NAMESPACE, SETTINGS_FILE, Program, probe, rule, tcp
from phoenix_operator.kinds import API_SERVICE, PHOENIX_MODEL, SECRET, SUBJECT_ACCESS_REVIEW
from phoenix_operator.metrics_api.names import API_SERVICES, GROUP, NAME, VERSIONS
from phoenix_operator.observed import Object

FILE = "metrics-api.yaml"
HTTPS_PORT, HTTP_PORT = 8443, 8080
# Of Prometheus as it is usually installed; 443 is open for the API server already.
PROMETHEUS_PORTS = (80, 9090)
_PROGRAM = Program(NAME)
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
    readers = ("Role", "extension-apiserver-authentication-reader")
    autoscaler, autoscaler_rules = f"{NAME}-autoscaler", [_rule_of_metrics()]
    objects: list[Object] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _PROGRAM.metadata()},
        {"apiVersion": "v1", "kind": "Secret", "metadata": _PROGRAM.metadata(), "type": "Opaque"},
        *_PROGRAM.granted("ClusterRole", NAME, None, cluster_rules()),
        *_PROGRAM.granted("Role", NAME, NAMESPACE, own_rules()),
    ]
    for place in namespaces or (None,):
        kind = "Role" if place else "ClusterRole"
        objects += _PROGRAM.granted(kind, f"{NAME}-models", place, model_rules())
    return [
        *objects,
        _PROGRAM.bound("RoleBinding", f"{NAME}-authentication", "kube-system", readers, _PROGRAM.account),
        *_PROGRAM.granted("ClusterRole", autoscaler, None, autoscaler_rules, _AUTOSCALER),
        _deployment(),
        _PROGRAM.disruption_budget(),
        _service(),
        _network_policy(),
        _policy_of_operator(),
        *(_api_service(version, 100 + index) for index, version in enumerate(reversed(VERSIONS))),
    ]


def _rule_of_metrics() -> Object:
    return {"apiGroups": [GROUP], "resources": ["*"], "verbs": ["get", "list"]}


def _deployment() -> Object:
    container = {
        "name": "metrics-api",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": ["metrics-api", f"--settings={SETTINGS_FILE}"],
        "ports": [
            {"name": "https", "containerPort": HTTPS_PORT, "protocol": "TCP"},
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
        ],
        "env": [{"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}],
        "resources": {"requests": {"cpu": "50m", "memory": "192Mi"}, "limits": {"memory": "192Mi"}},
        "startupProbe": probe("/livez", 1, 30),
        "readinessProbe": probe("/readyz", 5, 2),
        "livenessProbe": probe("/livez", 10, 3),
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [
            {"name": "settings", "mountPath": SETTINGS_FILE.rpartition("/")[0], "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    # nobody who scales is left alone while it is rolled out
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return _PROGRAM.deployment(container, tmp="16Mi", strategy=strategy)


def _service() -> Object:
    ports = [
        {"name": "https", "port": 443, "targetPort": "https"},
        {"name": "http", "port": HTTP_PORT, "targetPort": "http"},
    ]
    return _PROGRAM.service(ports)


def _network_policy() -> Object:
    """In: the API server (whose address no policy can name), probes, scrapes. Out: DNS, the API server, Prometheus."""
    egress = [DNS, API_SERVER, tcp(*PROMETHEUS_PORTS)]
    return _PROGRAM.network_policy(ingress=[tcp(HTTPS_PORT, HTTP_PORT)], egress=egress)


def _policy_of_operator() -> Object:
    """Out: Prometheus, for the latency in the status of models. Policies add up."""
    egress = [tcp(*PROMETHEUS_PORTS)]
    return _PROGRAM.network_policy(name=f"{OPERATOR}-prometheus", egress=egress, of=Program(OPERATOR))


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
        "metadata": _PROGRAM.metadata(f"{version}.{GROUP}", None),
        "spec": spec,
    }
