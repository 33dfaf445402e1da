"""The dashboards: what they ask for exists, nothing that is measured is forgotten, and Grafana 9 can load them."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import alerts
import boards
import pytest
import queries
import server_boards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard
from panels import Board, Panel
from rules.known_metrics import exposed, names_in, reference

FOLDER = Path(boards.__file__).parent / "grafana"
BOARDS = boards.boards()
ALERTS = {alert.name: alert for alert in alerts.alerts()}
UNITS = {value for name, value in vars(units).items() if not name.startswith("_") and isinstance(value, str)}
each_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


register_default_plugins()


def loaded(board: Board) -> dict[str, Any]:
    """Return a board as it is committed."""
    found: dict[str, Any] = json.loads((FOLDER / f"{board.uid}.json").read_text())
    return found


def names(panel: Panel) -> set[str]:
    return set().union(*(names_in(query.expr) for query in panel.queries))


def test_there_is_a_file_for_each_board_and_no_other() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(boards.files())
    assert len(BOARDS) == 4


@each_board
def test_queries_read_metrics_that_exist(board: Board) -> None:
    for panel in board.panels():
        assert names(panel) <= reference(), panel.title


def test_every_metric_is_shown_somewhere() -> None:
    read = set().union(*(names(panel) for board in BOARDS for panel in board.panels()))
    shown = read | {re.sub(r"_(bucket|sum|count)$", "", name) for name in read}
    assert exposed() - shown == {"phoenix_model_slo_seconds"}  # the recording rules make what is shown of it


def test_every_alert_has_a_panel_that_shows_what_it_reads() -> None:
    shown: dict[str, set[str]] = {name: set() for name in ALERTS}
    for panel in (panel for board in BOARDS for panel in board.panels()):
        for name in panel.alerts:
            shown[name] |= names(panel)
    for name, alert in ALERTS.items():
        read = {queries.MISSING_PODS if metric == "up" else metric for metric in names_in(alert.expr)}
        assert shown[name] & read, f"{name} is linked from no panel that shows one of {sorted(read)}"


@each_board
def test_units_are_grafanas(board: Board) -> None:
    for panel in board.panels():
        assert panel.unit in UNITS, panel.title


@each_board
def test_grafana_9_can_load_it(board: Board) -> None:
    made = loaded(board)
    assert made["schemaVersion"] == 36
    assert made["uid"] == board.uid
    assert "id" not in made
    assert {panel["type"] for panel in made["panels"]} <= {"row", "timeseries", "stat", "table"}
    assert "libraryPanel" not in json.dumps(made)
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in made["panels"]:
        if panel["type"] != "row":
            assert panel["options"]
            assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH")[: len(panel["targets"])]


@each_board
def test_it_has_no_field_that_grafanas_schema_does_not_know(board: Board) -> None:
    made = loaded(board)
    read_back = json.dumps(GrafanaDashboard.from_json(made), cls=JSONEncoder)
    assert json.loads(read_back) == made


@each_board
def test_data_source_namespace_and_model_are_variables(board: Board) -> None:
    made = loaded(board)
    variables = {variable["name"]: variable for variable in made["templating"]["list"]}
    assert list(variables) == ["datasource", *board.variables]
    assert variables["datasource"]["query"] == "prometheus"
    for name in board.variables:
        assert variables[name]["includeAll"]
        assert variables[name]["allValue"] == ".*"
        assert names_in(variables[name]["query"]["query"].partition("(")[2].partition(",")[0]) <= reference()
    for panel in made["panels"]:
        for asked in [panel, *panel.get("targets", [])]:
            if panel["type"] != "row":
                assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = set(re.findall(r"\$(\w+)", " ".join(query.expr for panel in board.panels() for query in panel.queries)))
    assert used == {*board.variables, "__rate_interval"}


@each_board
def test_panels_lie_side_by_side(board: Board) -> None:
    spots = [panel["gridPos"] for panel in loaded(board)["panels"]]
    for spot in spots:
        assert spot["x"] + spot["w"] <= 24
    for one, other in itertools.combinations(spots, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@each_board
def test_panels_lead_to_runbooks(board: Board) -> None:
    urls = {link["url"] for panel in loaded(board)["panels"] for link in panel.get("links", [])}
    assert urls == {ALERTS[name].runbook_url for panel in board.panels() for name in panel.alerts}


def test_thresholds_stand_at_the_objective() -> None:
    (ratio, *_) = [
        panel for panel in loaded(server_boards.model())["panels"] if panel["title"] == "Latency / objective"
    ]
    steps = ratio["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [(step["value"], step["color"]) for step in steps] == [(None, "green"), (0.7, "yellow"), (1, "red")]
