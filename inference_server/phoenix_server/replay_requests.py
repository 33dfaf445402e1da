"""Batch inference from a file: one OIP JSON request a line in, one result a line out, in the same order.

The embedded stand-in for asynchronous inference: the same requests, results and reasons, with lines for records. A line
that cannot be served goes to the dead letters with its number and reason, and holds nobody up. The model is served in
this process as `serve` does it, so features, events and audit are what the manifest says.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from phoenix_api import Manifest
from phoenix_server.app import running
from phoenix_server.async_requests import Record, Reply, dead_letter
from phoenix_server.errors import Code, Reason, StartError
from phoenix_server.metrics import RequestCounts
from phoenix_server.record_answers import RecordAnswers
from phoenix_server.settings import Settings

_LINES_AT_ONCE = 500
# A longer line is read as several, which are no requests.
_LONGEST_LINE_BYTES = 1 << 30


@dataclass(slots=True)
class Replayed:
    """How many lines became results, and how many dead letters."""

    results: int = 0
    dead_letters: int = 0


async def replay(
    settings: Settings,
    manifests: Sequence[Manifest],
    model_name: str,
    files: tuple[BinaryIO, BinaryIO, Callable[[], BinaryIO]],
    on_progress: Callable[[int], None],
) -> Replayed:
    """Answer every line of a file. `files`: requests, results, and what opens the dead letters when there are some.

    `on_progress` is told how many bytes were read. Raises `ModelLoadError`, and `OSError` where a file fails.
    """
    requests, results, open_dead_letters = files
    done, refused, number = Replayed(), None, 0
    async with running(settings, manifests, []) as server:
        answers = RecordAnswers(server.plane, model_name, RequestCounts())
        for lines in _batches(requests):
            records = [Record("line", 0, number + at, None, line) for at, line in enumerate(lines, 1)]
            number += len(lines)
            filled = [record for record in records if record.value]  # an empty line is no request
            for record, reply in zip(filled, await answers.answer(filled), strict=True):
                if reply.dead_reason is None and reply.headers:
                    reply = dead_letter(record, Code.INVALID.value, "a line has no place for binary outputs")
                if reply.dead_reason is None:
                    results.write((reply.value or b"") + b"\n")
                    done.results += 1
                else:
                    refused = refused or open_dead_letters()
                    refused.write(_dead_letter(record, reply))
                    done.dead_letters += 1
            results.flush()
            on_progress(sum(map(len, lines)) + len(lines))
    return done


def run(
    settings: Settings,
    manifests: Sequence[Manifest],
    *,
    model_name: str | None,
    requests: Path,
    output: Path | None,
    dead_letters: Path | None,
) -> int:
    """Replay `requests` (`-`: standard input) and say on stderr what came of it; return 0, or 1 with dead letters."""
    import uvloop

    name = _chosen(manifests, model_name)
    unread = settings.model_copy(
        update={
            "host": "127.0.0.1", "http_port": 0, "grpc_port": 0, "watch": False, "measure_capacity": False,
            "drain_seconds": 0.0, "kafka_requests": False,
        }
    )  # fmt: skip
    target = dead_letters or Path("dead-letters.jsonl" if str(requests) == "-" else f"{requests}.dead-letters.jsonl")
    with ExitStack() as stack:
        try:
            source = sys.stdin.buffer if str(requests) == "-" else stack.enter_context(requests.open("rb"))
            sink = sys.stdout.buffer if output is None else stack.enter_context(output.open("wb"))
        except OSError as error:
            raise StartError(Reason.INVALID_SETTING, f"{error.filename}: {error.strerror}") from error
        size_bytes = None if str(requests) == "-" else requests.stat().st_size
        on_progress = stack.enter_context(_Progress(size_bytes))
        files = (source, sink, lambda: stack.enter_context(target.open("wb")))
        done = uvloop.run(replay(unread, manifests, name, files, on_progress))
    told = f"{done.results} results, {done.dead_letters} dead letters"
    print(told + (f" in {target}" if done.dead_letters else ""), file=sys.stderr)
    return 1 if done.dead_letters else 0


def _chosen(manifests: Sequence[Manifest], model_name: str | None) -> str:
    names = sorted({manifest.model.metadata.name for manifest in manifests})
    if model_name is None and len(names) == 1:
        return names[0]
    if model_name not in names:
        asked = "several models are found; name one with --name" if model_name is None else f"no model '{model_name}'"
        raise StartError(Reason.INVALID_SETTING, f"{asked}; found: {', '.join(names)}")
    return model_name


def _batches(file: BinaryIO) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    while line := file.readline(_LONGEST_LINE_BYTES):
        lines.append(line.strip())
        if len(lines) == _LINES_AT_ONCE:
            yield lines
            lines = []
    if lines:
        yield lines


def _dead_letter(record: Record, reply: Reply) -> bytes:
    headers = dict(reply.headers)
    document = {
        "line": record.offset,
        "reason": reply.dead_reason,
        "message": (headers["phoenix-message"] or b"").decode(errors="replace"),
        "request": (record.value or b"").decode(errors="replace"),
    }
    return orjson.dumps(document) + b"\n"


class _Progress:
    """A bar on stderr where that is a terminal, else nothing."""

    def __init__(self, size_bytes: int | None) -> None:
        self._size_bytes = size_bytes

    def __enter__(self) -> Callable[[int], None]:
        self._bar = None
        if not sys.stderr.isatty():
            return lambda _: None
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True))
        self._bar.start()
        task = self._bar.add_task("requests", total=self._size_bytes)
        bar = self._bar
        return lambda read_bytes: bar.advance(task, read_bytes)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
