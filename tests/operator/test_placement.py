"""What the nodes lack for a pod that cannot be placed."""

import asyncio
from typing import Any, cast

import pytest
import virtual_time
from memory_cluster import Call, MemoryCluster
from objects import loading, subject, unplaced

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import NODE, POD
from phoenix_operator.observed import Object, Pod
from phoenix_operator.placement import Placement, requests_of


def node(name: str, *, cordoned: bool = False, **allocatable: str) -> Object:
    amounts = {key.replace("_", "/").replace("gpu", "nvidia.com/gpu"): value for key, value in allocatable.items()}
    return {"metadata": {"name": name}, "spec": {"unschedulable": cordoned}, "status": {"allocatable": amounts}}


def running(name: str, on: str, **requests: str) -> Object:
    return {"metadata": {"name": name, "namespace": "x"},
            "spec": {"nodeName": on, "containers": [{"resources": {"requests": requests}}]}}  # fmt: skip


def waiting(**resources: Any) -> Pod:
    pod = unplaced(subject(), "0/1 nodes are available")
    pod.body["spec"]["containers"][0]["resources"] = resources
    return pod


def shortfall(cluster: MemoryCluster, *pods: Pod) -> str:
    return asyncio.run(Placement(cast(Cluster, cluster)).shortfall(list(pods)))


def cluster_of(*nodes: Object, pods: tuple[Object, ...] = ()) -> MemoryCluster:
    cluster = MemoryCluster()
    for body in nodes:
        cluster.put(NODE, body)
    for body in pods:
        cluster.put(POD, body)
    return cluster


def test_each_node_is_named_with_what_it_lacks() -> None:
    cluster = cluster_of(
        node("a", cpu="4", memory="8Gi", gpu="1"),
        node("b", cpu="64", memory="256Gi"),
        node("c", cpu="1", memory="512Mi", gpu="4"),
        pods=(running("x", "a", cpu="3500m"), running("y", "a", **{"nvidia.com/gpu": "1"})),
    )
    pod = waiting(requests={"cpu": "1", "memory": "1Gi"}, limits={"memory": "1Gi", "nvidia.com/gpu": "2"})
    assert shortfall(cluster, pod) == (
        "node a: cpu asked 1, free 500m of 4, nvidia.com/gpu asked 2, free 0 of 1; "
        "node b: nvidia.com/gpu asked 2, free 0 of 0; "
        "node c: memory asked 1024Mi, free 512Mi of 512Mi"
    )


def test_many_nodes_are_counted_after_the_third() -> None:
    cluster = cluster_of(*(node(f"n{number}", cpu="1") for number in range(9)))
    words = shortfall(cluster, waiting(requests={"cpu": "2"}))
    assert words.count("node n") == 3
    assert words.endswith("; and 6 more nodes")


def test_node_that_takes_no_pods_is_left_out() -> None:
    cluster = cluster_of(node("a", cpu="1"), node("b", cpu="1", cordoned=True))
    assert shortfall(cluster, waiting(requests={"cpu": "2"})) == "node a: cpu asked 2, free 1 of 1"


def test_nothing_is_asked_while_every_pod_has_its_place() -> None:
    cluster = cluster_of(node("a", cpu="1"))
    assert shortfall(cluster, loading(subject())) == ""
    assert cluster.calls == []


def test_nothing_is_said_where_amounts_are_not_what_is_lacking() -> None:
    cluster = cluster_of(node("a", cpu="64"))
    assert shortfall(cluster, waiting(requests={"cpu": "2"})) == ""


@pytest.mark.parametrize("code", [403, 0])
def test_nothing_is_said_without_the_right_to_read_nodes(code: int) -> None:
    cluster = cluster_of(node("a", cpu="1"))

    def refuse(_: Call) -> None:
        raise ApiError(code, "Forbidden", "no")

    cluster.refuse = refuse
    assert shortfall(cluster, waiting(requests={"cpu": "2"})) == ""


def test_nodes_are_read_at_most_once_in_a_few_seconds() -> None:
    async def main() -> list[int]:
        cluster = cluster_of(node("a", cpu="1"))
        placement, counts = Placement(cast(Cluster, cluster)), []
        for _ in range(4):
            await placement.shortfall([waiting(requests={"cpu": "2"})])
            counts.append(len(cluster.calls))
            await asyncio.sleep(2.4)
        return counts

    assert virtual_time.run(main()) == [2, 2, 2, 4]


def test_scheduler_counts_the_sum_of_containers_or_the_largest_init_container() -> None:
    def container(**amounts: str) -> Object:
        return {"resources": {"requests": amounts}}

    pod = {
        "spec": {
            "containers": [container(cpu="1", memory="1Gi"), container(cpu="500m"), {}],
            "initContainers": [container(cpu="1"), container(memory="4Gi")],
        }
    }
    assert requests_of(pod) == {"cpu": pytest.approx(1.5), "memory": 4 * 2**30}


def test_request_wins_over_the_limit() -> None:
    container = {"resources": {"limits": {"cpu": "4", "nvidia.com/gpu": "1"}, "requests": {"cpu": "2"}}}
    assert requests_of({"spec": {"containers": [container]}}) == {"cpu": 2, "nvidia.com/gpu": 1}
