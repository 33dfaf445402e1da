"""The audit while its PostgreSQL is down, slow, hanging, read-only or refusing, and that it comes back by itself."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from audit_home import (
    PASSWORD,
    SCHEMA,
    PostgresHome,
    cli,
    infer,
    is_ready,
    load,
    metric,
    row_ids,
    serving,
    settings,
    state,
    write_model,
)
from faulty_proxy import FaultyProxy, proxy_to
from phoenix_process import Running, start, wait_until
from psycopg import sql
from services import PostgresServer


@pytest.fixture
def home(postgres_server: PostgresServer) -> PostgresHome:
    return PostgresHome(postgres_server)


def through(home: PostgresHome, proxy: FaultyProxy) -> dict[str, str]:
    return home.env_of(home.login, proxy.port)


def answers_503(server: Running, name: str) -> bool:
    status, body = infer(server, name)
    assert status in (200, 503), body
    assert status == 200 or "the prediction could not be recorded" in body["error"]
    return status == 503


def test_database_that_is_down_at_start_is_waited_for(home: PostgresHome, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    with proxy_to(home.server.port) as proxy:
        proxy.set("refuse")
        with start([manifest], settings(home, **through(home, proxy))) as server:
            wait_until(lambda: state(server)["up"] is False, "the outage is known")
            assert is_ready(server)
            status, body = infer(server, "early")
            assert (status, body["error"]) == (
                503, "the prediction could not be recorded: the audit database is down"
            )  # fmt: skip
            assert home.query("SELECT * FROM predictions") == []
            assert metric(server, "phoenix_binding_up") == 0
            proxy.set("pass")
            wait_until(lambda: infer(server, "late")[0] == 200, "the database is found")
            assert state(server)["up"] is True
            assert row_ids(home) == ["late"]
        assert PASSWORD not in "".join(server.stderr)


@pytest.mark.parametrize("mode", ["refuse", "reset", "hang"])
def test_nothing_is_answered_unrecorded_in_an_outage(home: PostgresHome, tmp_path: Path, mode: str) -> None:
    manifest = write_model(tmp_path / "iris")
    more = {"PHOENIX_AUDIT_DEADLINE_SECONDS": "1"}
    with proxy_to(home.server.port) as proxy, serving(home, manifest, **through(home, proxy), **more) as server:
        with load(server, connections=4) as answers:
            for _ in range(2):
                count = len(answers.of(200))
                wait_until(lambda count=count: len(answers.of(200)) > count + 50, "answers")  # type: ignore[misc]
                refused = len(answers.of(503))
                proxy.set(mode)  # type: ignore[arg-type]
                wait_until(lambda refused=refused: len(answers.of(503)) > refused + 10, "503")  # type: ignore[misc]
                assert is_ready(server)
                wait_until(lambda: state(server)["up"] is False, "the outage is known")
                proxy.set("pass")
            count = len(answers.of(200))
            wait_until(lambda: len(answers.of(200)) > count + 50, "answers again")
        ids = row_ids(home)
        assert set(answers.of(200)) <= set(ids)
        assert not answers.broken
        assert set(answers.ids) == {200, 503}
        assert state(server)["up"] is True
    assert PASSWORD not in "".join(server.stderr)
    found = cli(home, "audit", "verify")
    assert found.returncode == 0, found.stdout + found.stderr


def test_slow_database_makes_slow_answers(home: PostgresHome, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    with proxy_to(home.server.port) as proxy, serving(home, manifest, **through(home, proxy)) as server:
        assert infer(server, "fast")[0] == 200
        proxy.set("delay", delay_s=0.5)
        with load(server, connections=8) as answers:
            wait_until(lambda: len(answers.of(200)) > 40, "slow answers")
        assert set(answers.ids) == {200}
        assert set(answers.of(200)) <= set(row_ids(home))


def test_read_only_database_is_an_outage(home: PostgresHome, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    database = sql.Identifier(home.database)
    with serving(home, manifest) as server:
        assert infer(server, "before")[0] == 200
        with home.admin() as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(database))
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [home.login])
            wait_until(lambda: answers_503(server, "refused"), "503")
            wait_until(lambda: "read-only" in state(server)["error"], "the state names the cause")
            assert is_ready(server)
            admin.execute("SET default_transaction_read_only = off")
            admin.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(database))
        wait_until(lambda: infer(server, "after")[0] == 200, "it recovers")
    assert "after" in row_ids(home)


def test_wrong_password_is_told_and_not_shown(home: PostgresHome, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris")
    login = sql.Identifier(home.login)
    with home.admin() as admin:
        admin.execute(sql.SQL("ALTER ROLE {} PASSWORD 'another'").format(login))
        with start([manifest], settings(home)) as server:
            wait_until(lambda: "password authentication failed" in state(server)["error"], "the state names the cause")
            assert answers_503(server, "refused")
            admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(login, sql.Literal(PASSWORD)))
            wait_until(lambda: infer(server, "after")[0] == 200, "it recovers")
    assert PASSWORD not in "".join(server.stderr)


def test_full_outbox_refuses_and_drains(home: PostgresHome, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris", has_events=True)
    more = {"PHOENIX_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "PHOENIX_AUDIT_OUTBOX_ROWS": "5"}
    with serving(home, manifest, **more) as server:
        for number in range(5):
            assert infer(server, f"r{number}")[0] == 200
        wait_until(lambda: answers_503(server, "one-too-many"), "the full outbox is known")
        assert metric(server, "phoenix_audit_outbox_rows") == 5
        assert "outbox" in infer(server, "another")[1]["error"]
        assert is_ready(server)
    waiting = home.query("SELECT event_id FROM outbox")
    assert len(waiting) == len(row_ids(home)) >= 5
    with serving(home, manifest, PHOENIX_STATE_DIR=str(tmp_path / "state")):  # events go to a file
        wait_until(lambda: not home.query("SELECT id FROM outbox"), "the outbox is drained")


def test_best_effort_answers_through_an_outage_and_counts_what_it_loses(home: PostgresHome, tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "iris", mode="BestEffort")
    more = {"PHOENIX_AUDIT_QUEUE_ROWS": "50", "PHOENIX_AUDIT_DEADLINE_SECONDS": "1"}
    with proxy_to(home.server.port) as proxy, serving(home, manifest, **through(home, proxy), **more) as server:
        with load(server, connections=4) as answers:
            wait_until(lambda: len(answers.of(200)) > 50, "answers")
            proxy.set("hang")
            wait_until(lambda: metric(server, "phoenix_audit_dropped_total") > 20, "losses")
            proxy.set("pass")
            wait_until(lambda: state(server)["up"] is True, "it recovers")
        assert set(answers.ids) == {200}
        rows, lost = "phoenix_audit_rows_total", "phoenix_audit_dropped_total"
        # those that are being written wait in no queue, and are not counted yet
        wait_until(
            lambda: metric(server, rows) + metric(server, lost) == len(answers.of(200)), "every answer to be counted"
        )
        written = metric(server, rows)
    ids = row_ids(home)
    assert len(set(ids)) == written
    assert cli(home, "audit", "verify").returncode == 0


def test_logins_are_rotated_under_load(home: PostgresHome, tmp_path: Path) -> None:
    """The second login needs no right but its membership: the server grants it the rest when it first connects."""
    manifest = write_model(tmp_path / "iris")
    second = f"{home.database}_b"
    home.make_login(second)
    with (
        serving(home, manifest) as old,
        load(old, connections=2, name="old") as first,
        serving(home, manifest, **home.env_of(second, home.server.port)) as new,
        load(new, connections=2, name="new") as answers,
    ):
        wait_until(lambda: len(answers.of(200)) > 50, "answers")
    assert set(first.ids) == set(answers.ids) == {200}
    assert {*first.of(200), *answers.of(200)} <= set(row_ids(home))


def test_login_may_insert_and_not_change(home: PostgresHome) -> None:
    assert cli(home, "migrate").returncode == 0
    with home.server.connect(home.database) as admin:
        admin.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(home.login)))
        admin.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(SCHEMA)))
        for statement in (
            "UPDATE predictions SET outcome = 'ok'", "DELETE FROM predictions", "TRUNCATE predictions",
            "UPDATE chains SET sequence = 1", "DELETE FROM chains", "UPDATE models SET digest = ''",
            "DELETE FROM models", "DROP TABLE predictions", "CREATE TABLE mine (x int)",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                admin.execute(statement)  # type: ignore[call-overload]
        admin.execute("UPDATE models SET last_seen = now()")
        admin.execute("DELETE FROM outbox")


def test_owner_migrates_for_a_login_that_may_not(home: PostgresHome, tmp_path: Path) -> None:
    login = f"{home.database}_c"
    home.make_login(login, is_member=False)
    manifest = write_model(tmp_path / "iris")
    with start([manifest], settings(home, **home.env_of(login, home.server.port))) as server:
        wait_until(lambda: "phoenix-server migrate" in state(server)["error"], "the state says what to do")
        assert answers_503(server, "refused")
        done = cli(home, "migrate", PHOENIX_DATABASE_LOGIN=login)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: infer(server, "after")[0] == 200, "it recovers")
    assert row_ids(home) == ["after"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_five_replicas_migrate_at_once(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    env = {"PHOENIX_STATE_DIR": str(tmp_path)}
    if kind == "postgresql":
        env = PostgresHome(request.getfixturevalue("postgres_server")).env
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PHOENIX_")}
    replicas = [
        subprocess.Popen(
            [sys.executable, "-m", "phoenix_server", "migrate"],
            env=inherited | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(5)
    ]  # fmt: skip
    outputs = [replica.communicate(timeout=100) for replica in replicas]
    assert [replica.returncode for replica in replicas] == [0] * 5, outputs
    assert sum("migrated to" in out for out, _ in outputs) == 1


def bind(folder: Path, server: PostgresServer, *, database: str, username: str) -> dict[str, str]:
    """Write the service binding of a database behind TLS; the environment that names it."""
    folder.mkdir(parents=True)
    keys = {
        "type": "postgresql", "host": server.host, "port": str(server.port), "database": database,
        "username": username, "password": PASSWORD, "schema": SCHEMA,
        "sslmode": "verify-full", "certificates": Path(str(server.authority)).read_text(),
    }  # fmt: skip
    for name, text in keys.items():
        (folder / name).write_text(text)
    return {"SERVICE_BINDING_ROOT": str(folder.parent), "PHOENIX_MEASURE_CAPACITY": "false"}


def test_tls_is_verified(secure_postgres: PostgresServer, tmp_path: Path) -> None:
    home = PostgresHome(secure_postgres)
    binding = tmp_path / "bindings" / "postgresql"
    env = bind(binding, secure_postgres, database=home.database, username=home.login)
    manifest = write_model(tmp_path / "iris")
    with start([manifest], env) as server:
        wait_until(lambda: infer(server, "over-tls")[0] == 200, "the audit is connected")
        with contextlib.closing(home.admin()) as admin:
            rows = admin.execute(
                "SELECT s.ssl FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) WHERE a.usename = %s", [home.login]
            ).fetchall()
        assert rows
        assert all(is_on for (is_on,) in rows)
    assert row_ids(home) == ["over-tls"]
    (binding / "certificates").unlink()
    with start([manifest], env) as server:
        wait_until(lambda: "certificate verify failed" in state(server)["error"], "the state names the cause")
        assert answers_503(server, "refused")
        assert PASSWORD not in "".join(server.stderr)


def test_an_expired_certificate_is_not_trusted(postgres_factory: Callable[..., PostgresServer], tmp_path: Path) -> None:
    expired = postgres_factory(is_secure=True, is_expired=True)
    env = bind(tmp_path / "bindings" / "postgresql", expired, database="postgres", username="anybody")
    with start([write_model(tmp_path / "iris")], env) as server:
        wait_until(lambda: "certificate verify failed" in state(server)["error"], "the state names the cause")
        assert answers_503(server, "refused")
        assert is_ready(server)
        assert PASSWORD not in "".join(server.stderr)


def test_database_killed_under_load_has_recorded_every_answer(
    postgres_factory: Callable[..., PostgresServer], tmp_path: Path
) -> None:
    home = PostgresHome(postgres_factory())
    more = {"PHOENIX_AUDIT_DEADLINE_SECONDS": "1"}
    with serving(home, write_model(tmp_path / "iris"), **more) as server, load(server, connections=4) as answers:
        for _ in range(3):
            count = len(answers.of(200))
            wait_until(lambda count=count: len(answers.of(200)) > count + 50, "answers")  # type: ignore[misc]
            home.server.kill()
            wait_until(lambda: state(server)["up"] is False, "the outage is known")
            assert is_ready(server)
            home.server.start()
        count = len(answers.of(200))
        wait_until(lambda: len(answers.of(200)) > count + 50, "answers again")
    assert set(answers.of(200)) <= set(row_ids(home))
    assert not answers.broken
    assert set(answers.ids) == {200, 503}
    assert cli(home, "audit", "verify").returncode == 0


def test_requests_with_the_same_id_are_rows_of_their_own(home: PostgresHome, tmp_path: Path) -> None:
    with serving(home, write_model(tmp_path / "iris")) as server:
        assert [infer(server, "same")[0] for _ in range(3)] == [200] * 3
    assert row_ids(home) == ["same"] * 3
