"""What the tests of the three backends share: a backend for the block, models, logins, and the expected error."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from phoenix_api import Reason
from phoenix_operator.backends import Backend, BackendError, Login, Tenant, make_backend
from phoenix_operator.settings import BackendSettings

DEADLINE_S = 60
ADMIN_SECRET = "admin-of-default"
FRAUD = Tenant("ml", "fraud", "7c1a4a3e-0001")
CHURN = Tenant("ml", "churn", "7c1a4a3e-0002")
FRAUD_ELSEWHERE = Tenant("shop", "fraud", "7c1a4a3e-0003")


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine function; fixtures are its arguments."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE_S))

    return run


@asynccontextmanager
async def using(kind: str, admin: Mapping[str, str], **settings: Any) -> AsyncIterator[Backend]:
    """A backend for the block; `settings` as in the settings file."""
    values = {"name": "default", "kind": kind, "adminSecretRef": {"name": ADMIN_SECRET}, **settings}
    backend = make_backend(BackendSettings.model_validate(values), admin)
    try:
        yield backend
    finally:
        await backend.close()


def login_of(backend: Backend, tenant: Tenant, slot: str = "a", *, password: str = "") -> Login:
    """A login with a password that is found again wherever it leaks."""
    return Login(backend.username(tenant, slot), password or f"s3cret-{tenant.namespace}-{tenant.name}-{slot}")


@contextmanager
def refused(reason: Reason, *phrases: str, secrets: tuple[str, ...] = ()) -> Iterator[None]:
    """The block ends with this `BackendError`, which says all this and no secret."""
    with pytest.raises(BackendError) as caught:
        yield
    error = caught.value
    assert error.reason is reason, error.message
    assert "\n" not in error.message
    for phrase in phrases:
        assert phrase in error.message
    for secret in ("s3cret", *secrets):
        assert secret not in f"{error!r} {error} {error.__cause__!r} {error.__context__!r}"


def assert_silent(caplog: pytest.LogCaptureFixture, *secrets: str) -> None:
    """Nothing that was logged holds a secret."""
    text = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
    for secret in ("s3cret", *secrets):
        assert secret not in text
