"""The serving certificate: made, shared by replicas, trusted before it is served, replaced without a gap."""

import asyncio
import base64
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from lab import certificates as openssl
from metrics_api_world import (
    NAMESPACE,
    FrontProxy,
    Kubernetes,
    World,
    api_service,
    cluster_at,
    model,
    on_socket,
    path,
    until,
)

from phoenix_operator.cluster import ApiError
from phoenix_operator.metrics_api import certificates
from phoenix_operator.metrics_api.certificates import CertificateError, Pair
from phoenix_operator.metrics_api.names import API_SERVICES, NAME
from phoenix_operator.metrics_api.serving import MountedCertificate, OwnCertificate

NAMES = [f"{NAME}.{NAMESPACE}.svc", f"{NAME}.{NAMESPACE}.svc.cluster.local", f"{NAME}.{NAMESPACE}"]
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
LIFETIME = timedelta(days=90)
SECRET = f"secrets/{NAME}"


def made(*, now: datetime = NOW, before: bytes = b"") -> Pair:
    return certificates.make(NAMES, lifetime=LIFETIME, now=now, before=before)


def authorities(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pem)


# --- making and judging ----------------------------------------------------------------------------------------------


def test_certificate_is_for_the_service_and_no_authority() -> None:
    pair = made()
    (leaf,) = authorities(pair.certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == NAMES
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    (authority,) = authorities(pair.authorities)
    leaf.verify_directly_issued_by(authority)
    assert leaf.not_valid_before_utc < NOW, "clocks differ"
    assert b"PRIVATE KEY" not in pair.certificate + pair.authorities
    assert pair.key.count(b"PRIVATE KEY") == 2, "and the authority's is nowhere"


@pytest.mark.parametrize(("days", "is_due"), [(0, False), (59, False), (61, True), (90, True), (1000, True)])
def test_certificate_is_due_after_two_thirds_of_its_time(days: int, is_due: bool) -> None:
    assert certificates.is_due(made(), NAMES, now=NOW + timedelta(days=days)) is is_due


def test_certificate_that_is_not_for_these_names_or_not_whole_is_due() -> None:
    pair, other = made(), made()
    assert certificates.is_due(pair, ["elsewhere.svc"], now=NOW)
    for broken in (
        Pair(b"", b""),
        Pair(b"x", b"y", b"z"),
        Pair(pair.certificate, other.key, pair.authorities),
        Pair(pair.certificate, pair.key, other.authorities),
        Pair(pair.certificate, pair.key, b"z"),
        Pair(pair.certificate, pair.key),
    ):
        assert certificates.is_due(broken, NAMES, now=NOW)


def test_authorities_before_are_kept_until_they_expire_and_three_at_most() -> None:
    first = made()
    second = made(now=NOW + timedelta(days=60), before=first.authorities)
    assert authorities(second.authorities)[1] == authorities(first.authorities)[0]
    third = made(now=NOW + timedelta(days=120), before=second.authorities)
    assert authorities(third.authorities)[1:] == authorities(second.authorities)[:1], "the first has expired"
    fourth = made(now=NOW, before=made(before=second.authorities).authorities)
    assert len(authorities(fourth.authorities)) == 3


def test_pair_shows_no_key() -> None:
    pair = made()
    assert "KEY" not in f"{pair!r} {pair}"


# --- Secret and APIServices ------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


Work = Callable[[OwnCertificate, OwnCertificate], Awaitable[Any]]


def with_replicas(work: Work, kubernetes: Kubernetes, clock: Clock | None = None) -> Any:
    """Do work with two replicas."""
    now = clock or Clock()

    async def main() -> Any:
        async with on_socket(kubernetes.reply) as address, cluster_at(address) as cluster:
            first, second = (
                OwnCertificate(cluster, namespace=NAMESPACE, lifetime=LIFETIME, settle_s=0, clock=now) for _ in range(2)
            )
            return await work(first, second)

    return asyncio.run(main())


async def one(first: OwnCertificate, second: OwnCertificate) -> Pair:
    return await first.current()


async def both(first: OwnCertificate, second: OwnCertificate) -> list[Pair]:
    return list(await asyncio.gather(first.current(), second.current()))


def test_replicas_agree_on_one_certificate_that_the_api_server_trusts() -> None:
    kubernetes = Kubernetes()
    first, second = with_replicas(both, kubernetes)
    assert first == second
    assert kubernetes.secret() == {
        "tls.crt": first.certificate,
        "tls.key": first.key,
        "ca.crt": first.authorities,
    }
    assert [kubernetes.bundle(name) for name in API_SERVICES] == [first.authorities] * 2


def test_second_look_writes_nothing() -> None:
    kubernetes = Kubernetes()

    async def work(first: OwnCertificate, second: OwnCertificate) -> None:
        await first.current()
        version = kubernetes.version
        await second.current()
        assert kubernetes.version == version

    with_replicas(work, kubernetes)


def test_certificate_is_rotated_and_the_one_before_is_still_trusted() -> None:
    kubernetes, clock = Kubernetes(), Clock()

    async def work(first: OwnCertificate, second: OwnCertificate) -> list[Pair]:
        old = await first.current()
        clock.now += timedelta(days=61)
        return [old, await second.current(), await first.current()]

    old, new, seen = with_replicas(work, kubernetes, clock)
    assert new == seen
    assert new.certificate != old.certificate
    assert authorities(kubernetes.bundle())[1:] == authorities(old.authorities)


def test_certificate_is_not_given_out_before_it_is_trusted() -> None:
    kubernetes = Kubernetes()

    def refuse(request: web.Request) -> None:
        if request.method == "PATCH":
            raise web.HTTPForbidden(text="apiservices is forbidden")

    kubernetes.before = refuse
    with pytest.raises(ApiError, match="apiservices is forbidden"):
        with_replicas(one, kubernetes)
    kept = kubernetes.secret()
    kubernetes.before = lambda request: None
    assert with_replicas(one, kubernetes).certificate == kept["tls.crt"], "another replica has it trusted"
    assert kubernetes.bundle() == kept["ca.crt"]


@pytest.mark.parametrize("data", [{"tls.crt": "!"}, {"tls.crt": "eA==", "tls.key": "eA==", "ca.crt": "eA=="}])
def test_secret_that_somebody_spoilt_is_made_good(data: dict[str, str]) -> None:
    kubernetes = Kubernetes()
    kubernetes.objects[SECRET]["data"] = data
    pair = with_replicas(one, kubernetes)
    assert kubernetes.secret()["tls.crt"] == pair.certificate
    assert not certificates.is_due(pair, NAMES, now=NOW)


def test_bundle_that_somebody_removed_is_put_back() -> None:
    kubernetes = Kubernetes()
    pair = with_replicas(one, kubernetes)
    kubernetes.objects[f"apiservices/{API_SERVICES[1]}"]["spec"]["caBundle"] = base64.b64encode(b"x").decode()
    with_replicas(one, kubernetes)
    assert kubernetes.bundle(API_SERVICES[1]) == pair.authorities


def test_api_service_of_somebody_else_is_left_alone() -> None:
    kubernetes = Kubernetes()
    name = API_SERVICES[0]
    kubernetes.objects[f"apiservices/{name}"] = api_service(name, service="prometheus-adapter")
    with pytest.raises(CertificateError, match=f"{name} is of Service phoenix-system/prometheus-adapter, not of"):
        with_replicas(one, kubernetes)
    assert kubernetes.bundle() == b""


def test_one_version_of_the_api_is_enough() -> None:
    kubernetes = Kubernetes()
    del kubernetes.objects[f"apiservices/{API_SERVICES[1]}"]
    assert with_replicas(one, kubernetes).authorities == kubernetes.bundle()


@pytest.mark.parametrize("missing", [[SECRET], [f"apiservices/{name}" for name in API_SERVICES]])
def test_install_that_lacks_a_part_is_told_what_to_apply(missing: list[str]) -> None:
    kubernetes = Kubernetes()
    for name in missing:
        del kubernetes.objects[name]
    with pytest.raises(CertificateError, match=r"apply metrics-api\.yaml again"):
        with_replicas(one, kubernetes)


def test_secret_that_always_changes_is_given_up() -> None:
    kubernetes = Kubernetes()

    def meddle(request: web.Request) -> None:
        if request.method == "PUT":
            kubernetes.touch(kubernetes.objects[SECRET])

    kubernetes.before = meddle
    with pytest.raises(CertificateError, match="was changed by others 5 times in a row"):
        with_replicas(one, kubernetes)


# --- a mounted one ---------------------------------------------------------------------------------------------------


def in_folder(folder: Path, pair: Pair) -> MountedCertificate:
    (folder / "tls.crt").write_bytes(pair.certificate)
    (folder / "tls.key").write_bytes(pair.key)
    return MountedCertificate(folder)


def test_mounted_certificate_is_read_each_time(tmp_path: Path) -> None:
    first, second = made(), made()
    source = in_folder(tmp_path, first)
    assert asyncio.run(source.current()).certificate == first.certificate
    in_folder(tmp_path, second)
    assert asyncio.run(source.current()).certificate == second.certificate


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tls.crt", None, "tls.crt: cannot be read: No such file"), ("tls.key", None, "tls.key: cannot be read"),
        ("tls.key", b"hunter2", "tls.key: expected a private key in PEM"), ("tls.crt", b"x", "certificates in PEM"),
        ("tls.crt", made().certificate, "expected the certificate of tls.key"), ("tls.crt", b"", "tls.crt: expected"),
    ],
)  # fmt: skip
def test_mounted_certificate_that_cannot_be_used_is_told(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    source = in_folder(tmp_path, made())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CertificateError, match=words) as caught:
        asyncio.run(source.current())
    assert "hunter2" not in str(caught.value)


# --- served ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> FrontProxy:
    return FrontProxy(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def world(proxy: FrontProxy) -> World:
    world = World(proxy)
    world.kubernetes.models["ml"] = [model("fraud")]
    world.prometheus.put("phoenix:inference_concurrency", "1")
    return world


def test_new_certificate_is_served_while_requests_go_on(world: World) -> None:
    async def main() -> None:
        async with world.running_api():
            before, old = world.kubernetes.bundle(), world.server._served
            del world.kubernetes.objects[SECRET]["data"]
            world.server._changed.set()
            codes = []
            async with asyncio.timeout(20):
                while world.server._served == old:
                    codes.append((await world.ask(path())).code)
            codes.append((await world.ask(path())).code)
            assert set(codes) == {200}
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await world.ask(path(), bundle=before)
            assert world.counted("phoenix_metrics_api_certificate_expiry_timestamp_seconds") > 0

    asyncio.run(main())


def test_certificate_goes_on_being_served_while_the_api_server_is_away(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(request: web.Request) -> None:
        if "secrets" in request.path:
            raise web.HTTPInternalServerError(text="etcd is away")

    async def main() -> int:
        async with world.running_api():
            world.kubernetes.before = fail
            world.server._changed.set()
            await until(lambda: "the serving certificate is not as it should be" in caplog.text)
            assert not world.server.readiness()
            return (await world.ask(path())).code

    assert asyncio.run(main()) == 200


def test_mounted_certificate_is_served_and_no_secret_is_asked_for(world: World, tmp_path: Path) -> None:
    openssl.make_authority(tmp_path, "ca")
    names = (f"DNS:{NAMES[0]}",)
    openssl.make_certificate(tmp_path, "tls", subject="/CN=cert-manager", authority="ca", names=names)
    world.settings["certificate"] = {"folder": str(tmp_path)}
    seen: list[str] = []
    world.kubernetes.before = lambda request: seen.append(request.path)

    async def main() -> int:
        async with world.running_api():
            return (await world.ask(path(), bundle=(tmp_path / "ca.crt").read_bytes())).code

    assert asyncio.run(main()) == 200
    assert not [name for name in seen if "secrets" in name or "apiservices" in name]


def test_old_tls_is_refused(world: World) -> None:
    async def main() -> None:
        async with world.running_api():
            context = world.proxy.context(world.kubernetes.bundle())
            context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", world.server.port, ssl=context, server_hostname=NAMES[0])

    with pytest.warns(DeprecationWarning, match="TLSVersion"):
        asyncio.run(main())
