"""What the outside asks the operator: health, readiness, metrics."""

import asyncio
import socket

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from phoenix_operator import probes
from phoenix_operator.metrics import Metrics


class Answers:
    """What is wrong, for the test to say."""

    def __init__(self) -> None:
        self.health: list[str] = []
        self.readiness: list[str] = []


async def ask(path: str, answers: Answers, metrics: Metrics | None = None) -> tuple[int, str, str]:
    """Return code, content type and text."""
    runner = await probes.serve(
        0, metrics or Metrics(), health=lambda: answers.health, readiness=lambda: answers.readiness
    )
    try:
        port = next(address[1] for address in runner.addresses if address[0] == "0.0.0.0")
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
            return response.status, response.headers["Content-Type"], await response.text()
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_healthy_operator_says_ok(path: str) -> None:
    assert asyncio.run(ask(path, Answers()))[::2] == (200, "ok")


def test_unhealthy_operator_says_everything_that_is_wrong() -> None:
    answers = Answers()
    answers.health = ["the watch of Pod misses changes", "a model waits for 400 s"]
    assert asyncio.run(ask("/healthz", answers))[::2] == (503, "\n".join(answers.health))
    assert asyncio.run(ask("/readyz", answers))[0] == 200, "one has nothing to do with the other"
    answers.readiness = ["the watches are not up yet"]
    assert asyncio.run(ask("/readyz", answers))[::2] == (503, "the watches are not up yet")


def test_metrics_are_in_the_text_format_with_their_units() -> None:
    metrics = Metrics()
    metrics.on_request("APPLY", 200, 0.02)
    metrics.on_request("APPLY", 0, 30)
    metrics.reconcile_seconds.labels("ok").observe(0.01)
    code, content_type, text = asyncio.run(ask("/metrics", Answers(), metrics))
    assert code == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("phoenix_operator_") for name in families)
    samples = {
        (sample.labels["verb"], sample.labels["code"]): sample.value
        for sample in families["phoenix_operator_api_requests"].samples
        if sample.name.endswith("_total")
    }
    assert samples == {("APPLY", "200"): 1, ("APPLY", "0"): 1}
    results = {sample.labels["result"] for sample in families["phoenix_operator_reconcile_seconds"].samples}
    assert results == {"ok", "refused", "error"}, "each exists from the start"


def test_metrics_of_two_operators_in_one_process_are_apart() -> None:
    first, second = Metrics(), Metrics()
    first.leader.set(1)
    assert first.registry.get_sample_value("phoenix_operator_leader") == 1
    assert second.registry.get_sample_value("phoenix_operator_leader") == 0


def test_port_that_is_taken_is_an_error() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen()
            with pytest.raises(OSError, match="in use"):
                await probes.serve(taken.getsockname()[1], Metrics(), health=list, readiness=list)

    asyncio.run(main())
