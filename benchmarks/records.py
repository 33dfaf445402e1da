"""Measures asynchronous inference: fills the topic of requests, then counts the results that a reader may see."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from bindings import Services, topic
from processes import BenchError
from workloads import Array, Workload, compare_json

if TYPE_CHECKING:
    from confluent_kafka import Consumer

_WITHIN_S = 120.0
_KEYS = 64


def records_per_s(services: Services, workload: Workload, right: dict[str, Array], *, count: int) -> float:
    """Produce `count` requests; return committed results a second, from the first request on.

    Raises `BenchError` unless each request has exactly one result, and the right one.
    """
    consumer = _reader(services, topic(workload, "results"))
    try:
        begun = time.perf_counter()
        _produce(services, workload, count)
        values: list[bytes] = []
        while len(values) < count:
            if time.perf_counter() - begun > _WITHIN_S:
                raise BenchError(f"{len(values)} of {count} results within {_WITHIN_S:g} s")
            for record in consumer.consume(10_000, timeout=0.05):
                if record.error() is not None:
                    raise BenchError(f"results cannot be read: {record.error()}")
                values.append(record.value())
        seconds = time.perf_counter() - begun
        if more := consumer.consume(1, timeout=0.2):
            raise BenchError(f"more results than requests: {more[0].value()!r}")
    finally:
        consumer.close()
    answers = [json.loads(value) for value in values]
    if {answer["id"] for answer in answers} != {str(number) for number in range(count)}:
        raise BenchError("the results are not those of the requests")
    for answer in answers:
        compare_json(answer, right)
    return count / seconds


def _reader(services: Services, name: str) -> Consumer:
    """A consumer that stands at the end of the topic."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer(
        {
            "bootstrap.servers": services.kafka.bootstrap,
            "group.id": "bench",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "queued.min.messages": 1000,
            "log_level": 3,
        }
    )
    partitions = consumer.list_topics(name, timeout=10).topics[name].partitions
    places = [TopicPartition(name, number) for number in partitions]
    for place in places:
        place.offset = consumer.get_watermark_offsets(place, timeout=10)[1]
    consumer.assign(places)
    return consumer


def _produce(services: Services, workload: Workload, count: int) -> None:
    from confluent_kafka import Producer

    configuration: dict[str, Any] = {
        "bootstrap.servers": services.kafka.bootstrap,
        "enable.idempotence": True,
        "linger.ms": 5,
        "queue.buffering.max.messages": count + 1,
        "log_level": 3,
    }
    producer = Producer(configuration)
    document = json.loads(workload.request("json").body)
    name = topic(workload, "requests")
    for number in range(count):
        producer.produce(name, json.dumps({"id": str(number), **document}), f"key-{number % _KEYS}")
    if left := producer.flush(_WITHIN_S):
        raise BenchError(f"{left} requests were not taken by the broker")
