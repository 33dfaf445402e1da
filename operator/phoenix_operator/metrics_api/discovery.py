"""What the API server is told that is served here, at each level. Pure."""

from phoenix_operator.metrics_api.answers import Document
from phoenix_operator.metrics_api.metrics import METRICS
from phoenix_operator.metrics_api.names import GROUP, RESOURCE, VERSIONS


def group_list() -> Document:
    """Return the document of `/apis`."""
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group()]}


def group() -> Document:
    """Return the document of `/apis/custom.metrics.k8s.io`."""
    return {"kind": "APIGroup", "apiVersion": "v1", **_group()}


def resource_list(version: str) -> Document:
    """Return the document of one version: each metric is a subresource of the PhoenixModels."""
    resources = [
        {
            "name": f"{RESOURCE}/{name}",
            "singularName": "",
            "namespaced": True,
            "kind": "MetricValueList",
            "verbs": ["get"],
        }
        for name in METRICS
    ]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{GROUP}/{version}",
        "resources": resources,
    }


def _group() -> Document:
    versions = [{"groupVersion": f"{GROUP}/{version}", "version": version} for version in VERSIONS]
    return {"name": GROUP, "versions": versions, "preferredVersion": versions[0]}
