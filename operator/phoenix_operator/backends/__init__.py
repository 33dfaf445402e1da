"""Redis, Kafka and PostgreSQL as the operator provisions them: a home and a login for each model.

`make_backend` is the front door. The client packages are loaded with the first backend of their kind: an operator
without bindings does not pay for them.
"""

from collections.abc import Mapping

from phoenix_operator.backends.contract import SLOTS, Backend, BackendError, Login, Tenant, Topic
from phoenix_operator.settings import BackendKind, BackendSettings

__all__ = ["SLOTS", "Backend", "BackendError", "Login", "Tenant", "Topic", "make_backend"]


def make_backend(config: BackendSettings, admin: Mapping[str, str]) -> Backend:
    """Return the backend; nothing is connected yet.

    `admin` is its admin Secret, decoded, in the layout of the Service Binding specification. Raises
    `BackendError(SecretMissing)` that names the keys that the Secret lacks.
    """
    if config.kind is BackendKind.REDIS:
        from phoenix_operator.backends.redis import RedisBackend

        return RedisBackend(config, admin)
    if config.kind is BackendKind.KAFKA:
        from phoenix_operator.backends.kafka import KafkaBackend

        return KafkaBackend(config, admin)
    from phoenix_operator.backends.postgres import PostgresBackend

    return PostgresBackend(config, admin)
