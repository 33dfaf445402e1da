"""Kubernetes events: what is worth one, and how they are written."""

import asyncio
from typing import Any, cast

import kubernetes_validate
import pytest
from memory_cluster import Call, MemoryCluster
from objects import NOW, STAMP, subject

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import EVENT
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Object
from phoenix_operator.recorder import Happening, Recorder, happenings

CRASH = Happening("Warning", "CrashLoop", "pod fraud-1 ended with exit code 1")


def row(kind: str, status: str, reason: str, message: str = "words") -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


ACCEPTED, LOADING = row("Accepted", "True", "SpecUnderstood"), row("Available", "False", "Loading")
READY, NOT_READY = row("Ready", "True", "Ready"), row("Ready", "False", "Loading")
CRASHING, PULLING = row("Available", "False", "CrashLoop"), row("Available", "False", "ImagePullFailed")
SERVING = row("Available", "True", "ReplicasAvailable")
ROLLING, ROLLED = row("Progressing", "True", "RollingOut"), row("Progressing", "True", "RolledOut")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([], [ACCEPTED, LOADING, ROLLING, NOT_READY], []),
        ([], [row("ModelVerified", "Unknown", "Unknown")], []),
        ([LOADING], [CRASHING], [("Warning", "CrashLoop")]),
        ([CRASHING], [CRASHING | {"message": "other words"}], []),
        ([CRASHING], [PULLING], [("Warning", "ImagePullFailed")]),
        ([CRASHING], [SERVING], []),
        ([LOADING, NOT_READY], [CRASHING, row("Ready", "False", "CrashLoop")], [("Warning", "CrashLoop")]),
        ([], [row("Accepted", "False", "NameClash"), row("Available", "False", "NameClash")],
         [("Warning", "NameClash")]),
        ([NOT_READY], [READY], [("Normal", "Ready")]),
        ([READY], [row("Ready", "True", "FellBackToCPU")], [("Normal", "FellBackToCPU")]),
        ([READY], [NOT_READY], []),
        ([], [ROLLED], []),
        ([ROLLING], [ROLLED], [("Normal", "RolledOut")]),
        ([ROLLED], [ROLLING], [("Normal", "RollingOut")]),
        ([ROLLED], [row("Progressing", "False", "DeadlineExceeded")], [("Warning", "DeadlineExceeded")]),
        ([row("ModelVerified", "Unknown", "Loading")], [row("ModelVerified", "True", "SchemaChanged")],
         [("Warning", "SchemaChanged")]),
        ([], [row("AcceleratorReady", "True", "SessionOnAccelerator")], []),
    ],
)  # fmt: skip
def test_change_of_conditions_is_told_if_it_says_something(
    before: list[Object], after: list[Object], told: list[tuple[str, str]]
) -> None:
    assert [(happened.type, happened.reason) for happened in happenings(before, after)] == told


def record(cluster: MemoryCluster, *happened: Any, metrics: Metrics | None = None, uid: str = "u") -> Metrics:
    metrics = metrics or Metrics()

    async def main() -> None:
        recorder = Recorder(cast(Cluster, cluster), metrics, host="operator-1")
        for each in happened:
            if isinstance(each, Happening):
                await recorder.record(subject(uid=uid), each, NOW)
            else:
                each()

    asyncio.run(main())
    return metrics


def dropped(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("phoenix_operator_events_dropped_total")


def test_event_is_about_the_model_and_valid() -> None:
    cluster = MemoryCluster()
    record(cluster, CRASH)
    (event,) = cluster.of_kind(EVENT)
    kubernetes_validate.validate(event, "1.37", strict=True)
    assert event["involvedObject"] == {
        "apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "name": "fraud", "namespace": "ml", "uid": "u",
    }  # fmt: skip
    assert (event["type"], event["reason"], event["message"], event["count"]) == (
        "Warning", "CrashLoop", "pod fraud-1 ended with exit code 1", 1,
    )  # fmt: skip
    assert event["firstTimestamp"] == event["lastTimestamp"] == STAMP
    assert (event["source"], event["reportingInstance"]) == ({"component": "phoenix-operator"}, "operator-1")
    assert len(event["metadata"]["name"]) <= 253


def test_same_happening_is_counted_up() -> None:
    cluster = MemoryCluster()
    record(cluster, CRASH, CRASH, CRASH)
    (event,) = cluster.of_kind(EVENT)
    assert event["count"] == 3
    assert [call.verb for call in cluster.calls] == ["get", "create", "update", "update"]


def test_restarted_operator_counts_on() -> None:
    cluster = MemoryCluster()
    record(cluster, CRASH)
    record(cluster, CRASH)
    assert [event["count"] for event in cluster.of_kind(EVENT)] == [2]


def test_other_words_or_another_model_of_the_name_are_another_event() -> None:
    cluster = MemoryCluster()
    record(cluster, CRASH, Happening("Warning", "CrashLoop", "other words"))
    record(cluster, CRASH, uid="successor")
    assert len(cluster.of_kind(EVENT)) == 3


def test_long_message_is_cut_to_what_an_event_takes() -> None:
    cluster = MemoryCluster()
    record(cluster, Happening("Normal", "Ready", "x" * 5000))
    assert len(cluster.of_kind(EVENT)[0]["message"]) == 1024


def test_event_that_expired_is_dropped_once_and_then_made_again() -> None:
    cluster = MemoryCluster()

    def expire() -> None:
        cluster.remove(EVENT, cluster.of_kind(EVENT)[0]["metadata"]["name"])

    metrics = record(cluster, CRASH, expire, CRASH, CRASH)
    assert [event["count"] for event in cluster.of_kind(EVENT)] == [1]
    assert dropped(metrics) == 1


@pytest.mark.parametrize("code", [0, 403, 409, 500])
def test_event_that_cannot_be_written_is_counted_and_nothing_else(code: int) -> None:
    cluster = MemoryCluster()

    def refuse(_: Call) -> None:
        raise ApiError(code, "", "no")

    cluster.refuse = refuse
    assert dropped(record(cluster, CRASH, CRASH)) == 2


def test_namespace_that_ends_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    cluster = MemoryCluster()

    def refuse(_: Call) -> None:
        raise ApiError(403, "Forbidden", "forbidden because it is being terminated")

    cluster.refuse = refuse
    record(cluster, CRASH)
    assert caplog.records == []


def test_events_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phoenix_operator.recorder._MOST_REMEMBERED", 2)
    cluster = MemoryCluster()
    several = [Happening("Normal", "Ready", str(number)) for number in range(4)]
    record(cluster, *several, several[3], several[0])
    assert [call.verb for call in cluster.calls][-3:] == ["update", "get", "update"]
