"""What the manifests of each of our own programs have in common: names, labels, rights, pods that stay apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phoenix_operator import __version__
from phoenix_operator.desired.deployment import RESTRICTED_POD
from phoenix_operator.kinds import Kind
from phoenix_operator.observed import Object

NAMESPACE = "phoenix-system"
SETTINGS_FILE = "/etc/phoenix-operator/settings.yaml"
IMAGE = f"phoenix-ml/phoenix-operator:{__version__}"
DNS: Object = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
API_SERVER: Object = {"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]}
_RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True, slots=True)
class Program:
    """A program of the operator's image, by the name of its ServiceAccount, Deployment and Service."""

    name: str

    @property
    def labels(self) -> dict[str, str]:
        """Labels of its objects and pods."""
        return {**self.selector, "app.kubernetes.io/part-of": "phoenix", "app.kubernetes.io/version": __version__}

    @property
    def selector(self) -> dict[str, str]:
        """Labels that select its pods."""
        return {"app.kubernetes.io/name": self.name}

    @property
    def account(self) -> Object:
        """The subject of its rights."""
        return {"kind": "ServiceAccount", "name": self.name, "namespace": NAMESPACE}

    def metadata(self, name: str = "", namespace: str | None = NAMESPACE) -> Object:
        """Return the metadata of an object, called as the program if it has no name of its own."""
        return {"name": name or self.name, **({"namespace": namespace} if namespace else {}), "labels": self.labels}

    def bound(self, kind: str, name: str, namespace: str | None, role: tuple[str, str], account: Object) -> Object:
        """Return a binding of an account to a role: its kind and name."""
        return {
            "apiVersion": f"{_RBAC}/v1",
            "kind": kind,
            "metadata": self.metadata(name, namespace),
            "roleRef": {"apiGroup": _RBAC, "kind": role[0], "name": role[1]},
            "subjects": [account],
        }

    def granted(
        self, kind: str, name: str, namespace: str | None, rules: list[Object], account: Object | None = None
    ) -> list[Object]:
        """Return a role and its binding, to the program's own account if no other is given."""
        metadata = self.metadata(name, namespace)
        return [
            {"apiVersion": f"{_RBAC}/v1", "kind": kind, "metadata": metadata, "rules": rules},
            self.bound(f"{kind}Binding", name, namespace, (kind, name), account or self.account),
        ]

    def deployment(self, container: Object, *, tmp: str, **spec: Any) -> Object:
        """Return a Deployment of two restricted replicas that keep apart, with the settings and `tmp` of space."""
        apart = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": self.selector}}
        preferred = [{"weight": 100, "podAffinityTerm": apart}]
        whole = {
            "serviceAccountName": self.name,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 30,
            "securityContext": RESTRICTED_POD,
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
            "containers": [container],
            "volumes": [
                {"name": "settings", "configMap": {"name": "phoenix-operator-settings"}},
                {"name": "tmp", "emptyDir": {"sizeLimit": tmp}},
            ],
        }
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self.metadata(),
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": self.selector},
                **spec,
                "template": {"metadata": {"labels": self.labels}, "spec": whole},
            },
        }

    def disruption_budget(self) -> Object:
        """Return the PodDisruptionBudget: one replica at a time."""
        spec = {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": self.selector},
        }
        return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": self.metadata(), "spec": spec}

    def service(self, ports: list[Object]) -> Object:
        """Return the Service."""
        spec = {"selector": self.selector, "ports": ports}
        return {"apiVersion": "v1", "kind": "Service", "metadata": self.metadata(), "spec": spec}

    def network_policy(
        self, *, name: str = "", ingress: list[Object] | None = None, egress: list[Object], of: "Program | None" = None
    ) -> Object:
        """Return a NetworkPolicy of its pods, or of those of another program. Policies add up."""
        spec: Object = {
            "podSelector": {"matchLabels": (of or self).selector},
            "policyTypes": ["Egress"] if ingress is None else ["Ingress", "Egress"],
        }
        spec |= {} if ingress is None else {"ingress": ingress}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": self.metadata(name),
            "spec": spec | {"egress": egress},
        }


def rule(kind: Kind, verbs: Sequence[str], *, subresource: str = "", names: Sequence[str] = ()) -> Object:
    """Return an RBAC rule about one kind."""
    resource = f"{kind.plural}/{subresource}" if subresource else kind.plural
    found: Object = {"apiGroups": [kind.group], "resources": [resource], "verbs": list(verbs)}
    return found | ({"resourceNames": list(names)} if names else {})


def tcp(*ports: int) -> Object:
    """Return a rule of a NetworkPolicy about TCP ports."""
    return {"ports": [{"protocol": "TCP", "port": port} for port in ports]}


def probe(path: str, period_s: int, failures: int) -> Object:
    """Return a probe over HTTP."""
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
