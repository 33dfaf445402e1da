"""Asynchronous inference over Kafka: consume, infer, produce, each request exactly one result.

Results, dead letters and the offsets of the requests are committed in one Kafka transaction, fenced by the consumer
group's generation (KIP-447): whatever is killed, a reader with `isolation.level=read_committed` sees one result for
each request record. Each model has one consumer in a thread of its own; what is inferred happens on the event loop,
through the data plane, and results are produced in the order of the requests.

There is one way to fail: the consumer and the producer are let go and made anew, and go on from the committed offsets.
Calls of the transaction run in a thread that is given up where they do not return (`send_offsets_to_transaction` of
librdkafka 2.16 can hang past its timeout when the broker dies); the next producer of the same name fences the old one.
"""

import asyncio
import functools
import logging
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Self

from phoenix_server import async_requests
from phoenix_server.abandonable import AbandonableThread, Abandoned
from phoenix_server.async_requests import Record, Reply
from phoenix_server.dataplane import DataPlane
from phoenix_server.event_stream import topic_of
from phoenix_server.kafka_binding import KafkaBinding, binding_of
from phoenix_server.kafka_client import (
    Consumer,
    KafkaError,
    KafkaException,
    KafkaLink,
    Message,
    Producer,
    TopicPartition,
    is_too_large,
)
from phoenix_server.metrics import Metrics, RequestCounts
from phoenix_server.record_answers import RecordAnswers
from phoenix_server.served_model import ServedModel
from phoenix_server.settings import Settings

_log = logging.getLogger(__name__)
_PART = "requests"
_POLL_S = 0.2
# A batch that takes longer than this, because its model loads or is overloaded, pauses the partitions.
_PAUSE_AFTER_S = 0.5
_PROBE_EVERY_S = 2.0
_INIT_S = 15.0
_COMMIT_S = 20.0
_CLOSE_S = 10.0
_GRACE_S = 5.0
_FIRST_BACKOFF_S = 0.25
_LONGEST_BACKOFF_S = 5.0
# How long the partitions of a process that was killed rest: the least that brokers allow is 6 s by default.
_SESSION_TIMEOUT_MS = 10_000
# How long a transaction that a killed process left open holds up its successor elsewhere.
_TRANSACTION_TIMEOUT_MS = 10_000
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


@dataclass(frozen=True, slots=True)
class Route:
    """Where a model's requests come from and where what becomes of them goes."""

    model: str
    requests: str
    results: str
    dead_letters: str
    group: str
    transactional_id: str

    @classmethod
    def of(cls, model: ServedModel, settings: Settings) -> "Route | None":
        """Return the route that a manifest declares, or None."""
        kafka = model.spec.bindings and model.spec.bindings.kafka
        if not kafka or not kafka.requests:
            return None
        requests = kafka.requests
        own_group = f"phoenix.{model.manifest.model.metadata.namespace}.{model.name}"
        group = settings.kafka_group_id or own_group
        return cls(
            model=model.name,
            requests=requests.topic or topic_of(model, "requests"),
            results=requests.results or topic_of(model, "results"),
            dead_letters=requests.dead_letter_topic or topic_of(model, "dead-letters"),
            group=group,
            transactional_id=".".join(
                [group, *([model.name] if group != own_group else []), settings.kafka_transactional_id or _own_name(settings)]
            ),
        )


class AsyncInference:
    """Keeps a consumer for each loaded model that declares requests; an async context manager."""

    def __init__(self, settings: Settings, plane: DataPlane, metrics: Metrics) -> None:
        self._settings = settings
        self._plane = plane
        self._metrics = metrics
        self._consumers: dict[Route, ModelConsumer] = {}
        self._link: KafkaLink | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if self._settings.kafka_bootstrap_servers is not None and self._settings.kafka_requests:
            self._link = KafkaLink(self._settings)
            self._plane.repository.followers.append(self._follow)
            self._follow(self._plane.repository.served())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Finish the batches under way, commit them, and leave the groups."""
        if self._link is not None:
            self._plane.repository.followers.remove(self._follow)
        consumers = list(self._consumers.values())
        for consumer in consumers:
            consumer.stop()
        await asyncio.gather(*(consumer.ended() for consumer in consumers))

    def _follow(self, models: list[ServedModel]) -> None:
        """Start and stop consumers so that they fit what is loaded."""
        assert self._link is not None
        answering = {model.name for model in models}
        routes = {Route.of(self._plane.repository.get(name), self._settings) for name in answering}
        for route in self._consumers.keys() - routes:
            self._consumers.pop(route).stop()
        for route in routes - self._consumers.keys():
            if route is None:
                continue
            counts = self._metrics.async_requests.setdefault(route.model, RequestCounts())
            binding = binding_of(route.model, self._metrics.bindings, self._loop.call_soon_threadsafe)
            answers = RecordAnswers(self._plane, route.model, counts)

            def infer(records: Sequence[Record], answers: RecordAnswers = answers) -> "Future[list[Reply]]":
                return asyncio.run_coroutine_threadsafe(answers.answer(records), self._loop)

            consumer = ModelConsumer(route, self._link, infer, counts, binding, self._settings.kafka_batch_records)
            self._consumers[route] = consumer
            consumer.start()


class _Over(Exception):
    """The session cannot go on; a new one may. The message is what to tell, None if it is no fault of the cluster."""

    def __init__(self, fault: str | None = None) -> None:
        super().__init__(fault)
        self.fault = fault


class ModelConsumer:
    """The thread that consumes one model's requests. `infer` runs a batch on the event loop."""

    def __init__(
        self,
        route: Route,
        link: KafkaLink,
        infer: Callable[[Sequence[Record]], "Future[list[Reply]]"],
        counts: RequestCounts,
        binding: KafkaBinding,
        batch_records: int,
    ) -> None:
        self._route = route
        self._link = link
        self._infer = infer
        self._counts = counts
        self._binding = binding
        self._batch_records = batch_records
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"requests-{route.model}", daemon=True)
        self._connection_error = ""
        self._is_in_doubt = True
        self._has_committed = False

    def start(self) -> None:
        """Begin to consume."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests."""
        self._is_stopping.set()

    async def ended(self) -> None:
        """Wait until the batch under way is committed and the group is left, for a bounded time."""
        await asyncio.to_thread(self._thread.join, _COMMIT_S + _CLOSE_S + 2 * _GRACE_S)

    # --- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._is_stopping.is_set():
            self._has_committed = False
            fault: str | None = None
            try:
                self._session()
            except _Over as over:
                fault = over.fault
            except Abandoned as error:
                self._counts.producers_abandoned += 1
                fault = f"a call of the client library was given up: {error}"
            except KafkaException as failure:
                fault = self._link.words(failure.args[0])
            except Exception as error:
                _log.exception("asynchronous inference failed and begins anew", extra={"model": self._route.model})
                fault = f"unexpected {type(error).__name__}; the log has it"
            if self._is_stopping.is_set():
                break
            if fault is not None:
                self._binding.report(_PART, self._connection_error or fault)
                self._is_in_doubt = True
            _log.info("consuming begins anew", extra={"model": self._route.model, "cause": fault})
            backoff_s = _FIRST_BACKOFF_S if self._has_committed else min(_LONGEST_BACKOFF_S, backoff_s * 2)
            self._is_stopping.wait(backoff_s)

    def _session(self) -> None:
        """Consume with one producer and one consumer for as long as all goes well."""
        calls = AbandonableThread(f"transactions-{self._route.model}")
        try:
            producer = self._link.producer(
                {
                    "transactional.id": self._route.transactional_id,
                    "transaction.timeout.ms": _TRANSACTION_TIMEOUT_MS,
                    "linger.ms": 5,
                },
                self._on_error,
            )
            self._await_topics(producer)
            calls.call(lambda: producer.init_transactions(_INIT_S), _INIT_S + _GRACE_S)
            _Session(self, producer, calls).run()
            calls.call(producer.close, _CLOSE_S)
        finally:
            calls.end()

    def _await_topics(self, client: Producer) -> None:
        """Wait until the topics are there: requests are not to be read before their results can be written."""
        while not self._is_stopping.is_set():
            self._connection_error = ""
            client.poll(0)
            fault = self._topics_fault(client)
            if fault is None:
                return
            self._binding.report(_PART, self._connection_error or fault)
            self._is_stopping.wait(_PROBE_EVERY_S)
        raise _Over

    def _topics_fault(self, client: Producer | Consumer) -> str | None:
        route = self._route
        for topic in (route.requests, route.results, route.dead_letters):
            if (fault := self._link.topic_fault(client, topic)) is not None:
                return fault
        return None

    def _on_error(self, error: KafkaError) -> None:
        """Take what a client says between records; the topics are asked for before it is told."""
        self._connection_error = self._link.words(error)
        self._is_in_doubt = True


class _Session:
    """One consumer and one producer, from the first poll to the first failure."""

    def __init__(self, owner: ModelConsumer, producer: Producer, calls: AbandonableThread) -> None:
        self._owner = owner
        self._route = owner._route
        self._link = owner._link
        self._counts = owner._counts
        self._producer = producer
        self._calls = calls
        self._is_stopping = owner._is_stopping
        self._epoch = 0
        self._is_member = False
        self._must_rewind = False
        self._next_look_s = 0.0
        self._consumer = self._link.consumer(
            {
                "group.id": self._route.group,
                "partition.assignment.strategy": "roundrobin",
                "session.timeout.ms": _SESSION_TIMEOUT_MS,
                "max.poll.interval.ms": 300_000,
                "fetch.wait.max.ms": 100,
                "queued.max.messages.kbytes": 16_384,
            },
            owner._on_error,
        )

    def run(self) -> None:
        """Consume until told to stop; raise when the session cannot go on."""
        consumer = self._consumer
        try:
            consumer.subscribe(
                [self._route.requests], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
            )
            while not self._is_stopping.is_set():
                records = self._gather()
                if records and (replies := self._answer(records)) is not None:
                    self._commit(records, replies)
                if self._must_rewind:
                    self._rewind()
                self._look()
        finally:
            self._consumer = None  # type: ignore[assignment]
            closing = AbandonableThread(f"closing-{self._route.model}")
            try:
                closing.call(consumer.close, _CLOSE_S)
            except (Abandoned, KafkaException) as error:
                _log.warning("the group was left without a word", extra={"model": self._route.model, "cause": str(error)})
            del consumer
            closing.end()

    def _gather(self) -> list[Record]:
        """Return what can be had at once, at most a batch; empty if nothing came for a moment."""
        first = self._consumer.poll(_POLL_S)
        if first is None:
            return []
        epoch = self._epoch
        messages = [first, *self._consumer.consume(self._owner._batch_records - 1, 0)]
        records = []
        for message in messages:
            error = message.error()
            if error is None:
                records.append(_record(message))
            elif error.code() not in _TRANSIENT:
                raise _Over(self._link.words(error))
            elif error.code() != KafkaError._PARTITION_EOF:
                self._owner._on_error(error)
        if self._epoch != epoch:  # nobody can tell which records belong to whom now
            self._must_rewind = True
            return []
        return records

    def _answer(self, records: list[Record]) -> list[Reply] | None:
        """Return the replies; None when the partitions went to somebody else meanwhile.

        While it takes longer, the partitions are paused and the consumer is polled, which keeps it in its group.
        """
        epoch = self._epoch
        future = self._owner._infer(records)
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
                if self._epoch != epoch or self._is_stopping.is_set():
                    future.cancel()
                    self._must_rewind = True
                    return None
                try:
                    return future.result(0.05)
                except TimeoutError:
                    continue
                except CancelledError:
                    raise _Over from None
        finally:
            consumer.resume(consumer.assignment())

    def _commit(self, records: list[Record], replies: list[Reply]) -> None:
        """Produce the replies and commit them with the offsets of their requests."""
        is_careful = False
        while True:
            group = self._consumer.consumer_group_metadata()
            transaction = _Transaction(self._producer, self._route, records, replies, is_careful=is_careful)
            positions = _positions_after(records)
            try:
                self._calls.call(lambda t=transaction: t.run(positions, group), _COMMIT_S + 2 * _GRACE_S)  # type: ignore[misc]
                break
            except Exception:
                self._counts.transactions["failed"] += 1
                if not transaction.oversized or not transaction.is_aborted:
                    raise
            # The broker refuses what it gets at once, good records with the bad: find the bad by sending one by one.
            if is_careful or len(transaction.oversized) == 1:
                for index in transaction.oversized:
                    replies[index] = _smaller(records[index], replies[index])
            is_careful = True
        self._owner._has_committed = True
        self._counts.transactions["committed"] += 1
        for reply in replies:
            if reply.dead_reason is None:
                self._counts.results += 1
            else:
                dead = self._counts.dead_letters
                dead[reply.dead_reason] = dead.get(reply.dead_reason, 0) + 1

    def _look(self) -> None:
        """Once in a while: measure the lag, and where the cluster is in doubt, ask it."""
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + _PROBE_EVERY_S
        owner = self._owner
        self._producer.poll(0)
        if owner._is_in_doubt and self._is_member:
            owner._is_in_doubt = False
            fault = owner._topics_fault(self._consumer)
            owner._binding.report(_PART, fault and (owner._connection_error or fault))
            owner._is_in_doubt = fault is not None
            if fault is None:
                owner._connection_error = ""
        elif owner._is_in_doubt and owner._connection_error:
            owner._binding.report(_PART, owner._connection_error)
        lag = 0
        for position in self._consumer.position(self._consumer.assignment()):
            _, end = self._consumer.get_watermark_offsets(position, cached=True)
            if position.offset >= 0 and end > position.offset:
                lag += end - position.offset
        self._counts.lag_records = lag

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._epoch += 1
        self._is_member = True
        self._next_look_s = 0.0
        _log.info(
            "partitions assigned",
            extra={"model": self._route.model, "partitions": sorted(p.partition for p in partitions)},
        )

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._epoch += 1

    def _rewind(self) -> None:
        """Go back to the committed offsets."""
        self._must_rewind = False
        assigned = self._consumer.assignment()
        if assigned:
            self._consumer.assign([TopicPartition(p.topic, p.partition) for p in assigned])


class _Transaction:
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
        self._deadline_s = time.monotonic() + _COMMIT_S
        producer = self._producer
        producer.begin_transaction()
        try:
            for index, reply in enumerate(self._replies):
                self._produce(index, reply)
                if self._is_careful:
                    producer.flush(self._left_s())
                if self.oversized and self._is_careful:
                    raise _Over("a record is too large")
            if self.oversized:
                raise _Over("records are too large")
            self._until_done(lambda: producer.send_offsets_to_transaction(positions, group, self._left_s()))
            self._until_done(lambda: producer.commit_transaction(self._left_s()))
        except KafkaException as failure:
            error = failure.args[0]
            if error.txn_requires_abort():
                self._abort()
            raise
        except _Over:
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


def _record(message: Message) -> Record:
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        key=message.key(),  # type: ignore[arg-type]
        value=message.value(),  # type: ignore[arg-type]
        headers=tuple(message.headers() or ()),  # type: ignore[arg-type]
    )


def _positions_after(records: Sequence[Record]) -> list[TopicPartition]:
    last = {(record.topic, record.partition): record.offset for record in records}
    return [TopicPartition(topic, partition, offset + 1) for (topic, partition), offset in last.items()]


def _smaller(record: Record, reply: Reply) -> Reply:
    less = async_requests.smaller(record, reply)
    if less is None:
        raise _Over(f"the dead letter of {async_requests.place_of(record)} is too large for its topic")
    return less


def _own_name(settings: Settings) -> str:
    """Return what stays the same when this process is started again, and differs from every other process."""
    folder = os.path.realpath(settings.state_dir)
    return f"{socket.gethostname()}-{zlib.crc32(folder.encode()):08x}"
