"""One attempt to commit a batch of replies together with the offsets of their requests.

Hides the order of the calls, the deadline over all of them, and which failures of librdkafka are tried again, aborted
or raised. Runs in a thread that may be given up (`abandonable`), so it shares nothing that others change.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phoenix_server.async_requests import Record, Reply
from phoenix_server.kafka_client import KafkaError, KafkaException, Message, Producer, TopicPartition, is_too_large

COMMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Route:
    """Where a model's requests come from and where what becomes of them goes."""

    model: str
    requests: str
    results: str
    dead_letters: str
    group: str
    transactional_id: str


class TransactionAborted(Exception):
    """Some records are too large (`Transaction.oversized`); nothing of the batch is committed."""


class Transaction:
    """One attempt to commit a batch. Runs in a thread that may be given up, so it shares nothing that others change."""

    def __init__(
        self, producer: Producer, route: Route, records: Sequence[Record], replies: Sequence[Reply], *, is_careful: bool
    ) -> None:
        """`is_careful`: wait for each record before the next is sent."""
        self._producer = producer
        self._route = route
        self._records = records
        self._replies = tuple(replies)
        self._is_careful = is_careful
        self._deadline_s = 0.0
        self.oversized: list[int] = []
        self.is_aborted = False

    def run(self, positions: list[TopicPartition], group: object) -> None:
        """Commit, or abort and raise."""
        self._deadline_s = time.monotonic() + COMMIT_S
        producer = self._producer
        producer.begin_transaction()
        try:
            for index, reply in enumerate(self._replies):
                self._produce(index, reply)
                if self._is_careful:
                    producer.flush(self._left_s())
                if self.oversized and self._is_careful:
                    raise TransactionAborted("a record is too large")
            if self.oversized:
                raise TransactionAborted("records are too large")
            self._until_done(lambda: producer.send_offsets_to_transaction(positions, group, self._left_s()))
            self._until_done(lambda: producer.commit_transaction(self._left_s()))
        except KafkaException as failure:
            error = failure.args[0]
            # _STATE: the transaction failed already, by a record whose report came before this call
            if error.txn_requires_abort() or error.code() == KafkaError._STATE:
                self._abort()
            raise
        except TransactionAborted:
            self._abort()
            raise

    def _produce(self, index: int, reply: Reply) -> None:
        topic = self._route.results if reply.dead_reason is None else self._route.dead_letters
        while True:
            try:
                self._producer.produce(
                    topic,
                    reply.value,
                    reply.key,
                    headers=list(reply.headers),
                    on_delivery=functools.partial(self._delivered, index),
                )
                return
            except BufferError:
                self._producer.poll(min(0.1, self._left_s()))
            except KafkaException as failure:
                if not is_too_large(failure.args[0]):
                    raise
                self.oversized.append(index)
                return

    def _delivered(self, index: int, error: KafkaError | None, _: Message) -> None:
        if error is not None and is_too_large(error):
            self.oversized.append(index)

    def _until_done(self, call: Callable[[], object]) -> None:
        while True:
            try:
                call()
                return
            except KafkaException as failure:
                error = failure.args[0]
                if not error.retriable() or error.txn_requires_abort() or self._left_s() <= 0.1:
                    raise

    def _abort(self) -> None:
        self._until_done(lambda: self._producer.abort_transaction(max(1.0, self._left_s())))
        self.is_aborted = True

    def _left_s(self) -> float:
        return max(0.1, self._deadline_s - time.monotonic())
