"""Runs the conformance table (`table.py`, `rules_*.py`), one test for each rule and transport."""

from collections.abc import Callable

import pytest
from conformance.table import Rule, rules
from conformance.wire import Client


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A Phoenix that is started here is judged over both of its gRPC engines."""
    if "line" not in metafunc.fixturenames:
        return
    engines = ["grpc"] if metafunc.config.getoption("--url", None) else ["grpc", "grpcio"]
    metafunc.parametrize(
        ("line", "over"),
        [
            pytest.param(line, over, id=f"{line.id}[{over}]")
            for line in rules()
            for transport in line.transports
            for over in (engines if transport == "grpc" else [transport])
        ],
    )


def test_rule(
    line: Rule,
    over: str,
    profile: str,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    for name, value in (("rule", line.id), ("group", line.group), ("transport", over)):
        record_property(name, value)
    if profile == "oip" and line.profile == "phoenix":
        pytest.skip("a decision of Phoenix's own, beyond the protocol (--profile oip)")
    server: Client = request.getfixturevalue(f"{over}_client")
    if line.needs_folder and server.folder is None:
        pytest.skip("damages a model's file, which only a server started here allows")
    line.check(server)


def test_table_is_whole() -> None:
    """The table has the size that was promised, and each rule says what it is and where it comes from."""
    assert len(rules()) >= 110
    for line in rules():
        assert line.statement.endswith(".")
        assert "{each}" not in line.statement
        assert line.source
