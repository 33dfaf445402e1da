"""What can be wrong with a manifest, in words: field, expectation, and what came. Used by `manifest` and `documents`.

It hides pydantic's error types: the expectation is read from the generated schema, which is built only when there is
something to complain about.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

Location = Sequence[str | int]
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `document` counts from 1 (0: the file itself), `path` is in camelCase, `line` counts from 1."""

    file: Path
    document: int
    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = [str(self.file), *([f"document {self.document}"] if self.document else []), self.path, self.message]
        return ": ".join(part for part in where if part) + (f" (line {self.line})" if self.line else "")


class ManifestError(Exception):
    """Manifests that cannot be used; `faults` has every fault of every document of every file."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


def path_of(location: Location) -> str:
    """Write a location as in `spec.pod.env[0].name` or `spec.pod.labels[example.com/team]`."""
    path = ""
    for part in location:
        if isinstance(part, int) or not _PLAIN_KEY.fullmatch(part):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def shown(value: object) -> str:
    """Write what came, shortly and without a password that a URI may carry."""
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    written = re.sub(r"://[^/@]*@", "://***@", repr(str(value) if isinstance(value, str) else value))
    return written if len(written) <= 100 else f"{written[:80]}… ({len(written) - 2} characters)"


def close_match(word: object, known: Sequence[str]) -> str:
    """Return `, did you mean X?` where one of the known words looks like `word`, else nothing."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(str(word).replace("_", "").lower(), list(by_lower), n=1)
    return f", did you mean {by_lower[matches[0]]}?" if matches else ""


def explain(error: ValidationError) -> list[tuple[Location, str]]:
    """Return location and message of every fault that pydantic found in a PhoenixModel."""
    from phoenix_api.structure import model_schema  # only now: building it costs more than reading a manifest

    schema = model_schema()
    return [_explain_one(schema, detail) for detail in error.errors(include_url=False)]


def _explain_one(schema: dict[str, Any], detail: Any) -> tuple[Location, str]:
    location, came = detail["loc"], detail["input"]
    if detail["type"] == "rule":
        # a rule about a whole object has nothing short to show
        return location, detail["msg"] + (f", got {shown(came)}" if isinstance(came, str | int | float) else "")
    if detail["type"] == "extra_forbidden":
        known = list(_node_at(schema, location[:-1]).get("properties", {}))
        hint = close_match(location[-1], known) or (f", expected one of {', '.join(known)}" if known else "")
        return location, f"unknown field{hint}"
    if location and location[-1] == "[key]":
        return location[:-1], f"expected a string as key, got {shown(came)}"
    expected = expectation(_node_at(schema, location))
    if detail["type"] == "missing":
        return location, f"expected {expected}, got nothing"
    return location, f"expected {expected}, got {shown(came)}{_quoting_hint(_node_at(schema, location), came)}"


def _quoting_hint(node: dict[str, Any], came: object) -> str:
    wants_string = node.get("type") == "string" and "enum" not in node
    is_unquoted = isinstance(came, int | float) if wants_string else isinstance(came, float)
    if is_unquoted and (wants_string or "x-kubernetes-int-or-string" in node):
        return f'; quote it: "{shown(came)}"'
    return ""


def _node_at(schema: dict[str, Any], location: Location) -> dict[str, Any]:
    node = schema
    for part in location:
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
    return node


def expectation(node: dict[str, Any]) -> str:
    """Say in words what a node of the schema accepts."""
    if "enum" in node:
        *firsts, last = node["enum"]
        return f"one of {', '.join(firsts)} or {last}" if firsts else str(last)
    if "x-expects" in node and "x-kubernetes-int-or-string" in node:
        return str(node["x-expects"])
    match node.get("type"):
        case "integer" | "number" as kind:
            name = "an integer" if kind == "integer" else "a number"
            return name + _range(node.get("minimum"), node.get("maximum"), "")
        case "string":
            if "x-expects" in node:
                return f"{node['x-expects']}, at most {node['maxLength']} characters"
            return "a string" + _length(node.get("minLength"), node.get("maxLength"), " characters")
        case "array":
            return "a list" + _length(node.get("minItems"), node.get("maxItems"), " items")
        case "boolean":
            return "true or false"
        case "object" if "maxProperties" in node:
            return "an object" + _length(node.get("minProperties"), node.get("maxProperties"), " entries")
        case _:
            return "an object"


def _range(least: float | None, most: float | None, unit: str) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}{unit}"
    if least is not None:
        return f" of at least {least}{unit}"
    return f" of at most {most}{unit}" if most is not None else ""


def _length(least: int | None, most: int | None, unit: str) -> str:
    if least and most:
        return f" of {least} to {most}{unit}"
    return _range(least, most, unit)
