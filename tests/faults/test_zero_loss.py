"""Nothing is lost and nothing is answered twice when servers, broker and relays are killed: the proof in small.

`make zero-loss` is the same with 50 kills.
"""

import pytest
from faults.zero_loss import plan, prove
from faults.zero_loss_balance import Balance


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_loss_when_servers_broker_and_relays_are_killed(services_here):
    outcome = prove(kills=6, seed=7, servers=2, clients=3, say=print)
    assert not outcome.balance.faults
    assert sum(outcome.killed.values()) == 6
    assert len(outcome.killed) == 3
    assert outcome.balance.counts["audit verify"] == "clean"


def test_plan_is_the_same_for_a_seed_and_holds_each_kind():
    assert plan(20, seed=3) == plan(20, seed=3) != plan(20, seed=4)
    for seed in range(20):
        assert {kill.victim for kill in plan(3, seed)} == {"server", "broker", "relay"}
    assert len(plan(1, seed=0)) == 1


def test_balance_names_what_only_one_side_has():
    found = Balance()
    found.equal("rows and events", {"a", "b"}, {"b", "c"})
    found.equal("rows and rows", {"a"}, {"a"})
    found.none("duplicates", [])
    assert found.faults == ["rows and events: only the first has a", "rows and events: only the second has c"]
