"""Makes Grafana's JSON of the boards, with Grafana's own SDK; the only importer of it.

The boards load in Grafana 9 and newer, by provisioning or by import: schema version 36, no library panels, plugins that
every Grafana has, and the data source as a variable.
"""

import json
from collections.abc import Callable

import alerts
import operator_board
import panels
import server_boards
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from panels import Board, Panel, Query

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT = {"stat": 4, "timeseries": 8, "table": 7}
_TAG = "phoenix"
# The SDK has a class for each kind, with the same methods.
Builder = stat.Panel | table.Panel | timeseries.Panel


def boards() -> list[Board]:
    """Return every board."""
    return [server_boards.overview(), server_boards.model(), server_boards.bindings(), operator_board.operator()]


def files() -> dict[str, Callable[[], str]]:
    """Return for each file in dashboards/grafana what writes its text."""
    return {f"{board.uid}.json": lambda board=board: render(board) for board in boards()}  # type: ignore[misc]


def render(board: Board) -> str:
    """Return a board as Grafana imports it."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([_TAG])
        .timezone("browser")
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(_other_boards())
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for name in board.variables:
        made.with_variable(_variable(name, board))
    number = 0
    for title, members in board.rows:
        number += 1
        made.with_row(dashboard.Row(title).id(number))
        for member in members:
            number += 1
            made.with_panel(_panel(member).id(number))
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _other_boards() -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink("Phoenix")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([_TAG])
        .as_dropdown(True)
        .include_vars(True)
        .keep_time(True)
    )


def _variable(name: str, board: Board) -> dashboard.QueryVariable:
    # "All" is any value, also that of a scrape without this label, as under Compose
    chosen = f'{board.found_by}{{namespace=~"$namespace"}}' if name == "model" else board.found_by
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(_SOURCE)
        .query({"query": f"label_values({chosen}, {name})", "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _panel(panel: Panel) -> Builder:
    made = _BUILDERS[panel.kind](panel)
    made.title(panel.title).datasource(_SOURCE).unit(panel.unit).span(panel.width).height(_HEIGHT[panel.kind])
    if panel.description:
        made.description(panel.description)
    if panel.steps:
        steps = [models.Threshold(value=value, color=colour) for value, colour in panel.steps]
        made.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    if panel.alerts:
        made.links([_runbook(name) for name in panel.alerts])
    for number, query in enumerate(panel.queries):
        made.with_target(_target(query, panel.kind).ref_id(chr(ord("A") + number)))
    return made


def _runbook(alert: str) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink(f"Runbook: {alert}")
        .type(models.DashboardLinkType.LINK)
        .url(f"{alerts.RUNBOOKS}/{alert}.md")
        .target_blank(True)
    )


def _target(query: Query, kind: panels.Kind) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).datasource(_SOURCE)
    if query.legend:
        made.legend_format(query.legend)
    if kind == "table":
        return made.instant().format(PromQueryFormat.TABLE)
    return made.range()


def _stat(panel: Panel) -> stat.Panel:
    reduced = common.ReduceDataOptions().calcs(["lastNotNull"])
    colour = common_models.BigValueColorMode.VALUE if panel.steps else common_models.BigValueColorMode.NONE
    return stat.Panel().reduce_options(reduced).color_mode(colour).graph_mode(common_models.BigValueGraphMode.AREA)


def _table(panel: Panel) -> table.Panel:
    hidden = {"Time": True, "Value": True, "__name__": True, "alertstate": True}
    dropped = models.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    made = table.Panel().show_header(True).with_transformation(dropped)
    if any("ALERTS" in query.expr for query in panel.queries):
        # the cell with an alert's name leads to its page
        link = {"title": "Runbook", "url": f"{alerts.RUNBOOKS}/${{__value.text}}.md", "targetBlank": True}
        made.override_by_name("alertname", [models.DynamicConfigValue(id_val="links", value=[link])])
    return made


def _timeseries(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .fill_opacity(5)
        .line_width(1)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if panel.is_from_zero:
        made.min(0)
    if panel.steps:
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(common_models.GraphTresholdsStyleMode.DASHED))
    return made


_BUILDERS: dict[panels.Kind, Callable[[Panel], Builder]] = {"stat": _stat, "table": _table, "timeseries": _timeseries}
