"""Features from a Redis behind TLS and ACL: the right login works, every wrong one says what is wrong and no secret."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feature_models
import phoenix_process
import pytest
import redis
from feature_models import ask, binding, get, put, rows_of
from phoenix_process import Running, wait_until
from services import RedisServer

PREFIX = "phx:ml:strict:"
PASSWORD = "s3cr3t/@:?#%pass"  # whatever characters
RIGHTS = [f"~{PREFIX}*", "resetchannels", "-@all", "+@read", "+@connection"]
# As `ACL SETUSER` takes them; the password is hashed or in clear text.
USER = "phx:ml:strict"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return feature_models.write(tmp_path_factory.mktemp("features"), "strict", "lenient")


@pytest.fixture
def store(secure_redis: RedisServer) -> Iterator[redis.Redis]:
    with secure_redis.client() as client:
        put(client, "strict", "alice", 1, 2, 3)
        client.execute_command("ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", *RIGHTS)
        yield client
    secure_redis.flush()


def bound(folder: Path, server: RedisServer, **others: str) -> dict[str, str]:
    """The environment of a server with a binding in the Service Binding layout."""
    keys = {
        "type": "redis",
        "provider": "phoenix",
        "host": server.host,
        "port": str(server.port),
        "username": USER,
        "password": PASSWORD,
        "ssl": "true",
        "key-prefix": PREFIX,
        "certificates": server.authority.read_text() if server.authority else "",
        **others,
    }
    place = folder / "redis"
    place.mkdir(parents=True)
    for key, value in keys.items():
        if value:
            (place / key).write_text(value)
    return {
        "SERVICE_BINDING_ROOT": str(folder),
        "PHOENIX_FEATURE_TIMEOUT_SECONDS": "2",  # TLS takes its time on a busy machine
        "PHOENIX_LOG_LEVEL": "debug",
        "PHOENIX_ACCESS_LOG": "true",
    }


def check_no_secret(server: Running, *texts: str) -> None:
    """Nothing that the server wrote or answers holds the password, in any spelling."""
    written = "".join(server.stderr) + get(server, "/metrics")[1] + get(server, "/v2/models/strict/state")[1]
    for secret in (PASSWORD, "s3cr3t", "%2F%40"):
        assert secret not in "".join((written, *texts))


def check_refused(server: Running, *words: str) -> None:
    status, body = ask(server, "strict", "alice")
    assert status == 503, body
    assert rows_of(ask(server, "lenient", "alice")) == [[10, 20, 30]]
    assert get(server, "/v2/health/ready")[0] == 200
    wait_until(lambda: binding(server, "strict")["up"] is False, "the state says that Redis is down")
    error = binding(server, "strict")["error"]
    assert all(word in error for word in words), error
    check_no_secret(server, error, body["error"])


def test_a_binding_with_tls_login_and_prefix_is_used(
    folder: Path, secure_redis: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    with phoenix_process.start([folder], bound(tmp_path, secure_redis)) as server:
        assert rows_of(ask(server, "strict", "alice")) == [[1, 2, 3]]
        assert rows_of(ask(server, "lenient", "alice")) == [[1, 2, 3]]
        assert binding(server, "strict")["up"] is True
        check_no_secret(server)


def test_a_bindings_own_url_is_used(
    folder: Path, secure_redis: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    uri = f"rediss://phx%3Aml%3Astrict:s3cr3t%2F%40%3A%3F%23%25pass@localhost:{secure_redis.port}/0\n"
    env = bound(tmp_path, secure_redis, uri=uri, host="nowhere.invalid", password="wrong", ssl="false")
    with phoenix_process.start([folder], env) as server:
        assert rows_of(ask(server, "strict", "alice")) == [[1, 2, 3]]
        check_no_secret(server)


def test_variables_serve_as_well_as_a_binding(folder: Path, secure_redis: RedisServer, store: redis.Redis) -> None:
    env = {
        "PHOENIX_REDIS_URL": f"rediss://phx%3Aml%3Astrict:s3cr3t%2F%40%3A%3F%23%25pass@127.0.0.1:{secure_redis.port}",
        "PHOENIX_REDIS_CA_FILE": str(secure_redis.authority),
        "PHOENIX_REDIS_KEY_PREFIX": PREFIX,
        "PHOENIX_FEATURE_TIMEOUT_SECONDS": "2",
    }
    with phoenix_process.start([folder], env) as server:
        assert rows_of(ask(server, "strict", "alice")) == [[1, 2, 3]]
        assert rows_of(ask(server, "lenient", "alice")) == [[1, 2, 3]]


def test_a_wrong_password_is_told_and_mended_without_a_restart(
    folder: Path, secure_redis: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    store.execute_command("ACL", "SETUSER", USER, "resetpass", ">another")
    with phoenix_process.start([folder], bound(tmp_path, secure_redis)) as server:
        check_refused(server, "Redis refuses the login", "WRONGPASS")
        store.execute_command("ACL", "SETUSER", USER, f">{PASSWORD}")
        wait_until(lambda: ask(server, "strict", "alice")[0] == 200, "features are served")
        wait_until(lambda: binding(server, "strict")["up"] is True, "the state says that Redis is up")


def test_denied_commands_and_keys_are_told_and_mended_without_a_restart(
    folder: Path, secure_redis: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    store.execute_command("ACL", "SETUSER", USER, "-hmget")
    with phoenix_process.start([folder], bound(tmp_path, secure_redis)) as server:
        check_refused(server, "Redis refuses to read features", "NOPERM", "hmget")
        store.execute_command("ACL", "SETUSER", USER, "+hmget")
        wait_until(lambda: ask(server, "strict", "alice")[0] == 200, "features are served")
        wait_until(lambda: binding(server, "strict")["up"] is True, "the state says that Redis is up")
        store.execute_command("ACL", "SETUSER", USER, "resetkeys", "~elsewhere:*")
        check_refused(server, "Redis refuses to read features", "NOPERM", "key")
        store.execute_command("ACL", "SETUSER", USER, f"~{PREFIX}*")
        wait_until(lambda: ask(server, "strict", "alice")[0] == 200, "features are served again")
        wait_until(lambda: binding(server, "strict")["up"] is True, "the state says that Redis is up again")


def test_a_login_that_is_taken_away_is_noticed(
    folder: Path, secure_redis: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    with phoenix_process.start([folder], bound(tmp_path, secure_redis)) as server:
        assert ask(server, "strict", "alice")[0] == 200
        store.execute_command("ACL", "DELUSER", USER)
        wait_until(lambda: ask(server, "strict", "alice")[0] == 503, "the features are gone")
        check_refused(server, "WRONGPASS")


def test_a_certificate_of_an_unknown_authority_is_refused(
    folder: Path, secure_redis: RedisServer, store: redis.Redis, tmp_path: Path
) -> None:
    env = bound(tmp_path, secure_redis, certificates="")
    with phoenix_process.start([folder], env) as server:
        check_refused(server, "TLS: the certificate of Redis is refused", "self-signed")


def test_an_expired_certificate_is_refused(folder: Path, redis_factory: Any, tmp_path: Path) -> None:
    expired: RedisServer = redis_factory(is_secure=True, is_expired=True)
    with phoenix_process.start([folder], bound(tmp_path, expired)) as server:
        check_refused(server, "TLS: the certificate of Redis is refused", "expired")


@pytest.mark.parametrize("is_secure", [True, False])
def test_tls_on_one_side_only_is_told(
    folder: Path, secure_redis: RedisServer, redis_server: RedisServer, tmp_path: Path, is_secure: bool
) -> None:
    asked = secure_redis if is_secure else redis_server
    env = bound(tmp_path, asked, ssl="false" if is_secure else "true", certificates="")
    with phoenix_process.start([folder], env) as server:
        check_refused(server)


def test_a_redis_that_wants_a_password_and_gets_none_is_told(
    folder: Path, secure_redis: RedisServer, tmp_path: Path
) -> None:
    with phoenix_process.start([folder], bound(tmp_path, secure_redis, username="", password="")) as server:
        check_refused(server, "NOAUTH")


def test_a_host_that_does_not_exist_is_told(folder: Path, secure_redis: RedisServer, tmp_path: Path) -> None:
    with phoenix_process.start([folder], bound(tmp_path, secure_redis, host="redis.invalid")) as server:
        check_refused(server, "the host of Redis is not known to DNS")
