"""Whether a live object is as wanted: the API server's habits are no difference, edits of owned fields are."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import rendered, subject
from specs import COMPLETE, GOOD

from phoenix_operator.difference import is_as_wanted
from phoenix_operator.kinds import OPTIONAL
from phoenix_operator.observed import HASH, Object, Observed
from phoenix_operator.settings import Gateway, Monitoring, MonitorKind, RouteKind, Routes, Settings

ROUTED = Settings(
    routes=Routes(kind=RouteKind.HTTP_ROUTE, gateway=Gateway(name="web", namespace="gateways")),
    monitoring=Monitoring(kind=MonitorKind.POD_MONITOR),
)
SCALED = {key: value for key, value in COMPLETE.items() if key != "autoscaling"} | {"replicas": 3}
WANTED = rendered(subject(**SCALED), Observed(served_kinds=OPTIONAL), ROUTED)
each_object = pytest.mark.parametrize("wanted", WANTED, ids=lambda body: f"{body['kind']} {body['metadata']['name']}")
Path = tuple[str | int, ...]


def wish(body: Object) -> Object:
    return {"metadata": {"annotations": {HASH: "h"}}, **body}


def leaves(node: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every scalar."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield path
        return
    for key, child in children:
        yield from leaves(child, (*path, key))


def at(node: Any, path: Path) -> Any:
    for part in path:
        node = node[part]
    return node


@each_object
def test_object_is_as_wanted_by_itself_and_with_what_the_server_adds(wanted: Object) -> None:
    live = copy.deepcopy(wanted)
    assert is_as_wanted(wanted, live)
    live["metadata"] |= {"uid": "u", "resourceVersion": "5", "generation": 2, "managedFields": [{"manager": "x"}]}
    live["status"] = {"observedGeneration": 2}
    assert is_as_wanted(wanted, live)


@each_object
def test_every_edit_of_an_owned_field_is_seen(wanted: Object) -> None:
    for path in leaves(wanted):
        if at(wanted, path) in ("", None):
            continue
        live = copy.deepcopy(wanted)
        at(live, path[:-1])[path[-1]] = "edited"
        assert not is_as_wanted(wanted, live), path


@each_object
def test_every_owned_field_that_is_taken_away_is_seen(wanted: Object) -> None:
    for path in leaves(wanted):
        if at(wanted, path) in ("", None):
            continue
        live = copy.deepcopy(wanted)
        del at(live, path[:-1])[path[-1]]
        assert not is_as_wanted(wanted, live), path


def test_changed_wish_is_seen_although_the_live_object_holds_it() -> None:
    live = wish({"spec": {"a": 1, "b": 2}})
    assert not is_as_wanted({"metadata": {"annotations": {HASH: "other"}}, "spec": {"a": 1}}, live)
    assert not is_as_wanted(wish({"spec": {"a": 1}}), {"metadata": {}, "spec": {"a": 1}})
    assert not is_as_wanted(wish({"spec": {"a": 1}}), {"metadata": {"annotations": None}, "spec": {"a": 1}})


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_empty_value_that_the_server_leaves_out_is_no_difference(empty: Any) -> None:
    assert is_as_wanted(wish({"spec": {"group": empty}}), wish({"spec": {}}))
    assert not is_as_wanted(wish({"spec": {"group": empty}}), wish({"spec": {"group": ["x"]}}))


@pytest.mark.parametrize("zero", [0, False])
def test_zero_and_false_are_no_empty_values(zero: Any) -> None:
    assert not is_as_wanted(wish({"spec": {"maxUnavailable": zero}}), wish({"spec": {}}))


@pytest.mark.parametrize(
    ("mine", "stored", "is_same"),
    [
        ("1024Mi", "1Gi", True), ("0.5", "500m", True), ("1000m", "1", True), ("1", 1, True), ("1Gi", "1G", False),
        ("1", "2", False), ("1", "much", False), ("1", None, False),
        ("1e-99", "1e-3", True), ("0.1n", "1m", True), ("1.5m", "2m", True), ("0", "1m", False), ("1e-9", "2m", False),
        ("1e99", "9223372036854775807", True), ("9Ei", "9223372036854775807", True), ("8Ei", "8Ei", True),
        ("7Ei", "9223372036854775807", False), ("1.000000001Pi", "1125899907968523907m", True),
    ],
)  # fmt: skip
def test_quantity_is_compared_by_its_value(mine: str, stored: Any, is_same: bool) -> None:
    for field in ("requests", "limits"):
        wanted, live = {"resources": {field: {"memory": mine}}}, {"resources": {field: {"memory": stored}}}
        assert is_as_wanted(wish(wanted), wish(live)) is is_same
    assert is_as_wanted(wish({"emptyDir": {"sizeLimit": mine}}), wish({"emptyDir": {"sizeLimit": stored}})) is is_same


def test_text_that_looks_like_a_quantity_is_compared_as_text() -> None:
    assert not is_as_wanted(wish({"spec": {"version": "1.0"}}), wish({"spec": {"version": "1"}}))


@pytest.mark.parametrize(
    ("field", "mine", "foreign"),
    [
        ("containers", {"name": "server", "image": "a"}, {"name": "sidecar"}),
        ("env", {"name": "A", "value": "1"}, {"name": "B"}),
        ("ports", {"name": "http", "port": 80}, {"name": "admin", "port": 81}),
        ("volumes", {"name": "tmp"}, {"name": "token"}),
        ("volumeMounts", {"mountPath": "/tmp", "name": "tmp"}, {"mountPath": "/var/tmp", "name": "tmp"}),
        ("ownerReferences", {"uid": "1", "name": "fraud"}, {"uid": "2", "name": "fraud"}),
        ("topologySpreadConstraints", {"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"},
         {"topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}),
    ],
)  # fmt: skip
def test_member_that_others_add_to_a_map_is_theirs(field: str, mine: Object, foreign: Object) -> None:
    wanted = wish({"spec": {field: [mine]}})
    assert is_as_wanted(wanted, wish({"spec": {field: [foreign, mine]}}))
    assert is_as_wanted(wanted, wish({"spec": {field: [mine, foreign]}}))
    assert not is_as_wanted(wanted, wish({"spec": {field: [foreign]}}))


@pytest.mark.parametrize(
    ("field", "mine", "foreign"),
    [
        ("ports", {"protocol": "TCP", "port": 8000}, {"protocol": "TCP", "port": 22}),
        ("parentRefs", {"name": "web"}, {"name": "other"}),
        ("hostnames", "models.example.com", "other.example.com"),
        ("args", "serve", "--debug"),
        ("from", {"podSelector": {}}, {"namespaceSelector": {}}),
        ("drop", "ALL", "NONE"),
    ],
)
def test_member_that_others_add_to_a_list_of_one_owner_is_a_difference(field: str, mine: Any, foreign: Any) -> None:
    wanted = wish({"spec": {field: [mine]}})
    assert is_as_wanted(wanted, wish({"spec": {field: [mine]}}))
    assert not is_as_wanted(wanted, wish({"spec": {field: [mine, foreign]}}))
    assert not is_as_wanted(wanted, wish({"spec": {field: [foreign, mine]}}))


@pytest.mark.parametrize("field", ["selector", "podSelector", "namespaceSelector", "labelSelector", "nodeSelector"])
def test_label_that_others_add_to_a_selector_is_a_difference(field: str) -> None:
    for mine in ({"a": "b"}, {"matchLabels": {"a": "b"}}):
        theirs = {key: value | {"c": "d"} if isinstance(value, dict) else value for key, value in mine.items()}
        wanted = wish({"spec": {field: mine}})
        assert is_as_wanted(wanted, wish({"spec": {field: mine}}))
        assert not is_as_wanted(wanted, wish({"spec": {field: mine | {"c": "d"}}}))
        assert theirs == mine or not is_as_wanted(wanted, wish({"spec": {field: theirs}}))


def test_members_without_what_identifies_them_are_compared_in_order() -> None:
    wanted = wish({"spec": {"env": [{"value": "1"}, {"value": "2"}]}})
    assert is_as_wanted(wanted, wish({"spec": {"env": [{"value": "1"}, {"value": "2"}]}}))
    assert not is_as_wanted(wanted, wish({"spec": {"env": [{"value": "2"}, {"value": "1"}]}}))


@pytest.mark.parametrize("live", [None, 1, "x", [], {}, [1], {"a": 1}])
def test_value_of_another_type_is_a_difference(live: Any) -> None:
    for mine in ({"b": 1}, [2], "y", 3):
        assert not is_as_wanted(wish({"spec": mine}), wish({"spec": live}))


def enriched(draw: st.DrawFn, node: Any, field: str = "") -> Any:
    """Add fields of other owners wherever the API allows them; an empty object is itself a wish (select everything)."""
    if isinstance(node, dict) and node and not field.lower().endswith("selector"):
        extra = draw(st.dictionaries(st.sampled_from(["zzA", "zzB"]), st.sampled_from([1, "x", [1], {"y": 2}])))
        return {**{key: enriched(draw, value, key) for key, value in node.items()}, **extra}
    if isinstance(node, list):
        rows = [enriched(draw, row) for row in node]
        if field in ("containers", "env", "volumes") and draw(st.booleans()):
            rows.insert(draw(st.integers(0, len(rows))), {"name": "zz-foreign", "zzC": 1})
        return rows
    return node


@st.composite
def with_foreign_fields(draw: st.DrawFn) -> tuple[Object, Object]:
    spec = draw(st.sampled_from([case.spec for case in GOOD]))
    wanted = draw(st.sampled_from(rendered(subject(**spec), Observed(served_kinds=OPTIONAL), ROUTED)))
    return wanted, enriched(draw, wanted)


@settings(max_examples=200, deadline=None)
@given(with_foreign_fields())
def test_any_object_equals_itself_plus_foreign_fields(pair: tuple[Object, Object]) -> None:
    wanted, live = pair
    assert is_as_wanted(wanted, live)
