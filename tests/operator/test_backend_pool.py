"""The way to backends: admin Secrets, deadlines, and a backend that hangs holds nobody up for long."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import virtual_time
from memory_backend import MemoryBackend, Service
from objects import OPERATOR_NAMESPACE
from world import World

from phoenix_api import Reason
from phoenix_operator.backend_pool import BackendPool
from phoenix_operator.backends import Backend, BackendError
from phoenix_operator.cluster import ApiError
from phoenix_operator.kinds import SECRET
from phoenix_operator.settings import Settings

SETTINGS = Settings.model_validate(
    {
        "backends": [
            {"name": "default", "kind": "redis", "adminSecretRef": {"name": "redis-admin"}, "timeoutSeconds": 2}
        ]
    },
    by_alias=True,
    by_name=False,
)
HOME = ("redis", "default")


async def ping(backend: Backend) -> str:
    return cast(MemoryBackend, backend).admin["host"]


async def hang(_: Backend) -> None:
    await asyncio.sleep(3600)


def with_pool(work: Callable[[World, BackendPool], Awaitable[Any]]) -> Any:
    """Run work with a pool, in virtual time."""

    async def main() -> Any:
        world = World(SETTINGS)
        return await work(world, world.pool)

    return virtual_time.run(main())


def reason(error: pytest.ExceptionInfo[BackendError]) -> tuple[Reason, str]:
    return error.value.reason, error.value.message


def test_call_that_hangs_is_ended_and_the_next_ones_do_not_wait() -> None:
    async def work(world: World, pool: BackendPool) -> None:
        now = asyncio.get_running_loop().time
        started = now()
        answers = await asyncio.gather(*(pool.call(*HOME, hang) for _ in range(100)), return_exceptions=True)
        assert now() - started == pytest.approx(6, abs=0.1), "three times the deadline of a request, for all together"
        assert {type(answer) for answer in answers} == {BackendError}
        with pytest.raises(BackendError, match="did not answer within 6 s") as caught:
            await pool.call(*HOME, ping)
        assert caught.value.reason is Reason.BACKEND_UNREACHABLE
        assert now() - started == pytest.approx(6, abs=0.1)
        await asyncio.sleep(3)
        assert await pool.call(*HOME, ping) == "redis-admin.example.com", "one finds out that it is back"
        assert await pool.call(*HOME, ping) == "redis-admin.example.com"

    with_pool(work)


def test_one_call_finds_out_while_the_others_are_told_what_is_known() -> None:
    async def work(world: World, pool: BackendPool) -> None:
        now = asyncio.get_running_loop().time
        with pytest.raises(BackendError):
            await pool.call(*HOME, hang)
        await asyncio.sleep(3)
        started = now()
        probe = asyncio.create_task(pool.call(*HOME, hang))
        await asyncio.sleep(1)
        for _ in range(10):
            with pytest.raises(BackendError, match="did not answer"):
                await pool.call(*HOME, ping)
        assert now() - started == pytest.approx(1, abs=0.01)
        with pytest.raises(BackendError):
            await probe

    with_pool(work)


def test_few_calls_at_once_go_to_a_backend() -> None:
    async def work(world: World, pool: BackendPool) -> int:
        at_once, most = 0, 0

        async def count(_: Backend) -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.5)
            at_once -= 1

        await asyncio.gather(*(pool.call(*HOME, count) for _ in range(50)))
        return most

    assert with_pool(work) == 8


@pytest.mark.parametrize("refusal", [Reason.ACCESS_DENIED, Reason.TOPIC_MISMATCH])
def test_refusal_of_one_model_stops_no_other(refusal: Reason) -> None:
    async def work(world: World, pool: BackendPool) -> None:
        async def refuse(_: Backend) -> None:
            raise BackendError(refusal, "no")

        with pytest.raises(BackendError):
            await pool.call(*HOME, refuse)
        await pool.call(*HOME, ping)

    with_pool(work)


def test_words_of_a_client_library_are_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    async def work(world: World, pool: BackendPool) -> None:
        async def fail(_: Backend) -> None:
            raise OSError("cannot reach redis://admin:secret@x")

        with pytest.raises(BackendError, match="failed with OSError") as caught:
            await pool.call(*HOME, fail)
        assert caught.value.__cause__ is None
        assert "secret" not in caught.value.message

    with_pool(work)
    assert "secret" not in str([record.__dict__ for record in caplog.records])


def test_admin_secret_is_read_again_after_a_while_and_a_changed_one_counts() -> None:
    async def work(world: World, pool: BackendPool) -> None:
        first = await pool.get(*HOME)
        for _ in range(10):
            assert await pool.get(*HOME) is first
        assert len(world.cluster.calls) == 1
        world.admin("redis-admin", host="elsewhere")
        await asyncio.sleep(6)
        assert await pool.call(*HOME, ping) == "elsewhere"
        assert cast(MemoryBackend, first).is_closed
        world.cluster.refuse = lambda call: None
        await asyncio.sleep(6)
        assert await pool.get(*HOME) is await pool.get(*HOME)

    with_pool(work)


def test_admin_secret_that_cannot_be_used_is_named() -> None:
    async def work(world: World, pool: BackendPool) -> None:
        def refuse(_: Any) -> None:
            raise ApiError(403, "Forbidden", "no")

        world.cluster.refuse = refuse
        with pytest.raises(BackendError) as caught:
            await pool.get(*HOME)
        assert reason(caught)[0] is Reason.ACCESS_DENIED
        assert "manifests FOLDER --bindings redis-admin" in reason(caught)[1]
        world.cluster.refuse = lambda call: None
        world.cluster.remove(SECRET, "redis-admin", OPERATOR_NAMESPACE)
        with pytest.raises(BackendError) as caught:
            await pool.get(*HOME)
        assert reason(caught) == (
            Reason.SECRET_MISSING,
            "Secret phoenix-system/redis-admin of backend default does not exist; the operator's settings name it",
        )
        metadata = {"name": "redis-admin", "namespace": OPERATOR_NAMESPACE}
        world.cluster.put(SECRET, {"metadata": metadata, "data": {"host": "/w=="}})
        with pytest.raises(BackendError, match="key host of its admin Secret is no text"):
            await pool.get(*HOME)
        with pytest.raises(BackendError, match="name no backend gone of kind redis"):
            await pool.call("redis", "gone", ping)

    with_pool(work)


def test_pool_closes_what_it_has_opened() -> None:
    async def work(world: World, pool: BackendPool) -> None:
        backend = cast(MemoryBackend, await pool.get(*HOME))
        await pool.close()
        assert backend.is_closed

    with_pool(work)


def test_service_in_memory_lets_nobody_in_with_a_wrong_password() -> None:
    service = Service("redis", logins={"a": "x"})
    assert service.works({"username": "a", "password": "x"})
    assert not service.works({"username": "a", "password": "y"})
    assert not service.works({"username": "b", "password": "x"})
