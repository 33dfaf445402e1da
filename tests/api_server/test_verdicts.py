"""The table of specs through a real API server: the verdict, the field and the words are those of the Python types."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import Answer, Api, ApiServer, in_turn, models_path
from specs import CASES, GOOD, Case

from phoenix_api import ManifestError, PhoenixModel, Quantity, parse_manifests
from phoenix_api.rules import RULES

NAMESPACE = "verdicts"
STRUCTURAL = [case for case in CASES if not case.valid and case.caught_by == "schema"]
BROKEN = [case for case in CASES if case.caught_by == "cel"]
UNKNOWN = [case for case in CASES if case.caught_by == "pruning"]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture(scope="session")
def answers(server: ApiServer) -> dict[str, Answer]:
    """What the API server says to the creation of each spec, by the id of the case; nothing is stored."""

    async def ask(api: Api) -> list[Answer]:
        await api.make_namespace(NAMESPACE)
        return await in_turn(
            api("POST", models_path(NAMESPACE), case.manifest(), dryRun="All", fieldValidation="Strict")
            for case in CASES
        )

    return dict(zip((case.id for case in CASES), server.run(ask), strict=True))


@each(CASES)
def test_verdict_is_that_of_the_table(case: Case, answers: dict[str, Answer]) -> None:
    assert answers[case.id].is_success is case.valid, answers[case.id].message


@each(STRUCTURAL)
def test_structural_fault_names_the_same_field(case: Case, answers: dict[str, Answer]) -> None:
    # the API server joins keys of maps by a dot
    field = re.sub(r"\[([^\d].*?)\]", r".\1", case.field)
    assert field in {field for field, _ in answers[case.id].causes}


@each(BROKEN)
def test_broken_rules_are_told_by_the_same_field_and_message(case: Case, answers: dict[str, Answer]) -> None:
    told = {
        # a rule about metadata stands at the root, and only its message can name the field
        ("metadata.name", message.removeprefix("metadata.name: ")) if message.startswith("metadata.name: ")
        else (field, message)
        for field, message in ((field, words.removeprefix("Invalid value: ")) for field, words in
                               answers[case.id].causes)
    }  # fmt: skip
    assert told == set(rules_broken(case))


def rules_broken(case: Case) -> Iterator[tuple[str, str]]:
    """Yield path and message of each rule that the Python types find broken."""
    with pytest.raises(ManifestError) as caught:
        parse_manifests(json.dumps(case.manifest()), file="case.json")
    for fault in caught.value.faults:
        (message,) = {rule.message for rule in RULES if fault.message.startswith(rule.message)}
        yield fault.path, message


@each(UNKNOWN)
def test_unknown_field_is_named(case: Case, answers: dict[str, Answer]) -> None:
    assert f'unknown field "{case.field}"' in answers[case.id].message


@each(GOOD)
def test_defaults_written_are_those_of_the_types(case: Case, answers: dict[str, Answer]) -> None:
    assert stored_differs_from_types(case.spec, answers[case.id].body["spec"]) == ""


def stored_differs_from_types(spec: dict[str, Any], stored: dict[str, Any]) -> str:
    """Say where the stored spec is not what the types make of the same manifest; empty if nowhere."""
    document = {"metadata": {"name": "model"}, "spec": spec}
    dumped = PhoenixModel.read(document, strict=True).spec.model_dump(by_alias=True, mode="python", exclude_none=True)
    return difference(dumped, stored, "spec")


def difference(ours: object, theirs: object, path: str) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = ((f"{path}.{key}", ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys()))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = ((f"{path}[{index}]", *pair) for index, pair in enumerate(zip(ours, theirs, strict=True)))
    else:
        # a quantity that was written as an integer stays one in the API server
        is_same = ours == theirs or (isinstance(ours, Quantity) and ours == str(theirs))
        return "" if is_same else f"{path}: {ours!r} here, {theirs!r} there"
    return next((found for where, one, other in pairs if (found := difference(one, other, where))), "")


# --- updates ---------------------------------------------------------------------------------------------------------


def test_no_rule_compares_with_the_old_object() -> None:
    """One that does needs a row of its own here, because a creation never breaks it."""
    assert not [rule.message for rule in RULES if "oldSelf" in rule.cel]


@pytest.fixture(scope="session")
def stored(server: ApiServer, answers: dict[str, Answer]) -> dict[str, Any]:
    """A model as it is stored."""
    path, body = models_path(NAMESPACE), Case("", GOOD[0].spec, name="stored").manifest()
    return server.run(lambda api: api.must("POST", path, body))


def test_update_is_held_to_the_same_rules(server: ApiServer, stored: dict[str, Any]) -> None:
    async def ask(api: Api) -> list[Answer]:
        return await in_turn(
            api("PUT", models_path(NAMESPACE, "stored"), stored | {"spec": case.spec}, dryRun="All",
                fieldValidation="Strict")
            for case in CASES if case.name == "model"
        )  # fmt: skip

    cases = [case for case in CASES if case.name == "model"]
    wrong = [
        f"{case.id}: {answer.code} {answer.message}"
        for case, answer in zip(cases, server.run(ask), strict=True)
        if answer.is_success is not case.valid
    ]
    assert wrong == []


def test_generation_counts_specs_and_nothing_else(server: ApiServer, stored: dict[str, Any]) -> None:
    path = models_path(NAMESPACE, "stored")
    assert stored["metadata"]["generation"] == 1
    labelled = copy.deepcopy(stored)
    labelled["metadata"]["labels"] = {"example.com/team": "risk"}
    told = server.ask("PUT", path, labelled)
    assert told.body["metadata"]["generation"] == 1
    told = server.ask("PUT", f"{path}/status", told.body | {"status": {"observedGeneration": 1}})
    assert told.body["metadata"]["generation"] == 1
    assert told.body["status"] == {"observedGeneration": 1, "conditions": []}
    changed = server.ask("PUT", path, told.body | {"spec": told.body["spec"] | {"replicas": 2}, "status": {}})
    assert changed.body["metadata"]["generation"] == 2
    assert changed.body["status"] == told.body["status"], "a spec's writer cannot change the status"
