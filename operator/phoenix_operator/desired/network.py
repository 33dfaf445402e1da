"""How a model is reached: Services, NetworkPolicy, route, and the object by which Prometheus finds the pods."""

from phoenix_operator.desired import bindings
from phoenix_operator.desired.naming import GRPC_PORT, HTTP_PORT, owned, selector
from phoenix_operator.desired.source import source
from phoenix_operator.kinds import (
    HTTP_ROUTE,
    INGRESS,
    NETWORK_POLICY,
    POD_MONITOR,
    SERVICE,
    SERVICE_MONITOR,
)
from phoenix_operator.observed import PORTS, Object, Observed, Subject
from phoenix_operator.settings import MonitorKind, RouteKind, Settings

_NAMESPACE = "kubernetes.io/metadata.name"
_PORTS = (("http", HTTP_PORT, "http"), ("grpc", GRPC_PORT, "kubernetes.io/h2c"))
_HEADLESS = "phoenix-ml.io/headless"  # by this label a ServiceMonitor leaves the headless twin out
_METADATA_SERVICE, _METADATA_SERVICE_V6 = "169.254.169.254/32", "fd00:ec2::254/128"


def services(subject: Subject) -> list[Object]:
    """Return the Service with a cluster address, and the headless one whose name resolves to every ready pod.

    gRPC clients keep one connection, so a cluster address would send all that one client asks to one pod.
    """
    ports = [
        {"name": name, "port": port, "targetPort": name, "protocol": "TCP", "appProtocol": protocol}
        for name, port, protocol in _PORTS
    ]
    spec = {"type": "ClusterIP", "selector": selector(subject.name), "ports": ports}
    headless = owned(subject, SERVICE, f"{subject.name}-headless", {"spec": spec | {"clusterIP": "None"}})
    headless["metadata"]["labels"][_HEADLESS] = "true"
    return [owned(subject, SERVICE, subject.name, {"spec": spec}), headless]


def network_policy(subject: Subject, observed: Observed, settings: Settings, operator_namespace: str) -> Object:
    """Return the NetworkPolicy: nothing in or out of the pods but what the manifest and the settings imply."""
    pods = [{"protocol": "TCP", "port": port} for _, port, _ in _PORTS]
    rules: list[Object] = [{"from": _callers(subject, settings, operator_namespace), "ports": pods}]
    scrapers = [operator_namespace, settings.monitoring.namespace]
    if subject.spec.networking.allow_from:
        # the operator asks pods what they loaded, Prometheus scrapes them: no caller's list shuts these out
        rules.append({"from": _namespaces(*scrapers), "ports": pods[:1]})
    ports = bindings.ports(subject, observed)
    body = {
        "spec": {
            "podSelector": {"matchLabels": selector(subject.name)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": rules,
            "egress": [_DNS, *_way_to_the_model(subject), *_ways_to_backends(ports), *settings.extra_egress],
        }
    }
    annotations = {PORTS: bindings.as_text(ports)} if ports else None
    return owned(subject, NETWORK_POLICY, subject.name, body, annotations=annotations)


def _callers(subject: Subject, settings: Settings, operator_namespace: str) -> list[Object]:
    if subject.spec.networking.allow_from:
        return subject.spec.networking.allow_from
    others = (settings.routes.controller_namespace, operator_namespace, settings.monitoring.namespace)
    return [{"podSelector": {}}, *_namespaces(*others)]


def _namespaces(*names: str | None) -> list[Object]:
    return [{"namespaceSelector": {"matchLabels": {_NAMESPACE: name}}} for name in dict.fromkeys(names) if name]


_DNS: Object = {
    "to": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}],
    "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")],
}


def _way_to_the_model(subject: Subject) -> list[Object]:
    port = source(subject).remote_port
    if port is None:
        return []
    return [{"to": _ANYWHERE, "ports": [{"protocol": "TCP", "port": port}]}]


# A store's addresses cannot be known; the cloud's metadata service, which hands out credentials, is none of them.
_ANYWHERE: list[Object] = [
    {"ipBlock": {"cidr": "0.0.0.0/0", "except": [_METADATA_SERVICE]}},
    {"ipBlock": {"cidr": "::/0", "except": [_METADATA_SERVICE_V6]}},
]


def _ways_to_backends(ports: dict[str, tuple[int, ...]]) -> list[Object]:
    """Backends go by name, and Kafka's brokers tell their addresses themselves: only ports are known beforehand.

    Some network plugins take address blocks to mean addresses outside of the cluster only.
    """
    numbers = sorted({port for each in ports.values() for port in each})
    if not numbers:
        return []
    rows = [{"protocol": "TCP", "port": number} for number in numbers]
    return [{"to": [{"namespaceSelector": {}}, *_ANYWHERE], "ports": rows}]


def path_prefix(subject: Subject) -> str:
    """Return the path under which a model is reached from outside; it is the server's own."""
    return f"/v2/models/{subject.name}"


def route(subject: Subject, settings: Settings) -> Object | None:
    """Return the HTTPRoute or Ingress of `spec.networking.host`; None where none is asked or configured."""
    host, routes = subject.spec.networking.host, settings.routes
    if host is None or routes.kind is None:
        return None
    if routes.kind is RouteKind.HTTP_ROUTE:
        return _http_route(subject, settings, host)
    backend = {"service": {"name": subject.name, "port": {"name": "http"}}}
    path = {"path": path_prefix(subject), "pathType": "Prefix", "backend": backend}
    spec: Object = {"rules": [{"host": host, "http": {"paths": [path]}}]}
    if routes.ingress_class_name:
        spec["ingressClassName"] = routes.ingress_class_name
    if routes.tls_secret_name:
        spec["tls"] = [{"hosts": [host], "secretName": routes.tls_secret_name}]
    return owned(subject, INGRESS, subject.name, {"spec": spec})


def _http_route(subject: Subject, settings: Settings, host: str) -> Object:
    gateway = settings.routes.gateway
    parent: Object = {"group": "gateway.networking.k8s.io", "kind": "Gateway"}
    if gateway is not None:
        parent |= {"name": gateway.name, "namespace": gateway.namespace}
        if gateway.section_name:
            parent["sectionName"] = gateway.section_name
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": path_prefix(subject)}}],
        "backendRefs": [{"group": "", "kind": "Service", "name": subject.name, "port": HTTP_PORT, "weight": 1}],
    }
    spec = {"parentRefs": [parent], "hostnames": [host], "rules": [rule]}
    return owned(subject, HTTP_ROUTE, subject.name, {"spec": spec})


def monitor(subject: Subject, settings: Settings) -> Object | None:
    """Return the PodMonitor or ServiceMonitor; None where the settings ask for none."""
    asked = settings.monitoring
    if asked.kind is None:
        return None
    # the rules leave canaries out by this label
    track = {"sourceLabels": ["__meta_kubernetes_pod_label_phoenix_ml_io_track"], "targetLabel": "track"}
    endpoint = {
        "port": "http",
        "path": "/metrics",
        "interval": asked.interval,
        "honorLabels": False,
        "relabelings": [track],
    }
    spec: Object = {"selector": {"matchLabels": selector(subject.name)}}
    if asked.kind is MonitorKind.POD_MONITOR:
        kind = POD_MONITOR
        spec |= {"podTargetLabels": list(selector(subject.name)), "podMetricsEndpoints": [endpoint]}
    else:
        kind = SERVICE_MONITOR
        # the headless twin has the same labels: without this every pod would be scraped twice
        spec["selector"]["matchExpressions"] = [{"key": _HEADLESS, "operator": "DoesNotExist"}]
        spec |= {"targetLabels": list(selector(subject.name)), "endpoints": [endpoint]}
    made = owned(subject, kind, subject.name, {"spec": spec})
    made["metadata"]["labels"] |= asked.labels
    return made
