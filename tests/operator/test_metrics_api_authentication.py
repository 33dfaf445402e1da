"""Who is let in: front-proxy certificates over real TLS, the ConfigMap and its changes, the headers."""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from metrics_api_world import CONFIG, HPA, FrontProxy, World, config_map, model, path, until
from multidict import CIMultiDict

from phoenix_operator.metrics_api import tls_server
from phoenix_operator.metrics_api.authentication import (
    Caller,
    ConfigError,
    Unauthenticated,
    authenticate,
    front_proxy,
)
from phoenix_operator.metrics_api.authentication import (
    FrontProxy as Trusted,
)

SERIES = "phoenix:inference_concurrency"
PEM = "-----BEGIN CERTIFICATE-----\n…"
Scenario = Callable[[World], Awaitable[Any]]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> FrontProxy:
    return FrontProxy(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def world(proxy: FrontProxy) -> World:
    world = World(proxy)
    world.kubernetes.models["ml"] = [model("fraud")]
    world.prometheus.put(SERIES, "1")
    return world


def through(world: World, scenario: Scenario, *, is_ready: bool = True) -> Any:
    async def main() -> Any:
        async with world.running_api(is_ready=is_ready):
            return await scenario(world)

    return asyncio.run(main())


# --- over TLS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [path(), "/apis", "/apis/custom.metrics.k8s.io/v1beta2", "/openapi/v2", "/livez"])
def test_caller_without_the_front_proxys_certificate_gets_401(world: World, asked: str) -> None:
    answer = through(world, lambda world: world.ask(asked, certificate=None, X_Remote_Group="system:masters"))
    assert (answer.code, answer.body["kind"], answer.body["reason"]) == (401, "Status", "Unauthorized")
    assert "expected the client certificate of the API server's front proxy, got none" in answer.body["message"]
    assert not world.kubernetes.reviews


def test_certificate_of_another_name_gets_401(world: World) -> None:
    answer = through(world, lambda world: world.ask(path(), certificate="stranger"))
    assert answer.code == 401
    assert "requestheader-allowed-names" in answer.body["message"]


def test_any_name_will_do_where_none_is_listed(world: World, proxy: FrontProxy) -> None:
    world.kubernetes.objects[CONFIG] = config_map(proxy.authority())
    assert through(world, lambda world: world.ask(path(), certificate="stranger")).code == 200


def test_certificate_of_another_authority_is_refused_in_the_handshake(world: World) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await world.ask(path(), certificate="other")

    through(world, scenario)
    assert not world.prometheus.queries


def test_front_proxy_that_names_nobody_gets_401(world: World) -> None:
    answer = through(world, lambda world: world.ask(path(), X_Remote_User=""))
    assert answer.code == 401
    assert "X-Remote-User" in answer.body["message"]


def test_plain_http_is_no_request(world: World) -> None:
    async def scenario(world: World) -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http://127.0.0.1:{world.server.port}{path()}")

    through(world, scenario)


def test_authority_of_the_front_proxy_is_rotated_without_a_restart(world: World, proxy: FrontProxy) -> None:
    async def scenario(world: World) -> None:
        assert (await world.ask(path())).code == 200
        world.kubernetes.objects[CONFIG] = config_map(proxy.authority("other-ca"), "other-client")
        await world.server._proxy.read()
        before = world.server._served
        await until(lambda: world.server._served != before)
        assert (await world.ask(path(), certificate="other")).code == 200
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await world.ask(path())

    through(world, scenario)


def test_connection_that_an_old_authority_vouches_for_ends(world: World, proxy: FrontProxy) -> None:
    async def scenario(world: World) -> None:
        context = proxy.context(world.kubernetes.bundle())
        reading, writing = await asyncio.open_connection(
            "127.0.0.1", world.server.port, ssl=context, server_hostname="phoenix-metrics-api.phoenix-system.svc"
        )
        writing.write(f"GET {path()} HTTP/1.1\r\nHost: x\r\nX-Remote-User: {HPA}\r\n\r\n".encode())
        assert b"200 OK" in await reading.readuntil(b"\r\n")
        world.kubernetes.objects[CONFIG] = config_map(proxy.authority("other-ca"))
        await world.server._proxy.read()
        async with asyncio.timeout(20):
            await reading.read()  # to its end
        writing.close()

    through(world, scenario)


def test_request_that_is_served_during_a_rotation_is_answered(world: World, proxy: FrontProxy) -> None:
    world.prometheus.waits = waits = asyncio.Event()

    async def scenario(world: World) -> int:
        asking = asyncio.create_task(world.ask(path()))
        await until(lambda: bool(world.prometheus.queries))
        world.kubernetes.objects[CONFIG] = config_map(proxy.authority("other-ca"))
        await world.server._proxy.read()
        before = world.server._served
        await until(lambda: world.server._served != before)
        waits.set()
        return (await asking).code

    assert through(world, scenario) == 200


async def connections(world: World, count: int) -> list[asyncio.StreamReader]:
    """Open connections without a certificate that ask for nothing."""
    context = world.proxy.context(world.kubernetes.bundle(), None)
    name = "phoenix-metrics-api.phoenix-system.svc"
    opened = [
        await asyncio.open_connection("127.0.0.1", world.server.port, ssl=context, server_hostname=name)
        for _ in range(count)
    ]
    world.writers = [writer for _, writer in opened]  # else they would be closed here
    return [reader for reader, _ in opened]


async def has_ended(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(20):
        return await reader.read() == b""


def test_connection_that_asks_for_nothing_is_ended(world: World) -> None:
    async def scenario(world: World) -> None:
        (reader,) = await connections(world, 1)
        tls, now = world.server._tls, time.monotonic()
        assert tls is not None
        await until(lambda: bool(tls._strangers))
        tls.end_strangers(now + 20)
        assert not reader.at_eof()
        tls.end_strangers(now + 40)
        assert await has_ended(reader)

    through(world, scenario)


def test_connections_of_strangers_are_bounded_and_the_oldest_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_server, "_STRANGERS", 2)

    async def scenario(world: World) -> None:
        readers = await connections(world, 4)
        for reader in readers[:2]:
            assert await has_ended(reader)
        assert not any(reader.at_eof() for reader in readers[2:])
        assert (await world.ask(path())).code == 200

    through(world, scenario)


def test_answer_to_a_stranger_ends_the_connection(world: World) -> None:
    answer = through(world, lambda world: world.ask(path(), certificate=None))
    assert (answer.code, answer.headers["Connection"]) == (401, "close")


@pytest.mark.parametrize("sent", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"])
def test_request_that_is_none_is_refused_and_harms_nobody(world: World, sent: bytes) -> None:
    async def scenario(world: World) -> bytes:
        (reader,) = await connections(world, 1)
        world.writers[0].write(sent)
        async with asyncio.timeout(20):
            said = await reader.readline()
        assert (await world.ask(path())).code == 200
        return said

    assert b" 400 " in through(world, scenario)


def test_config_map_that_turns_bad_leaves_what_was_known(world: World) -> None:
    async def scenario(world: World) -> int:
        world.kubernetes.objects[CONFIG] = config_map("")
        with pytest.raises(ConfigError):
            await world.server._proxy.read()
        del world.kubernetes.objects[CONFIG]
        with pytest.raises(ConfigError, match="extension-apiserver-authentication does not exist"):
            await world.server._proxy.read()
        return (await world.ask(path())).code

    assert through(world, scenario) == 200


def test_without_the_config_map_nobody_is_served_and_readiness_says_so(world: World, proxy: FrontProxy) -> None:
    kept = world.kubernetes.objects.pop(CONFIG)

    async def scenario(world: World) -> None:
        code, text = await world.probe("readyz")
        assert (code, "the front proxy of the API server is not known yet" in text) == (503, True)
        assert (await world.probe("livez"))[0] == 200
        world.kubernetes.objects[CONFIG] = kept
        await world.server._proxy.read()
        await until(lambda: not world.server.readiness())
        assert (await world.ask(path())).code == 200

    through(world, scenario, is_ready=False)


def test_right_to_read_the_config_map_that_is_missing_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(request: web.Request) -> None:
        if "configmaps" in request.path:
            raise web.HTTPForbidden(text="configmaps is forbidden")

    world.kubernetes.before = refuse

    async def scenario(world: World) -> None:
        await until(lambda: "the front proxy is not known" in caplog.text)

    through(world, scenario, is_ready=False)
    assert world.server.readiness()


# --- the ConfigMap ---------------------------------------------------------------------------------------------------


def test_config_map_is_read_as_the_api_server_writes_it() -> None:
    found = front_proxy(config_map(PEM, "front-proxy-client", "aggregator"))
    assert found == Trusted(
        PEM,
        allowed_names=("front-proxy-client", "aggregator"),
        username_headers=("X-Remote-User",),
        uid_headers=("X-Remote-Uid",),
        group_headers=("X-Remote-Group",),
        extra_prefixes=("X-Remote-Extra-",),
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "requestheader-client-ca-file: expected a certificate"),
        ({"requestheader-client-ca-file": "x"}, "requestheader-client-ca-file: expected a certificate"),
        ({"requestheader-allowed-names": "front-proxy-client"}, "requestheader-allowed-names: expected a JSON list"),
        ({"requestheader-allowed-names": "{}"}, "requestheader-allowed-names: expected a JSON list"),
        ({"requestheader-group-headers": "[1]"}, "requestheader-group-headers: expected a JSON list"),
        ({"requestheader-username-headers": "[]"}, "requestheader-username-headers: expected the name of a header"),
        ({"requestheader-username-headers": '[" "]'}, "requestheader-username-headers: expected the name of a header"),
    ],
)
def test_config_map_that_does_not_say_what_it_should_is_told(data: dict[str, str], words: str) -> None:
    whole = config_map(PEM)["data"]
    with pytest.raises(ConfigError, match=words):
        front_proxy({"data": whole | data if data else {}})


# --- the headers -----------------------------------------------------------------------------------------------------

TRUSTED = front_proxy(config_map(PEM, "front-proxy-client"))
CERTIFICATE = {"subject": ((("organizationName", "x"),), (("commonName", "front-proxy-client"),))}


def called(*headers: tuple[str, str]) -> Caller:
    return authenticate(TRUSTED, CERTIFICATE, CIMultiDict(headers))


def test_every_group_counts_and_a_comma_divides_none() -> None:
    caller = called(
        ("x-remote-user", "eve"), ("X-Remote-Group", "a,b"), ("X-REMOTE-GROUP", "c"), ("X-Remote-Group", "")
    )
    assert caller == Caller("eve", groups=("a,b", "c"))


def test_extra_is_unescaped_and_in_lower_case() -> None:
    caller = called(
        ("X-Remote-User", "eve"), ("X-Remote-Extra-Scopes", "1"), ("x-remote-extra-acme.com%2Fid", "2"),
        ("X-Remote-Extra-scopes", "3"), ("X-Remote-Extrapolated", "no"),
    )  # fmt: skip
    assert caller.extra == (("acme.com/id", ("2",)), ("scopes", ("1", "3")))


def test_authorization_header_is_nobodys() -> None:
    with pytest.raises(Unauthenticated):
        called(("Authorization", "Bearer x"))


@pytest.mark.parametrize("certificate", [None, {}, {"subject": ()}, {"subject": ((("commonName", "kubelet"),),)}])
def test_certificate_without_an_allowed_name_is_nobodys(certificate: Any) -> None:
    with pytest.raises(Unauthenticated):
        authenticate(TRUSTED, certificate, CIMultiDict({"X-Remote-User": "eve"}))
