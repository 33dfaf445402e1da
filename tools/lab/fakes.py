"""Hardware that is not there, for tests of scheduling: GPUs on a real node, and whole nodes that kwok keeps alive.

Pods on a fake node become Running without running. Fake nodes are labelled `type=kwok`, and tainted so that only pods
which tolerate it land there, unless they are to be schedulable.
"""

import json
from typing import Any

from . import binaries, processes
from .control_plane import Command, kubectl
from .state import Facts, Lab

LABEL = "type=kwok"
_TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
_CAPACITY = {"cpu": "32", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "250"}
GPU = "nvidia.com/gpu"


def kwok(lab: Lab, facts: Facts) -> Command:
    """What plays the kubelet of the fake nodes; its own built-in stages say how they and their pods live."""
    config = lab.folder / "kwok.yaml"
    config.touch()  # or it reads one from the home folder
    return [
        binaries.path("kwok"),
        f"--config={config}",
        f"--kubeconfig={lab.kubeconfig}",
        f"--manage-nodes-with-label-selector={LABEL}",
        "--node-lease-duration-seconds=40",
        "--cidr=10.245.0.0/16",
    ]


def set_gpus(lab: Lab, node_name: str, *, count: int, resource: str) -> None:
    """Advertise `count` devices on a node that has none. The scheduler counts them; a container gets nothing."""
    amount = {resource: str(count) if count else None}
    patch = json.dumps({"status": {"capacity": amount, "allocatable": amount}})
    kubectl(lab, "patch", "node", node_name, "--subresource=status", "--type=merge", "-p", patch)


def set_nodes(lab: Lab, *, count: int, gpus: int, is_schedulable: bool) -> None:
    """Have exactly `count` fake nodes, `fake-1` and so on; what ran on those that go is gone too."""
    wanted = [_node(f"fake-{number}", gpus, is_schedulable) for number in range(1, count + 1)]
    names = {each["metadata"]["name"] for each in wanted}
    there = set(kubectl(lab, "get", "nodes", "-l", LABEL, "-o=jsonpath={.items[*].metadata.name}").split())
    if surplus := sorted(there - names):
        kubectl(lab, "delete", "node", "--wait=false", *surplus)
        _delete_pods(lab, set(surplus))
    if wanted:
        listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": wanted})
        apply = ("apply", "--server-side", "--force-conflicts", "--field-manager=phoenix-lab", "-f", "-")
        kubectl(lab, *apply, stdin=listed)
        kubectl(lab, *apply, "--subresource=status", stdin=listed)


def wait_ready(lab: Lab, count: int) -> None:
    """Wait until kwok has taken over the fake nodes."""
    query = "-o=jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"

    def ready() -> bool:
        return kubectl(lab, "get", "nodes", "-l", LABEL, query).split().count("True") >= count

    log = lab.logs / "kwok.log"
    processes.wait_until(f"{count} fake nodes are ready", ready, deadline_s=60, log=log)


def _node(name: str, gpus: int, is_schedulable: bool) -> dict[str, Any]:
    key, _, value = LABEL.partition("=")
    amounts = _CAPACITY | ({GPU: str(gpus)} if gpus else {})
    labels = {key: value, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {} if is_schedulable else {"taints": [_TAINT]},
        "status": {"capacity": amounts, "allocatable": amounts},
    }


def _delete_pods(lab: Lab, nodes: set[str]) -> None:
    """Nobody is left to report that these pods ended."""
    columns = "-o=jsonpath={range .items[*]}{.spec.nodeName} {.metadata.namespace} {.metadata.name}{'\\n'}{end}"
    for line in kubectl(lab, "get", "pods", "--all-namespaces", columns).splitlines():
        on, _, where = line.partition(" ")
        if on in nodes:
            namespace, name = where.split()
            kubectl(
                lab, "delete", "pod", name, f"--namespace={namespace}", "--force", "--grace-period=0", "--wait=false"
            )
