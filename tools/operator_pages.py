"""Renders the reference pages of the operator: settings file, metrics, metrics of its metrics API. See `generate`."""

import json
from collections.abc import Iterator
from typing import Any

from phoenix_api.faults import expectation
from phoenix_operator.metrics import Metrics, MetricsApiMetrics
from phoenix_operator.settings import Settings

Schema = dict[str, Any]
_ABSENT = object()


def settings_page() -> str:
    """Return the text of docs/reference/operator-settings.md, without its header."""
    schema = Settings.model_json_schema(by_alias=True)
    defaults = Settings().model_dump(mode="json", by_alias=True, exclude_none=True)
    return (
        "# Settings of phoenix-operator\n\n"
        "One YAML file, named with `phoenix-operator run --settings FILE`; the install folder keeps it in the\n"
        "ConfigMap `phoenix-operator-settings`, under `settings.yaml`. It is read once, at the start. A field that is\n"
        "absent has its default; an unknown or wrong one is named and ends the process with exit code 2. `render`\n"
        "takes the same file. Durations are in seconds.\n\n" + "\n".join(sections(schema, defaults, "The file"))
    )


def metrics_page() -> str:
    """Return the text of docs/reference/operator-metrics.md, without its header."""
    metrics = Metrics()
    metrics.on_request("GET", 200, 0.1)
    metrics.watch_events.labels("Deployment", "MODIFIED")
    metrics.missed_events.labels("Deployment")
    metrics.backend_seconds.labels("redis", "ok")
    return (
        "# Metrics of phoenix-operator\n\n"
        "`GET /metrics` on `httpPort`, in the Prometheus text format. Gauges of work stand at 0 on a standby.\n\n"
        + _table(metrics)
    )


def metrics_api_page() -> str:
    """Return the text of docs/reference/metrics-api-metrics.md, without its header."""
    metrics = MetricsApiMetrics()
    metrics.on_request("GET", 200, 0.1)
    metrics.requests.labels("200")
    return (
        "# Metrics of phoenix-operator metrics-api\n\n"
        "`GET /metrics` on `httpPort`, in the Prometheus text format, from each replica.\n\n" + _table(metrics)
    )


def _table(metrics: Metrics | MetricsApiMetrics) -> str:
    rows = []
    for family in metrics.registry.collect():
        if not family.samples:
            raise RuntimeError(f"{family.name} has labels: give it an example above")
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        rows.append(f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |\n")
    return "| metric | type | labels | meaning |\n|---|---|---|---|\n" + "".join(rows)


def sections(schema: Schema, defaults: dict[str, Any], title: str) -> list[str]:
    """Return a section with a table for each object of a schema, the whole of it under `title`."""
    objects = _objects(schema, schema["$defs"], "", defaults)
    return [_section(path, node, value, title) for path, node, value in objects]


def _objects(node: Schema, known: dict[str, Schema], path: str, value: Any) -> Iterator[tuple[str, Schema, Any]]:
    """Yield every object with fields, outer ones first, with its references resolved and its defaults."""
    fields = {name: _resolved(child, known) for name, child in node["properties"].items()}
    yield path, node | {"properties": fields}, value
    for name, child in fields.items():
        inner, below = value.get(name, {}) if isinstance(value, dict) else {}, f"{path}.{name}" if path else name
        if "properties" in child:
            yield from _objects(child, known, below, inner)
        for member in child.get("patternProperties", {}).values():
            yield from _objects(_resolved(member, known), known, f"{below}.<name>", {})
        if "$ref" in child.get("items", {}):
            yield from _objects(_resolved(child["items"], known), known, f"{below}[]", {})


def _resolved(node: Schema, known: dict[str, Schema]) -> Schema:
    """Return the node that a reference or an optional value stands for; what is said beside it wins."""
    choices = [choice for choice in node.get("anyOf", []) if choice.get("type") != "null"]
    if len(choices) == 1:
        node = _resolved(choices[0], known) | {key: value for key, value in node.items() if key != "anyOf"}
    if "$ref" in node:
        node = known[node["$ref"].rpartition("/")[2]] | {key: value for key, value in node.items() if key != "$ref"}
    return node


def _section(path: str, node: Schema, value: Any, title: str) -> str:
    lines = [f"## {f'`{path}`' if path else title}", ""]
    if path:
        lines += [node.get("description", ""), ""]
    lines += ["| field | type | default | description |", "|---|---|---|---|"]
    for name, child in node["properties"].items():
        default = "*required*" if name in node.get("required", ()) else _default(child, value.get(name, _ABSENT))
        lines.append(f"| `{name}` | {_type(child)} | {default} | {child.get('description', '')} |")
    return "\n".join([*lines, ""])


def _type(node: Schema) -> str:
    words = expectation(node)
    if "pattern" in node and "x-expects" not in node:
        words = f"a string that matches `{node['pattern']}`"
    if "exclusiveMinimum" in node:
        words = words.replace(" of at most ", f" above {node['exclusiveMinimum']:g}, at most ")
    return words.replace("|", "\\|")


def _default(node: Schema, value: Any) -> str:
    value = node.get("default") if value is _ABSENT else value
    if value in (None, {}, []) or "properties" in node:
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"
