"""Starts a real `phoenix-server` process on free ports, for tests that speak to it from outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_DEADLINE_S = 60
STOP_DEADLINE_S = 30


@dataclass
class Running:
    """A server that answers. `rest_url` is `http://host:port`, `grpc_target` `host:port`; `stderr` grows as it logs."""

    rest_url: str
    grpc_target: str
    process: subprocess.Popen[str]
    stderr: list[str] = field(default_factory=list)


@contextlib.contextmanager
def start(paths: Sequence[Path], env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Serve `paths` until the block ends; then SIGTERM, and fail unless the process ends with 0.

    `env` adds settings (`PHOENIX_…`); those of the caller's own environment are not passed on.
    """
    with tempfile.TemporaryDirectory(prefix="phoenix-state-") as state_dir:
        settings = {
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_HTTP_PORT": "0",
            "PHOENIX_GRPC_PORT": "0",
            "PHOENIX_STATE_DIR": state_dir,
            **(env or {}),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "phoenix_server", "serve", *map(str, paths)],
            env={**inherited, **settings},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        stderr: list[str] = []
        ready: list[dict[str, Any]] = []
        changed = threading.Condition()
        reader = threading.Thread(target=_read, args=(process, stderr, ready, changed), daemon=True)
        reader.start()
        try:
            with changed:
                is_over = changed.wait_for(lambda: ready or process.poll() is not None, START_DEADLINE_S)
            if not ready:
                what = "ended before it was ready" if is_over else f"was not ready within {START_DEADLINE_S} s"
                raise AssertionError(f"phoenix-server {what}:\n{''.join(stderr)}")
            yield Running(ready[0]["rest"], ready[0]["grpc"], process, stderr)
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_DEADLINE_S)
            assert code == 0, f"phoenix-server ended with {code} after SIGTERM:\n{''.join(stderr)}"
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join()
            assert process.stderr is not None
            process.stderr.close()


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Call `condition` until it is true; fail after `deadline_s` seconds."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")


def _read(
    process: subprocess.Popen[str], stderr: list[str], ready: list[dict[str, Any]], changed: threading.Condition
) -> None:
    """Collect the log; tell when the line with the addresses comes or the process ends."""
    assert process.stderr is not None
    for line in process.stderr:
        stderr.append(line)
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "rest" in record:
                with changed:
                    ready.append(record)
                    changed.notify_all()
    process.wait()
    with changed:
        changed.notify_all()
