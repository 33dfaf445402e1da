"""The kinds of Kubernetes objects that the operator reads or writes: one table for paths, watches and RBAC.

What a kind is called in a URL, in `apiVersion` and in a role stands here once; everybody else names the constant.
"""

from dataclasses import dataclass

from phoenix_api import GROUP, KIND


@dataclass(frozen=True, slots=True)
class Kind:
    """A namespaced kind. `group` is empty for the core API; `plural` is the name in URLs and roles."""

    group: str
    version: str
    kind: str
    plural: str

    @property
    def api_version(self) -> str:
        """As in the field `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """The path of the group and version."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the path of an object, or of the collection; `namespace=None` is the whole cluster."""
        parts = [self.root]
        if namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts += [part for part in (self.plural, name, subresource) if part is not None]
        return "/".join(parts)

    def __str__(self) -> str:
        return self.kind


PHOENIX_MODEL = Kind(GROUP, "v1alpha1", KIND, "phoenixmodels")

CONFIG_MAP = Kind("", "v1", "ConfigMap", "configmaps")
SERVICE_ACCOUNT = Kind("", "v1", "ServiceAccount", "serviceaccounts")
SERVICE = Kind("", "v1", "Service", "services")
DEPLOYMENT = Kind("apps", "v1", "Deployment", "deployments")
POD_DISRUPTION_BUDGET = Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICY = Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies")
RESOURCE_CLAIM_TEMPLATE = Kind("resource.k8s.io", "v1", "ResourceClaimTemplate", "resourceclaimtemplates")
HORIZONTAL_POD_AUTOSCALER = Kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
TRIGGER_AUTHENTICATION = Kind("keda.sh", "v1alpha1", "TriggerAuthentication", "triggerauthentications")
SCALED_OBJECT = Kind("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects")
INGRESS = Kind("networking.k8s.io", "v1", "Ingress", "ingresses")
HTTP_ROUTE = Kind("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes")
POD_MONITOR = Kind("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors")
SERVICE_MONITOR = Kind("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors")

POD = Kind("", "v1", "Pod", "pods")
SECRET = Kind("", "v1", "Secret", "secrets")
PERSISTENT_VOLUME_CLAIM = Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
NODE = Kind("", "v1", "Node", "nodes")
EVENT = Kind("", "v1", "Event", "events")
# of the whole cluster
API_SERVICE = Kind("apiregistration.k8s.io", "v1", "APIService", "apiservices")
SUBJECT_ACCESS_REVIEW = Kind("authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews")
LEASE = Kind("coordination.k8s.io", "v1", "Lease", "leases")

# What a PhoenixModel may become, in the order of application: what a pod refers to comes before the Deployment.
CHILDREN = (
    SERVICE_ACCOUNT,
    CONFIG_MAP,
    RESOURCE_CLAIM_TEMPLATE,
    NETWORK_POLICY,
    SERVICE,
    DEPLOYMENT,
    POD_DISRUPTION_BUDGET,
    HORIZONTAL_POD_AUTOSCALER,
    TRIGGER_AUTHENTICATION,
    SCALED_OBJECT,
    INGRESS,
    HTTP_ROUTE,
    POD_MONITOR,
    SERVICE_MONITOR,
)
# Kinds of the table above that a cluster need not serve.
OPTIONAL = frozenset(
    {RESOURCE_CLAIM_TEMPLATE, TRIGGER_AUTHENTICATION, SCALED_OBJECT, HTTP_ROUTE, POD_MONITOR, SERVICE_MONITOR}
)
# Kinds whose spec can never change: another wish is another object of the same name.
IMMUTABLE = frozenset({RESOURCE_CLAIM_TEMPLATE})
_BY_NAME = {(kind.api_version, kind.kind): kind for kind in (*CHILDREN, PHOENIX_MODEL, POD, SECRET)}


def kind_of(manifest: dict[str, object]) -> Kind:
    """Return the kind of an object with `apiVersion` and `kind`. Raises `KeyError` for one that is not in the table."""
    return _BY_NAME[str(manifest["apiVersion"]), str(manifest["kind"])]
