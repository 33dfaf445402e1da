"""Settings: where things are and how the process behaves. What is served is the manifests' business.

Read once, at the door, from `PHOENIX_*` variables and from `SERVICE_BINDING_ROOT` folders, which win. An unknown
`PHOENIX_*` variable or a wrong value is an error that names it. (Plain pydantic: pydantic-settings does the same for
0.1 s and 5 MB more, a tenth of the start-up budget; see docs/decisions.)
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from phoenix_server.clients import Network, parse_networks
from phoenix_server.errors import Reason, StartError
from phoenix_server.redis_address import parse_redis_url, redis_url_of

_PREFIX = "PHOENIX_"
# Variables that belong to other programs of the project and so may stand in a shared environment.
_FOREIGN = ("PHOENIX_TEST_", "PHOENIX_REQUIRE", "PHOENIX_BENCH_")
# Service Binding type and key -> setting. https://servicebinding.io/spec/core/1.1.0/
_BINDING_KEYS = {
    ("postgresql", "uri"): "database_url",
    ("postgresql", "schema"): "database_schema",
    ("postgresql", "sslmode"): "database_sslmode",
    ("redis", "uri"): "redis_url",
    ("redis", "key-prefix"): "redis_key_prefix",
    ("kafka", "bootstrap-servers"): "kafka_bootstrap_servers",
    ("kafka", "security-protocol"): "kafka_security_protocol",
    ("kafka", "sasl-mechanism"): "kafka_sasl_mechanism",
    ("kafka", "username"): "kafka_username",
    ("kafka", "password"): "kafka_password",
    ("kafka", "group-id"): "kafka_group_id",
}
# The same for keys whose file is handed to the client library by its path.
_BINDING_FILES = {
    ("kafka", "certificates"): "kafka_ca_file",
    ("kafka", "client-certificate"): "kafka_certificate_file",
    ("kafka", "private-key"): "kafka_key_file",
    ("postgresql", "certificates"): "database_ca_file",
    ("redis", "certificates"): "redis_ca_file",
}
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseModel):
    """Everything the environment decides. Durations are in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    host: str = Field("0.0.0.0", description="Address that both ports listen on.")
    http_port: Port = Field(8000, description="REST port; 0 picks a free one.")
    grpc_port: Port = Field(8001, description="gRPC port; 0 picks a free one.")
    grpc_engine: Literal["auto", "native", "grpcio"] = Field(
        "auto", description="Engine under the gRPC servicer: pygrpc-native where it is installed, else grpc.aio."
    )
    model_store: Path = Field(Path("models"), description="Folder that relative model URIs are looked up in.")
    state_dir: Path = Field(Path(".phoenix"), description="Folder for caches, SQLite and JSON lines.")
    drain_seconds: float = Field(
        0.0, ge=0, le=3600, description="Time to answer as not ready before connections stop being accepted."
    )
    shutdown_seconds: float = Field(
        60.0, gt=0, le=3600, description="Longest time to wait for requests in flight before the process ends."
    )
    exit_on_error: bool = Field(
        True, description="End the process when a model cannot be loaded at start; else serve the others, not ready."
    )
    watch: bool = Field(True, description="Load manifests again when their files change.")
    measure_capacity: bool = Field(True, description="Measure each model's capacity once it is loaded and idle.")
    cpus: float = Field(
        0.0, ge=0, description="CPUs this process may use (downward API); 0: the scheduler affinity decides."
    )
    model_credentials_dir: Path = Field(
        Path("/var/run/phoenix/credentials"),
        description="Folder of the Secret for fetching models: one file a key, used for the fetch only.",
    )
    api_keys_file: Path | None = Field(None, description="File with one bearer key a line; absent: no keys asked.")
    trusted_proxies: str = Field(
        "",
        description="Addresses or networks of proxies, separated by commas, whose `X-Forwarded-For` names the client; "
        "`per: Client` of a rate limit needs it behind one.",
    )
    access_log: bool = Field(False, description="Write one log line for each request.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    header_timeout_seconds: float = Field(10.0, gt=0, description="Longest time a request's head may take to arrive.")
    body_timeout_seconds: float = Field(60.0, gt=0, description="Longest time a request's body may take to arrive.")
    keep_alive_seconds: float = Field(75.0, gt=0, description="Longest time a connection may stay idle.")
    max_connections: int = Field(10_000, ge=1, description="Open HTTP connections beyond which new ones are closed.")
    termination_log: Path = Field(
        Path("/dev/termination-log"), description="Where the reason for ending is written, if the file exists."
    )
    database_url: SecretStr | None = Field(
        None, description="PostgreSQL for models and audit; absent: SQLite in the state folder."
    )
    database_schema: str | None = Field(
        None,
        pattern=r"^[^\x00]{1,63}$",
        description="Schema of the audit; absent: the first of the `search_path`.",
    )
    database_sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] | None = Field(
        None, description="TLS to the database, as libpq has it; absent: what the URL says."
    )
    database_ca_file: Path | None = Field(None, description="Certificates that the database's own is checked against.")
    database_pooler: bool = Field(
        False, description="Whether a pooler (pgbouncer) stands between; then statements are not prepared."
    )
    database_login: str | None = Field(
        None, description="Login that `phoenix-server migrate` grants the server's rights to, where an owner runs it."
    )
    audit_deadline_seconds: float = Field(
        5.0, gt=0, le=300, description="Longest time that an answer waits for its row; then it is 503."
    )
    audit_queue_rows: int = Field(
        10_000, ge=1, description="Predictions that wait to be written, beyond which `BestEffort` loses them."
    )
    audit_outbox_rows: int = Field(
        1_000_000, ge=1, description="Events that wait in the outbox, beyond which `Durable` answers 503."
    )
    audit_heads_topic: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,249}$",
        description="Topic for the heads of hash chains; absent: they are in the log, the metrics and the database.",
    )
    audit_retention_days: int = Field(
        0, ge=0, le=36_500, description="Age in days at which predictions are dropped, by whole months; 0: never."
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis for online features: `redis://[[user]:password@]host[:port][/database]`, `rediss://` for "
        "TLS. Absent: they come from `features.json` or `features.csv` beside the manifest.",
    )
    redis_ca_file: Path | None = Field(
        None, description="Certificates (PEM) that Redis' own is checked with; absent: those of the system."
    )
    redis_key_prefix: str | None = Field(
        None,
        max_length=256,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="What all keys in Redis begin with; absent: `phx:<namespace>:<name>:` of each model.",
    )
    feature_timeout_seconds: float = Field(
        0.5, gt=0, le=60, description="Longest time that a request waits for its features."
    )
    kafka_bootstrap_servers: str | None = Field(
        None,
        pattern=r"^[^\s,:]+(:\d+)?(,[^\s,:]+(:\d+)?)*$|^\[",
        description="Kafka for events and asynchronous inference, as `host:port,…`; absent: events go to files.",
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How to talk to Kafka."
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Field(
        None, description="SASL mechanism; needed with SASL_PLAINTEXT and SASL_SSL."
    )
    kafka_username: str | None = Field(None, description="User for PLAIN and SCRAM.")
    kafka_password: SecretStr | None = Field(None, description="Password for PLAIN and SCRAM.")
    kafka_ca_file: Path | None = Field(None, description="PEM of the CAs of the brokers; absent: the system's.")
    kafka_certificate_file: Path | None = Field(None, description="PEM of the client certificate, for mutual TLS.")
    kafka_key_file: Path | None = Field(None, description="PEM of the client certificate's private key.")
    kafka_key_password: SecretStr | None = Field(None, description="Password of that key, if it has one.")
    kafka_oauth_token_url: str | None = Field(
        None, pattern="^https?://", description="Token endpoint for OAUTHBEARER (OpenID Connect client credentials)."
    )
    kafka_oauth_client_id: str | None = Field(None, description="Client id at the token endpoint.")
    kafka_oauth_client_secret_file: Path | None = Field(None, description="File with the client secret.")
    kafka_oauth_scope: str | None = Field(None, description="Scope to ask the token endpoint for.")
    kafka_oauth_callback: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="`module:function` that returns (token, unix time of its end), in place of a token endpoint.",
    )
    kafka_group_id: str | None = Field(
        None, description="Consumer group of asynchronous inference; absent: `phoenix.<namespace>.<name>`."
    )
    kafka_transactional_id: str | None = Field(
        None, description="Name of this process for transactions, after the group; absent: of host and state folder."
    )
    kafka_message_max_bytes: int = Field(
        1_000_000, ge=1000, le=1_000_000_000, description="Largest record sent; at most the topics' max.message.bytes."
    )
    kafka_requests: bool = Field(True, description="Consume the requests of models with asynchronous inference.")
    kafka_batch_records: int = Field(
        500, ge=1, le=10_000, description="Most requests that share a transaction of asynchronous inference."
    )
    events_queue_records: int = Field(
        50_000,
        ge=1,
        le=10_000_000,
        description="Most events that wait; more are lost and counted.",
    )
    events_queue_bytes: int = Field(
        64 << 20, ge=1 << 16, description="Most bytes of events that wait, estimated from their tensors."
    )
    events_file_bytes: int = Field(
        64 << 20,
        ge=1 << 16,
        description="Size beyond which an event file becomes `.1`, in place of the older one.",
    )

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: SecretStr | None) -> SecretStr | None:
        """Read every spelling of PostgreSQL as psycopg's, which is the driver here."""
        if url is None:
            return None
        scheme, separator, rest = url.get_secret_value().partition("://")
        if scheme in ("postgres", "postgresql", "postgresql+psycopg", "postgresql+asyncpg") and rest:
            return SecretStr(f"postgresql+psycopg://{rest}")
        if scheme == "sqlite" and separator:
            return url
        raise ValueError("expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE or sqlite:///FILE")

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, text: str) -> str:
        parse_networks(text)
        return text

    @property
    def proxy_networks(self) -> tuple[Network, ...]:
        """The networks of the trusted proxies."""
        return parse_networks(self.trusted_proxies)

    @field_validator("redis_url")
    @classmethod
    def _parsed(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            parse_redis_url(url.get_secret_value())
        return url

    @classmethod
    def variable(cls, name: str) -> str:
        """Return the environment variable of a setting."""
        return "DATABASE_URL" if name == "database_url" else _PREFIX + name.upper()


def load_settings(environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings: arguments that are not None win over service bindings, and those over the environment.

    Raises `StartError(InvalidSetting)` that lists every wrong or unknown variable.
    """
    environment = os.environ if environment is None else environment
    names = {Settings.variable(name): name for name in Settings.model_fields}
    faults = []
    for variable in sorted(environment):
        if variable.startswith(_PREFIX) and variable not in names and not variable.startswith(_FOREIGN):
            near = get_close_matches(variable, names, n=1)
            faults.append(f"{variable}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    values: dict[str, Any] = {names[v]: text for v, text in environment.items() if v in names and text != ""}
    values |= _service_bindings(environment.get("SERVICE_BINDING_ROOT"))
    values |= {name: value for name, value in overrides.items() if value is not None}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = str(fault["loc"][0])
            is_secret = "Secret" in str(Settings.model_fields[name].annotation)
            got = "a secret value" if is_secret else repr(fault["input"])
            faults.append(f"{Settings.variable(name)}: {fault['msg']}, got {got}")
    if faults:
        raise StartError(Reason.INVALID_SETTING, "; ".join(faults))
    return settings


def _service_bindings(root: str | None) -> dict[str, str]:
    """Read the folders under `SERVICE_BINDING_ROOT`: one a binding, one file a key."""
    values: dict[str, str] = {}
    for folder in sorted(Path(root).iterdir()) if root and Path(root).is_dir() else ():
        type_file = folder / "type"
        kind = type_file.read_text().strip() if type_file.is_file() else folder.name
        for (binding, key), name in _BINDING_KEYS.items():
            if kind == binding and (folder / key).is_file():
                values[name] = (folder / key).read_text().strip()
        for (binding, key), name in _BINDING_FILES.items():
            if kind == binding and (folder / key).is_file():
                values[name] = str(folder / key)
        if kind == "postgresql" and "database_url" not in values:
            values |= _database_url(folder)
        if kind == "redis" and not (folder / "uri").is_file():
            keys = ("host", "port", "username", "password", "ssl", "database")
            parts = {key: (folder / key).read_text().strip() for key in keys if (folder / key).is_file()}
            if url := redis_url_of(parts):
                values["redis_url"] = url
    return values


def _database_url(folder: Path) -> dict[str, str]:
    """Return the URL of a binding that has its parts only, as Secrets of other provisioners do."""
    texts = {
        key: (folder / key).read_text().strip()
        for key in ("host", "port", "database", "username", "password")
        if (folder / key).is_file()
    }
    if "host" not in texts:
        return {}
    user, password = quote(texts.get("username", ""), safe=""), quote(texts.get("password", ""), safe="")
    host = f"[{texts['host']}]" if ":" in texts["host"] else texts["host"]
    url = f"postgresql://{user}:{password}@{host}:{texts.get('port', '5432')}/{texts.get('database', '')}"
    return {"database_url": url}
