"""Fixtures of the conformance table: a server started here, or one that `--url` and `--grpc` name.

    pytest tests/conformance                                                        a Phoenix, started and stopped here
    pytest tests/conformance --url http://host:8000 --grpc host:8001 [--profile oip]   any server

A server that is judged from outside has to serve the conformance models (`python tests/conformance/models.py DIR`
writes them), and nobody else should use it meanwhile: some rules count requests, and some unload `oip-spare`,
`oip-version` and `oip-slow` and load them again.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `conformance` and `phoenix_process`
pytest.register_assert_rewrite("conformance", "phoenix_process")

from conformance import models  # noqa: E402
from conformance.table import Transport  # noqa: E402
from conformance.wire import Client  # noqa: E402
from conformance.wire_grpc import GrpcClient  # noqa: E402
from conformance.wire_rest import RestClient  # noqa: E402
from phoenix_process import start  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--url", help="REST address of a running server, http://host:port")
    group.addoption("--grpc", help="gRPC address of the same server, host:port")
    group.addoption(
        "--profile",
        choices=("phoenix", "oip"),
        default="phoenix",
        help="oip: leave out what the protocol does not decide, and take any client error for a refusal",
    )


@dataclasses.dataclass(frozen=True)
class Judged:
    """The server under judgement; `folder` holds its models if it was started here."""

    rest_url: str
    grpc_target: str | None
    folder: Path | None
    missing: frozenset[str]


@pytest.fixture(scope="session")
def profile(pytestconfig: pytest.Config) -> str:
    """Which rules count: `phoenix` (all) or `oip`."""
    return str(pytestconfig.getoption("--profile", "phoenix"))


@pytest.fixture(scope="session")
def judged(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    """The server: named on the command line, or started here on free ports with the conformance models."""
    url = pytestconfig.getoption("--url", None)
    if url:
        yield Judged(url.rstrip("/"), pytestconfig.getoption("--grpc", None), None, _missing(url))
        return
    folder = tmp_path_factory.mktemp("conformance-models")
    models.write(folder)
    # Rules damage files and mend them: what is served shall change only when a rule asks for it.
    settings = {"PHOENIX_WATCH": "false", "PHOENIX_MEASURE_CAPACITY": "false"}
    with start([folder], settings) as running:
        yield Judged(running.rest_url, running.grpc_target, folder, frozenset())


@pytest.fixture(scope="session")
def clients(judged: Judged, profile: str) -> Iterator[dict[Transport, Client]]:
    """A client for each transport that there is an address for."""
    shared = {"is_strict": profile == "phoenix", "folder": judged.folder, "missing": judged.missing}
    found: dict[Transport, Client] = {"rest": RestClient(**shared, url=judged.rest_url)}
    if judged.grpc_target:
        grpc_client = GrpcClient(**shared, target=judged.grpc_target)
        found["grpc"] = grpc_client
    yield found
    if judged.grpc_target:
        grpc_client.close()


def _missing(url: str) -> frozenset[str]:
    """Return the conformance models that a server does not have."""
    client = RestClient(url=url)
    names = {model.name for model in models.MODELS}
    return frozenset(name for name in names if client.http("GET", client.model_path(name)).status != 200)


# --- the summary -----------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table's result by group and transport, and why rules were left out."""
    counted: Counter[tuple[str, str, str]] = Counter()
    reasons: Counter[str] = Counter()
    rules = set()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            facts = dict(getattr(report, "user_properties", ()))
            if "rule" not in facts or (report.when != "call" and outcome == "passed"):
                continue
            rules.add(facts["rule"])
            counted[facts["group"], facts["transport"], "failed" if outcome == "error" else outcome] += 1
            if outcome == "skipped" and isinstance(report.longrepr, tuple):
                reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    if not counted:
        return
    terminalreporter.section(f"conformance: {len(rules)} rules, {sum(counted.values())} checks")
    row = "{:<16} {:<6} {:>7} {:>7} {:>8}".format
    terminalreporter.write_line(row("group", "over", "passed", "failed", "skipped"))
    pairs = list(dict.fromkeys((group, transport) for group, transport, _ in counted))
    for group, transport in sorted(pairs):
        numbers = [counted[group, transport, outcome] for outcome in ("passed", "failed", "skipped")]
        terminalreporter.write_line(row(group, transport, *numbers))
    totals = [sum(n for key, n in counted.items() if key[2] == outcome) for outcome in ("passed", "failed", "skipped")]
    terminalreporter.write_line(row("all", "", *totals))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"skipped {count}: {reason}")
