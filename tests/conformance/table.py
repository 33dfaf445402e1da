"""The conformance table: what a rule is, and the list that the modules `rules_*` fill.

    python tests/conformance/table.py           print the table as Markdown

A rule is a small function that takes a client (`wire_rest.RestClient` or `wire_grpc.GrpcClient`) and asserts one thing;
its docstring is the rule's statement. A rule that exists in both transports is one function that runs over both.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Transport = Literal["rest", "grpc"]
# oip: the protocol or one of its extensions says so. phoenix: our own decision where they are silent or disagree.
Profile = Literal["oip", "phoenix"]
Check = Callable[..., None]

BOTH: tuple[Transport, ...] = ("rest", "grpc")
REST: tuple[Transport, ...] = ("rest",)
GRPC: tuple[Transport, ...] = ("grpc",)

# Where rules come from.
OIP_REST = "OIP v2, inference_rest.md"
OIP_GRPC = "OIP v2, inference_grpc.md"
BINARY = "Triton, extension_binary_data.md"
REPOSITORY = "Triton, extension_model_repository.md"
STATISTICS = "Triton, extension_statistics.md"
CONFIGURATION = "Triton, extension_model_configuration.md"
LOGGING = "Triton, extension_logging.md"
PARAMETERS = "Triton, extension_parameters.md"
TRITON_GRPC = "Triton, grpc_service.proto"
GRPC_HEALTH = "gRPC, health checking protocol"
GRPC_REFLECTION = "gRPC, server reflection protocol"
HTTP = "RFC 9110, HTTP semantics"
HTTP_1_1 = "RFC 9112, HTTP/1.1"
JSON = "RFC 8259, JSON"
KSERVE = "KServe, REST data plane"
PHOENIX = "Phoenix, limits and errors"

MODULES = ("rules_health", "rules_metadata", "rules_infer", "rules_json", "rules_binary", "rules_http",
           "rules_repository", "rules_statistics", "rules_grpc")  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One line of the table. `needs_folder`: only a server whose model files the check may change can be judged."""

    id: str
    statement: str
    source: str
    transports: tuple[Transport, ...]
    profile: Profile
    needs_folder: bool
    check: Check

    @property
    def group(self) -> str:
        """What the id begins with."""
        return self.id.partition(".")[0]


_RULES: dict[str, Rule] = {}


def rule(
    id: str,
    source: str,
    *,
    on: tuple[Transport, ...] = BOTH,
    profile: Profile = "oip",
    needs_folder: bool = False,
    each: Iterable[str] = (),
) -> Callable[[Check], Check]:
    """Put the decorated check into the table.

    With `each`, one rule for each value: the value is the check's second argument, ends the id in lower case, and
    stands in the statement where that says `{each}`.
    """

    def add(check: Check) -> Check:
        statement = " ".join((check.__doc__ or "").split())
        assert statement, f"rule {id} says nothing"
        cases: list[tuple[str, str, Check]] = [
            (f"{id}-{value.lower()}", statement.format(each=value), functools.partial(_call, check, value))
            for value in each
        ] or [(id, statement, check)]
        for case_id, text, run in cases:
            assert case_id not in _RULES, f"rule {case_id} stands twice in the table"
            _RULES[case_id] = Rule(case_id, text, source, on, profile, needs_folder, run)
        return check

    return add


def _call(check: Check, value: str, client: Any) -> None:
    check(client, value)


def rules() -> list[Rule]:
    """Return the whole table in the order of its modules."""
    for module in MODULES:
        importlib.import_module(f"conformance.{module}")
    return list(_RULES.values())


def markdown() -> str:
    """Return the table as Markdown."""
    lines = ["| rule | says | over | from | profile |", "|---|---|---|---|---|"]
    lines += [
        f"| `{line.id}` | {line.statement} | {', '.join(line.transports)} | {line.source} | {line.profile} |"
        for line in rules()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    # The rules register with the module `conformance.table`, not with this `__main__`.
    print(importlib.import_module("conformance.table").markdown())
