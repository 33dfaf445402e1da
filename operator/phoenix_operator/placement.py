"""What the nodes lack for a pod that cannot be placed: the numbers behind the scheduler's words.

Reads nodes and the pods on them, only when something is unschedulable, and at most once in a few seconds for all
models. Without the right to read nodes (a namespaced install) it says nothing.
"""

import time
from collections import defaultdict
from decimal import Decimal

from phoenix_api import quantity
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import NODE, POD
from phoenix_operator.observed import Object, Pod

_GOOD_FOR_S = 5.0
_SHOWN_NODES = 3


class Placement:
    """Free amounts by node."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._until = 0.0
        self._free: dict[str, dict[str, tuple[Decimal, Decimal]]] = {}

    async def shortfall(self, pods: list[Pod]) -> str:
        """Say for each node what it lacks for the first unschedulable pod; empty when nothing is short or known."""
        waiting = next((pod for pod in pods if pod.unschedulable is not None), None)
        if waiting is None:
            return ""
        await self._refresh()
        asked = requests_of(waiting.body)
        lines = []
        for node, free in sorted(self._free.items()):
            lacking = [
                f"{resource} asked {_plain(amount)}, free {_plain(free.get(resource, _NOTHING)[0])} "
                f"of {_plain(free.get(resource, _NOTHING)[1])}"
                for resource, amount in sorted(asked.items())
                if amount > free.get(resource, _NOTHING)[0]
            ]
            if lacking:
                lines.append(f"node {node}: {', '.join(lacking)}")
        more = f"; and {len(lines) - _SHOWN_NODES} more nodes" if len(lines) > _SHOWN_NODES else ""
        return "; ".join(lines[:_SHOWN_NODES]) + more

    async def _refresh(self) -> None:
        if time.monotonic() < self._until:
            return
        self._until = time.monotonic() + _GOOD_FOR_S
        try:
            nodes = (await self._cluster.list(NODE, None)).items
            pods = (await self._cluster.list(POD, None, fields="status.phase!=Succeeded,status.phase!=Failed")).items
        except ApiError:
            self._free = {}
            return
        used: dict[str, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
        for pod in pods:
            if node := pod["spec"].get("nodeName"):
                for resource, amount in requests_of(pod).items():
                    used[node][resource] += amount
        self._free = {
            node["metadata"]["name"]: {
                resource: (total - used[node["metadata"]["name"]][resource], total)
                for resource, total in _amounts(node.get("status", {}).get("allocatable", {})).items()
            }
            for node in nodes
            if not node["spec"].get("unschedulable")
        }


_NOTHING = (Decimal(0), Decimal(0))


def requests_of(pod: Object) -> dict[str, Decimal]:
    """Return what the scheduler counts for a pod: the sum of its containers, or its largest init container."""
    spec = pod["spec"]
    total: dict[str, Decimal] = defaultdict(Decimal)
    for container in spec["containers"]:
        for resource, amount in _asked(container).items():
            total[resource] += amount
    for container in spec.get("initContainers", []):
        for resource, amount in _asked(container).items():
            total[resource] = max(total[resource], amount)
    return dict(total)


def _asked(container: Object) -> dict[str, Decimal]:
    resources = container.get("resources", {})
    return _amounts(resources.get("limits", {}) | resources.get("requests", {}))


def _amounts(written: dict[str, str]) -> dict[str, Decimal]:
    return {resource: quantity.amount(text) for resource, text in written.items()}


def _plain(amount: Decimal) -> str:
    """Write an amount as `kubectl` would: sizes in Mi, cores in thousandths."""
    if amount >= 2**20:
        return f"{amount / 2**20:.0f}Mi"
    return f"{amount:.0f}" if amount == amount.to_integral_value() else f"{amount * 1000:.0f}m"
