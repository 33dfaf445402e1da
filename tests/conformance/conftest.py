"""Fixtures of the conformance table: a server started here, or one that `--url` and `--grpc` name.

    pytest tests/conformance                                                        a Phoenix, started and stopped here
    pytest tests/conformance --url http://host:8000 --grpc host:8001 [--profile oip]   any server

A server that is judged from outside has to serve the conformance models (`python tests/conformance/models.py DIR`
writes them), and nobody else should use it meanwhile: some rules count requests, and some unload `oip-spare`,
`oip-version` and `oip-slow` and load them again.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `conformance` and `phoenix_process`
if "conformance" not in sys.modules:  # tests/clients imports it too
    pytest.register_assert_rewrite("conformance", "phoenix_process")

from conformance import models
from conformance.wire_grpc import GrpcClient
from conformance.wire_rest import RestClient
from phoenix_process import start


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
    """The server under judgement, and what its clients have in common."""

    rest_url: str
    grpc_target: str | None
    shared: dict[str, Any]


@pytest.fixture(scope="session")
def profile(pytestconfig: pytest.Config) -> str:
    """Which rules count: `phoenix` (all) or `oip`."""
    return str(pytestconfig.getoption("--profile", "phoenix"))


@pytest.fixture(scope="session")
def judged(pytestconfig: pytest.Config, profile: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    """The server: named on the command line, or started here on free ports with the conformance models."""
    url = pytestconfig.getoption("--url", None)
    if url:
        url = url.rstrip("/")
        shared = {"is_strict": profile == "phoenix", "missing": _missing(url)}
        yield Judged(url, pytestconfig.getoption("--grpc", None), shared)
        return
    with _started(tmp_path_factory.mktemp("conformance-models"), "auto") as server:
        yield server


@pytest.fixture(scope="session")
def rest_client(judged: Judged) -> RestClient:
    """The server over REST."""
    return RestClient(url=judged.rest_url, **judged.shared)


@pytest.fixture(scope="session")
def grpc_client(judged: Judged) -> Iterator[GrpcClient]:
    """The server over gRPC."""
    if not judged.grpc_target:
        pytest.skip("no gRPC address was given (--grpc host:port)")
    client = GrpcClient(target=judged.grpc_target, **judged.shared)
    yield client
    client.close()


@pytest.fixture(scope="session")
def grpcio_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcClient]:
    """A second server, started here, whose gRPC engine is grpcio (the first has the one that is chosen by itself)."""
    with _started(tmp_path_factory.mktemp("conformance-models"), "grpcio") as server:
        assert server.grpc_target is not None
        client = GrpcClient(target=server.grpc_target, **server.shared)
        yield client
        client.close()


@contextlib.contextmanager
def _started(folder: Path, grpc_engine: str) -> Iterator[Judged]:
    models.write(folder)
    # Rules damage files and mend them: what is served shall change only when a rule asks for it.
    settings = {"PHOENIX_WATCH": "false", "PHOENIX_MEASURE_CAPACITY": "false", "PHOENIX_GRPC_ENGINE": grpc_engine}
    with start([folder], settings) as running:
        yield Judged(running.rest_url, running.grpc_target, {"folder": folder})


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
