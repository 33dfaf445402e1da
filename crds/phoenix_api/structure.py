"""Flattens pydantic's JSON Schema of the API types into a structural schema, as Kubernetes defines it.

`crd` and `schema` render it, `reference` tabulates it, and `faults` reads from it what a field expects. What a
structural schema cannot say raises `NotStructural` with the path, so that a mistake in `types` never reaches a cluster.

Rules: kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions, "Specifying a structural
schema". Words for messages travel as `x-expects`, which no generated file contains.
"""

import re
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from phoenix_api.fields import ApiObject
from phoenix_api.rules import Rule, rules_of
from phoenix_api.types import PhoenixModel

Schema = dict[str, Any]
_INT_OR_STRING = "x-kubernetes-int-or-string"
_PRESERVED = "x-kubernetes-preserve-unknown-fields"
_VALIDATIONS = "x-kubernetes-validations"
_BOUNDS = {"string": "maxLength", "array": "maxItems", "map": "maxProperties"}
_KEPT = frozenset(
    (
        *("type", "description", "default", "enum", "anyOf", "x-expects", _INT_OR_STRING, _PRESERVED, _VALIDATIONS),
        *("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
        *("items", "minItems", "maxItems", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
        *("minLength", "maxLength", "pattern", "minimum", "maximum"),
    )
)


class NotStructural(Exception):
    """The types say something that a CustomResourceDefinition cannot."""


@cache
def model_schema() -> Schema:
    """Return the schema of a whole PhoenixModel. Shared: do not change it."""
    return flatten(PhoenixModel)


def flatten(kind: type[ApiObject]) -> Schema:
    """Return the structural schema of a type. Raises `NotStructural`."""
    generated = kind.model_json_schema(by_alias=True, mode="validation", schema_generator=_WithRules)
    return _Flattening(generated.get("$defs", {})).node(generated, kind.__name__, ())


class _WithRules(GenerateJsonSchema):
    """Pydantic's generator, which puts the CEL of the table of rules onto the objects that they are about."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        generated = super().model_schema(schema)
        rules = [_cel(rule, generated) for rule in rules_of(schema["cls"])]
        if rules:
            generated[_VALIDATIONS] = rules
        return generated


def _cel(rule: Rule, owner: Schema) -> Schema:
    entry = {"rule": rule.cel, "message": rule.message}
    if rule.location:
        if rule.location[0] not in owner.get("properties", {}):
            raise NotStructural(f"rule of {rule.on}: there is no field {rule.field}")
        entry["fieldPath"] = f".{rule.field}"
    return entry


class _Flattening:
    """One walk; `definitions` are the types by name."""

    def __init__(self, definitions: Schema) -> None:
        self._definitions = definitions

    def node(self, node: Schema, path: str, within: tuple[str, ...]) -> Schema:
        node, within = self._resolved(node, path, within)
        if "const" in node:
            node = {**node, "enum": [node["const"]]}
        flat = {key: value for key, value in node.items() if key in _KEPT and value is not None}
        if unknown := set(node) - _KEPT - {"title", "const", "default"}:
            raise NotStructural(f"{path}: a structural schema has no {', '.join(sorted(unknown))}")
        if "anyOf" in flat and not flat.get(_INT_OR_STRING):
            raise NotStructural(f"{path}: a structural schema has no unions but int-or-string")
        extra = flat.pop("additionalProperties", None)
        if isinstance(extra, dict):
            flat["additionalProperties"] = self.node(extra, f"{path}.*", within)
        elif extra is True and not flat.get(_PRESERVED):
            raise NotStructural(f"{path}: unknown fields are allowed but not declared as preserved")
        if "properties" in flat:
            flat["properties"] = self._properties(flat, path, within)
        if "items" in flat:
            flat["items"] = self.node(flat["items"], f"{path}[]", within)
        if flat.get("type") == "integer":
            flat["format"] = "int64"
        _check_bounds(flat, path)
        if "default" in flat and (problem := _mismatch(flat["default"], flat) or _unguarded(flat)):
            raise NotStructural(f"{path}: the default {problem}")
        return flat

    def _properties(self, owner: Schema, path: str, within: tuple[str, ...]) -> Schema:
        properties = {}
        for name, value in owner["properties"].items():
            if name not in owner.get("required", ()) and "default" not in value:
                # a default factory leaves no trace in pydantic's schema, but an optional field has `default: null`
                is_list = self._resolved(value, path, within)[0].get("type") == "array"
                value = {**value, "default": [] if is_list else {}}
            properties[name] = self.node(value, f"{path}.{name}", within)
        return properties

    def _resolved(self, node: Schema, path: str, within: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
        """Replace references and the null of an optional field by what they stand for."""
        while True:
            if "$ref" in node:
                name = node["$ref"].rpartition("/")[2]
                if name in within:
                    raise NotStructural(f"{path}: {name} contains itself")
                within = (*within, name)
                node = {**self._definitions[name], **{key: value for key, value in node.items() if key != "$ref"}}
            elif "anyOf" in node and not node.get(_INT_OR_STRING):
                choices = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
                if len(choices) != 1:
                    raise NotStructural(f"{path}: a structural schema has no unions but int-or-string")
                node = {**choices[0], **{key: value for key, value in node.items() if key != "anyOf"}}
            elif len(node.get("allOf", ())) == 1:
                node = {**node["allOf"][0], **{key: value for key, value in node.items() if key != "allOf"}}
            else:
                return {key: value for key, value in node.items() if key != "$defs"}, within


def _check_bounds(flat: Schema, path: str) -> None:
    if flat.get(_INT_OR_STRING):
        shape = "string"
    elif "additionalProperties" in flat or flat.get(_PRESERVED):
        shape = "map"
    else:
        shape = flat.get("type", "")
    if not shape:
        raise NotStructural(f"{path}: there is no type")
    if shape in _BOUNDS and _BOUNDS[shape] not in flat and "enum" not in flat:
        raise NotStructural(
            f"{path}: a {shape} needs {_BOUNDS[shape]}, or the API server cannot bound the cost of rules"
        )
    if "additionalProperties" in flat and "properties" in flat:
        raise NotStructural(f"{path}: properties and additionalProperties exclude each other")


def _unguarded(flat: Schema) -> str:
    """Say which rule the API server cannot try on the default, which it does before the fields have theirs."""
    for rule in flat.get(_VALIDATIONS, ()):
        for name in sorted(set(re.findall(r"self\.(\w+)", rule["rule"]))):
            if f"has(self.{name})" not in rule["rule"]:
                return f"{flat['default']!r} has no {name}, which a rule reads without has(): {rule['message']}"
    return ""


def _mismatch(value: Any, flat: Schema) -> str:
    """Say why a default does not fit its own schema; empty if it does."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
    }  # fmt: skip
    wanted: Any = (int, str) if flat.get(_INT_OR_STRING) else kinds[flat["type"]]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        return f"{value!r} has another type"
    if "enum" in flat and value not in flat["enum"]:
        return f"{value!r} is not in {flat['enum']}"
    if isinstance(value, str):
        is_fit = len(value) <= flat.get("maxLength", len(value)) and re.search(flat.get("pattern", ""), value)
        return "" if is_fit and len(value) >= flat.get("minLength", 0) else f"{value!r} breaks its bounds or pattern"
    if isinstance(value, int | float):
        is_fit = flat.get("minimum", value) <= value <= flat.get("maximum", value)
        return "" if is_fit else f"{value!r} is out of range"
    least = flat.get("minItems" if isinstance(value, list) else "minProperties", 0)
    if len(value) < least:
        return f"{value!r} has fewer than {least} entries"
    missing = sorted(set(flat.get("required", ())) - set(value)) if isinstance(value, dict) else []
    return f"{value!r} lacks {', '.join(missing)}" if missing else ""
