"""Answers requests that are not anybody's connection: records of a topic, lines of a file.

Hides the fan-out that fills batches and the trying again of faults that pass. Runs on the event loop;
`async_inference` hands over records from its thread, `replay` lines.
"""

import asyncio
import itertools
import logging
from collections.abc import Sequence

from phoenix_server import async_requests, codec_json
from phoenix_server.async_requests import Record, Reply
from phoenix_server.codec_json import OutputForms
from phoenix_server.dataplane import DataPlane
from phoenix_server.errors import Code, Outcome, PhoenixError
from phoenix_server.metrics import RequestCounts
from phoenix_server.served_model import ServedModel
from phoenix_server.tensors import InferRequest

_log = logging.getLogger(__name__)
_SHORTEST_PAUSE_S = 0.005
_PAUSE_OF_OVERLOAD_S = 0.05
_LONGEST_PAUSE_S = 2.0
# Requests at once, as a multiple of what shares a run: one run's rows gather while the other is under way.
_RUNS_AHEAD = 4


class RecordAnswers:
    """Answers the records of one model."""

    def __init__(self, plane: DataPlane, model_name: str, counts: RequestCounts) -> None:
        self._plane = plane
        self._model_name = model_name
        self._counts = counts

    async def answer(self, records: Sequence[Record]) -> list[Reply]:
        """Return one reply for each record, in order; waits as long as faults that pass take to pass."""
        replies: dict[int, Reply] = {}
        left = iter(range(len(records)))
        model = await self._loaded()

        async def some() -> None:
            for index in left:
                replies[index] = await self._settled(records[index])

        # Half of the queue stays free for those who wait for an answer.
        most = min(_RUNS_AHEAD * model.max_batch_rows, max(1, model.spec.limits.max_queued_rows // 2))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(most, len(records))):
                group.create_task(some())
        return [replies[index] for index in range(len(records))]

    async def _loaded(self) -> ServedModel:
        """Return the model, once it is there."""
        for attempt in itertools.count():
            try:
                return self._plane.repository.get(self._model_name)
            except PhoenixError:
                await self._pause(attempt, _LONGEST_PAUSE_S)
        raise AssertionError

    async def _settled(self, record: Record) -> Reply:
        """Return the result or the dead letter of a record, once its faults have passed."""
        for attempt in itertools.count():
            reply = await self._reply(record, attempt)
            if isinstance(reply, Reply):
                return reply
            # A full queue empties within a run or two; what is down or loading takes longer.
            await self._pause(attempt, _PAUSE_OF_OVERLOAD_S if reply.code is Code.OVERLOADED else _LONGEST_PAUSE_S)
        raise AssertionError

    async def _pause(self, attempt: int, longest_s: float) -> None:
        self._counts.retries += 1
        await asyncio.sleep(min(longest_s, _SHORTEST_PAUSE_S * 2 ** min(attempt, 10)))

    async def _reply(self, record: Record, attempt: int) -> Reply | PhoenixError:
        """Return the result or the dead letter, or the fault that passes."""
        model: ServedModel | None = None
        request: InferRequest | None = None
        rows = 0
        try:
            model = self._plane.admit(self._model_name)
            request, forms = await self._decode(record, model)
            response = await self._plane.infer(model, request)
            rows = response.rows
            reply = async_requests.result(record, response, forms)
            failure = None
        except PhoenixError as error:
            failure = error
        except Exception as error:
            _log.exception("unexpected failure of a record", extra={"record": async_requests.place_of(record)})
            failure = PhoenixError(Code.INTERNAL, f"internal error: {type(error).__name__}; the log has it")
        if failure is not None:
            if async_requests.passes(failure, request, attempt):
                return failure
            reply = async_requests.dead_letter(record, failure.code.value, failure.message)
        outcome = Outcome.OK if failure is None else failure.outcome
        sizes = (rows, len(record.value or b""), len(reply.value or b"") if failure is None else 0)
        if model is not None:
            model.metrics.observe_record(outcome, sizes)
        return reply

    @staticmethod
    async def _decode(record: Record, model: ServedModel) -> tuple[InferRequest, OutputForms]:
        if len(record.value or b"") < codec_json.BIG_BODY_BYTES:
            return async_requests.decode(record, model)
        return await asyncio.to_thread(async_requests.decode, record, model)
