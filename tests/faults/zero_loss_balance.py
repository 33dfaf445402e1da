"""Whether everything balances: answers, audit rows, events, results and dead letters, read when all has come to rest.

Reads the audit from PostgreSQL and the topics as any consumer with `read_committed` does, from their beginning.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from faults.zero_loss_load import Load, Produced
from faults.zero_loss_stage import DEAD_LETTERS, EVENTS, PARTITIONS, RESULTS, Stage

from phoenix_server.audit import tensor_blob
from phoenix_server.event_format import tensor_from

REST_WITHIN_S = 240.0
_READ_WITHIN_S = 120.0
_VERIFY_WITHIN_S = 120.0
_ASK_S = 10.0
_LOOK_EVERY_S = 0.25
_SHOWN = 3
Outputs = tuple[tuple[str, str, tuple[int, ...], bytes], ...]


@dataclass(frozen=True)
class Row:
    """One row of the audit."""

    request_id: str
    event_id: str | None
    outcome: str
    outputs: Outputs


@dataclass
class Balance:
    """What was counted, and every way in which it does not fit; empty `faults`: nothing was lost."""

    counts: dict[str, int | str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def equal(self, what: str, left: set[str], right: set[str]) -> None:
        """Note where two sets differ."""
        for side, ids in (("only the first has", left - right), ("only the second has", right - left)):
            if ids:
                self.faults.append(f"{what}: {side} {_some(ids)}")

    def none(self, what: str, found: Iterable[str]) -> None:
        """Note what should not be there."""
        if found := set(found):
            self.faults.append(f"{what}: {_some(found)}")


def come_to_rest(stage: Stage) -> None:
    """Wait until the outbox is empty, the consumers have caught up, and no transaction is open.

    Raises `AssertionError` if that takes too long.
    """
    end = time.monotonic() + REST_WITHIN_S
    _await("the outbox is empty", lambda: stage.outbox_rows(), end)
    _await("the consumers have caught up", lambda: stage.lag(), end)
    _await("no transaction is open", lambda: _undecided(stage), end)


def _await(what: str, left: Callable[[], int], end: float) -> None:
    found = 0
    while True:
        try:
            found = left()
        except KafkaException as error:
            found, last = -1, str(error)
        else:
            last = f"{found} left"
            if found == 0:
                return
        if time.monotonic() > end:
            raise AssertionError(f"not within {REST_WITHIN_S:.0f} s: {what} ({last})")
        time.sleep(_LOOK_EVERY_S)


def _undecided(stage: Stage) -> int:
    """How many records lie behind the first open transaction."""
    admin = AdminClient(stage.kafka.config({"log_level": 4}))
    places = [TopicPartition(topic, number) for topic in (RESULTS, DEAD_LETTERS) for number in range(PARTITIONS)]
    wanted = {place: OffsetSpec.latest() for place in places}
    ends = []
    for level in (IsolationLevel.READ_UNCOMMITTED, IsolationLevel.READ_COMMITTED):
        answers = admin.list_offsets(wanted, isolation_level=level, request_timeout=_ASK_S)
        ends.append(sum(answer.result(_ASK_S).offset for answer in answers.values()))
    return ends[0] - ends[1]


def balance(stage: Stage, load: Load) -> Balance:
    """Compare everything with everything."""
    found = Balance(faults=list(load.faults))
    rows, answers, produced = read_rows(stage), load.answers, load.records.produced
    events, results = read_topic(stage, EVENTS), read_topic(stage, RESULTS)
    _rows_and_events(found, rows, events)
    _answers(found, rows, answers)
    _results(found, rows, results, produced)
    _dead_letters(found, read_topic(stage, DEAD_LETTERS), produced)
    ok = {row.request_id for row in rows if row.outcome == "ok"}
    found.equal("answered or produced requests and rows", answers.keys() | produced.ids, ok)
    found.counts |= {
        "requests answered": len(answers),
        "tries": sum(load.tries.values()),
        "tries whose answer was lost": load.tries["0"],
        "tries answered 503 or 504": load.tries["503"] + load.tries["504"],
        "request records": len(produced.ids) + len(produced.malformed),
        "of them malformed": len(produced.malformed),
        "audit rows": len(rows),
        "rows beyond one for each request": len(rows) - len({row.request_id for row in rows}),
    }
    for what in ("requests answered", "results", "dead letters", "events"):
        if not found.counts[what]:
            found.faults.append(f"{what}: none, so that nothing is proven")
    _verify(found, stage)
    return found


def _rows_and_events(found: Balance, rows: Sequence[Row], records: Sequence[Message]) -> None:
    documents: dict[str, dict[str, Any]] = {}
    for record in records:
        document = json.loads(record.value())
        known = documents.setdefault(document["id"], document)
        found.none("two events of one id differ", () if known == document else [document["id"]])
    of_event = {row.event_id: row for row in rows if row.event_id is not None}
    found.none("rows without an event id", (row.request_id for row in rows if row.event_id is None))
    found.none(
        "event ids of several rows", (i for i, n in Counter(row.event_id for row in rows).items() if n > 1 and i)
    )
    found.equal("event ids of rows and of events", set(of_event), set(documents))
    for event_id in of_event.keys() & documents.keys():
        row, event = of_event[event_id], documents[event_id]
        outputs = _outputs((tensor["name"], tensor_from(tensor)) for tensor in event.get("outputs", ()))
        if (row.request_id, row.outcome, row.outputs) != (event["request_id"], event["outcome"], outputs):
            found.faults.append(f"row and event {event_id} of request {row.request_id} differ")
    ok = {event["request_id"] for event in documents.values() if event["outcome"] == "ok"}
    found.equal("requests of rows and of events", {row.request_id for row in rows if row.outcome == "ok"}, ok)
    found.counts |= {"events": len(documents), "events delivered again": len(records) - len(documents)}


def _answers(found: Balance, rows: Sequence[Row], answers: dict[str, list[dict[str, Any]]]) -> None:
    """A request that was tried again has a row for each try that came through; the answer is that of one of them."""
    kept = defaultdict(set)
    for row in rows:
        kept[row.request_id].add(row.outputs)
    found.none(
        "answers that differ from their rows",
        (name for name, tensors in answers.items() if kept[name] and _from_json(tensors) not in kept[name]),
    )


def _results(found: Balance, rows: Sequence[Row], records: Sequence[Message], produced: Produced) -> None:
    ids: dict[str, list[str]] = defaultdict(list)
    answers: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        answer = json.loads(record.value())
        ids[record.key().decode()].append(answer["id"])
        answers[answer["id"]] = answer["outputs"]
    counts = Counter(request_id for of_key in ids.values() for request_id in of_key)
    found.equal("request records and results", produced.ids, set(counts))
    found.none("requests with several results", (request_id for request_id, count in counts.items() if count > 1))
    for key, wanted in produced.by_key.items():
        if ids[key] != wanted:
            place = next((i for i, (a, b) in enumerate(zip(ids[key], wanted, strict=False)) if a != b), len(wanted))
            found.faults.append(f"results of {key} are not in the order of its requests, from number {place} on")
    _answers(found, rows, answers)
    found.counts["results"] = len(records)


def _dead_letters(found: Balance, records: Sequence[Message], produced: Produced) -> None:
    counts: Counter[str] = Counter()
    for record in records:
        headers = dict(record.headers() or ())
        case = headers.get("case", b"?").decode()
        counts[case] += 1
        found.none("dead letters without a reason", () if headers.get("phoenix-reason") else [case])
        found.none("dead letters without a message", () if headers.get("phoenix-message") else [case])
        same = (record.value() or b"") == produced.malformed.get(case)
        found.none("dead letters that are not what was produced", () if same else [case])
    found.equal("malformed records and dead letters", set(produced.malformed), set(counts))
    found.none("records with several dead letters", (case for case, count in counts.items() if count > 1))
    found.counts["dead letters"] = len(records)


def _verify(found: Balance, stage: Stage) -> None:
    settings = stage.servers[0].environment()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
    done = subprocess.run(
        [sys.executable, "-m", "phoenix_server", "audit", "verify"],
        env=inherited | settings,
        capture_output=True,
        text=True,
        timeout=_VERIFY_WITHIN_S,
    )
    found.counts["audit verify"] = "clean" if done.returncode == 0 else f"exit {done.returncode}"
    if done.returncode:
        found.faults.append(f"audit verify ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")


def read_rows(stage: Stage) -> list[Row]:
    """Every row of the audit."""
    query = "SELECT request_id, event_id, outcome, outputs FROM predictions"
    with stage.postgres.connect(stage.database) as connection:
        return [
            Row(request_id, event_id, outcome, _outputs(tensor_blob.unpack(blob)) if blob else ())
            for request_id, event_id, outcome, blob in connection.execute(query)
        ]


def read_topic(stage: Stage, topic: str) -> list[Message]:
    """Every committed record of a topic, partition by partition in order."""
    consumer = Consumer(
        stage.kafka.config(
            {"group.id": f"balance-{topic}", "isolation.level": "read_committed", "enable.partition.eof": True}
        )
    )
    records: list[Message] = []
    ended: set[int] = set()
    end = time.monotonic() + _READ_WITHIN_S
    try:
        consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
        while len(ended) < PARTITIONS:
            if time.monotonic() > end:
                raise AssertionError(f"{topic} could not be read within {_READ_WITHIN_S:.0f} s")
            for record in consumer.consume(1000, timeout=1.0):
                if record.error() is None:
                    records.append(record)
                elif record.error().code() == KafkaError._PARTITION_EOF:
                    ended.add(record.partition())
    finally:
        consumer.close()
    return records


def _outputs(tensors: Iterable[tuple[str, Any]]) -> Outputs:
    return tuple((name, array.dtype.str, array.shape, array.tobytes()) for name, array in tensors)


def _from_json(tensors: Sequence[dict[str, Any]]) -> Outputs:
    return _outputs((tensor["name"], np.asarray(tensor_from(tensor))) for tensor in tensors)


def _some(ids: Iterable[str]) -> str:
    names = sorted(ids)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
