"""One consumer and one transactional producer, from the first poll to the first failure.

Hides gathering, pausing, rebalances and the commit. Lives in the thread of `async_inference.ModelConsumer`, which makes
a new session when this one raises; what the next one begins with are the committed offsets.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from phoenix_server import async_requests
from phoenix_server.abandonable import AbandonableThread, Abandoned
from phoenix_server.async_requests import Record, Reply
from phoenix_server.kafka_client import (
    Consumer,
    KafkaError,
    KafkaException,
    KafkaLink,
    Message,
    Producer,
    TopicPartition,
)
from phoenix_server.kafka_health import ClusterHealth
from phoenix_server.kafka_transaction import COMMIT_S, Route, Transaction
from phoenix_server.metrics import RequestCounts

_log = logging.getLogger(__name__)
_POLL_S = 0.2
# A batch that takes longer than this, because its model loads or is overloaded, pauses the partitions.
_PAUSE_AFTER_S = 0.5
_LOOK_EVERY_S = 2.0
_CLOSE_S = 10.0
_FRUITLESS = 3
_GRACE_S = 10.0
# How long the partitions of a process that was killed rest: the least that brokers allow is 6 s by default.
_SESSION_TIMEOUT_MS = 10_000
# What a consumer says of connections and topics that come and go; it goes on by itself.
_TRANSIENT = {
    KafkaError._PARTITION_EOF,
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._RESOLVE,
    KafkaError._TIMED_OUT,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_PARTITION,
}


class SessionOver(Exception):
    """The session cannot go on; a new one may. `fault` is what to tell, None if nothing is wrong with the cluster."""

    def __init__(self, fault: str | None = None) -> None:
        super().__init__(fault)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, for as long as a model declares it. `infer` runs a batch on the event loop."""

    route: Route
    link: KafkaLink
    infer: Callable[[Sequence[Record]], "Future[list[Reply]]"]
    counts: RequestCounts
    health: ClusterHealth
    batch_records: int
    is_stopping: threading.Event = field(default_factory=threading.Event)


class ConsumerSession:
    """Consumes until told to stop, or until something fails."""

    def __init__(self, work: Work, producer: Producer, calls: AbandonableThread) -> None:
        """`producer` is ready for transactions, `calls` the only thread that uses it from now on."""
        self._work = work
        self._producer = producer
        self._calls = calls
        self._epoch = 0
        self._is_member = False
        self._must_rewind = False
        self._next_look_s = 0.0
        self._consumer = work.link.consumer(
            {
                "group.id": work.route.group,
                "partition.assignment.strategy": "roundrobin",
                "session.timeout.ms": _SESSION_TIMEOUT_MS,
                "max.poll.interval.ms": 300_000,
                "fetch.wait.max.ms": 100,
                "queued.max.messages.kbytes": 16_384,
            },
            work.health.on_error,
        )

    def run(self) -> None:
        """Consume until told to stop; raise when the session cannot go on."""
        consumer = self._consumer
        try:
            consumer.subscribe(
                [self._work.route.requests], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
            )
            while not self._work.is_stopping.is_set():
                records = self._gather()
                if records and (replies := self._answer(records)) is not None:
                    self._commit(records, replies)
                if self._must_rewind:
                    self._rewind()
                self._look()
        finally:
            self._consumer = None
            closing = AbandonableThread(f"closing-{self._work.route.model}")
            try:
                closing.call(consumer.close, _CLOSE_S)
            except (Abandoned, KafkaException) as error:
                _log.warning(
                    "the group was left without a word", extra={"model": self._work.route.model, "cause": str(error)}
                )
            del consumer
            closing.end()

    def _gather(self) -> list[Record]:
        """Return what can be had at once, at most a batch; empty if nothing came for a moment."""
        first = self._consumer.poll(_POLL_S)
        if first is None:
            return []
        epoch = self._epoch
        messages = [first, *self._consumer.consume(self._work.batch_records - 1, 0)]
        records = []
        for message in messages:
            error = message.error()
            if error is None:
                records.append(_record(message))
            elif error.code() not in _TRANSIENT:
                raise SessionOver(self._work.link.words(error))
            elif error.code() != KafkaError._PARTITION_EOF:
                self._work.health.on_error(error)
        if self._epoch != epoch:  # nobody can tell which records belong to whom now
            self._must_rewind = True
            return []
        return records

    def _answer(self, records: list[Record]) -> list[Reply] | None:
        """Return the replies; None when the partitions went to somebody else meanwhile.

        While it takes longer, the partitions are paused and the consumer is polled, which keeps it in its group.
        """
        epoch = self._epoch
        future = self._work.infer(records)
        try:
            return future.result(_PAUSE_AFTER_S)
        except TimeoutError:
            pass
        consumer = self._consumer
        consumer.pause(consumer.assignment())
        try:
            while True:
                if consumer.poll(0.05) is not None:
                    self._must_rewind = True  # it came before the pause: read it again
                if self._epoch != epoch or self._work.is_stopping.is_set():
                    future.cancel()
                    self._must_rewind = True
                    return None
                try:
                    return future.result(0.05)
                except TimeoutError:
                    continue
                except CancelledError:
                    raise SessionOver from None
        finally:
            consumer.resume(consumer.assignment())

    def _commit(self, records: list[Record], replies: list[Reply]) -> None:
        """Produce the replies and commit them with the offsets of their requests."""
        is_careful, fruitless = False, 0
        while True:
            transaction = Transaction(self._producer, self._work.route, records, replies, is_careful=is_careful)
            run = functools.partial(
                transaction.run, _positions_after(records), self._consumer.consumer_group_metadata()
            )
            try:
                self._calls.call(run, COMMIT_S + 2 * _GRACE_S)
                break
            except Exception:
                self._work.counts.transactions["failed"] += 1
                # One more failure follows a refused record, of those that were sent after it.
                fruitless = 0 if transaction.oversized else fruitless + 1
                if not transaction.is_aborted or fruitless > (_FRUITLESS if is_careful else 0):
                    raise
            # The broker refuses what it gets at once, good records with the bad: find the bad by sending one by one.
            if is_careful or len(transaction.oversized) == 1:
                for index in transaction.oversized:
                    replies[index] = _smaller(records[index], replies[index])
            is_careful = True
        self._work.counts.transactions["committed"] += 1
        for reply in replies:
            if reply.dead_reason is None:
                self._work.counts.results += 1
            else:
                dead = self._work.counts.dead_letters
                dead[reply.dead_reason] = dead.get(reply.dead_reason, 0) + 1

    def _look(self) -> None:
        """Once in a while: measure the lag, and where the cluster is in doubt, ask it."""
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + _LOOK_EVERY_S
        self._producer.poll(0)
        if self._is_member:
            self._work.health.ask(self._consumer)
        lag = 0
        for position in self._consumer.position(self._consumer.assignment()):
            _, end = self._consumer.get_watermark_offsets(position, cached=True)
            if position.offset >= 0 and end > position.offset:
                lag += end - position.offset
        self._work.counts.lag_records = lag

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._epoch += 1
        self._is_member = True
        self._next_look_s = 0.0
        _log.info(
            "partitions assigned",
            extra={"model": self._work.route.model, "partitions": sorted(p.partition for p in partitions)},
        )

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._epoch += 1

    def _rewind(self) -> None:
        """Go back to the committed offsets."""
        self._must_rewind = False
        assigned = self._consumer.assignment()
        if assigned:
            self._consumer.assign([TopicPartition(p.topic, p.partition) for p in assigned])


def _record(message: Message) -> Record:
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        key=message.key(),
        value=message.value(),
        headers=tuple(message.headers() or ()),
    )


def _positions_after(records: Sequence[Record]) -> list[TopicPartition]:
    last = {(record.topic, record.partition): record.offset for record in records}
    return [TopicPartition(topic, partition, offset + 1) for (topic, partition), offset in last.items()]


def _smaller(record: Record, reply: Reply) -> Reply:
    less = async_requests.smaller(record, reply)
    if less is None:
        raise SessionOver(f"the dead letter of {async_requests.place_of(record)} is too large for its topic")
    return less
