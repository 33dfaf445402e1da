"""The table of specs through all that refuse them but the API server: Python types, schemas of CRD and editor."""

import json
from typing import Any

import jsonschema
import pytest
from specs import CASES, Case

from phoenix_api import ManifestError, parse_manifests
from phoenix_api.crd import custom_resource_definition
from phoenix_api.rules import RULES
from phoenix_api.schema import editor_schema

OPENAPI = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
CRD = jsonschema.Draft202012Validator(OPENAPI)
EDITOR = jsonschema.Draft7Validator(editor_schema())
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def without_nulls(value: Any) -> Any:
    """The API server drops them before it validates."""
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return [without_nulls(child) for child in value] if isinstance(value, list) else value


def test_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 60


@each_case
def test_python_types_decide_as_the_table_says(case: Case) -> None:
    text = json.dumps(case.manifest())
    if case.valid:
        assert len(parse_manifests(text, file="case.json")) == 1
        return
    with pytest.raises(ManifestError) as caught:
        parse_manifests(text, file="case.json")
    assert case.field in {fault.path for fault in caught.value.faults}
    assert any(case.message in fault.message for fault in caught.value.faults if fault.path == case.field)


@each_case
def test_schema_of_the_crd_refuses_what_is_structural_and_nothing_else(case: Case) -> None:
    is_refused = not case.valid and case.caught_by == "schema"
    assert CRD.is_valid(without_nulls(case.manifest())) is not is_refused


@each_case
def test_schema_for_editors_also_refuses_unknown_fields(case: Case) -> None:
    is_refused = not case.valid and (case.caught_by != "cel" or case.field == "metadata.name")
    assert EDITOR.is_valid(without_nulls(case.manifest())) is not is_refused


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.on}: {rule.message[:50]}")
def test_every_rule_is_broken_by_a_case(rule: Any) -> None:
    broken = []
    for case in CASES:
        if case.caught_by == "cel":
            with pytest.raises(ManifestError) as caught:
                parse_manifests(json.dumps(case.manifest()), file="case.json")
            broken += [fault.message for fault in caught.value.faults]
    assert any(rule.message in message for message in broken)
