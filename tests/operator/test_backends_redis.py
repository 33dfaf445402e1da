"""Redis as the operator provisions it, on the real one, with TLS and ACLs."""

import asyncio
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import redis
from backend_cases import (
    ADMIN_SECRET,
    CHURN,
    FRAUD,
    FRAUD_ELSEWHERE,
    PROVISIONING,
    assert_silent,
    login_of,
    on_a_loop,
    refused,
    using,
    wait_for,
)
from faulty_proxy import proxy_to
from redis.exceptions import NoPermissionError
from services import RedisServer

from phoenix_api import Reason
from phoenix_operator.backends import Backend, Login, Tenant

Admin = Mapping[str, str]
KIND = "redis"
KEY = "phx:ml:fraud:user:1"
# Each with keys of its own, which is what a login may use; the rest is no command of feature tables.
ALLOWED = (
    ("HSET", KEY, "amount", "1"), ("HMGET", KEY, "amount", "count"), ("HGETALL", KEY), ("HDEL", KEY, "count"),
    ("EXPIRE", KEY, "60"), ("TTL", KEY), ("TYPE", KEY), ("EXISTS", KEY), ("UNLINK", KEY), ("DEL", KEY), ("PING",),
)  # fmt: skip
FORBIDDEN = (
    ("KEYS", "*"), ("SCAN", "0"), ("RANDOMKEY",), ("DBSIZE",), ("FLUSHALL",), ("FLUSHDB",), ("SWAPDB", "0", "1"),
    ("CONFIG", "GET", "*"), ("INFO",), ("MONITOR",), ("SHUTDOWN",), ("SAVE",),
    ("ACL", "LIST"), ("ACL", "WHOAMI"), ("CLIENT", "LIST"), ("CLIENT", "KILL", "ID", "1"), ("CLIENT", "PAUSE", "1"),
    ("CLIENT", "TRACKING", "ON"), ("EVAL", "return 1", "0"), ("FUNCTION", "FLUSH"), ("SCRIPT", "FLUSH"),
    ("PUBLISH", "c", "x"), ("SUBSCRIBE", "c"), ("SLOWLOG", "GET"), ("MIGRATE", "h", "1", KEY, "0", "1"),
    ("REPLICAOF", "h", "1"), ("SORT", KEY), ("RESTORE", KEY, "0", "x"),
)  # fmt: skip


def admin_of(server: RedisServer, **others: str) -> dict[str, str]:
    return {
        "host": server.host,
        "port": str(server.port),
        "username": server.admin.username,
        "password": server.admin.password,
        "ssl": "true",
        "certificates": server.authority.read_text(),
        **others,
    }


@pytest.fixture
def server(secure_redis: RedisServer) -> RedisServer:
    secure_redis.flush()
    return secure_redis


def pod(server: RedisServer, binding: Mapping[str, str]) -> redis.Redis:
    """A client of a server of a model: it knows the binding Secret and nothing else."""
    return redis.Redis.from_url(binding["uri"], ssl_ca_data=binding["certificates"], decode_responses=True)


async def pod_of(
    server: RedisServer, backend: Backend, tenant: Tenant = FRAUD, slot: str = "a", *, password: str = ""
) -> redis.Redis:
    login = login_of(backend, tenant, slot, password=password)
    await backend.ensure(tenant, login)
    return pod(server, backend.binding(tenant, login))


def calls(server: RedisServer) -> dict[str, int]:
    """How often each command was called."""
    with server.client() as client:
        found = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): of["calls"] for name, of in found.items()}


def users(server: RedisServer) -> set[str]:
    with server.client(decode_responses=True) as client:
        return set(client.acl_users()) - {"default", "admin"}


@on_a_loop
async def test_user_is_made_and_works_under_its_prefix(server: RedisServer) -> None:
    async with using(KIND, admin_of(server)) as backend:
        with await pod_of(server, backend) as client:
            for command in ALLOWED:
                client.execute_command(*command)
            with client.pipeline() as pipeline:
                pipeline.hset(KEY, mapping={"amount": "2"}).hmget(KEY, ["amount", "count"])
                assert pipeline.execute()[1] == ["2", None]
    assert users(server) == {"phx:ml:fraud:a"}


@on_a_loop
async def test_user_may_do_nothing_that_meets_others(server: RedisServer) -> None:
    async with using(KIND, admin_of(server)) as backend:
        with await pod_of(server, backend) as client:
            for command in FORBIDDEN:
                with pytest.raises(NoPermissionError):
                    client.execute_command(*command)


@on_a_loop
async def test_foreign_login_reaches_nothing(server: RedisServer) -> None:
    async with using(KIND, admin_of(server)) as backend:
        with await pod_of(server, backend) as client:
            client.hset(KEY, "amount", "1")
        for tenant in (CHURN, FRAUD_ELSEWHERE, Tenant("ml", "fraud-2", "uid"), Tenant("ml", "frau", "uid")):
            with await pod_of(server, backend, tenant) as client:
                own = f"phx:{tenant.namespace}:{tenant.name}:k"
                client.set(own, "x")
                for command in (("HGETALL", KEY), ("HSET", KEY, "amount", "2"), ("DEL", KEY), ("EXISTS", own, KEY),
                                ("GET", "phx:ml:fraud:"), ("SET", "plain", "1")):  # fmt: skip
                    with pytest.raises(NoPermissionError):
                        client.execute_command(*command)
    with server.client(decode_responses=True) as client:
        assert client.hgetall(KEY) == {"amount": "1"}


@on_a_loop
async def test_second_ensure_writes_nothing(server: RedisServer) -> None:
    async with using(KIND, admin_of(server)) as backend:
        login = login_of(backend, FRAUD)
        before = calls(server)
        await backend.ensure(FRAUD, login)
        after_first = calls(server)
        assert after_first["acl|setuser"] - before.get("acl|setuser", 0) == 1
        for _ in range(3):
            await backend.ensure(FRAUD, login)
        new = {name: count - after_first.get(name, 0) for name, count in calls(server).items()}
        called = {name for name, count in new.items() if count}
        assert called <= {"acl|getuser", "info", "hello", "auth"}, "the last three are the test's own"
        assert new["acl|getuser"] == 3


@on_a_loop
async def test_operator_that_starts_again_learns_the_words_of_redis_once(server: RedisServer) -> None:
    async with using(KIND, admin_of(server)) as backend:
        await backend.ensure(FRAUD, login_of(backend, FRAUD))
        await backend.ensure(CHURN, login_of(backend, CHURN))
    async with using(KIND, admin_of(server)) as backend:
        before = calls(server)["acl|setuser"]
        for tenant in (FRAUD, CHURN, FRAUD):
            await backend.ensure(tenant, login_of(backend, tenant))
        assert calls(server)["acl|setuser"] - before <= 1


@on_a_loop
async def test_rotation_lets_both_slots_in_until_the_old_one_goes(server: RedisServer) -> None:
    async with using(KIND, admin_of(server)) as backend:
        old = await pod_of(server, backend)
        new = await pod_of(server, backend, slot="b")
        old.hset(KEY, "amount", "1")
        assert new.hget(KEY, "amount") == "1"
        for _ in range(2):
            await backend.drop_login(FRAUD, backend.username(FRAUD, "a"))
            with pytest.raises((redis.AuthenticationError, redis.ConnectionError)):
                old.hget(KEY, "amount")
            assert new.hget(KEY, "amount") == "1"
        again = await pod_of(server, backend, password="s3cret-anew")
        assert again.hget(KEY, "amount") == "1"
        with pytest.raises(redis.AuthenticationError):
            old.ping()
        for client in (old, new, again):
            client.close()


@on_a_loop
async def test_what_somebody_changed_is_set_right(server: RedisServer) -> None:
    changes = (
        "off", "nopass", ">other", "resetpass", "~*", "resetkeys", "&*", "+@all", "-hmget", "+flushall",
        "clearselectors", "(+@all ~*)", "reset", "%R~other:*",
    )  # fmt: skip
    async with using(KIND, admin_of(server)) as backend:
        await backend.ensure(FRAUD, login_of(backend, FRAUD))
        with server.client(decode_responses=True) as chief:
            expected = chief.acl_getuser("phx:ml:fraud:a")
            for change in changes:
                chief.execute_command("ACL", "SETUSER", "phx:ml:fraud:a", change)
                with await pod_of(server, backend) as client:
                    client.hset(KEY, "amount", "1")
                found = chief.acl_getuser("phx:ml:fraud:a")
                assert {**found, "commands": set(found["commands"])} == {
                    **expected,
                    "commands": set(expected["commands"]),
                }, change


@on_a_loop
async def test_users_are_made_again_after_redis_lost_them(redis_factory: Callable[..., RedisServer]) -> None:
    server = redis_factory(is_secure=True)
    async with using(KIND, admin_of(server)) as backend:
        (await pod_of(server, backend)).close()
        server.kill()
        with refused(Reason.BACKEND_UNREACHABLE, f"redis default at 127.0.0.1:{server.port}: "):
            await backend.ensure(FRAUD, login_of(backend, FRAUD))
        server.start()
        with await pod_of(server, backend) as client:
            client.hset(KEY, "amount", "1")


@on_a_loop
async def test_retain_keeps_keys_and_delete_takes_them_all(server: RedisServer) -> None:
    async with using(KIND, admin_of(server)) as backend:
        neighbour = Tenant("ml", "fraud-2", "uid")
        with await pod_of(server, backend) as client, client.pipeline() as pipeline:
            for number in range(5_000):
                pipeline.hset(f"phx:ml:fraud:user:{number}", "amount", "1")
            pipeline.execute()
        other = await pod_of(server, backend, neighbour)
        other.set("phx:ml:fraud-2:k", "x")
        with server.client() as chief:
            chief.set("plain", "x")
            await backend.drop_login(FRAUD, backend.username(FRAUD, "a"))
            assert chief.dbsize() == 5_002
            await pod_of(server, backend)
            for _ in range(2):
                await backend.drop_data(FRAUD)
                assert set(chief.keys()) == {b"plain", b"phx:ml:fraud-2:k"}
                assert users(server) == {"phx:ml:fraud-2:a"}
        assert other.get("phx:ml:fraud-2:k") == "x"
        other.close()


@on_a_loop
async def test_deletion_goes_on_where_time_was_up(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.client() as chief, chief.pipeline() as pipeline:
        for number in range(20_000):
            pipeline.set(f"phx:ml:fraud:{number}", "x")
            pipeline.set(f"others:{number}", "x")
        pipeline.execute()
    ticks = itertools.count(step=4)
    monkeypatch.setattr("phoenix_operator.backends.redis.monotonic", lambda: next(ticks))
    tries = 1
    async with using(KIND, admin_of(server)) as backend:
        while True:
            try:
                await backend.drop_data(FRAUD)
                break
            except Exception as error:
                with refused(Reason.DELETION_BLOCKED, "keys of phx:ml:fraud:* are still being deleted"):
                    raise error
                tries += 1
    with server.client() as chief:
        assert chief.dbsize() == 20_000
    assert tries > 2
    server.flush()


@on_a_loop
async def test_without_users_the_admins_credentials_are_given(server: RedisServer) -> None:
    async with using(KIND, admin_of(server), capabilities={"manageUsers": False}) as backend:
        login = login_of(backend, FRAUD)
        await backend.ensure(FRAUD, login)
        binding = backend.binding(FRAUD, login)
        assert (binding["username"], binding["password"]) == ("admin", server.admin.password)
        assert users(server) == set()
        with pod(server, binding) as client:
            client.hset(KEY, "amount", "1")
        await backend.drop_login(FRAUD, login.username)
        await backend.drop_data(FRAUD)
        with server.client() as chief:
            assert chief.dbsize() == 0


@on_a_loop
async def test_acl_file_is_kept_where_there_is_one(
    redis_factory: Callable[..., RedisServer], everything_logged: pytest.LogCaptureFixture
) -> None:
    server = redis_factory(is_secure=True)
    before = calls(server).get("acl|save", 0)
    async with using(KIND, admin_of(server)) as backend:
        await backend.ensure(FRAUD, login_of(backend, FRAUD))
        await backend.ensure(FRAUD, login_of(backend, FRAUD))
    assert calls(server)["acl|save"] - before == 1
    assert not [record for record in everything_logged.records if record.name.startswith("phoenix_operator")]


# --- faults ----------------------------------------------------------------------------------------------------------


@on_a_loop
async def test_wrong_admin_password_is_access_denied(server: RedisServer) -> None:
    async with using(KIND, admin_of(server, password="s3cret-wrong")) as backend:
        with refused(Reason.ACCESS_DENIED, f"redis default at 127.0.0.1:{server.port}: the credentials of the Secret "
                     f"{ADMIN_SECRET} are refused; correct its username and password"):  # fmt: skip
            await backend.ensure(FRAUD, login_of(backend, FRAUD))


@on_a_loop
async def test_admin_without_rights_is_access_denied_and_with_those_of_the_docs_is_enough(server: RedisServer) -> None:
    with server.client() as chief:
        chief.execute_command("ACL", "SETUSER", "provisioner", "reset", "on", ">s3cret-provisioner", "+@connection")
    admin = admin_of(server, username="provisioner", password="s3cret-provisioner")
    async with using(KIND, admin) as backend:
        with refused(Reason.ACCESS_DENIED, "the admin may not make the user phx:ml:fraud:a", "acl|getuser",
                     "give it the rights, or switch manageUsers off"):  # fmt: skip
            await backend.ensure(FRAUD, login_of(backend, FRAUD))
    [command] = re.findall(r"^ACL SETUSER phoenix-admin (.*)$", PROVISIONING, re.MULTILINE)
    with server.client() as chief:
        chief.execute_command(
            "ACL", "SETUSER", "provisioner", *command.replace("PASSWORD", "s3cret-provisioner").split()
        )
    async with using(KIND, admin) as backend:
        with await pod_of(server, backend) as client:
            client.hset(KEY, "amount", "1")
        await backend.drop_data(FRAUD)
    assert users(server) == {"provisioner"}


@on_a_loop
async def test_replica_is_told(redis_factory: Callable[..., RedisServer], redis_server: RedisServer) -> None:
    replica = redis_factory()
    with replica.client() as client, redis_server.client() as primary:
        primary.set("phx:ml:fraud:k", "x")
        client.replicaof("127.0.0.1", str(redis_server.port))
        await asyncio.to_thread(wait_for, lambda: client.exists("phx:ml:fraud:k"))
        async with using(KIND, {"host": "127.0.0.1", "port": str(replica.port)}) as backend:
            with refused(Reason.ACCESS_DENIED, "this is a replica; name the primary as host"):
                await backend.drop_data(FRAUD)
        primary.delete("phx:ml:fraud:k")


@on_a_loop
async def test_backend_that_is_down_slow_or_back_again(
    server: RedisServer, everything_logged: pytest.LogCaptureFixture
) -> None:
    with proxy_to(server.port) as proxy:
        where = f"redis default at 127.0.0.1:{proxy.port}: "
        async with using(KIND, admin_of(server, port=str(proxy.port)), timeoutSeconds=1) as backend:
            login = login_of(backend, FRAUD)
            await backend.ensure(FRAUD, login)
            proxy.set("hang")
            for work in (backend.ensure(FRAUD, login), backend.drop_data(FRAUD),
                         backend.drop_login(FRAUD, login.username)):  # fmt: skip
                with refused(Reason.BACKEND_UNREACHABLE, f"{where}no answer within 1 s; see that it runs",
                             secrets=(server.admin.password,)):  # fmt: skip
                    await work
            proxy.set("refuse")
            with refused(Reason.BACKEND_UNREACHABLE, where, "see that it runs"):
                await backend.ensure(FRAUD, login)
            proxy.set("reset")
            with refused(Reason.BACKEND_UNREACHABLE, where, "see that it runs"):
                await backend.ensure(FRAUD, login)
            proxy.set("pass")
            await backend.ensure(FRAUD, login)
            server.pause()
            try:
                with refused(Reason.BACKEND_UNREACHABLE, f"{where}no answer within 1 s"):
                    await backend.ensure(FRAUD, login)
            finally:
                server.resume()
            await backend.ensure(FRAUD, login)
    assert_silent(everything_logged, server.admin.password)


@on_a_loop
async def test_authority_that_did_not_sign_is_refused(server: RedisServer, secure_postgres: Any) -> None:
    for certificates in (secure_postgres.authority.read_text(), ""):
        async with using(KIND, admin_of(server, certificates=certificates)) as backend:
            with refused(Reason.BACKEND_UNREACHABLE, "certificate verify failed", secrets=(server.admin.password,)):
                await backend.ensure(FRAUD, login_of(backend, FRAUD))


@on_a_loop
async def test_password_reaches_redis_as_a_hash_only(server: RedisServer) -> None:
    with server.client() as chief:
        chief.config_set("slowlog-log-slower-than", 0)
        async with using(KIND, admin_of(server)) as backend:
            await backend.ensure(FRAUD, login_of(backend, FRAUD))
        commands = b" ".join(entry["command"] for entry in chief.slowlog_get(128))
        chief.config_set("slowlog-log-slower-than", 10_000)
        chief.slowlog_reset()
    assert b"SETUSER" in commands
    assert b"s3cret" not in commands


# --- names -----------------------------------------------------------------------------------------------------------


@on_a_loop
async def test_binding_has_the_keys_of_the_service_binding_specification() -> None:
    async with using(KIND, {"host": "r", "ssl": "true", "certificates": "PEM"}) as backend:
        assert backend.binding(FRAUD, Login("phx:ml:fraud:a", "p@ss/word")) == {
            "type": "redis", "provider": "phoenix", "host": "r", "port": "6379", "username": "phx:ml:fraud:a",
            "password": "p@ss/word", "ssl": "true", "key-prefix": "phx:ml:fraud:",
            "uri": "rediss://phx%3Aml%3Afraud%3Aa:p%40ss%2Fword@r:6379/0", "certificates": "PEM",
        }  # fmt: skip
    async with using(KIND, {"host": "::1", "port": "1"}, capabilities={"manageUsers": False}) as backend:
        binding = backend.binding(FRAUD, Login("phx:ml:fraud:a", "unused"))
        assert (binding["uri"], binding["username"], binding["ssl"]) == ("redis://[::1]:1/0", "", "false")


@on_a_loop
async def test_secret_that_was_made_of_files_is_read_without_their_ends() -> None:
    async with using(KIND, {"host": "r\n", "port": "1\r\n"}, capabilities={"manageUsers": False}) as backend:
        assert backend.binding(FRAUD, Login("", ""))["uri"] == "redis://r:1/0"


@pytest.mark.parametrize(
    "values",
    [
        {"name": "fraud*"}, {"name": "fraud:x"}, {"name": "fraud.x"}, {"name": 'x"; DROP SCHEMA public; --'},
        {"name": ""}, {"name": "a" * 64}, {"name": "Fraud"}, {"name": "fraud\n"}, {"name": "-x"},
        {"namespace": "ml fraud"}, {"namespace": "ml~*"}, {"namespace": "ml.fraud"}, {"namespace": "ml_fraud"},
        {"uid": "' OR 1=1"}, {"uid": ""}, {"group": "g\0"}, {"group": "phoenix ml"},
    ],
)  # fmt: skip
def test_name_that_is_no_label_makes_no_tenant(values: dict[str, str]) -> None:
    [field] = values
    with pytest.raises(ValueError, match=f"^{field}: expected") as caught:
        Tenant(**{"namespace": "ml", "name": "fraud", "uid": "uid", **values})
    assert "\n" not in str(caught.value)


@on_a_loop
@pytest.mark.parametrize("kind", ["redis", "kafka", "postgresql"])
async def test_login_of_another_model_is_not_dropped(kind: str) -> None:
    admin = {"host": "h", "database": "d", "username": "u", "password": "p", "bootstrap-servers": "h",
             "security-protocol": "SASL_SSL"}  # fmt: skip
    async with using(kind, admin) as backend:
        with pytest.raises(ValueError, match="is no login of ml/fraud"):
            await backend.drop_login(FRAUD, backend.username(CHURN, "a"))


@on_a_loop
@pytest.mark.parametrize(
    ("admin", "phrase"), [({}, "has no host"), ({"host": "r", "port": "x1"}, "port of its admin Secret: expected")]
)
async def test_admin_secret_that_lacks_something_is_told(admin: Admin, phrase: str) -> None:
    with refused(Reason.SECRET_MISSING, "backend default", phrase):
        async with using(KIND, admin):
            pass
