"""The load of the proof of zero loss: clients that ask until they are answered, and a producer of request records.

What they did is the truth that rows and events are compared with: which ids were answered and with what, which records
were produced in which order. Every loop is bounded: a request by tries and seconds, a run by the number of requests.
"""

import contextlib
import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, Message, Producer
from faults.zero_loss_stage import MODEL, REQUESTS, InferenceServer, Stage

TRIES = 2_000
REQUEST_WITHIN_S = 180.0
MOST_REQUESTS = 20_000
MOST_RECORDS = 20_000
_TIMEOUT_S = 10.0
_PAUSE_S = 0.1
_CLIENT_EVERY_S = 0.03
_RECORD_EVERY_S = 0.02
_KEYS = 12
_MALFORMED_EVERY = 25
_PRODUCE_WITHIN_S = 600
_AGAIN = (503, 504)
_PATH = f"/v2/models/{MODEL}/infer"


def _request(request_id: str, values: Sequence[float]) -> dict[str, Any]:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": list(values)}
    return {"id": request_id, "inputs": [tensor]}


def _values(source: random.Random) -> list[float]:
    return [round(source.uniform(0.1, 8.0), 3) for _ in range(4)]


class Client(threading.Thread):
    """Sends one request after the other to one server after the other; asks again, with the same id, until answered."""

    def __init__(self, servers: Sequence[InferenceServer], *, number: int, seed: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.tries: Counter[str] = Counter()
        self.answered_by: Counter[str] = Counter()
        self.faults: list[str] = []
        self._servers = itertools.cycle(servers)
        self._number = number
        self._source = random.Random(f"{seed}-{number}")
        self._is_over = threading.Event()

    def end(self) -> None:
        """Send no new request; the one under way is still asked until it is answered."""
        self._is_over.set()

    def run(self) -> None:
        for count in range(MOST_REQUESTS):
            if self._is_over.wait(_CLIENT_EVERY_S) or self.faults:
                return
            request_id = f"rest-{self._number}-{count}"
            body = json.dumps(_request(request_id, _values(self._source)))
            outputs = self._ask(request_id, body)
            if outputs is not None:
                self.answers[request_id] = outputs

    def _ask(self, request_id: str, body: str) -> list[dict[str, Any]] | None:
        end = time.monotonic() + REQUEST_WITHIN_S
        last = ""
        for _ in range(TRIES):
            server = next(self._servers)
            status, text = _post(server, body)
            last = f"{status} {text[:200]}"
            self.tries[str(status)] += 1
            if status == 200:
                answer = json.loads(text)
                if answer.get("id") != request_id:
                    self.faults.append(f"{request_id} was answered with the id {answer.get('id')!r}")
                self.answered_by[server.name] += 1
                return list(answer["outputs"])
            if status not in (*_AGAIN, 0):
                break
            if time.monotonic() > end:
                break
            time.sleep(_PAUSE_S)
        self.faults.append(f"{request_id} was never answered; the last try: {last}")
        return None


def _post(server: InferenceServer, body: str) -> tuple[int, str]:
    """One try: status and body; status 0 for an answer that was lost."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=_TIMEOUT_S)
    with contextlib.closing(connection):
        try:
            connection.request("POST", _PATH, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error)


@dataclass
class Produced:
    """What is in the topic of requests for certain: the ids of each key in order, and what is malformed, by case."""

    by_key: dict[str, list[str]] = field(default_factory=dict)
    malformed: dict[str, bytes] = field(default_factory=dict)

    @property
    def ids(self) -> set[str]:
        """Every well-formed request."""
        return {request_id for ids in self.by_key.values() for request_id in ids}


class Records(threading.Thread):
    """Produces request records under a few keys; some of them nobody can serve."""

    def __init__(self, stage: Stage, *, seed: int) -> None:
        super().__init__(name="records", daemon=True)
        self.produced = Produced()
        self.faults: list[str] = []
        self._source = random.Random(f"{seed}-records")
        self._is_over = threading.Event()
        self._undelivered = 0
        self._producer = Producer(
            stage.kafka.config(
                {
                    "enable.idempotence": True,
                    "message.timeout.ms": _PRODUCE_WITHIN_S * 1000,
                    "partitioner": "murmur2_random",
                    "linger.ms": 5,
                    "reconnect.backoff.max.ms": 1000,
                    "log_level": 0,
                }
            )
        )

    def end(self) -> None:
        """Produce no more; what is produced is still delivered."""
        self._is_over.set()

    def run(self) -> None:
        for count in range(MOST_RECORDS):
            if self._is_over.wait(_RECORD_EVERY_S) or self.faults:
                break
            key = f"key-{self._source.randrange(_KEYS)}"
            if count % _MALFORMED_EVERY == _MALFORMED_EVERY - 1:
                self._malformed(f"case-{count}", key)
            else:
                ids = self.produced.by_key.setdefault(key, [])
                request_id = f"async-{key}-{len(ids)}"
                ids.append(request_id)
                self._send(key, json.dumps(_request(request_id, _values(self._source))).encode(), request_id)
        if left := self._producer.flush(_PRODUCE_WITHIN_S):
            self.faults.append(f"{left} request records were not acknowledged within {_PRODUCE_WITHIN_S} s")

    def _malformed(self, case: str, key: str) -> None:
        good = _request(case, _values(self._source))
        kinds = (
            b"this is no JSON",
            json.dumps({"id": case}).encode(),
            json.dumps({**good, "inputs": [{**good["inputs"][0], "name": "unknown"}]}).encode(),
            json.dumps({**good, "inputs": [{**good["inputs"][0], "shape": [1, 5]}]}).encode(),
            b"",
        )
        value = kinds[len(self.produced.malformed) % len(kinds)]
        self.produced.malformed[case] = value
        self._send(key, value, case)

    def _send(self, key: str, value: bytes, name: str) -> None:
        def on_delivery(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                self.faults.append(f"{name} was not produced: {error}")

        # while the broker is away librdkafka queues: up to 100,000 records, more than this sends
        self._producer.produce(REQUESTS, value, key, on_delivery=on_delivery, headers={"case": name})
        self._producer.poll(0)


class Load:
    """All clients and the producer."""

    def __init__(self, stage: Stage, *, clients: int, seed: int) -> None:
        self.clients = [Client(stage.servers, number=number, seed=seed) for number in range(clients)]
        self.records = Records(stage, seed=seed)

    def start(self) -> None:
        """Begin."""
        for thread in (*self.clients, self.records):
            thread.start()

    def finish(self, within_s: float) -> None:
        """Send nothing new, and wait until all that was sent is answered or acknowledged, or given up."""
        threads = (*self.clients, self.records)
        for thread in threads:
            thread.end()
        end = time.monotonic() + within_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self.records.faults.append(f"{thread.name} has not finished within {within_s:.0f} s")

    @property
    def faults(self) -> list[str]:
        """What went wrong for a caller."""
        return [fault for thread in (*self.clients, self.records) for fault in thread.faults]

    @property
    def answers(self) -> dict[str, list[dict[str, Any]]]:
        """Each answered request's outputs."""
        return {request_id: outputs for client in self.clients for request_id, outputs in client.answers.copy().items()}

    def answered_by(self, server: InferenceServer) -> int:
        """How many requests a server has answered so far."""
        return sum(client.answered_by[server.name] for client in self.clients)

    @property
    def tries(self) -> Counter[str]:
        """How often was asked, by HTTP status; `0` is an answer that was lost."""
        return sum((client.tries for client in self.clients), Counter())
