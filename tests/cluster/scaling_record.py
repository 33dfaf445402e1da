"""What an autoscaled model does over time: replicas, signals and the HPA's words, looked at every two seconds."""

import csv
import threading
import time
from pathlib import Path
from typing import Any

from lab import LabError
from lab.prometheus import Prometheus
from phoenix_cluster import Phoenix

SIGNALS = ("phoenix:inference_concurrency", "phoenix:inference_slo_pressure", "phoenix:inference_latency_seconds")
FIELDS = ("seconds", "replicas", "ready", *SIGNALS, "phase")
_EVERY_S = 2


class Record:
    """Rows of `FIELDS`, taken by a thread while the block runs; what could not be asked is empty."""

    def __init__(self, phoenix: Phoenix, prometheus: Prometheus, namespace: str, name: str) -> None:
        self._phoenix, self._prometheus, self._namespace, self._name = phoenix, prometheus, namespace, name
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._started = time.monotonic()
        self.phase = ""
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "Record":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def begin(self, phase: str) -> float:
        """Name what begins now; seconds since the start."""
        self.phase = phase
        seconds = time.monotonic() - self._started
        print(f"{seconds:.0f} s: {phase}")
        return seconds

    def since(self, seconds: float) -> list[dict[str, Any]]:
        """Return the rows from that time on."""
        return [row for row in self.rows if row["seconds"] >= seconds]

    def value(self, signal: str) -> float | None:
        """Ask for a signal now."""
        try:
            found = self._prometheus.query(f'{signal}{{namespace="{self._namespace}",model="{self._name}"}}')
        except (OSError, LabError):
            return None
        return float(found[0]["value"][1]) if found else None

    def _run(self) -> None:
        while not self._is_over.wait(_EVERY_S):
            found = self._phoenix.get(self._namespace, f"deployment/{self._name}") or {"spec": {}, "status": {}}
            self.rows.append(
                {
                    "seconds": round(time.monotonic() - self._started, 1),
                    "replicas": found["spec"].get("replicas"),
                    "ready": found["status"].get("readyReplicas", 0),
                    **{signal: self.value(signal) for signal in SIGNALS},
                    "phase": self.phase,
                }
            )

    def write(self, file: Path) -> None:
        """Write the rows as CSV."""
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self, file: Path, *, objective_s: float) -> None:
        """Draw replicas, latency and signals over time."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        seconds = [row["seconds"] for row in self.rows]
        figure, (top, middle, bottom) = pyplot.subplots(3, 1, sharex=True, figsize=(10, 8), layout="constrained")
        top.step(seconds, [row["replicas"] for row in self.rows], where="post", label="replicas wanted")
        top.step(seconds, [row["ready"] for row in self.rows], where="post", label="replicas ready")
        middle.plot(seconds, [row[SIGNALS[2]] for row in self.rows], label="latency (95 %), s")
        middle.axhline(objective_s, linestyle="--", color="grey", label="targetLatency")
        bottom.plot(seconds, [row[SIGNALS[0]] for row in self.rows], label="concurrency")
        bottom.plot(seconds, [row[SIGNALS[1]] for row in self.rows], label="pressure")
        bottom.set_xlabel("seconds")
        phases = {row["phase"]: row["seconds"] for row in reversed(self.rows) if row["phase"]}
        for axes in (top, middle, bottom):
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper right")
            for begins in phases.values():
                axes.axvline(begins, color="lightgrey", linewidth=0.8)
        for phase, begins in phases.items():
            top.annotate(phase, (begins, 0.2), rotation=90, fontsize=8, color="grey")
        figure.savefig(file)
        pyplot.close(figure)
