"""Runs the conformance table (`table.py`, `rules_*.py`), one test for each rule and transport."""

import pytest
from conformance.table import Rule, Transport, rules
from conformance.wire import Client

CHECKS = [pytest.param(line, over, id=f"{line.id}[{over}]") for line in rules() for over in line.transports]


@pytest.mark.parametrize(("line", "over"), CHECKS)
def test_rule(
    line: Rule,
    over: Transport,
    clients: dict[Transport, Client],
    profile: str,
    record_property: pytest.FixtureRequest,
) -> None:
    for name, value in (("rule", line.id), ("group", line.group), ("transport", over), ("profile", line.profile)):
        record_property(name, value)  # type: ignore[operator]
    if profile == "oip" and line.profile == "phoenix":
        pytest.skip("a decision of Phoenix's own, beyond the protocol (--profile oip)")
    if over not in clients:
        pytest.skip("no gRPC address was given (--grpc host:port)")
    server = clients[over]
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
