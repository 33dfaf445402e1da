"""ONNX Runtime in process, without any server: the limit that every server is compared with, and the right answers.

`run.py` starts this file as a worker on the measured core and talks to it by lines of JSON, so that a measurement costs
no start-up, and so that the runner itself maps no ONNX Runtime (which would make a server's share of memory smaller).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from processes import BenchError, on_core


class RawWorker:
    """The runner's end of the worker."""

    def __init__(self, core: int) -> None:
        with on_core(core):
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )

    def rows_per_s(self, model: Path, inputs: Path, *, rows: int, seconds: float) -> float:
        """Run the model on its one-row `.npy` input, repeated to `rows`, for `seconds`; return rows a second."""
        return float(self._ask(do="rate", model=str(model), inputs=str(inputs), rows=rows, seconds=seconds)["rate"])

    def write_answer(self, model: Path, inputs: Path, answer: Path) -> None:
        """Write the outputs of the model for that input as `.npz`."""
        self._ask(do="answer", model=str(model), inputs=str(inputs), answer=str(answer))

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("the worker that runs ONNX Runtime in process has died")
        return dict(json.loads(line))


def serve() -> None:
    """Answer the questions on standard input until it ends."""
    import numpy as np
    import onnxruntime as ort

    sessions: dict[str, ort.InferenceSession] = {}
    for line in sys.stdin:
        question = json.loads(line)
        model = question["model"]
        if model not in sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            sessions[model] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        session = sessions[model]
        row = np.load(question["inputs"])
        name = session.get_inputs()[0].name
        output_names = [output.name for output in session.get_outputs()]
        if question["do"] == "answer":
            np.savez(question["answer"], **dict(zip(output_names, session.run(output_names, {name: row}), strict=True)))
            print("{}", flush=True)
            continue
        feed = {name: np.repeat(row, question["rows"], axis=0)}
        for _ in range(3):
            session.run(output_names, feed)
        runs, started = 0, time.perf_counter()
        until, step = started + question["seconds"], 1
        while (now := time.perf_counter()) < until:
            for _ in range(step):
                session.run(output_names, feed)
            runs += step
            # Ask for the time about every millisecond: it costs a tenth of what a small model costs.
            step = min(1000, max(1, int(0.001 * runs / (time.perf_counter() - started)))) if now > started else 1
        rate = runs * question["rows"] / (time.perf_counter() - started)
        print(json.dumps({"rate": rate}), flush=True)


if __name__ == "__main__":
    serve()
