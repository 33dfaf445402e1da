"""The small parts of the metrics API: label selectors, shared answers; its process and its command."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from metrics_api_world import FrontProxy, World, until
from test_cli import program

from phoenix_operator.__main__ import main
from phoenix_operator.metrics_api.label_selector import Selector, SelectorError, parse_selector
from phoenix_operator.metrics_api.shared import Shared

# --- label selectors -------------------------------------------------------------------------------------------------

LABELS = {"app": "fraud", "tier": "gold", "phoenix-ml.io/model": "fraud", "empty": ""}


@pytest.mark.parametrize(
    ("text", "is_selected"),
    [
        ("", True), ("  ", True), ("app", True), ("!app", False), ("! app", False), ("owner", False), ("!owner", True),
        ("app=fraud", True), ("app==fraud", True), ("app = fraud ", True), ("app=churn", False), ("app!=churn", True),
        ("owner!=x", True), ("owner=", False), ("empty=", True), ("app!=fraud", False), ("empty", True),
        ("app in (fraud)", True), ("app in (churn, fraud)", True), ("app in(churn,fraud)", True),
        ("app in (churn)", False), ("app notin (churn)", True), ("owner notin (x)", True), ("owner in (x)", False),
        ("app notin (fraud,churn)", False), ("empty in ()", True), ("app=fraud,tier=gold", True),
        ("app=fraud,tier in (silver,bronze)", False), ("app in (a,fraud),!owner, tier!=silver", True),
        ("phoenix-ml.io/model=fraud", True), ("phoenix-ml.io/model!=fraud", False), ("in=x", False), ("in", False),
    ],
)  # fmt: skip
def test_selector_selects_as_kubernetes_does(text: str, is_selected: bool) -> None:
    assert parse_selector(text).matches(LABELS) is is_selected


@pytest.mark.parametrize(
    "text",
    [
        ",", "a,", "a,,b", "=a", "a=b=c", "a in", "a in b", "a in (b", "a in (b))", "a in (b c)", "a>1", "a<1",
        "a b", "!", "!!a", "a!", "-a=b", "a=-b", "a=b c", "a in (-b)", "/a", "A/a=b", "a" * 64, "é=b", "a=(b)",
        "x" * 5000,
    ],
)  # fmt: skip
def test_selector_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SelectorError, match="expected a label selector"):
        parse_selector(text)


def test_selector_is_told_as_an_object() -> None:
    assert parse_selector("").as_object() is None
    assert parse_selector("a=b,c!=d,e,!f,g in (h,i)").as_object() == {
        "matchExpressions": [
            {"key": "a", "operator": "In", "values": ["b"]},
            {"key": "c", "operator": "NotIn", "values": ["d"]},
            {"key": "e", "operator": "Exists"},
            {"key": "f", "operator": "DoesNotExist"},
            {"key": "g", "operator": "In", "values": ["h", "i"]},
        ]
    }
    assert parse_selector(" ") == Selector()


# --- shared answers --------------------------------------------------------------------------------------------------


class Asked:
    """Answers with the number of the question, or fails; the time is the test's."""

    def __init__(self, *, most: int = 10) -> None:
        self.keys: list[str] = []
        self.now = 0.0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.shared: Shared[str, int] = Shared(
            self.ask, lifetime_s=lambda answer: 10, failure_s=2, most=most, clock=lambda: self.now
        )

    async def ask(self, key: str) -> int:
        self.keys.append(key)
        number = len(self.keys)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return number


def with_asked(work: Callable[[Asked], Awaitable[Any]], **values: Any) -> Any:
    async def run() -> Any:
        asked = Asked(**values)
        try:
            return await work(asked)
        finally:
            await asked.shared.close()

    return asyncio.run(run())


def test_answer_stands_for_its_time() -> None:
    async def work(asked: Asked) -> list[int]:
        found = []
        for now in (0, 9.9, 10, 15):
            asked.now = now
            found.append(await asked.shared.get("a"))
        return found

    assert with_asked(work) == [1, 1, 2, 2]


def test_failure_stands_for_its_own_time() -> None:
    async def work(asked: Asked) -> int:
        asked.error = ValueError("no")
        for now in (0, 1.9, 2):
            asked.now = now
            with pytest.raises(ValueError, match="no"):
                await asked.shared.get("a")
        return len(asked.keys)

    assert with_asked(work) == 2


def test_those_who_ask_at_once_share_one_answer() -> None:
    async def work(asked: Asked) -> tuple[list[int], list[str]]:
        asked.gate.clear()
        asking = [asyncio.create_task(asked.shared.get(key)) for key in "aabab"]
        await asyncio.sleep(0)
        asking.pop(0).cancel()
        asked.gate.set()
        return await asyncio.gather(*asking), asked.keys

    assert with_asked(work) == ([1, 2, 1, 2], ["a", "b"])


def test_newer_answer_can_be_asked_for() -> None:
    async def work(asked: Asked) -> list[int]:
        found = [await asked.shared.get("a")]
        asked.now = 1.0
        found.append(await asked.shared.get("a", max_age_s=1))
        asked.now = 1.1
        found.append(await asked.shared.get("a", max_age_s=1))
        return found

    assert with_asked(work) == [1, 1, 2]


def test_answers_are_bounded_and_the_oldest_goes_first() -> None:
    async def work(asked: Asked) -> list[int]:
        for key in "abcd":
            await asked.shared.get(key)
        assert len(asked.shared) == 3
        return [await asked.shared.get("d"), await asked.shared.get("a")]

    assert with_asked(work, most=3) == [4, 5]


# --- the process -----------------------------------------------------------------------------------------------------


def test_command_without_the_address_of_prometheus_ends_with_2(tmp_path: Path, monkeypatch: Any) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text(KUBECONFIG.format(server="http://127.0.0.1:1"))
    done = program("metrics-api", KUBECONFIG=str(config))
    assert done.returncode == 2
    assert "phoenix-operator: autoscaling.prometheus.url: expected the address of Prometheus, got none" in done.stderr


KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: x
contexts: [{{name: x, context: {{cluster: x, user: x}}}}]
clusters: [{{name: x, cluster: {{server: "{server}"}}}}]
users: [{{name: x, user: {{}}}}]
"""


def test_wrong_settings_end_the_command_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("autoscaling: {provider: magic}\n")
    assert main(["metrics-api", "--settings", str(settings)]) == 2
    assert "autoscaling.provider" in capsys.readouterr().err


def test_process_serves_until_sigterm_and_ends_with_0(tmp_path: Path, world: World) -> None:
    from metrics_api_world import on_socket

    async def run() -> tuple[int, bytes]:
        async with on_socket(world.kubernetes.reply) as address, on_socket(world.prometheus.answer) as source:
            (tmp_path / "kubeconfig").write_text(KUBECONFIG.format(server=address))
            settings = {"httpPort": 0, "autoscaling": {"prometheus": {"url": source}, "httpsPort": 0}}
            (tmp_path / "settings.yaml").write_text(json.dumps(settings))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "phoenix_operator", "metrics-api"),
                f"--settings={tmp_path / 'settings.yaml'}",
                env=os.environ | {"KUBECONFIG": str(tmp_path / "kubeconfig")},
                stderr=subprocess.PIPE,
            )
            assert process.stderr is not None
            told = b""
            async with asyncio.timeout(60):
                while b'"message": "serving"' not in told:
                    line = await process.stderr.readline()
                    assert line, told
                    told += line
                process.send_signal(signal.SIGTERM)
                rest = await process.stderr.read()
                return await process.wait(), told + rest

    code, told = asyncio.run(run())
    assert (code, b'"message": "stopped"' in told) == (0, True)
    assert b"PRIVATE KEY" not in told


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(FrontProxy(tmp_path_factory.mktemp("pki")))


def test_server_that_is_being_stopped_is_not_ready(world: World) -> None:
    async def run() -> None:
        async with world.running_api():
            assert (await world.probe("readyz"))[0] == 200
            world.stop.set()
            await until(lambda: bool(world.server.readiness()))

    asyncio.run(run())


def test_taken_port_ends_it(world: World) -> None:
    async def run() -> None:
        with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
            world.settings["httpsPort"] = taken.getsockname()[1]
            with pytest.raises(OSError, match="in use"):
                async with world.running_api():
                    pass

    asyncio.run(run())
