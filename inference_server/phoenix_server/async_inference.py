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
import zlib
from typing import Self

from phoenix_server.abandonable import AbandonableThread, Abandoned
from phoenix_server.consumer_session import ConsumerSession, SessionOver, Work
from phoenix_server.dataplane import DataPlane
from phoenix_server.event_stream import topic_of
from phoenix_server.kafka_binding import binding_of
from phoenix_server.kafka_client import KafkaException, KafkaLink, Producer
from phoenix_server.kafka_health import ClusterHealth
from phoenix_server.kafka_transaction import COMMIT_S, Route
from phoenix_server.metrics import Metrics, RequestCounts
from phoenix_server.record_answers import RecordAnswers
from phoenix_server.served_model import ServedModel
from phoenix_server.settings import Settings

_log = logging.getLogger(__name__)
_PART = "requests"
_PROBE_EVERY_S = 2.0
_INIT_S = 15.0
_CLOSE_S = 10.0
_GRACE_S = 5.0
_FIRST_BACKOFF_S = 0.25
_LONGEST_BACKOFF_S = 5.0
# How long a transaction that a killed process left open holds up its successor elsewhere.
_TRANSACTION_TIMEOUT_MS = 10_000


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
        declared = [route_of(self._plane.repository.get(name), self._settings) for name in answering]
        routes = {route for route in declared if route is not None}
        for route in self._consumers.keys() - routes:
            self._consumers.pop(route).stop()
        for route in routes - self._consumers.keys():
            self._consumers[route] = ModelConsumer(self._work(route, self._link))

    def _work(self, route: Route, link: KafkaLink) -> Work:
        counts = self._metrics.async_requests.setdefault(route.model, RequestCounts())
        binding = binding_of(route.model, self._metrics.bindings, self._loop.call_soon_threadsafe)
        answers = RecordAnswers(self._plane, route.model, counts)
        return Work(
            route=route,
            link=link,
            infer=lambda records: asyncio.run_coroutine_threadsafe(answers.answer(records), self._loop),
            counts=counts,
            health=ClusterHealth(
                link, (route.requests, route.results, route.dead_letters), functools.partial(binding.report, _PART)
            ),
            batch_records=self._settings.kafka_batch_records,
        )


class ModelConsumer:
    """The thread that consumes one model's requests; it begins at once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._model = work.route.model
        self._thread = threading.Thread(target=self._run, name=f"requests-{self._model}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests."""
        self._work.is_stopping.set()

    async def ended(self) -> None:
        """Wait until the batch under way is committed and the group is left, for a bounded time."""
        await asyncio.to_thread(self._thread.join, COMMIT_S + _CLOSE_S + 2 * _GRACE_S)

    # --- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        work, backoff_s = self._work, _FIRST_BACKOFF_S
        while not work.is_stopping.is_set():
            committed = work.counts.transactions["committed"]
            fault: str | None = None
            try:
                self._session()
            except SessionOver as over:
                fault = over.fault
            except Abandoned as error:
                work.counts.producers_abandoned += 1
                fault = f"a call of the client library was given up: {error}"
            except KafkaException as failure:
                fault = work.link.words(failure.args[0])
            except Exception as error:
                _log.exception("asynchronous inference failed and begins anew", extra={"model": self._model})
                fault = f"unexpected {type(error).__name__}; the log has it"
            if work.is_stopping.is_set():
                break
            if fault is not None:
                work.health.failed(fault)
            _log.info("consuming begins anew", extra={"model": self._model, "cause": fault})
            has_progress = work.counts.transactions["committed"] > committed
            backoff_s = _FIRST_BACKOFF_S if has_progress else min(_LONGEST_BACKOFF_S, backoff_s * 2)
            work.is_stopping.wait(backoff_s)

    def _session(self) -> None:
        """Consume with one producer and one consumer for as long as all goes well."""
        work = self._work
        calls = AbandonableThread(f"transactions-{self._model}")
        producer: Producer | None = None
        try:
            producer = work.link.producer(
                {
                    "transactional.id": work.route.transactional_id,
                    "transaction.timeout.ms": _TRANSACTION_TIMEOUT_MS,
                    "linger.ms": 5,
                },
                work.health.on_error,
            )
            # Requests are not to be read before their results can be written.
            while not work.health.ask(producer, is_told=False):
                producer.poll(0)
                if work.is_stopping.wait(_PROBE_EVERY_S):
                    return
            init = functools.partial(producer.init_transactions, _INIT_S)
            calls.call(init, _INIT_S + _GRACE_S)
            ConsumerSession(work, producer, calls).run()
        except Abandoned:
            producer = None  # a thread is inside it: neither to be closed nor to be freed by another one
            raise
        finally:
            if producer is not None:
                calls.call(producer.close, _CLOSE_S)
            calls.end()


def route_of(model: ServedModel, settings: Settings) -> Route | None:
    """Return the route that a manifest declares, or None."""
    kafka = model.spec.bindings and model.spec.bindings.kafka
    if not kafka or not kafka.requests:
        return None
    requests = kafka.requests
    own_group = f"phoenix.{model.manifest.model.metadata.namespace}.{model.name}"
    group = settings.kafka_group_id or own_group
    return Route(
        model=model.name,
        requests=requests.topic or topic_of(model, "requests"),
        results=requests.results or topic_of(model, "results"),
        dead_letters=requests.dead_letter_topic or topic_of(model, "dead-letters"),
        group=group,
        transactional_id=".".join(
            [
                group,
                *([model.name] if group != own_group else []),
                settings.kafka_transactional_id or _own_name(settings),
            ]
        ),
    )


def _own_name(settings: Settings) -> str:
    """Return what stays the same when this process is started again, and differs from every other process."""
    folder = os.path.realpath(settings.state_dir)
    return f"{socket.gethostname()}-{zlib.crc32(folder.encode()):08x}"
