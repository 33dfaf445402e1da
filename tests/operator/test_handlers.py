"""The watches: real kopf against a tiny API server."""

from pathlib import Path

import pytest
from objects import SETTINGS
from watch_server import Sink, WatchServer, watching

from phoenix_operator.app import watched_kinds
from phoenix_operator.kinds import CHILDREN, DEPLOYMENT, OPTIONAL, PHOENIX_MODEL, POD, POD_MONITOR, Kind
from phoenix_operator.observed import Object
from phoenix_operator.settings import (
    AutoscalingProvider,
    AutoscalingSettings,
    Monitoring,
    MonitorKind,
    Prometheus,
    RouteKind,
    Routes,
    Settings,
)

SELECTOR = "app.kubernetes.io/managed-by=phoenix-operator"

PROMETHEUS = Prometheus(url="http://prometheus")


def model(name: str, version: int = 1) -> Object:
    return body(PHOENIX_MODEL, name, version)


def body(kind: Kind, name: str, version: int = 1) -> Object:
    metadata = {"name": name, "namespace": "ml", "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": {}}


def test_listed_and_streamed_objects_reach_the_sink_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = watched_kinds(SETTINGS, frozenset())
    server = WatchServer(kinds)
    server.objects[PHOENIX_MODEL] = [model("fraud"), model("iris")]

    async def talk(sink: Sink) -> None:
        await sink.until(lambda told: len(told) == 2)
        assert set(sink.told) == {(PHOENIX_MODEL, None, "fraud"), (PHOENIX_MODEL, None, "iris")}
        await server.watched(kinds)
        server.tell(PHOENIX_MODEL, "MODIFIED", model("fraud", 2))
        await sink.until(lambda told: (PHOENIX_MODEL, "MODIFIED", "fraud") in told)
        server.tell(DEPLOYMENT, "ADDED", body(DEPLOYMENT, "fraud", 3))
        server.tell(POD, "DELETED", body(POD, "fraud-1", 4))
        await sink.until(lambda told: len(told) == 5)

    sink = watching(server, tmp_path, monkeypatch, talk)
    assert sorted(sink.told[3:], key=str) == sorted(
        [(DEPLOYMENT, "ADDED", "fraud"), (POD, "DELETED", "fraud-1")], key=str
    )
    assert {seen.verb for seen in server.seen} == {"list", "watch"}
    of_ours = [seen for seen in server.seen if seen.kind in kinds]
    assert {seen.kind for seen in of_ours if seen.verb == "watch"} == set(kinds)
    for seen in of_ours:
        expected = None if seen.kind == PHOENIX_MODEL else SELECTOR
        assert seen.query.get("labelSelector") == expected, seen
        if seen.verb == "list":
            assert seen.query["limit"] == "100"
        else:
            assert seen.query["timeoutSeconds"] == "290"


def test_namespaced_watch_stays_in_its_namespaces_and_looks_for_no_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = watched_kinds(SETTINGS, frozenset())
    server = WatchServer(kinds)

    async def talk(_: Sink) -> None:
        await server.watched(kinds, times=2)

    watching(server, tmp_path, monkeypatch, talk, namespaces=("ml", "other"))
    assert {seen.namespace for seen in server.seen} == {"ml", "other"}
    assert {seen.kind for seen in server.seen} == set(kinds)


def test_kind_that_the_cluster_does_not_serve_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(monitoring=Monitoring(kind=MonitorKind.POD_MONITOR))
    served = [kind for kind in watched_kinds(settings, frozenset()) if kind not in OPTIONAL]
    server = WatchServer(served)

    async def talk(_: Sink) -> None:
        await server.watched(served)

    watching(server, tmp_path, monkeypatch, talk, settings=settings)
    assert POD_MONITOR not in {seen.kind for seen in server.seen}


@pytest.mark.parametrize(
    ("settings", "watched"),
    [
        (Settings(), set()),
        (Settings(routes=Routes(kind=RouteKind.HTTP_ROUTE)), {"HTTPRoute"}),
        (Settings(monitoring=Monitoring(kind=MonitorKind.POD_MONITOR)), {"PodMonitor"}),
        (Settings(monitoring=Monitoring(kind=MonitorKind.SERVICE_MONITOR)), {"ServiceMonitor"}),
        (
            Settings(autoscaling=AutoscalingSettings(provider=AutoscalingProvider.KEDA, prometheus=PROMETHEUS)),
            {"ScaledObject", "TriggerAuthentication"},
        ),
    ],
)
def test_kinds_that_no_setting_leads_to_are_watched_only_where_old_ones_may_be(
    settings: Settings, watched: set[str]
) -> None:
    switched = {"HTTPRoute", "PodMonitor", "ServiceMonitor", "ScaledObject", "TriggerAuthentication"}
    every = {PHOENIX_MODEL, POD, *CHILDREN}
    kinds = watched_kinds(settings, frozenset())
    assert {str(kind) for kind in every - set(kinds)} == switched - watched
    assert len(set(kinds)) == len(kinds)
    assert set(watched_kinds(settings, OPTIONAL)) == every
