"""The golden files of the operator's tests, on a real API server: it takes each object, and has nothing to mend.

A golden file shows what a scenario becomes; here it is applied as the operator applies it, in a namespace of its own.
"""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_client import APPLY, Answer, Api, ApiServer, in_turn

from phoenix_operator.difference import is_as_wanted
from phoenix_operator.kinds import CHILDREN, Kind, kind_of

FILES = sorted((Path(__file__).parents[1] / "operator/golden").glob("*.yaml"))
Applied = list[tuple[dict[str, Any], Answer, Answer]]


@pytest.fixture(scope="session")
def served(server: ApiServer) -> frozenset[Kind]:
    """The kinds that this API server has; the others are said."""

    async def ask(api: Api) -> list[Answer]:
        return await in_turn(api("GET", kind.path(None), limit="1") for kind in CHILDREN)

    found = frozenset(kind for kind, answer in zip(CHILDREN, server.run(ask), strict=True) if answer.is_success)
    print(
        f"kinds that this API server does not serve: {', '.join(str(kind) for kind in CHILDREN if kind not in found)}"
    )
    return found


@pytest.fixture(scope="session")
def applied(server: ApiServer, served: frozenset[Kind]) -> dict[str, Applied]:
    """By file: each object, and what the API server says when it is applied once and once more."""

    async def apply_file(api: Api, name: str, bodies: list[dict[str, Any]]) -> Applied:
        namespace = f"golden-{name}"
        await api.make_namespace(namespace)
        found = []
        for body in bodies:
            if kind_of(body) in served:
                wanted = copy.deepcopy(body)
                wanted["metadata"]["namespace"] = namespace
                found.append((wanted, await apply(api, wanted), await apply(api, wanted)))
        return found

    golden = {file.stem: [body for body in yaml.safe_load_all(file.read_text()) if body] for file in FILES}
    answers = server.run(lambda api: in_turn(apply_file(api, name, bodies) for name, bodies in golden.items()))
    return dict(zip(golden, answers, strict=True))


async def apply(api: Api, body: dict[str, Any]) -> Answer:
    path = kind_of(body).path(body["metadata"]["namespace"], body["metadata"]["name"])
    return await api("PATCH", path, body, kind=APPLY, fieldManager="phoenix-operator", fieldValidation="Strict")


def test_there_are_golden_files_of_every_kind_that_is_served(
    applied: dict[str, Applied], served: frozenset[Kind]
) -> None:
    counted = Counter(str(kind_of(body)) for objects in applied.values() for body, _, _ in objects)
    print(f"{counted.total()} objects of {len(FILES)} files: {dict(counted)}")
    assert counted.keys() == {str(kind) for kind in served} == {str(kind) for kind in CHILDREN}


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_every_object_is_taken_and_is_as_wanted_then(name: str, applied: dict[str, Applied]) -> None:
    for body, first, second in applied[name]:
        what = f"{body['kind']} {body['metadata']['name']}"
        assert first.code == 201, f"{what}: {first.code} {first.message}"
        assert is_as_wanted(body, first.body), f"{what} would be applied again and again"
        before, after = (answer.body["metadata"]["resourceVersion"] for answer in (first, second))
        assert before == after, f"{what}: a second apply changes it"
