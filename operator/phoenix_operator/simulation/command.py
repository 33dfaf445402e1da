"""`phoenix-operator simulate`: from a manifest, a trace and what is known of a replica to table, CSV and picture."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phoenix_api import PhoenixModel, read_manifests
from phoenix_api.types import Autoscaling
from phoenix_operator.desired.autoscaling import TARGET_SHARE
from phoenix_operator.simulation import picture, report
from phoenix_operator.simulation.policies import POLICIES
from phoenix_operator.simulation.run import Run, Scenario, simulate, table_of
from phoenix_operator.simulation.serving import Replica
from phoenix_operator.simulation.trace import Trace, read_trace
from phoenix_operator.simulation.waiting import Service

_USUAL_CAPACITY = 4
_LEAST_SLO_S = 0.001


class SimulateError(Exception):
    """A manifest or an option that cannot be simulated; the message names it, what is expected and what came."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. None: found in the manifest, or assumed, which is told."""

    manifest: Path
    trace: Path
    capacity: int | None = None
    service_ms: float | None = None
    loaded_service_ms: float | None = None
    variation: float = 0.25
    load_s: float = 30.0
    cpu_share: float = 1.0
    replicas: int | None = None
    seed: int = 1
    policies: Sequence[str] = tuple(POLICIES)
    csv: Path | None = None
    picture: Path | None = None


def command(options: Options) -> int:
    """Simulate and print. Raises `SimulateError`, `ManifestError`, `TraceError` and `PictureError`."""
    if options.picture is not None:
        picture.check(options.picture)
    model, asked = _model(options.manifest)
    trace = read_trace(options.trace)
    runs, assumed = compare(model, asked, trace, options)
    sys.stdout.write(f"{assumed}\n\n{report.table(runs)}")
    if options.csv is not None:
        try:
            with options.csv.open("w", encoding="utf-8", newline="") as out:
                report.write_csv(out, runs)
        except OSError as error:
            raise SimulateError(f"--csv: expected a file that can be written, got: {error}") from error
    if options.picture is not None:
        picture.draw(runs, options.picture, f"{model.metadata.name} under {options.trace.name}")
    return 0


def compare(model: PhoenixModel, asked: Autoscaling, trace: Trace, options: Options) -> tuple[list[Run], str]:
    """Run the policies, and say of what replica. Raises `SimulateError`."""
    slo_s = float(asked.target_latency)
    if slo_s < _LEAST_SLO_S:
        raise SimulateError(f"spec.autoscaling.targetLatency: expected 1m or more, got {asked.target_latency}")
    capacity = options.capacity or _capacity(asked)
    alone_s = slo_s / 4 if options.service_ms is None else options.service_ms / 1000
    loaded_s = alone_s if options.loaded_service_ms is None else options.loaded_service_ms / 1000
    try:
        service = Service(capacity, alone_s, loaded_s, options.variation)
    except ValueError as error:
        raise SimulateError(str(error)) from error
    limits = model.spec.limits
    replica = Replica(service, options.load_s, limits.max_queued_rows, limits.timeout_seconds, options.cpu_share)
    replicas = options.replicas or _enough(asked, trace, service)
    scenario = Scenario(replica, slo_s, asked.percentile, replicas, options.seed)
    table = table_of(scenario)
    runs = [
        simulate(name, POLICIES[name](model, asked, capacity, options.load_s), trace, scenario, table)
        for name in options.policies
    ]
    assumed = (
        f"Replica: {capacity} at once, {alone_s * 1000:g} ms alone, {loaded_s * 1000:g} ms with {capacity}, "
        f"{service.most_per_second:g} requests/s at most, ready after {options.load_s:g} s. "
        f"Objective: p{asked.percentile} of {slo_s * 1000:g} ms. Seed {options.seed}."
    )
    return runs, assumed


def _model(file: Path) -> tuple[PhoenixModel, Autoscaling]:
    found = read_manifests([file])
    if len(found) != 1:
        raise SimulateError(f"{file}: expected one PhoenixModel, got {len(found)}")
    model = found[0].model
    asked = model.spec.autoscaling
    if asked is None:
        raise SimulateError(f"{file}: spec.autoscaling: expected autoscaling, which is simulated, got none")
    if asked.min_replicas == 0:
        raise SimulateError(f"{file}: spec.autoscaling.minReplicas: expected 1 or more: to 0 scales KEDA, got 0")
    return model, asked


def _capacity(asked: Autoscaling) -> int:
    per_replica = asked.concurrency_per_replica
    return _USUAL_CAPACITY if per_replica is None else max(1, round(per_replica / float(TARGET_SHARE)))


def _enough(asked: Autoscaling, trace: Trace, service: Service) -> int:
    """Return the replicas that the first load needs."""
    needed = trace.per_second[0] / (service.most_per_second * float(TARGET_SHARE))
    return max(asked.min_replicas, min(asked.max_replicas, round(needed + 0.499)))
