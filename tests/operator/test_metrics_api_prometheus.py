"""Prometheus at its worst: what the autoscaler is told then is an error or nothing, and never 0."""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from lab import certificates
from metrics_api_world import FrontProxy, Prometheus, World, model, on_socket, path, until

from phoenix_operator import settings
from phoenix_operator.metrics_api import readings
from phoenix_operator.metrics_api.metrics import METRICS, expression
from phoenix_operator.metrics_api.prometheus import RESULTS, PrometheusClient, PrometheusError

SERIES = "phoenix:inference_concurrency"
CONCURRENCY = METRICS["inference_latency_seconds_concurrency"]
Work = Callable[[PrometheusClient, Prometheus], Awaitable[Any]]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> FrontProxy:
    return FrontProxy(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def world(proxy: FrontProxy) -> World:
    world = World(proxy)
    world.kubernetes.models["ml"] = [model("fraud"), model("churn")]
    world.prometheus.put(SERIES, "1")
    return world


def with_client(
    work: Work, prometheus: Prometheus | None = None, *, context: ssl.SSLContext | None = None, **values: Any
) -> tuple[Any, list[str]]:
    """Return what the work returns, or its error, and how the queries ended."""
    source, results = prometheus or Prometheus(), []

    async def main() -> Any:
        async with on_socket(source.answer, context=context) as address:
            given = {"url": address} | values
            client = PrometheusClient(
                settings.Prometheus(**given), observer=lambda result, seconds: results.append(result)
            )
            try:
                return await work(client, source)
            except PrometheusError as error:
                return error
            finally:
                await client.close()

    return asyncio.run(main()), results


async def query(client: PrometheusClient, _: Prometheus) -> Any:
    return await client.query(expression(CONCURRENCY, "ml", max_age_s=60))


def answering(body: Any, status: int = 200, **headers: str) -> Prometheus:
    prometheus = Prometheus()
    text = body if isinstance(body, str) else json.dumps(body)
    prometheus.reply = lambda request: web.Response(text=text, status=status, headers=headers)
    return prometheus


def vector(*rows: Any) -> dict[str, Any]:
    return {"status": "success", "data": {"resultType": "vector", "result": list(rows)}}


# --- the client ------------------------------------------------------------------------------------------------------


def test_vector_is_read_with_its_times_and_odd_numbers() -> None:
    rows = [{"metric": {"model": name}, "value": [1.5, name]} for name in ("1.25", "NaN", "+Inf", "-Inf", "1e-4")]
    samples, results = with_client(query, answering(vector(*rows)))
    assert [str(sample.value) for sample in samples] == ["1.25", "nan", "inf", "-inf", "0.0001"]
    assert {sample.at for sample in samples} == {1.5}
    assert results == ["ok"]


def test_nothing_found_is_an_empty_vector() -> None:
    assert with_client(query, answering(vector())) == ([], ["ok"])


@pytest.mark.parametrize(
    "body",
    [
        "", "<html><body>Sign in</body></html>", "null", "[]", "{}", "1", '"x"', "[" * 100_000,
        {"status": "error", "data": {"resultType": "vector", "result": []}},
        {"status": "success", "data": {"resultType": "matrix", "result": []}},
        {"status": "success", "data": {"resultType": "scalar", "result": [1, "0"]}},
        {"status": "success", "data": {"resultType": "vector", "result": None}},
        vector({}), vector([]), vector(None), vector({"metric": {}, "value": []}),
        vector({"metric": {}, "value": [1, "much"]}), vector({"metric": {}, "value": [1, 0]}),
        vector({"metric": {}, "value": ["1", "0"]}), vector({"metric": {"a": 1}, "value": [1, "0"]}),
        vector({"metric": None, "value": [1, "0"]}), '{"status": "success", "data": {"resultType": "vector", "result": '
        '[{"metric": {}, "value": [1e999, "0"]}]}}',
    ],
    ids=lambda body: str(body)[:40],
)  # fmt: skip
def test_answer_that_is_no_vector_is_an_error(body: Any) -> None:
    error, results = with_client(query, answering(body))
    assert "answered with something that is no instant vector" in str(error)
    assert results == ["malformed"]


@pytest.mark.parametrize("status", [301, 302, 400, 401, 403, 404, 422, 429, 500, 502, 503])
def test_code_other_than_200_is_an_error(status: int) -> None:
    prometheus = answering("<html>", status, Location="http://127.0.0.1:1/stolen")
    error, results = with_client(query, prometheus)
    assert f"answered with HTTP {status}" in str(error)
    assert results == ["refused"]
    assert len(prometheus.queries) == 1, "no redirect is followed"


def test_reason_that_prometheus_gives_is_named_in_short() -> None:
    error, _ = with_client(query, answering({"status": "error", "errorType": "bad_data", "error": "secret"}, 400))
    assert "HTTP 400 (bad_data)" in str(error)
    assert "secret" not in str(error)


def test_prometheus_that_hangs_is_given_up() -> None:
    async def work(client: PrometheusClient, prometheus: Prometheus) -> Any:
        prometheus.waits = asyncio.Event()
        return await query(client, prometheus)

    error, results = with_client(work, timeout_seconds=0.2)
    assert "did not answer within 0.2 s" in str(error)
    assert results == ["timeout"]


def test_prometheus_that_trickles_is_given_up() -> None:
    class Trickling(Prometheus):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.01)

    error, results = with_client(query, Trickling(), timeout_seconds=0.3)
    assert "did not answer within 0.3 s" in str(error)
    assert results == ["timeout"]


def test_endless_answer_is_given_up() -> None:
    error, results = with_client(query, answering(" " * (8 * 1024 * 1024 + 1)))
    assert "more than 8388608 bytes" in str(error)
    assert results == ["malformed"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://prometheus.invalid:9090"])
def test_address_where_nobody_answers_is_an_error(address: str) -> None:
    error, results = with_client(query, url=address)
    assert f"Prometheus at {address} cannot be asked" in str(error)
    assert results == ["unreachable"]


def test_path_of_the_address_is_kept() -> None:
    seen: list[str] = []
    prometheus = Prometheus()

    def note(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        return web.json_response(vector())

    prometheus.reply = note

    async def work(client: PrometheusClient, source: Prometheus) -> Any:
        other = PrometheusClient(settings.Prometheus(url=f"{client._url}/tenant/a"))
        await query(other, source)
        await other.close()

    with_client(work, prometheus)
    assert seen == ["/tenant/a/api/v1/query"]


# --- TLS and token ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prometheus")
    for authority in ("ca", "other"):
        certificates.make_authority(folder, authority)
    names = ("IP:127.0.0.1", "DNS:localhost")
    certificates.make_certificate(folder, "server", subject="/CN=prometheus", authority="ca", names=names)
    certificates.make_certificate(folder, "elsewhere", subject="/CN=x", authority="ca", names=("DNS:x.example",))
    return folder


def served_by(pki: Path, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / f"{name}.crt", pki / f"{name}.key")
    return context


def test_prometheus_over_tls_is_asked_when_its_authority_is_known(pki: Path) -> None:
    context = served_by(pki, "server")
    assert with_client(query, context=context, ca_file=str(pki / "ca.crt")) == ([], ["ok"])


@pytest.mark.parametrize(("name", "authority"), [("server", "other"), ("server", None), ("elsewhere", "ca")])
def test_prometheus_that_is_not_trusted_is_not_asked(pki: Path, name: str, authority: str | None) -> None:
    prometheus = Prometheus()
    file = str(pki / f"{authority}.crt") if authority else None
    error, results = with_client(query, prometheus, context=served_by(pki, name), ca_file=file)
    assert "its certificate is not trusted; see caFile" in str(error)
    assert results == ["unreachable"]
    assert not prometheus.queries


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read: No such file"), ("x", "no certificates in PEM")]
)
def test_ca_file_that_is_none_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "ca.crt"
    if content is not None:
        file.write_text(content)
    error, results = with_client(query, ca_file=str(file))
    assert f"the CA file {file} " in str(error)
    assert words in str(error)
    assert results == ["credentials"]


def test_ca_file_is_read_again_when_it_changes(pki: Path, tmp_path: Path) -> None:
    file = tmp_path / "ca.crt"
    file.write_bytes((pki / "other.crt").read_bytes())

    async def work(client: PrometheusClient, source: Prometheus) -> Any:
        with pytest.raises(PrometheusError):
            await query(client, source)
        file.unlink()
        file.write_bytes((pki / "ca.crt").read_bytes())
        return await query(client, source)

    assert with_client(work, context=served_by(pki, "server"), ca_file=str(file)) == ([], ["unreachable", "ok"])


def test_token_is_sent_and_read_again_for_each_query(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    prometheus = Prometheus()

    async def work(client: PrometheusClient, source: Prometheus) -> None:
        await query(client, source)
        file.write_text("second")
        await query(client, source)

    with_client(work, prometheus, bearer_token_file=str(file))
    assert [headers["Authorization"] for headers in prometheus.headers] == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize("content", [None, b"", b"\n", b"hunter2\nX-Evil: 1", b"hunter2\xff"])
def test_token_that_is_none_is_told_and_not_shown(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    prometheus = Prometheus()
    error, results = with_client(query, prometheus, bearer_token_file=str(file))
    assert str(file) in str(error)
    assert "hunter2" not in str(error)
    assert results == ["credentials"]
    assert not prometheus.queries


@pytest.mark.parametrize("status", [200, 401, 500])
def test_token_that_comes_back_is_in_no_error(tmp_path: Path, status: int) -> None:
    file = tmp_path / "token"
    file.write_text("hunter2")
    prometheus = Prometheus()
    prometheus.reply = lambda request: web.Response(text=request.headers["Authorization"], status=status)
    error, _ = with_client(query, prometheus, bearer_token_file=str(file))
    assert isinstance(error, PrometheusError)
    assert "hunter2" not in f"{error!r} {error.__cause__!r}"


# --- the query -------------------------------------------------------------------------------------------------------


def test_query_leaves_out_what_is_old() -> None:
    assert expression(CONCURRENCY, "ml", max_age_s=60) == (
        'phoenix:inference_concurrency{namespace="ml"} and '
        '(time() - timestamp(phoenix:inference_concurrency{namespace="ml"}) < 60)'
    )


def test_namespace_cannot_leave_its_quotes() -> None:
    assert 'namespace="a\\"} or vector(0) #\\\\"' in expression(CONCURRENCY, 'a"} or vector(0) #\\', max_age_s=60)


# --- through the API -------------------------------------------------------------------------------------------------


def through(world: World, scenario: Callable[[World], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with world.running_api():
            return await scenario(world)

    return asyncio.run(main())


@pytest.mark.parametrize("reply", [answering("<html>"), answering("", 503), answering(vector({}))])
@pytest.mark.parametrize("name", ["fraud", "*"])
def test_prometheus_that_fails_is_503_and_never_zero(world: World, reply: Prometheus, name: str) -> None:
    world.prometheus.reply = reply.reply
    answer = through(world, lambda world: world.ask(path(name=name)))
    assert (answer.code, answer.body["kind"], answer.body["reason"]) == (503, "Status", "ServiceUnavailable")
    assert "Retry-After" not in answer.headers
    failed = sum(
        world.counted("phoenix_metrics_api_query_seconds_count", result=result) for result in RESULTS if result != "ok"
    )
    assert failed == 1


def test_prometheus_that_comes_back_is_asked_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world.prometheus.reply = answering("", 503).reply

    async def scenario(world: World) -> list[int]:
        codes = [(await world.ask(path())).code]
        world.prometheus.reply = None
        async with asyncio.timeout(20):
            while codes[-1] != 200:
                codes.append((await world.ask(path())).code)
        return codes

    assert through(world, scenario)[0] == 503
    told = [record.message for record in caplog.records if record.message.startswith("Prometheus")]
    assert told == ["Prometheus does not answer", "Prometheus answers again"], "each once"


def test_failure_is_shared_so_that_a_hanging_prometheus_is_waited_for_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "_LONGEST_FAILURE_S", 60)
    world.prometheus.waits = asyncio.Event()
    world.settings["cacheSeconds"] = 60

    async def scenario(world: World) -> set[int]:
        return {answer.code for answer in await asyncio.gather(*(world.ask(path()) for _ in range(20)))}

    world.timeout_s = 0.3
    assert through(world, scenario) == {503}
    assert len(world.prometheus.queries) == 1


def test_caller_that_gives_up_takes_the_answer_from_nobody(world: World) -> None:
    world.prometheus.waits = waits = asyncio.Event()

    async def scenario(world: World) -> int:
        first, second = (asyncio.create_task(world.ask(path())) for _ in range(2))
        await until(lambda: bool(world.prometheus.queries))
        first.cancel()
        waits.set()
        return (await second).code

    assert through(world, scenario) == 200
    assert len(world.prometheus.queries) == 1


def test_series_of_another_namespace_is_not_taken(world: World) -> None:
    row = {"metric": {"namespace": "other", "model": "fraud"}, "value": [1, "9"]}
    world.prometheus.reply = answering(vector(row)).reply
    assert through(world, lambda world: world.ask(path())).code == 404
