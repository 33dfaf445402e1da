"""Rate limits of real servers: over both transports, alone and sharing a real Redis, and when that Redis fails."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import onnx
import phoenix_process
import pytest
from onnx import TensorProto, helper
from phoenix_process import Running, wait_until
from services import RedisServer

from phoenix_server._proto import inference as proto

INFER = "/inference.GRPCInferenceService/ModelInfer"
BODY = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}
# A burst of a second: a machine that is busy for less than that makes no token spill.
RATE, BURST = 100, 100
LIMITS: dict[str, dict[str, Any] | None] = {
    "by-client": {"requestsPerSecond": RATE, "burst": BURST},
    "by-model": {"requestsPerSecond": RATE, "burst": BURST, "per": "Model"},
    "once": {"requestsPerSecond": 1, "burst": 3},
    "free": None,
}
# Longest wait for features, and so for Redis at all.
TIMEOUT_S = 0.3


def write(folder: Path, limits: dict[str, dict[str, Any] | None], **spec: Any) -> Path:
    """Write a model for each limit; the folder."""
    shape = {"x": helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])}
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])], "negated", [shape["x"]],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    for name, limit in limits.items():
        networking = {} if limit is None else {"networking": {"rateLimit": limit}}
        manifest = {
            "apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel",
            "metadata": {"name": name, "namespace": "ml"},
            "spec": {"model": {"uri": "model.onnx"}, **networking, **spec},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(manifest))
    return folder


def start(folder: Path, **settings: str) -> Any:
    """Serve a folder with settings in lower case."""
    env = {f"PHOENIX_{name.upper()}": value for name, value in settings.items()}
    return phoenix_process.start([folder], {"PHOENIX_MEASURE_CAPACITY": "false", **env})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("limited"), LIMITS)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with start(folder, trusted_proxies="127.0.0.0/8") as running:
        yield running


# --- asking ----------------------------------------------------------------------------------------------------------

Ask = Callable[[], Coroutine[Any, Any, str]]


class Offered:
    """What came of requests that were sent evenly, however slowly the answers came."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.seconds = 0.0

    @property
    def passed(self) -> int:
        return self.answers["200"] + self.answers["OK"]


async def offer(asks: list[Ask], per_second: float, seconds: float) -> Offered:
    """Ask in turn, at that pace; every answer is awaited."""
    offered, tasks = Offered(), []
    offered.answers[await asks[0]()] += 1  # connected, and the first token taken: from here on it is counted
    began = last = time.monotonic()
    for index in range(int(per_second * seconds)):
        await asyncio.sleep(began + index / per_second - time.monotonic())
        tasks.append(asyncio.create_task(asks[index % len(asks)]()))
        last = time.monotonic()
    offered.answers.update(await asyncio.gather(*tasks))
    offered.seconds = last - began
    return offered


def rest(session: aiohttp.ClientSession, server: Running, model: str, **headers: str) -> Ask:
    """Ask over REST; the status."""

    async def ask() -> str:
        url = f"{server.rest_url}/v2/models/{model}/infer"
        async with session.post(url, json=BODY, headers=headers) as response:
            body = await response.json()
            if response.status == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert "rate limit" in body["error"]
            return str(response.status)

    return ask


def message(model: str) -> bytes:
    """A ModelInfer request."""
    request = proto.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(1)
    data: bytes = request.SerializeToString()
    return data


def over_grpc(channel: grpc.aio.Channel, model: str) -> Ask:
    """Ask over gRPC; the status."""
    call = channel.unary_unary(INFER)

    async def ask() -> str:
        answer = call(message(model))
        status = await answer.code()
        if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
            assert int(dict(await answer.trailing_metadata())["retry-after"]) >= 1
            assert "rate limit" in await answer.details()
        return str(status.name)

    return ask


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await work

    asyncio.run(bounded())


async def statuses(server: Running, model: str, count: int, **headers: str) -> list[str]:
    """The statuses of some requests one after the other."""
    async with aiohttp.ClientSession() as session:
        ask = rest(session, server, model, **headers)
        return [await ask() for _ in range(count)]


async def load_again(server: Running) -> None:
    """Have the model `once` loaded again."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.rest_url}/v2/repository/models/once/load", json={}) as response,
    ):
        assert response.status == 200


async def metric(server: Running, line: str) -> float:
    """The value of a series."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.rest_url}/metrics") as response:
        page = await response.text()
    return sum(float(row.rpartition(" ")[2]) for row in page.splitlines() if row.startswith(line))


def about(offered: Offered, rate: float = RATE, burst: float = BURST) -> Any:
    """What the limit lets through of it, give or take 5 %."""
    return pytest.approx(burst + rate * offered.seconds, rel=0.05)


# --- one server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["by-client", "by-model"])
def test_twice_the_limit_offered_over_rest_gives_the_limit(server: Running, model: str) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            offered = await offer([rest(session, server, model)], 2 * RATE, 4)
        assert offered.passed == about(offered)
        assert set(offered.answers) == {"200", "429"}
        told = await metric(server, 'phoenix_requests_rejected_total{code="rate_limited",protocol="rest"}')
        assert told >= offered.answers["429"]

    run(work())


@pytest.mark.parametrize("engine", ["native", "grpcio"])
def test_twice_the_limit_offered_over_grpc_gives_the_limit(folder: Path, engine: str) -> None:
    async def work(server: Running) -> None:
        async with grpc.aio.insecure_channel(server.grpc_target) as channel:
            offered = await offer([over_grpc(channel, "by-client")], 2 * RATE, 4)
        assert offered.passed == about(offered)
        assert set(offered.answers) == {"OK", "RESOURCE_EXHAUSTED"}
        told = await metric(server, 'phoenix_requests_rejected_total{code="rate_limited",protocol="grpc"}')
        assert told == offered.answers["RESOURCE_EXHAUSTED"]
        # A message of a stream is a request: what is over the limit fails, the stream goes on.
        async with grpc.aio.insecure_channel(server.grpc_target) as channel:
            call = channel.stream_stream(INFER.replace("ModelInfer", "ModelStreamInfer"))
            answers = [
                proto.ModelStreamInferResponse.FromString(answer) async for answer in call(iter([message("once")] * 5))
            ]
        assert ["rate limit" in answer.error_message for answer in answers] == [False, False, False, True, True]

    with start(folder, grpc_engine=engine) as server:
        run(work(server))


def test_both_transports_share_a_client_s_bucket(folder: Path) -> None:
    async def work(server: Running) -> None:
        assert await statuses(server, "once", 2) == ["200", "200"]
        async with grpc.aio.insecure_channel(server.grpc_target) as channel:
            ask = over_grpc(channel, "once")
            assert [await ask() for _ in range(2)] == ["OK", "RESOURCE_EXHAUSTED"]

    with start(folder) as server:
        run(work(server))


def test_only_inference_counts_and_only_of_that_model(server: Running) -> None:
    async def work() -> None:
        client = {"X-Forwarded-For": "192.0.2.77"}
        assert await statuses(server, "once", 4, **client) == ["200"] * 3 + ["429"]
        assert await statuses(server, "free", 50, **client) == ["200"] * 50
        async with aiohttp.ClientSession() as session:
            for path in ("/v2/health/ready", "/v2/models/once", "/v2/models/once/ready", "/metrics"):
                for _ in range(10):
                    async with session.get(server.rest_url + path, headers=client) as response:
                        assert response.status == 200

    run(work())


def test_pipelined_requests_are_limited_too(server: Running) -> None:
    """These take the way through ASGI."""

    async def work() -> None:
        host, _, port = server.rest_url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(BODY).encode()
        head = "POST /v2/models/once/infer HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.1\r\n"
        head += f"Content-Length: {len(body)}\r\n"
        last = head + "Connection: close\r\n"
        writer.write(b"".join(part.encode() + b"\r\n" + body for part in [head] * 4 + [last]))
        answers = (await reader.read()).decode()
        writer.close()
        assert [part[:3] for part in answers.split("HTTP/1.1 ")[1:]] == ["200"] * 3 + ["429"] * 2

    run(work())


def test_many_clients_have_a_limit_each(server: Running) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            for number in range(100):
                ask = rest(session, server, "once", **{"X-Forwarded-For": f"203.0.113.7, 198.51.100.{number}"})
                assert [await ask() for _ in range(4)] == ["200"] * 3 + ["429"]
            # What the client itself wrote before its proxy's entry does not make it another one.
            ask = rest(session, server, "once", **{"X-Forwarded-For": "1.2.3.4, 198.51.100.99, 127.0.0.9"})
            assert await ask() == "429"

    run(work())


def test_nobody_is_believed_where_no_proxy_is_trusted(folder: Path) -> None:
    async def work(server: Running) -> None:
        for number in range(5):
            (answer,) = await statuses(server, "once", 1, **{"X-Forwarded-For": f"198.51.100.{number}"})
            assert answer == ("200" if number < 3 else "429")

    with start(folder) as server:
        run(work(server))


def test_clients_are_keys_where_keys_are_asked_for(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")

    async def work(server: Running) -> None:
        assert await statuses(server, "once", 4, Authorization="Bearer first") == ["200"] * 3 + ["429"]
        assert await statuses(server, "once", 1, Authorization="bearer  first ") == ["429"]
        assert await statuses(server, "once", 4, Authorization="Bearer second") == ["200"] * 3 + ["429"]
        assert await statuses(server, "once", 1, Authorization="Bearer third") == ["403"]

    with start(folder, api_keys_file=str(keys)) as server:
        run(work(server))


def test_reload_with_the_same_limit_gives_no_burst_and_another_limit_counts_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path, {"once": LIMITS["once"]})

    async def work(server: Running) -> None:
        assert await statuses(server, "once", 4) == ["200"] * 3 + ["429"]
        await load_again(server)
        assert "429" in await statuses(server, "once", 3)
        write(folder, {"once": {"requestsPerSecond": 1, "burst": 1000}})
        await load_again(server)
        assert await statuses(server, "once", 50) == ["200"] * 50

    with start(folder, watch="false") as server:
        run(work(server))


@pytest.mark.parametrize("value", ["10.0.0.0/33", "proxy.example.com", "10.0.0.1/8"])
def test_wrong_proxies_are_told(folder: Path, value: str) -> None:
    told = pytest.raises(AssertionError, match=r"PHOENIX_TRUSTED_PROXIES: .*expected addresses or networks")
    with told, start(folder, trusted_proxies=value):
        pass


# --- several servers, one Redis --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    limits = {name: {"requestsPerSecond": RATE, "burst": BURST, "per": "Model"} for name in ("m", "paused", "narrow")}
    return write(tmp_path_factory.mktemp("shared"), dict(limits), bindings={"redis": {"backend": "default"}})


@pytest.fixture
def three(shared: Path, redis_server: RedisServer) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        settings = {"redis_url": redis_server.url, "feature_timeout_seconds": str(TIMEOUT_S)}
        yield [stack.enter_context(start(shared, **settings)) for _ in range(3)]
    redis_server.flush()


def test_three_servers_together_give_the_limit(three: list[Running], redis_server: RedisServer) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            asks = [rest(session, server, "m") for server in three]
            offered = await offer(asks, 2 * RATE, 5)
            assert offered.passed == about(offered)
            # Below the limit nobody is refused, whoever of them is asked, once there is something in the bucket.
            uneven = [asks[0], asks[0], asks[1], asks[2]]
            await offer(uneven, 0.5 * RATE, 1)
            calm = await offer(uneven, 0.7 * RATE, 3)
            assert calm.answers == {"200": calm.passed}
        assert sum([await metric(server, "phoenix_rate_limit_unshared_total") for server in three]) == 0
        with redis_server.client(decode_responses=True) as client:
            keys = client.keys("*")
            assert keys
            assert all(key.startswith("phx:ml:m:rate:") for key in keys)
            assert all(client.pttl(key) > 0 or not client.exists(key) for key in keys)

    run(work())


def test_paused_redis_leaves_each_server_its_part(three: list[Running], redis_server: RedisServer) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            asks = [rest(session, server, "paused") for server in three]
            await offer(asks, 2 * RATE, 1)
            redis_server.pause()
            try:
                offered = await offer(asks, 2 * RATE, 5)
            finally:
                redis_server.resume()
            # How many share it is counted for ten seconds at a time, so that it may be thought fewer than three.
            assert set(offered.answers) == {"200", "429"}
            assert 0.9 * RATE * 5 <= offered.passed <= 2 * (BURST + RATE * offered.seconds)
            for server in three:
                assert await metric(server, 'phoenix_rate_limit_unshared_total{model="paused"') > 0
                lines = [line for line in server.stderr if "the rate limit is not shared" in line]
                assert len(lines) == 1, lines
            for ask in asks:
                while await ask() != "200":  # noqa: ASYNC110 - a server announces nothing
                    await asyncio.sleep(0.05)

    run(work())


def test_login_with_too_few_rights_leaves_the_server_its_part(shared: Path, redis_factory: Any) -> None:
    redis = redis_factory(is_secure=True)
    with redis.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~phx:ml:*", "+hmget")
    url = f"rediss://reader:secret@{redis.host}:{redis.port}/0"

    async def work(server: Running) -> None:
        async with aiohttp.ClientSession() as session:
            offered = await offer([rest(session, server, "narrow")], 2 * RATE, 3)
        assert offered.passed == about(offered)
        assert any("NOPERM" in line and "the rate limit is not shared" in line for line in server.stderr)

    with start(shared, redis_url=url, redis_ca_file=str(redis.authority)) as server:
        run(work(server))


def test_operator_s_login_may_do_what_the_limit_needs(shared: Path, redis_factory: Any) -> None:
    from phoenix_operator.backends.redis import _COMMANDS

    redis = redis_factory(is_secure=True)
    with redis.client() as client:
        rule = ["reset", "on", ">secret", "~phx:ml:m:*", "resetchannels", *_COMMANDS.split()]
        client.execute_command("ACL", "SETUSER", "phx:ml:m:a", *rule)
    url = f"rediss://phx%3Aml%3Am%3Aa:secret@{redis.host}:{redis.port}/0"

    async def work(server: Running) -> None:
        assert "200" in await statuses(server, "m", 5)
        wait_until(lambda: not [line for line in server.stderr if "not shared" in line], "it is shared")
        assert await metric(server, 'phoenix_rate_limit_unshared_total{model="m"') == 0

    with start(shared, redis_url=url, redis_ca_file=str(redis.authority)) as server:
        run(work(server))


def test_counters_that_are_lost_are_begun_again(three: list[Running], redis_server: RedisServer) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            asks = [rest(session, server, "m") for server in three]
            await offer(asks, 2 * RATE, 1)
            with redis_server.client() as client:
                assert client.delete("phx:ml:m:rate:100:100:clock") == 1
            offered = await offer(asks, 2 * RATE, 5)
        assert RATE * offered.seconds * 0.9 <= offered.passed <= 3 * BURST + 1.1 * RATE * offered.seconds

    run(work())
