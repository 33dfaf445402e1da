"""PostgreSQL as the operator provisions it, on the real one."""

import secrets as random
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
import pytest
from backend_cases import (
    ADMIN_SECRET,
    CHURN,
    FRAUD,
    FRAUD_ELSEWHERE,
    assert_silent,
    login_of,
    on_a_loop,
    refused,
    using,
)
from faulty_proxy import proxy_to
from psycopg import errors, sql
from services import PostgresServer

from phoenix_api import Reason
from phoenix_operator.backends import Backend, Login, Tenant

Admin = Mapping[str, str]
KIND = "postgresql"
TABLES = ("CREATE TABLE predictions (id int)", "INSERT INTO predictions VALUES (1)")
GRANTS = "GRANT USAGE ON SCHEMA {schema} TO {login}; GRANT SELECT, INSERT ON predictions TO {login}"


def admin_of(server: PostgresServer, database: str, **others: str) -> dict[str, str]:
    return {
        "host": server.host,
        "port": str(server.port),
        "database": database,
        "username": server.admin.username,
        "password": server.admin.password,
        "certificates": server.authority.read_text(),
        **others,
    }


@pytest.fixture(params=["superuser", "createrole"])
def admin(request: pytest.FixtureRequest, secure_postgres: PostgresServer) -> Iterator[Admin]:
    """The admin Secret of a fresh database: the superuser's, or that of a role with CREATEROLE and CREATEDB only."""
    if request.param == "superuser":
        yield admin_of(secure_postgres, secure_postgres.fresh_database())
    else:
        name, password = f"provisioner_{random.token_hex(4)}", random.token_hex(16)
        with secure_postgres.connect() as connection:
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN CREATEROLE CREATEDB PASSWORD {}").format(sql.Identifier(name), password)
            )
        login = {"username": name, "password": password}
        with psycopg.connect(secure_postgres.url(**login), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(f"of_{name}")))
        yield admin_of(secure_postgres, f"of_{name}", **login)
    with secure_postgres.connect() as connection:  # roles are of all databases
        left = connection.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'phx\\_%'").fetchall()
        databases = connection.execute("SELECT datname FROM pg_database WHERE datname ~ '^(of|test)_'").fetchall()
        for (database,) in databases:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))
        for (role,) in left:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


class Pod:
    """A server of a model: it knows the binding Secret and nothing else."""

    def __init__(self, server: PostgresServer, binding: Mapping[str, str]) -> None:
        self._binding = binding
        self._uri = f"{binding['uri']}&sslrootcert={server.authority}"

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self._uri, autocommit=True, connect_timeout=10)

    def migrate(self) -> None:
        """Make a table as its owner, and grant it to the login, as the server does."""
        names = {"schema": sql.Identifier(self._binding["schema"]), "login": sql.Identifier(self._binding["username"])}
        with self.connect() as connection, connection.transaction():
            rows = connection.execute(
                "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = %s", [self._binding["schema"]]
            ).fetchall()
            connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.SQL(rows[0][0])))
            for statement in (
                TABLES if not connection.execute("SELECT to_regclass('predictions')").fetchone()[0] else ()
            ):  # type: ignore[index]
                connection.execute(statement)
            connection.execute(sql.SQL(GRANTS).format(**names))

    def rows(self) -> int:
        with self.connect() as connection:
            connection.execute("INSERT INTO predictions VALUES (2)")
            return int(connection.execute("SELECT count(*) FROM predictions").fetchone()[0])  # type: ignore[index]

    def is_let_in(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError as error:
            if "FATAL" not in str(error):
                raise
            return False
        return True


async def pod_of(
    server: PostgresServer, backend: Backend, tenant: Tenant = FRAUD, slot: str = "a", *, password: str = ""
) -> Pod:
    login = login_of(backend, tenant, slot, password=password)
    await backend.ensure(tenant, login)
    return Pod(server, backend.binding(tenant, login))


def facts(server: PostgresServer, database: str) -> dict[str, Any]:
    with server.connect(database) as connection:
        roles = connection.execute(
            "SELECT rolname, rolcanlogin FROM pg_roles WHERE rolname LIKE 'phx\\_%' ORDER BY 1"
        ).fetchall()
        schemas = connection.execute(
            "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'phx\\_%' ORDER BY 1"
        ).fetchall()
        return {"roles": dict(roles), "schemas": [name for (name,) in schemas]}


@on_a_loop
async def test_schema_and_login_are_made_and_work(secure_postgres: PostgresServer, admin: Admin) -> None:
    async with using(KIND, admin) as backend:
        pod = await pod_of(secure_postgres, backend)
        pod.migrate()
        assert pod.rows() == 2
    assert facts(secure_postgres, admin["database"]) == {
        "roles": {"phx_ml_fraud": False, "phx_ml_fraud_a": True},
        "schemas": ["phx_ml_fraud"],
    }


@on_a_loop
async def test_second_ensure_writes_nothing(secure_postgres: PostgresServer, admin: Admin) -> None:
    async with using(KIND, admin) as backend:
        login = login_of(backend, FRAUD)
        await backend.ensure(FRAUD, login)
        with secure_postgres.connect() as connection:
            before = connection.execute("SELECT pg_current_xact_id()").fetchone()
            await backend.ensure(FRAUD, login)
            after = connection.execute("SELECT pg_current_xact_id()").fetchone()
    assert int(after[0]) - int(before[0]) == 1, "only what asks has a transaction id"  # type: ignore[index]


@on_a_loop
async def test_login_adds_and_reads_and_changes_nothing(secure_postgres: PostgresServer, admin: Admin) -> None:
    async with using(KIND, admin) as backend:
        pod = await pod_of(secure_postgres, backend)
    pod.migrate()
    with pod.connect() as connection:
        for statement in ("UPDATE predictions SET id = 3", "DELETE FROM predictions", "TRUNCATE predictions",
                          "DROP TABLE predictions", "CREATE TABLE mine (id int)"):  # fmt: skip
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute(statement)


@on_a_loop
async def test_foreign_login_reaches_nothing(secure_postgres: PostgresServer, admin: Admin) -> None:
    async with using(KIND, admin) as backend:
        (await pod_of(secure_postgres, backend)).migrate()
        for tenant in (CHURN, FRAUD_ELSEWHERE):
            pod = await pod_of(secure_postgres, backend, tenant)
            with pod.connect() as connection:
                for statement in ("SELECT * FROM phx_ml_fraud.predictions", "SET ROLE phx_ml_fraud",
                                  "SET ROLE phx_ml_fraud_a", "CREATE TABLE phx_ml_fraud.mine (id int)",
                                  "ALTER ROLE phx_ml_fraud_a PASSWORD 'mine'", "DROP SCHEMA phx_ml_fraud"):  # fmt: skip
                    with pytest.raises(errors.InsufficientPrivilege):
                        connection.execute(statement)


@on_a_loop
async def test_rotation_lets_both_slots_in_until_the_old_one_goes(
    secure_postgres: PostgresServer, admin: Admin
) -> None:
    async with using(KIND, admin) as backend:
        old = await pod_of(secure_postgres, backend)
        old.migrate()
        new = await pod_of(secure_postgres, backend, slot="b")
        new.migrate()
        assert (old.rows(), new.rows()) == (2, 3)
        with old.connect() as connection:
            await backend.drop_login(FRAUD, backend.username(FRAUD, "a"))
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        assert not old.is_let_in()
        assert new.rows() == 4
        await backend.drop_login(FRAUD, backend.username(FRAUD, "a"))
        again = await pod_of(secure_postgres, backend, password="s3cret-anew")
        again.migrate()
        assert (again.rows(), old.is_let_in()) == (5, False)


@on_a_loop
async def test_what_somebody_changed_is_set_right(secure_postgres: PostgresServer, admin: Admin) -> None:
    async with using(KIND, admin, connectionLimit=7) as backend:
        pod = await pod_of(secure_postgres, backend)
        pod.migrate()
        changes = ["ALTER ROLE phx_ml_fraud_a PASSWORD 'other'", "ALTER ROLE phx_ml_fraud_a NOLOGIN",
                   "ALTER ROLE phx_ml_fraud_a INHERIT", "ALTER ROLE phx_ml_fraud_a CONNECTION LIMIT 1",
                   "ALTER ROLE phx_ml_fraud_a CREATEDB", "ALTER ROLE phx_ml_fraud_a RESET ALL",
                   "REVOKE phx_ml_fraud FROM phx_ml_fraud_a",
                   f"ALTER ROLE phx_ml_fraud_a IN DATABASE {admin['database']} RESET search_path",
                   f"REVOKE CONNECT ON DATABASE {admin['database']} FROM PUBLIC, phx_ml_fraud_a"]  # fmt: skip
        expected = "SELECT rolcanlogin, rolinherit, rolconnlimit, rolcreatedb FROM pg_roles WHERE rolname = %s"
        for change in changes:
            with secure_postgres.connect(admin["database"]) as connection:
                connection.execute(sql.SQL(change))
                await pod_of(secure_postgres, backend)
                found = connection.execute(expected, ["phx_ml_fraud_a"]).fetchone()
            assert found == (True, False, 7, False), change
            pod.migrate()
            assert pod.rows() > 1, change


@on_a_loop
async def test_retained_schema_is_taken_up_by_the_next_model_of_the_name(
    secure_postgres: PostgresServer, admin: Admin
) -> None:
    async with using(KIND, admin) as backend:
        pod = await pod_of(secure_postgres, backend)
        pod.migrate()
        await backend.drop_login(FRAUD, backend.username(FRAUD, "a"))
        assert facts(secure_postgres, admin["database"]) == {
            "roles": {"phx_ml_fraud": False, "phx_ml_fraud_a": False},
            "schemas": ["phx_ml_fraud"],
        }
        heir = await pod_of(secure_postgres, backend, Tenant("ml", "fraud", "heir"))
        heir.migrate()
        assert heir.rows() == 2
        await backend.drop_data(FRAUD)
        assert heir.rows() == 3, "it belongs to the heir now"


@on_a_loop
async def test_schema_of_a_living_model_is_refused(secure_postgres: PostgresServer, admin: Admin) -> None:
    async with using(KIND, admin) as backend:
        pod = await pod_of(secure_postgres, backend)
        pod.migrate()
        twin = Tenant("ml", "fraud", "twin")
        with refused(Reason.ACCESS_DENIED, "phx_ml_fraud belongs to the model with uid 7c1a4a3e-0001",
                     "ALTER ROLE phx_ml_fraud_a NOLOGIN"):  # fmt: skip
            await backend.ensure(twin, login_of(backend, twin, password="s3cret-twin"))
        assert pod.rows() == 2, "nothing has changed"
        await backend.drop_data(twin)
        assert pod.rows() == 3


@on_a_loop
async def test_schema_that_the_operator_did_not_make_is_refused(secure_postgres: PostgresServer, admin: Admin) -> None:
    with secure_postgres.connect(admin["database"]) as connection:
        connection.execute("CREATE SCHEMA phx_ml_fraud")
        connection.execute("COMMENT ON SCHEMA phx_ml_fraud IS 'of the shop; uid 7c1a4a3e-0001'")
    async with using(KIND, admin) as backend:
        with refused(Reason.ACCESS_DENIED, "phx_ml_fraud is not the operator's", "COMMENT ON SCHEMA phx_ml_fraud IS"):
            await backend.ensure(FRAUD, login_of(backend, FRAUD))
        await backend.drop_data(FRAUD)
    assert facts(secure_postgres, admin["database"]) == {"roles": {}, "schemas": ["phx_ml_fraud"]}


@on_a_loop
async def test_delete_leaves_nothing_of_the_model_and_all_of_others(
    secure_postgres: PostgresServer, admin: Admin
) -> None:
    async with using(KIND, admin) as backend:
        for slot in "ab":
            (await pod_of(secure_postgres, backend, slot=slot)).migrate()
        other = await pod_of(secure_postgres, backend, CHURN)
        other.migrate()
        for _ in range(2):
            await backend.drop_data(FRAUD)
            assert facts(secure_postgres, admin["database"]) == {
                "roles": {"phx_ml_churn": False, "phx_ml_churn_a": True},
                "schemas": ["phx_ml_churn"],
            }
        assert other.rows() == 2
        (await pod_of(secure_postgres, backend)).migrate()


@on_a_loop
async def test_without_users_the_admins_credentials_are_given(secure_postgres: PostgresServer, admin: Admin) -> None:
    async with using(KIND, admin, capabilities={"manageUsers": False}) as backend:
        login = login_of(backend, FRAUD)
        await backend.ensure(FRAUD, login)
        binding = backend.binding(FRAUD, login)
        assert (binding["username"], binding["password"]) == (admin["username"], admin["password"])
        assert Pod(secure_postgres, binding).is_let_in()
        assert facts(secure_postgres, admin["database"]) == {"roles": {}, "schemas": ["phx_ml_fraud"]}
        await backend.drop_login(FRAUD, login.username)
        await backend.drop_data(FRAUD)
    assert facts(secure_postgres, admin["database"]) == {"roles": {}, "schemas": []}


@on_a_loop
async def test_without_schemas_one_must_be_there(secure_postgres: PostgresServer, admin: Admin) -> None:
    capabilities = {"manageSchemas": False, "manageUsers": False}
    async with using(KIND, admin, capabilities=capabilities) as backend:
        with refused(Reason.ACCESS_DENIED, "there is no schema phx_ml_fraud; make it, with an owner"):
            await backend.ensure(FRAUD, login_of(backend, FRAUD))
        with secure_postgres.connect(admin["database"]) as connection:
            connection.execute("CREATE SCHEMA phx_ml_fraud")
        await backend.ensure(FRAUD, login_of(backend, FRAUD))
        await backend.drop_data(FRAUD)
    assert facts(secure_postgres, admin["database"]) == {"roles": {}, "schemas": ["phx_ml_fraud"]}


# --- faults ----------------------------------------------------------------------------------------------------------


@on_a_loop
async def test_wrong_admin_password_is_access_denied(secure_postgres: PostgresServer) -> None:
    admin = admin_of(secure_postgres, "postgres", password="s3cret-wrong")
    async with using(KIND, admin) as backend:
        with refused(Reason.ACCESS_DENIED, f"the credentials of the Secret {ADMIN_SECRET} are refused: password "
                     'authentication failed for user "postgres"'):  # fmt: skip
            await backend.ensure(FRAUD, login_of(backend, FRAUD))


@on_a_loop
async def test_missing_database_is_access_denied(secure_postgres: PostgresServer) -> None:
    async with using(KIND, admin_of(secure_postgres, "nowhere")) as backend:
        with refused(Reason.ACCESS_DENIED, 'database "nowhere" does not exist'):
            await backend.ensure(FRAUD, login_of(backend, FRAUD))


@on_a_loop
async def test_admin_without_rights_is_access_denied(secure_postgres: PostgresServer) -> None:
    with secure_postgres.connect() as connection:
        connection.execute("CREATE ROLE nobody LOGIN PASSWORD 's3cret-nobody'")
    admin = admin_of(secure_postgres, "postgres", username="nobody", password="s3cret-nobody")
    async with using(KIND, admin) as backend:
        with refused(Reason.ACCESS_DENIED, "the admin may not make schema and login of ml/fraud: permission denied"):
            await backend.ensure(FRAUD, login_of(backend, FRAUD))
    with secure_postgres.connect() as connection:
        connection.execute("DROP ROLE nobody")


@on_a_loop
async def test_backend_that_is_down_slow_or_back_again(
    secure_postgres: PostgresServer, admin: Admin, everything_logged: pytest.LogCaptureFixture
) -> None:
    with proxy_to(secure_postgres.port) as proxy:
        async with using(KIND, {**admin, "port": str(proxy.port)}, timeoutSeconds=1) as backend:
            login = login_of(backend, FRAUD)
            where = f"postgresql default at 127.0.0.1:{proxy.port}/{admin['database']}"
            proxy.set("refuse")
            with refused(Reason.BACKEND_UNREACHABLE, where, "refused", secrets=(admin["password"],)):
                await backend.ensure(FRAUD, login)
            proxy.set("hang")
            for work in (backend.ensure(FRAUD, login), backend.drop_data(FRAUD),
                         backend.drop_login(FRAUD, login.username)):  # fmt: skip
                with refused(Reason.BACKEND_UNREACHABLE, f"{where}: no answer within 1 s; see that it runs"):
                    await work
            proxy.set("reset")
            with refused(Reason.BACKEND_UNREACHABLE, where):
                await backend.ensure(FRAUD, login)
        proxy.set("pass")
        async with using(KIND, {**admin, "port": str(proxy.port)}) as backend:
            await backend.ensure(FRAUD, login)
            await backend.drop_data(FRAUD)
    assert_silent(everything_logged, admin["password"])


@on_a_loop
async def test_authority_that_did_not_sign_is_refused(secure_postgres: PostgresServer, secure_redis: Any) -> None:
    admin = admin_of(secure_postgres, "postgres", certificates=secure_redis.authority.read_text())
    async with using(KIND, admin) as backend:
        with refused(Reason.BACKEND_UNREACHABLE, "certificate verify failed", secrets=(admin["password"],)):
            await backend.ensure(FRAUD, login_of(backend, FRAUD))


@on_a_loop
async def test_no_secret_reaches_the_servers_log(secure_postgres: PostgresServer, admin: Admin) -> None:
    with secure_postgres.connect(admin["database"]) as connection:
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET log_statement = 'all'").format(sql.Identifier(admin["database"]))
        )
    async with using(KIND, admin) as backend:
        await backend.ensure(FRAUD, login_of(backend, FRAUD))
        await backend.drop_data(FRAUD)
    text = secure_postgres.log.read_text()
    assert "ALTER ROLE" in text
    assert "s3cret" not in text


# --- names -----------------------------------------------------------------------------------------------------------


@on_a_loop
async def test_names_fit_and_no_two_models_share_one() -> None:
    tenants = [
        FRAUD, FRAUD_ELSEWHERE, Tenant("ml-fraud", "x", "u"), Tenant("ml", "fraud-x", "u"), Tenant("a", "b-c", "u"),
        Tenant("a-b", "c", "u"), Tenant("n" * 63, "m" * 40, "u"), Tenant("n" * 63, "m" * 39 + "x", "u"),
        Tenant("n" * 20, "m" * 35, "u"), Tenant("n" * 20, "m" * 37, "u"), Tenant("n" * 20, "m" * 38, "u"),
    ]  # fmt: skip
    admin = {"host": "localhost", "database": "d", "username": "admin", "password": "p"}
    async with using(KIND, admin) as backend:
        names = [backend.username(tenant, slot) for tenant in tenants for slot in "ab"]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) == 63


@on_a_loop
async def test_binding_has_the_keys_of_the_service_binding_specification() -> None:
    admin = {"host": "db", "database": "d/ta", "username": "admin", "password": "p", "sslmode": "require"}
    async with using(KIND, admin) as backend:
        assert backend.binding(FRAUD, Login("phx_ml_fraud_a", "p@ss/word")) == {
            "type": "postgresql", "provider": "phoenix", "host": "db", "port": "5432", "database": "d/ta",
            "username": "phx_ml_fraud_a", "password": "p@ss/word", "schema": "phx_ml_fraud", "sslmode": "require",
            "uri": "postgresql://phx_ml_fraud_a:p%40ss%2Fword@db:5432/d%2Fta?sslmode=require",
        }  # fmt: skip


@on_a_loop
@pytest.mark.parametrize(
    ("admin", "phrase"),
    [
        ({}, "has no host and no database and no username"),
        ({"host": "db", "username": "u"}, "has no database"),
        (
            {"host": "db", "database": "d", "username": "u", "sslmode": "please"},
            "sslmode of its admin Secret: expected",
        ),
    ],
)
async def test_admin_secret_that_lacks_something_is_told(admin: Admin, phrase: str) -> None:
    with refused(Reason.SECRET_MISSING, "backend default", phrase):
        async with using(KIND, admin):
            pass
