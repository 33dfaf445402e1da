"""Asynchronous inference on a real Kafka: each request exactly one result, whatever is killed; poison never blocks."""

import contextlib
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import phoenix_process
import pytest
from confluent_kafka import Message, Producer
from phoenix_process import wait_until
from server.kafka_models import (
    Reader,
    Topics,
    await_state,
    behind_a_proxy,
    binding,
    body,
    is_ready,
    metric,
    records_of,
    send,
    settings_of,
    write_model,
)
from services import KafkaBroker

ASYNC = {"requests": {}, "events": {"samplePercent": 0}}
RECOVERY_S = 100


def served(folder: Path, name: str, **spec: Any) -> list[Path]:
    return [write_model(folder, name, kafka=ASYNC, **spec)]


def result_of(record: Message) -> tuple[str, float]:
    document = json.loads(record.value())
    return document["id"], document["outputs"][0]["data"][0]


def test_each_request_has_one_result_with_its_key_id_and_headers(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("plain").make(kafka_broker)
    send(kafka_broker, topics.requests, [(b"k%d" % n, body(n, f"r{n}")) for n in range(500)], traceparent="00-ab")
    send(kafka_broker, topics.requests, [(None, body(500))])
    header = json.dumps(
        {
            "id": "binary",
            "parameters": {"binary_data_output": True},
            "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}],
        }
    ).encode()
    send(
        kafka_broker,
        topics.requests,
        [(b"b", header + np.array([21], "<f4").tobytes())],
        **{"Inference-Header-Content-Length": str(len(header))},
    )
    with phoenix_process.start(served(tmp_path, "plain"), settings_of(kafka_broker)) as server:
        found = records_of(kafka_broker, topics.results, count=502)
        wait_until(lambda: metric(server, 'phoenix_async_results_total{model="plain"}') == 502, "the count of results")
        await_state(server, "plain", up=True)
    assert len(found) == 502
    binary = next(record for record in found if record.key() == b"b")
    size = int(dict(binary.headers())["inference-header-content-length"])
    assert json.loads(binary.value()[:size])["id"] == "binary"
    assert np.frombuffer(binary.value()[size:], "<f4").tolist() == [42.0]
    of_key = {record.key(): record for record in found if record.key() not in (b"b", None)}
    for number in range(500):
        record = of_key[b"k%d" % number]
        assert result_of(record) == (f"r{number}", 2.0 * number)
        assert record.headers() == [("traceparent", b"00-ab")]
    (nameless,) = [record for record in found if record.key() is None]
    assert result_of(nameless)[0].startswith(f"{topics.requests}-")


def test_a_poisoned_request_goes_to_the_dead_letters_and_holds_nobody_up(
    kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    topics = Topics("poisoned").make(kafka_broker, partitions=1)
    poison = {
        b"garbage": b"\xff\xfe",
        b"empty": None,
        b"object": b"{}",
        b"name": body(1).replace(b'"x"', b'"z"'),
        b"huge": b" " * 3_000,
        b"late": body(1, "late", timeout=1),
    }
    mixed: list[tuple[bytes | None, bytes | None]] = []
    for number, (key, value) in enumerate(poison.items()):
        mixed += [(b"good", body(number, f"r{number}")), (key, value)]
    send(kafka_broker, topics.requests, mixed)
    folder = served(tmp_path, "poisoned", limits={"maxRequestBytes": "2000"})
    with phoenix_process.start(folder, settings_of(kafka_broker)) as server:
        results = Reader(kafka_broker, [topics.results, topics.dead_letters])
        results.read_until(lambda records: len(records) >= len(mixed), "an answer to everything")
        results.close()
        label = 'phoenix_async_dead_letters_total{model="poisoned",reason="too_large"}'
        wait_until(lambda: metric(server, label) == 1, "the count of dead letters")
    dead = {r.key(): (r.value(), dict(r.headers())) for r in results.records if r.topic() == topics.dead_letters}
    good = [result_of(record)[0] for record in results.records if record.topic() == topics.results]
    reasons = {key: headers["phoenix-reason"] for key, (_, headers) in dead.items()}
    if b"late" not in reasons:  # a microsecond may be enough
        good.remove("late")
    else:
        assert reasons.pop(b"late") == b"deadline"
    assert good == [f"r{number}" for number in range(len(poison))]
    assert reasons == {
        b"garbage": b"invalid", b"empty": b"invalid", b"object": b"invalid", b"name": b"invalid", b"huge": b"too_large",
    }  # fmt: skip
    assert b"unknown input 'z'" in dead[b"name"][1]["phoenix-message"]
    assert dead[b"garbage"][0] == b"\xff\xfe"
    assert dead[b"object"][1]["phoenix-offset"] == b"5"


def test_a_result_over_the_topics_limit_is_a_dead_letter_alone(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("swollen")
    for name in (topics.requests, topics.dead_letters):
        kafka_broker.make_topic(name)
    kafka_broker.make_topic(topics.results, config={"max.message.bytes": "3000"})
    rng = np.random.default_rng(7)
    values = rng.standard_normal(1000).astype(np.float32).tolist()  # which zstd cannot make small
    big = {"id": "big", "inputs": [{"name": "x", "shape": [1000, 1], "datatype": "FP32", "data": values}]}
    records = [(b"k", body(n, f"r{n}")) for n in range(10)]
    records.insert(5, (b"k", json.dumps(big).encode()))
    send(kafka_broker, topics.requests, records)
    with phoenix_process.start(served(tmp_path, "swollen"), settings_of(kafka_broker)):
        good = records_of(kafka_broker, topics.results, count=10)
        (dead,) = records_of(kafka_broker, topics.dead_letters, count=1)
    assert [result_of(record)[0] for record in good] == [f"r{n}" for n in range(10)]
    assert dict(dead.headers())["phoenix-reason"] == b"too_large"
    assert json.loads(dead.value())["id"] == "big"


def test_a_missing_topic_is_told_and_nothing_is_read_before_it_is_there(
    kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    topics = Topics("gap")
    kafka_broker.make_topic(topics.requests)
    kafka_broker.make_topic(topics.dead_letters)
    send(kafka_broker, topics.requests, [(b"k", body(1, "r"))])
    with phoenix_process.start(served(tmp_path, "gap"), settings_of(kafka_broker)) as server:
        await_state(server, "gap", up=False, saying=f"topic '{topics.results}' does not exist")
        kafka_broker.make_topic(topics.results)
        assert len(records_of(kafka_broker, topics.results, count=1)) == 1
        await_state(server, "gap", up=True)


def test_an_overloaded_model_lets_requests_wait_and_keeps_their_order(
    kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    topics = Topics("narrow").make(kafka_broker, partitions=1)
    folder = served(tmp_path, "narrow", limits={"maxQueuedRows": 8}, batching={"maxRows": 8})

    def full(number: int) -> bytes:
        rows = {"name": "x", "shape": [8, 1], "datatype": "FP32", "data": [number] * 8}
        return json.dumps({"id": f"r{number}", "inputs": [rows]}).encode()

    with phoenix_process.start(folder, settings_of(kafka_broker)) as server:
        send(kafka_broker, topics.requests, [(b"k", full(n)) for n in range(1000)])
        found = records_of(kafka_broker, topics.results, count=1000)
        assert metric(server, 'phoenix_async_retries_total{model="narrow"}') > 0
    assert [result_of(record)[0] for record in found] == [f"r{n}" for n in range(1000)]


def test_requests_with_the_same_id_have_a_result_each(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("repeated").make(kafka_broker, partitions=1)
    send(kafka_broker, topics.requests, [(b"k", body(number, "same")) for number in range(3)])
    with phoenix_process.start(served(tmp_path, "repeated"), settings_of(kafka_broker)):
        found = records_of(kafka_broker, topics.results, count=3)
    assert [result_of(record) for record in found] == [("same", 0.0), ("same", 2.0), ("same", 4.0)]


class Load:
    """Sends numbered requests of some keys until it is told to stop; order per key is the order of the numbers."""

    def __init__(self, broker: KafkaBroker, topic: str, *, keys: int = 7) -> None:
        self._producer = Producer(
            broker.config({"enable.idempotence": True, "linger.ms": 5, "reconnect.backoff.max.ms": 500})
        )
        self._topic = topic
        self._keys = keys
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.sent = 0

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        assert self._producer.flush(60) == 0

    def _run(self) -> None:
        while not self._is_over.wait(0.002):
            value = body(self.sent, str(self.sent)) if self.sent % 50 else b"poison %d" % self.sent
            self._producer.produce(self._topic, value, b"k%d" % (self.sent % self._keys))
            self._producer.poll(0)
            self.sent += 1


def assert_exactly_once(found: list[Message], topics: Topics, load: Load) -> None:
    """Each request has one result or dead letter, and of each key they come in its order."""
    results = [result_of(record) for record in found if record.topic() == topics.results]
    dead = [record for record in found if record.topic() == topics.dead_letters]
    twice = {number: count for number, count in Counter(number for number, _ in results).items() if count > 1}
    assert not twice
    assert all(value == 2.0 * int(number) for number, value in results)
    assert sorted(int(number) for number, _ in results) == [n for n in range(load.sent) if n % 50]
    assert sorted(record.value() for record in dead) == sorted(b"poison %d" % n for n in range(0, load.sent, 50))
    of_key: dict[bytes, list[int]] = defaultdict(list)
    for record in found:
        if record.topic() == topics.results:
            of_key[record.key()].append(int(result_of(record)[0]))
    assert all(numbers == sorted(numbers) for numbers in of_key.values())


def has_grown(reader: Reader, by: int = 1) -> Callable[[], bool]:
    """A condition: more records than now are committed."""
    before = len(reader.records)
    return lambda: len(reader.read()) >= before + by


@contextlib.contextmanager
def to_be_killed(folder: list[Path], settings: dict[str, str]) -> Iterator[phoenix_process.Running]:
    """A server that the block kills."""
    with pytest.raises(AssertionError, match="ended with -9"), phoenix_process.start(folder, settings) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_of_the_server_lose_and_repeat_nothing(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("killed").make(kafka_broker)
    folder = served(tmp_path / "m", "killed")
    settings = settings_of(kafka_broker, PHOENIX_STATE_DIR=str(tmp_path / "state"))
    reader = Reader(kafka_broker, [topics.results, topics.dead_letters])
    with Load(kafka_broker, topics.requests) as load:
        for number in range(3):
            with to_be_killed(folder, settings) as server:
                wait_until(has_grown(reader), "results before the kill", RECOVERY_S)
                time.sleep(0.01 * number)  # kills at different moments of a transaction
                server.process.kill()
                server.process.wait()
    with phoenix_process.start(folder, settings):
        reader.read_until(lambda records: len(records) >= load.sent, "all results", RECOVERY_S)
    reader.read()
    reader.close()
    assert_exactly_once(reader.records, topics, load)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_of_the_broker_lose_and_repeat_nothing(kafka_factory: Callable[..., KafkaBroker], tmp_path: Path) -> None:
    broker = kafka_factory()
    topics = Topics("broken").make(broker)
    with phoenix_process.start(served(tmp_path, "broken"), settings_of(broker)) as server:
        reader = Reader(broker, [topics.results, topics.dead_letters])
        with Load(broker, topics.requests) as load:
            for _ in range(3):
                wait_until(has_grown(reader, 50), "results before the kill", RECOVERY_S)
                broker.kill()
                wait_until(lambda: binding(server, "broken")["up"] is False, "the outage to be told")
                broker.start()
            wait_until(has_grown(reader, 50), "results after the last kill", RECOVERY_S)
        reader.read_until(lambda records: len(records) >= load.sent, "all results", RECOVERY_S)
        await_state(server, "broken", up=True)
        reader.read()
        reader.close()
    assert_exactly_once(reader.records, topics, load)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slow_or_hanging_broker_loses_and_repeats_nothing(
    kafka_factory: Callable[..., KafkaBroker], tmp_path: Path
) -> None:
    with behind_a_proxy(kafka_factory) as (broker, proxy):
        topics = Topics("slow").make(broker)
        reader = Reader(broker, [topics.results, topics.dead_letters])
        with phoenix_process.start(served(tmp_path, "slow"), settings_of(broker)) as server:
            with Load(broker, topics.requests) as load:
                wait_until(has_grown(reader, 50), "results", RECOVERY_S)
                proxy.set("delay", delay_s=0.5)
                wait_until(has_grown(reader, 50), "results of a slow broker", RECOVERY_S)
                proxy.set("hang")
                wait_until(lambda: binding(server, "slow")["up"] is False, "the outage to be told", RECOVERY_S)
                assert is_ready(server)
                proxy.set("pass")
                wait_until(has_grown(reader, 50), "results afterwards", RECOVERY_S)
            reader.read_until(lambda records: len(records) >= load.sent, "all results", RECOVERY_S)
            await_state(server, "slow", up=True)
            reader.read()
        reader.close()
    assert_exactly_once(reader.records, topics, load)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_partitions_move_between_servers_without_loss(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topics = Topics("shared").make(kafka_broker)
    folder = served(tmp_path, "shared")
    reader = Reader(kafka_broker, [topics.results, topics.dead_letters])
    results = 'phoenix_async_results_total{model="shared"}'
    with phoenix_process.start(folder, settings_of(kafka_broker)):
        with Load(kafka_broker, topics.requests) as load:
            wait_until(has_grown(reader, 50), "results of one server", RECOVERY_S)
            with phoenix_process.start(folder, settings_of(kafka_broker)) as second:
                wait_until(lambda: metric(second, results) > 100, "results of the second server", RECOVERY_S)
            wait_until(has_grown(reader, 500), "results after it has gone", RECOVERY_S)
        reader.read_until(lambda records: len(records) >= load.sent, "all results", RECOVERY_S)
    reader.read()
    reader.close()
    assert_exactly_once(reader.records, topics, load)
