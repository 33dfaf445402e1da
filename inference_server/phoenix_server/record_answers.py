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
_FIRST_PAUSE_S = 0.05
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
        replies: list[Reply | None] = [None] * len(records)
        pending = list(range(len(records)))
        for attempt in itertools.count():
            await self._attempt(records, replies, pending, attempt)
            pending = [index for index in pending if replies[index] is None]
            if not pending:
                break
            self._counts.retries += len(pending)
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempt, 10)))
        return [reply for reply in replies if reply is not None]

    async def _attempt(
        self, records: Sequence[Record], replies: list[Reply | None], pending: list[int], attempt: int
    ) -> None:
        """Put a reply for each of `pending` that can be answered or refused now."""
        try:
            model = self._plane.repository.get(self._model_name)
        except PhoenixError:
            return  # loading, or on its way out
        left = iter(pending)

        async def some() -> None:
            for index in left:
                replies[index] = await self._reply(model, records[index], attempt)

        # Half of the queue stays free for those who wait for an answer.
        most = min(_RUNS_AHEAD * model.max_batch_rows, max(1, model.spec.limits.max_queued_rows // 2))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(most, len(pending))):
                group.create_task(some())

    async def _reply(self, model: ServedModel, record: Record, attempt: int) -> Reply | None:
        """Return the result or the dead letter; None for a fault that passes."""
        request: InferRequest | None = None
        rows = 0
        try:
            self._plane.admit(self._model_name)
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
                return None
            reply = async_requests.dead_letter(record, failure.code.value, failure.message)
        outcome = Outcome.OK if failure is None else failure.outcome
        sizes = (rows, len(record.value or b""), len(reply.value or b"") if failure is None else 0)
        model.metrics.observe_record(outcome, sizes)
        return reply

    @staticmethod
    async def _decode(record: Record, model: ServedModel) -> tuple[InferRequest, OutputForms]:
        if len(record.value or b"") < codec_json.BIG_BODY_BYTES:
            return async_requests.decode(record, model)
        return await asyncio.to_thread(async_requests.decode, record, model)
