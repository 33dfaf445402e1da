"""The generators: the CRD is structural, bounded and as designed; the committed files are current."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

from phoenix_api import crd, reference, schema
from phoenix_api.__main__ import main
from phoenix_api.conditions import CONDITIONS, ConditionType, Reason
from phoenix_api.fields import ApiObject
from phoenix_api.structure import NotStructural, flatten

ROOT = Path(__file__).parents[2]
DEFINITION = crd.custom_resource_definition()
VERSION = DEFINITION["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
GENERATED = {
    "crd": ROOT / "crds/phoenixmodels.yaml",
    "schema": ROOT / "crds/phoenixmodel.schema.json",
    "reference": ROOT / "docs/reference/phoenixmodel.md",
}
# apiextensions/v1 JSONSchemaProps that a structural schema may use
ALLOWED = {
    *("type", "format", "description", "default", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum"),
    *("properties", "required", "additionalProperties", "minProperties", "maxProperties", "anyOf"),
    *("items", "minItems", "maxItems", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    *("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations"),
}


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from nodes(node["additionalProperties"], f"{path}.*")


NODES = dict(nodes(SCHEMA))
PLAIN = {path: node for path, node in NODES.items() if path not in ("", ".apiVersion", ".kind", ".metadata")}


@pytest.mark.parametrize("path", PLAIN)
def test_node_is_structural_described_and_bounded(path: str) -> None:
    node = PLAIN[path]
    assert set(node) <= ALLOWED
    if node.get("x-kubernetes-int-or-string"):
        assert "type" not in node
        assert node["anyOf"] == [{"type": "integer"}, {"type": "string"}]
    else:
        assert node["type"] in ("object", "array", "string", "integer", "number", "boolean")
        assert "anyOf" not in node
    assert not ("properties" in node and "additionalProperties" in node)
    assert ("items" in node) == (node.get("type") == "array")
    if node.get("type") == "string":
        assert "maxLength" in node or "enum" in node
    if node.get("type") == "array":
        assert "maxItems" in node
    if "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields"):
        assert "maxProperties" in node
    if not path.endswith(("[]", ".*")):
        assert node["description"]


def test_root_leaves_metadata_to_the_api_server() -> None:
    assert SCHEMA["properties"]["metadata"] == {"type": "object"}
    assert SCHEMA["required"] == ["spec"]


@pytest.mark.parametrize("path", [path for path, node in NODES.items() if "x-kubernetes-validations" in node])
def test_rule_names_only_fields_that_exist_and_is_safe_to_evaluate(path: str) -> None:
    for rule in NODES[path]["x-kubernetes-validations"]:
        assert rule["message"]
        assert "\n" not in rule["message"]
        if "fieldPath" in rule:
            assert f"{path}{rule['fieldPath']}" in NODES
        for name in re.findall(r"\bself((?:\.[a-z][A-Za-z0-9]*)+)(?!\()\b", rule["rule"]):
            known = name.rpartition(".")[0] if re.search(r"\.(startsWith|matches|all|exists_one)$", name) else name
            if not known.startswith(".metadata"):
                assert f"{path}{known}" in NODES, f"{known} of {rule['rule']}"


def test_optional_fields_are_guarded_in_rules() -> None:
    for path, node in NODES.items():
        for rule in node.get("x-kubernetes-validations", ()):
            for name in set(re.findall(r"self\.([a-zA-Z0-9]+)", rule["rule"])) - {"metadata"}:
                child = node["properties"][name]
                is_there = name in node.get("required", ()) or "default" in child
                assert is_there or f"has(self.{name})" in rule["rule"], f"{path}: {rule['rule']}"


def test_definition_has_names_columns_and_subresources() -> None:
    assert DEFINITION["metadata"]["name"] == "phoenixmodels.phoenix-ml.io"
    assert DEFINITION["spec"]["names"] == {
        "plural": "phoenixmodels",
        "singular": "phoenixmodel",
        "kind": "PhoenixModel",
        "listKind": "PhoenixModelList",
        "shortNames": ["phx", "pm"],
        "categories": ["phoenix", "all"],
    }
    columns = [(column["name"], column.get("priority", 0)) for column in VERSION["additionalPrinterColumns"]]
    assert columns == [
        *[(name, 0) for name in ("READY", "STATUS", "VERSION", "DEVICE", "P95", "AGE")],
        *[("URI", 1), ("ENDPOINT", 1)],
    ]
    scale = VERSION["subresources"]["scale"]
    paths = [*scale.values(), *(field["jsonPath"] for field in VERSION["selectableFields"])]
    paths += [column["jsonPath"] for column in VERSION["additionalPrinterColumns"] if "?" not in column["jsonPath"]]
    assert all(path in NODES for path in paths if not path.startswith(".metadata"))
    assert VERSION["subresources"]["status"] == {}


def test_conditions_are_a_map_by_type() -> None:
    conditions = NODES[".status.conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]
    assert "type" in conditions["items"]["required"]


def test_defaults_are_those_of_the_design() -> None:
    spec = SCHEMA["properties"]["spec"]["properties"]
    assert {name for name, node in spec.items() if node.get("default") == {}} == {
        *("runtime", "batching", "warmup", "limits", "resources", "networking", "rollout", "pod")
    }
    assert NODES[".spec.batching.maxRows"]["default"] == 32
    assert NODES[".spec.limits.maxRequestBytes"]["default"] == "64Mi"
    assert NODES[".spec.limits.timeoutSeconds"]["default"] == 30
    assert NODES[".spec.replicas"]["default"] == 1
    assert "default" not in spec["autoscaling"]


class WithUnion(ApiObject):
    """Has a union."""

    field: Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=3)] = Field(1, description="x")


class Recursive(ApiObject):
    """Contains itself."""

    inner: "Recursive | None" = Field(None, description="x")


class UnboundedText(ApiObject):
    """Has no bound."""

    field: str = Field("", description="x")


class UnboundedList(ApiObject):
    """Has no bound."""

    field: list[Annotated[str, Field(max_length=3)]] = Field(default_factory=list, description="x")


class UnboundedMap(ApiObject):
    """Has no bound."""

    field: dict[str, int] = Field(default_factory=dict, description="x")


class WrongDefault(ApiObject):
    """Breaks its own bounds."""

    field: int = Field(0, ge=1, description="x")


class RequiredInside(ApiObject):
    """Needs a field."""

    name: int


class DefaultLacksField(ApiObject):
    """Defaults to an object that is not valid."""

    field: RequiredInside = Field(default_factory=lambda: RequiredInside(name=1), description="x")


class ShortDefault(ApiObject):
    """Defaults to a list that is too short."""

    field: Annotated[list[int], Field(min_length=1, max_length=2)] = Field(default_factory=list, description="x")


class Untyped(ApiObject):
    """Says nothing about its field."""

    field: Any = Field(1, description="x")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithUnion, "WithUnion.field: a structural schema has no unions"),
        (Recursive, "Recursive contains itself"),
        (UnboundedText, "UnboundedText.field: a string needs maxLength"),
        (UnboundedList, "UnboundedList.field: a array needs maxItems"),
        (UnboundedMap, "UnboundedMap.field: a map needs maxProperties"),
        (WrongDefault, "WrongDefault.field: the default 0 is out of range"),
        (DefaultLacksField, "DefaultLacksField.field: the default {} lacks name"),
        (ShortDefault, "ShortDefault.field: the default [] has fewer than 1 entries"),
        (Untyped, "Untyped.field: there is no type"),
    ],
)
def test_generation_fails_with_the_path_for_what_is_not_structural(kind: type[ApiObject], message: str) -> None:
    with pytest.raises(NotStructural, match=re.escape(message)):
        flatten(kind)


def test_generation_fails_for_a_rule_that_the_default_object_would_break() -> None:
    class KafkaRequests(ApiObject):
        """Has, by its name, a rule that reads its topics without has()."""

        topic: str = Field("", max_length=9)
        results: str = Field("", max_length=9)
        dead_letter_topic: str = Field("", max_length=9)

    class Holder(ApiObject):
        """Defaults to it."""

        field: KafkaRequests = Field(default_factory=KafkaRequests)

    with pytest.raises(NotStructural, match=r"Holder\.field: the default \{\} has no deadLetterTopic"):
        flatten(Holder)


@pytest.mark.parametrize("what", GENERATED)
def test_generated_file_is_current_and_says_so_in_line_1(what: str) -> None:
    assert main([what, "--check", str(GENERATED[what])]) == 0
    first = GENERATED[what].read_text().splitlines()[0]
    assert "GENERATED" in first
    assert f"python -m phoenix_api {what}" in first


def test_check_of_a_stale_file_shows_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "crd.yaml"
    assert main(["crd", "--check", str(file)]) == 1
    assert main(["crd", "--output", str(file)]) == 0
    assert main(["crd", "--check", str(file)]) == 0
    file.write_text(file.read_text().replace("phoenixmodels", "phoenixmodel"))
    capsys.readouterr()
    assert main(["crd", "--check", str(file)]) == 1
    told = capsys.readouterr().err
    assert f"python -m phoenix_api crd --output {file}" in told
    assert "+  name: phoenixmodels.phoenix-ml.io" in told


def test_printed_text_is_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crd"]) == 0
    assert capsys.readouterr().out == GENERATED["crd"].read_text()
    assert yaml.safe_load(crd.render()) == DEFINITION
    assert "x-expects" not in crd.render() + schema.render() + reference.render()


def test_reference_has_every_field_rule_condition_and_reason() -> None:
    page = reference.render()
    for path, node in PLAIN.items():
        if path.count(".") > 1 and not path.endswith(("[]", ".*")):
            assert f"| `{path.rpartition('.')[2]}` |" in page
        assert all(rule["message"] in page for rule in node.get("x-kubernetes-validations", ()))
    assert all(f"| `{reason}` | {reason.meaning} |" in page for reason in Reason)
    assert all(f"| `{kind}`" in page for kind in ConditionType)


def test_every_reason_but_unknown_belongs_to_a_condition() -> None:
    used = {reason for row in CONDITIONS.values() for reason in (*row.when_true, *row.otherwise)}
    assert set(Reason) - used == {Reason.UNKNOWN}
    assert list(CONDITIONS) == list(ConditionType)
