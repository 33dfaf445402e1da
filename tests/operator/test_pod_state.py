"""What ready pods say that they loaded: asked once a container, and never more than the status can hold."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
import virtual_time
from aiohttp import web
from objects import DIGEST, loading, ready, subject

from phoenix_operator import pod_state
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Loaded, Pod
from phoenix_operator.pod_state import PodStates

TENSOR = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
ANSWER: dict[str, Any] = {
    "name": "fraud", "version": "3", "sha256": DIGEST, "provider": "CPUExecutionProvider", "capacity": {"rows": 1},
    "inputs": [TENSOR | {"optional": False}], "outputs": [TENSOR],
}  # fmt: skip


class Server:
    """A pod's server at the port that the test chose."""

    def __init__(self, answer: Any = ANSWER) -> None:
        self.answer = answer
        self.paths: list[str] = []

    async def reply(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        if isinstance(self.answer, web.StreamResponse):
            return self.answer
        if self.answer == "endless":
            endless = web.StreamResponse()
            await endless.prepare(request)
            with suppress(ConnectionError):
                while True:
                    await endless.write(b" " * 2**16)
            return endless
        if self.answer is None:
            await asyncio.sleep(3600)
        return web.json_response(self.answer)


def ask(server: Server, talk: Callable[[PodStates, Metrics], Awaitable[Any]], patch: pytest.MonkeyPatch) -> Any:
    async def main() -> Any:
        app = web.Application()
        app.router.add_get("/{path:.*}", server.reply)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        patch.setattr(pod_state, "HTTP_PORT", runner.addresses[0][1])
        metrics = Metrics()
        states = PodStates(metrics, timeout_s=2)
        try:
            return await talk(states, metrics)
        finally:
            await states.close()
            await runner.cleanup()

    return virtual_time.run(main())


def at_home(pod: Pod) -> Pod:
    pod.body["status"]["podIP"] = "127.0.0.1"
    return pod


def failures(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("phoenix_operator_state_failures_total") or 0


def test_ready_pods_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server, model = Server(), subject()
    pods = [at_home(ready(model, "a")), at_home(loading(model, "b"))]

    async def talk(states: PodStates, _: Metrics) -> dict[str, Loaded]:
        first = await states.of("fraud", pods)
        assert await states.of("fraud", pods) == first
        return first

    assert ask(server, talk, monkeypatch) == {
        "uid-a": Loaded(DIGEST, "3", "CPUExecutionProvider", [TENSOR], [TENSOR]),
    }
    assert server.paths == ["/v2/models/fraud/state"]


def test_container_that_started_again_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server, model = Server(), subject()

    async def talk(states: PodStates, _: Metrics) -> None:
        await states.of("fraud", [at_home(ready(model))])
        await states.of("fraud", [at_home(ready(model, container={"restartCount": 1}))])

    ask(server, talk, monkeypatch)
    assert len(server.paths) == 2


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=503), "endless", web.Response(text="<html>"), None, [], "x", {},
        ANSWER | {"inputs": "x"}, ANSWER | {"inputs": [{"name": "x"}]}, ANSWER | {"inputs": [1]},
        ANSWER | {"inputs": [TENSOR | {"shape": ["batch", 4]}]}, ANSWER | {"inputs": [TENSOR | {"shape": [-2]}]},
        ANSWER | {"provider": "x" * 1000}, ANSWER | {"more": "x" * 2**20},
    ],
    ids=["503", "endless", "html", "silence", "list", "text", "empty", "inputs", "lacks", "number", "symbolic",
         "negative", "long", "big"],
)  # fmt: skip
def test_answer_that_cannot_be_used_is_counted_and_asked_for_again(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, pods = Server(answer), [at_home(ready(subject()))]

    async def talk(states: PodStates, metrics: Metrics) -> dict[str, Loaded]:
        assert await states.of("fraud", pods) == {}
        assert failures(metrics) == 1
        server.answer = ANSWER
        return await states.of("fraud", pods)

    assert list(ask(server, talk, monkeypatch)) == ["uid-fraud-1"]


def test_model_of_very_many_tensors_tells_of_as_many_as_the_status_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [TENSOR | {"name": f"x{number}"} for number in range(300)]
    server = Server(ANSWER | {"inputs": many})

    async def talk(states: PodStates, _: Metrics) -> dict[str, Loaded]:
        return await states.of("fraud", [at_home(ready(subject()))])

    assert ask(server, talk, monkeypatch)["uid-fraud-1"].inputs == many[:256]


def test_pod_that_cannot_be_reached_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(states: PodStates, metrics: Metrics) -> dict[str, Loaded]:
        monkeypatch.setattr(pod_state, "HTTP_PORT", 1)
        found = await states.of("fraud", [at_home(ready(subject()))])
        assert failures(metrics) == 1
        return found

    assert ask(Server(), talk, monkeypatch) == {}


def test_address_of_the_sixth_version_is_put_into_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get(_: aiohttp.ClientSession, address: str) -> None:
        asked.append(address)
        raise aiohttp.ClientConnectionError

    async def talk(states: PodStates, _: Metrics) -> None:
        monkeypatch.setattr(aiohttp.ClientSession, "get", get)
        pod = ready(subject())
        pod.body["status"]["podIP"] = "fd00::1"
        assert await states.of("fraud", [pod]) == {}

    ask(Server(), talk, monkeypatch)
    assert asked[0].startswith("http://[fd00::1]:")


# --- bindings --------------------------------------------------------------------------------------------------------


def told(bindings: Any) -> dict[str, Any]:
    return ANSWER | {"bindings": bindings}


@pytest.mark.parametrize(
    ("bindings", "failing"),
    [
        ({"redis": {"up": True, "since": 1, "error": ""}}, {}),
        ({"redis": {"up": None, "since": 1, "error": ""}}, {}),
        ({"redis": {"up": False, "since": 1, "error": "timed out"}}, {"redis": "timed out"}),
        ({"kafka": {"up": False, "error": "x" * 1000}}, {"kafka": "x" * 300}),
        ({"postgresql": {"up": False}, "other": {"up": False}}, {"postgresql": "no answer"}),
        ({"redis": "down"}, {}), (["redis"], {}), ("down", {}), (None, {}),
    ],
)  # fmt: skip
def test_backends_that_a_pod_cannot_use_are_told(
    bindings: Any, failing: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(states: PodStates, _: Metrics) -> Any:
        return await states.of("fraud", [at_home(ready(subject(), "a"))], is_bound=True)

    (answer,) = ask(Server(told(bindings)), talk, monkeypatch).values()
    assert answer.bindings == failing


def test_pod_of_a_model_with_bindings_is_asked_each_time_and_one_that_is_silent_keeps_what_it_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(told({"redis": {"up": False, "error": "down"}}))

    async def talk(states: PodStates, _: Metrics) -> list[dict[str, str]]:
        pods, said = [at_home(ready(subject(), "a"))], []
        for answer in (server.answer, told({"redis": {"up": True}}), web.Response(status=500)):
            server.answer = answer
            (loaded,) = (await states.of("fraud", pods, is_bound=True)).values()
            said.append(dict(loaded.bindings))
        return said

    assert ask(server, talk, monkeypatch) == [{"redis": "down"}, {}, {}]
    assert len(server.paths) == 3
