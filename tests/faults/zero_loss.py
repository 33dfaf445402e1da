"""Proves that nothing is lost: kills servers, broker and relays at random under load, then counts everything.

    python tests/faults/zero_loss.py [--kills 50] [--seed N] [--servers 2] [--clients 4]

`kill -9` hits a server at work, the broker at work, or a server whose relay has events in hand (the relay lives in the
server's process); each comes back after a short while. At the end the answered requests, the audit's rows and the
events must be the same, and each asynchronous request must have exactly one result, in the order of its key. Exits 0
only then. `make zero-loss` runs it.
"""

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    _ROOT = Path(__file__).parents[2]
    sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tools")]

from faults.zero_loss_balance import Balance, balance, come_to_rest
from faults.zero_loss_load import Load
from faults.zero_loss_stage import Stage, stage
from lab.services import Service
from rich.console import Console
from rich.table import Table

Victim = Literal["server", "broker", "relay"]
_SHARES: dict[Victim, int] = {"server": 4, "relay": 3, "broker": 3}
MOST_KILLS = 500
_LONGEST_GAP_S = 1.5
_LONGEST_DOWN_S = 2.0
_MOMENT_WITHIN_S = 90.0
_LOOK_EVERY_S = 0.02
_SECONDS_A_KILL = 20.0
_FINISH_WITHIN_S = 240.0


@dataclass(frozen=True)
class Kill:
    """One fault: after a pause of `gap_s` the victim is killed, and started again `down_s` later."""

    victim: Victim
    gap_s: float
    down_s: float


def plan(kills: int, seed: int) -> list[Kill]:
    """Choose the faults; each kind comes at least once in the first three."""
    source = random.Random(seed)
    first: list[Victim] = source.sample(list(_SHARES), k=3)
    more = source.choices(list(_SHARES), list(_SHARES.values()), k=max(0, kills - 3))
    return [
        Kill(victim, source.uniform(0, _LONGEST_GAP_S), source.uniform(0, _LONGEST_DOWN_S))
        for victim in (*first, *more)[:kills]
    ]


@dataclass
class _Killer:
    """Carries out a plan. What is away has its turn again when it is back and at work."""

    stage: Stage
    load: Load
    pool: ThreadPoolExecutor
    say: Callable[[str], None]
    killed: Counter[str] = field(default_factory=Counter)
    _restarts: dict[int, "Future[None]"] = field(default_factory=dict)
    _seen: dict[int, int] = field(default_factory=dict)

    def carry_out(self, kills: list[Kill], seed: int) -> None:
        source = random.Random(f"{seed}-victims")
        end = time.monotonic() + _SECONDS_A_KILL * len(kills) + _MOMENT_WITHIN_S
        for number, kill in enumerate(kills, start=1):
            if time.monotonic() > end:
                raise AssertionError(f"only {number - 1} of {len(kills)} kills in time")
            threading.Event().wait(kill.gap_s)
            victim, kind = self._victim(kill, source)
            victim.kill()
            self.killed[kind] += 1
            self.say(f"kill {number} of {len(kills)}: {kind}; {len(self.load.answers)} requests answered so far")
            self._restarts[id(victim)] = self.pool.submit(self._restart, victim, kill.down_s)
        for restart in self._restarts.values():
            restart.result(_MOMENT_WITHIN_S)

    def _restart(self, victim: Service, down_s: float) -> None:
        threading.Event().wait(down_s)
        victim.start()
        self._seen[id(victim)] = self._work_of(victim)

    def _victim(self, kill: Kill, source: random.Random) -> tuple[Service, str]:
        """Wait for a moment at which the kill hurts: the victim is up, and at work since it came up."""
        servers = list(self.stage.servers)
        wanted = source.choice(servers)
        end = time.monotonic() + _MOMENT_WITHIN_S
        while time.monotonic() < end:
            if self.load.faults:
                raise AssertionError(f"the load has failed: {self.load.faults[0]}")
            if kill.victim == "broker" and self._is_at_work(self.stage.kafka):
                return self.stage.kafka, "broker"
            if kill.victim == "server" and self._is_at_work(wanted):
                return wanted, "server"
            if kill.victim == "relay" and (relaying := self.stage.relaying()) and self._is_up(relaying):
                return relaying, "relay with events in hand"
            time.sleep(_LOOK_EVERY_S)
        raise AssertionError(f"no moment to kill a {kill.victim} within {_MOMENT_WITHIN_S:.0f} s")

    def _is_up(self, victim: Service) -> bool:
        restart = self._restarts.get(id(victim))
        if restart is None:
            return True
        if not restart.done():
            return False
        restart.result()
        return True

    def _is_at_work(self, victim: Service) -> bool:
        return self._is_up(victim) and self._work_of(victim) > self._seen.get(id(victim), 0)

    def _work_of(self, victim: Service) -> int:
        """What a victim has done in all its lives."""
        server = next((server for server in self.stage.servers if server is victim), None)
        return self.stage.event_records() if server is None else self.load.answered_by(server)


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `killed` counts the kills of each kind."""

    killed: Counter[str]
    balance: Balance
    seconds: float

    def table(self, title: str) -> Table:
        """Everything that was counted."""
        table = Table(title=title, title_justify="left", show_header=False)
        for kind, count in sorted(self.killed.items()):
            table.add_row(f"kill -9 of {kind}", str(count))
        for what, count in self.balance.counts.items():
            table.add_row(what, str(count))
        table.add_row("seconds", f"{self.seconds:.0f}")
        for fault in self.balance.faults:
            table.add_row("FAULT", fault, style="red")
        table.add_row("verdict", "not balanced" if self.balance.faults else "everything balances")
        return table


def prove(
    *, kills: int, seed: int, servers: int = 2, clients: int = 4, say: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Start everything, kill under load, count. Raises `AssertionError` where it does not come to an end."""
    begun = time.monotonic()
    with stage(servers) as here, ThreadPoolExecutor(servers + 1) as pool:
        load = Load(here, clients=clients, seed=seed)
        load.start()
        killer = _Killer(here, load, pool, say)
        try:
            killer.carry_out(plan(kills, seed), seed)
        finally:
            say("no more kills; waiting for the last answers")
            load.finish(_FINISH_WITHIN_S)
        say("waiting until outbox and topics are at rest")
        come_to_rest(here)
        say("counting")
        return Outcome(killer.killed, balance(here, load), time.monotonic() - begun)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Kill at random under load, then count everything.")
    parser.add_argument("--kills", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, default=None, help="repeats the same plan; default: a new one, printed")
    parser.add_argument("--servers", type=int, default=2, choices=range(1, 5), help="replicas (default 2)")
    parser.add_argument("--clients", type=int, default=4, choices=range(1, 33), help="REST clients (default 4)")
    options = parser.parse_args(arguments)
    if not 1 <= options.kills <= MOST_KILLS:
        parser.error(f"--kills must lie between 1 and {MOST_KILLS}")
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"{options.kills} kills on {options.servers} servers, --seed {seed}")
    begun = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun:6.1f} s[/dim]  {text}")

    try:
        outcome = prove(kills=options.kills, seed=seed, servers=options.servers, clients=options.clients, say=say)
    except AssertionError as error:
        console.print(f"[red]no proof:[/red] {error}")
        return 1
    console.print(outcome.table(f"Zero loss: {options.kills} kills, seed {seed}"))
    return 1 if outcome.balance.faults else 0


if __name__ == "__main__":
    sys.exit(main())
