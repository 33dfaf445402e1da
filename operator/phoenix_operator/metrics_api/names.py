"""What the metrics API is called: its API group for others, its own objects for the install. Pure."""

from phoenix_operator.kinds import PHOENIX_MODEL

GROUP = "custom.metrics.k8s.io"
# The first is preferred.
VERSIONS = ("v1beta2", "v1beta1")
RESOURCE = f"{PHOENIX_MODEL.plural}.{PHOENIX_MODEL.group}"
API_SERVICES = tuple(f"{version}.{GROUP}" for version in VERSIONS)
# Of Deployment, Service, ServiceAccount and Secret.
NAME = "phoenix-metrics-api"
