"""The front door to Kafka: settings become librdkafka clients, and its errors become words and reasons.

Hides confluent-kafka's configuration, logging and error codes from `event_broker` and `async_inference`. Everything
here may be called from any thread.
"""

import logging
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from phoenix_server import __version__
from phoenix_server.errors import Reason, StartError
from phoenix_server.settings import Settings

__all__ = [
    "OFFSET_INVALID",
    "Consumer",
    "KafkaError",
    "KafkaException",
    "KafkaLink",
    "LastError",
    "Message",
    "Producer",
    "TopicPartition",
]

_log = logging.getLogger(__name__)
# One metadata request may take this long before the cluster counts as not answering.
PROBE_TIMEOUT_S = 3.0
# "(after 3ms in state CONNECT, 2 identical error(s) suppressed)" would make news of each repetition.
_CIRCUMSTANCES = re.compile(r" \(after \d+ms in state [^)]*(\(s\)[^)]*)?\)")
_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}
_NO_TOPIC = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
_TIMED_OUT = {KafkaError._MSG_TIMED_OUT, KafkaError.REQUEST_TIMED_OUT, KafkaError._TIMED_OUT}
_PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._DESTROY}


class KafkaLink:
    """Makes clients for the cluster of these settings."""

    def __init__(self, settings: Settings) -> None:
        """Raises `StartError(InvalidSetting)` where the security settings do not fit together."""
        self._secrets: list[str] = []
        self._configuration = self._of(settings)
        self.message_max_bytes = settings.kafka_message_max_bytes

    def producer(self, configuration: dict[str, Any], on_error: Callable[[KafkaError], None]) -> Producer:
        """Return an idempotent producer (acks=all, zstd); `on_error` is called from its `poll`."""
        return Producer(
            self._configuration
            | {
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": "zstd",
                # Level 3 saves a tenth of the bytes for twice the time, on the CPU that serves.
                "compression.level": 1,
                "partitioner": "murmur2_random",  # as the Java clients: equal keys meet in one partition
                "message.max.bytes": self.message_max_bytes,
                "error_cb": on_error,
            }
            | configuration
        )

    def consumer(self, configuration: dict[str, Any], on_error: Callable[[KafkaError], None]) -> Consumer:
        """Return a consumer that sees committed records only and commits nothing by itself."""
        return Consumer(
            self._configuration
            | {
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "allow.auto.create.topics": False,
                "error_cb": on_error,
            }
            | configuration
        )

    def words(self, error: KafkaError) -> str:
        """Return an error for people: its name and text, without secrets."""
        return self._clean(f"{error.name()}: {_CIRCUMSTANCES.sub('', error.str())}")

    def topic_fault(self, client: Producer | Consumer, topic: str) -> str | None:
        """Ask the cluster for a topic; return what is wrong with it or with the cluster, None if all is well."""
        try:
            error = client.list_topics(topic, timeout=PROBE_TIMEOUT_S).topics[topic].error
        except KafkaException as failure:
            return self.words(failure.args[0])
        if error is None:
            return None
        if error.code() in _NO_TOPIC:
            return f"topic '{topic}' does not exist; create it, or let the operator manage topics"
        if error.code() in _DENIED:
            return f"topic '{topic}': access denied to this user; allow it to describe, read or write the topic"
        return f"topic '{topic}': {self.words(error)}"

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _of(self, settings: Settings) -> dict[str, Any]:
        """Return what all clients share."""
        faults: list[str] = []

        def needed(name: str, why: str) -> Any:
            value = getattr(settings, name)
            if value is None:
                faults.append(f"{Settings.variable(name)} is missing: {why}")
            return value

        def file(name: str) -> str:
            path = getattr(settings, name)
            if not path.is_file():
                faults.append(f"{Settings.variable(name)}: no such file: {path}")
                return ""
            return str(path)

        protocol = settings.kafka_security_protocol
        configuration: dict[str, Any] = {
            "bootstrap.servers": settings.kafka_bootstrap_servers,
            "security.protocol": protocol,
            "client.id": "phoenix-server",
            "client.software.name": "phoenix-server",
            "client.software.version": __version__,
            "logger": _Log(self._clean),
            "log.connection.close": False,
            "socket.keepalive.enable": True,
            "socket.timeout.ms": 10_000,
            "socket.connection.setup.timeout.ms": 5_000,
            "reconnect.backoff.max.ms": 2_000,
            # How soon a topic is found that was missing.
            "topic.metadata.refresh.interval.ms": 5_000,
        }
        if protocol in ("SSL", "SASL_SSL"):
            if settings.kafka_ca_file is not None:
                configuration["ssl.ca.location"] = file("kafka_ca_file")
            if settings.kafka_certificate_file is not None or settings.kafka_key_file is not None:
                for name, key in (("certificate", "ssl.certificate.location"), ("key", "ssl.key.location")):
                    if needed(f"kafka_{name}_file", "mutual TLS needs certificate and key") is not None:
                        configuration[key] = file(f"kafka_{name}_file")
            if settings.kafka_key_password is not None:
                configuration["ssl.key.password"] = self._secret(settings.kafka_key_password.get_secret_value())
        if protocol.startswith("SASL_"):
            mechanism = needed("kafka_sasl_mechanism", f"{protocol} needs a SASL mechanism")
            configuration["sasl.mechanism"] = mechanism
            if mechanism == "OAUTHBEARER" and settings.kafka_oauth_callback is not None:
                configuration["oauth_cb"] = _token_source(settings.kafka_oauth_callback, faults)
            elif mechanism == "OAUTHBEARER":
                why = "OAUTHBEARER needs a token endpoint with client id and secret, or PHOENIX_KAFKA_OAUTH_CALLBACK"
                configuration["sasl.oauthbearer.method"] = "oidc"
                configuration["sasl.oauthbearer.token.endpoint.url"] = needed("kafka_oauth_token_url", why)
                configuration["sasl.oauthbearer.client.id"] = needed("kafka_oauth_client_id", why)
                if needed("kafka_oauth_client_secret_file", why) and (path := file("kafka_oauth_client_secret_file")):
                    with open(path, encoding="utf-8") as secret:
                        configuration["sasl.oauthbearer.client.secret"] = self._secret(secret.read().strip())
                if settings.kafka_oauth_scope is not None:
                    configuration["sasl.oauthbearer.scope"] = settings.kafka_oauth_scope
            elif mechanism is not None:
                configuration["sasl.username"] = needed("kafka_username", f"{mechanism} needs a user")
                password = needed("kafka_password", f"{mechanism} needs a password")
                configuration["sasl.password"] = self._secret(password.get_secret_value()) if password else ""
        elif settings.kafka_sasl_mechanism is not None:
            faults.append(
                f"PHOENIX_KAFKA_SECURITY_PROTOCOL: expected SASL_SSL or SASL_PLAINTEXT with "
                f"{settings.kafka_sasl_mechanism}, got {protocol}"
            )
        if faults:
            raise StartError(Reason.INVALID_SETTING, "; ".join(faults))
        return configuration

    def _secret(self, value: str) -> str:
        if value:
            self._secrets.append(value)
        return value


class LastError:
    """The last thing that a client said of its connections; it says more than that a question had no answer."""

    def __init__(self, link: KafkaLink) -> None:
        self._link = link
        self.text = ""

    def take(self, error: KafkaError) -> None:
        """Take an error; that all brokers are down is what follows from the one before it."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN or not self.text:
            self.text = self._link.words(error)


def loss_reason(error: KafkaError) -> str:
    """Return why a record was not delivered, as the `reason` label of the metrics."""
    code = error.code()
    for reason, codes in (
        ("too_large", _TOO_LARGE),
        ("denied", _DENIED),
        ("no_topic", _NO_TOPIC),
        ("timeout", _TIMED_OUT),
        ("shutdown", _PURGED),
    ):
        if code in codes:
            return reason
    return "failed"


def is_too_large(error: KafkaError) -> bool:
    """Whether the record was refused for its size."""
    return error.code() in _TOO_LARGE


class _Log:
    """Takes librdkafka's log lines, which tell of every retry: for debugging; states and counters tell the rest."""

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean

    def log(self, level: int, text: str, *arguments: Any) -> None:
        """Log one line, without secrets."""
        if _log.isEnabledFor(logging.DEBUG):
            line = text % arguments if arguments else text
            _log.debug("librdkafka", extra={"line": self._clean(line), "severity": level})


def _token_source(name: str, faults: list[str]) -> Callable[[str], tuple[str, float]] | None:
    module, _, attribute = name.partition(":")
    try:
        source: Callable[[str], tuple[str, float]] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        faults.append(f"PHOENIX_KAFKA_OAUTH_CALLBACK: {error}")
        return None
    return source
