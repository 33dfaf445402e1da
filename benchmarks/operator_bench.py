"""Measures what the operator costs with many PhoenixModels, on a real API server without nodes.

    python benchmarks/operator_bench.py [--models N] [--edits N] [--rounds N] [--quick] [--output DIR]

Exits 0 also when a target is missed: a busy machine misses them all. Exits 1 when something is wrong, so that the
figures would mean nothing: a request that fails, children that are not there, an operator that died.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from aiohttp import ClientError
from operator_lab import (
    LOOP_AGENT,
    OPERATOR_NAMESPACE,
    Api,
    AuditLog,
    Lab,
    Object,
    Operator,
    Request,
    at_once,
    by_verb,
    cpu_s,
    machine_busy_s,
    memory_mb,
    of_operator,
    operator_token,
    running,
    write_kubeconfig,
    writes,
)
from operator_results import Outcome, tables, write
from processes import BenchError, free_port
from report import number
from rich.console import Console
from rich.table import Table

from phoenix_api import PhoenixModel
from phoenix_operator.desired import desired_objects
from phoenix_operator.desired.naming import MODEL
from phoenix_operator.kinds import kind_of
from phoenix_operator.observed import TEMPLATE, Observed, Subject
from phoenix_operator.render import NO_UID
from phoenix_operator.settings import Settings

_DEADLINE_S, _EDIT_DEADLINE_S, _BETWEEN_EDITS_S = 600.0, 30.0, 0.05
_NAMESPACES = 10
_CREATORS = 16  # who creates the models, at the same time
_RESYNC_S = 10
_MODELS = "/apis/phoenix-ml.io/v1alpha1/namespaces/{}/phoenixmodels"
# How many of each kind a model of this bench has.
_CHILDREN = {
    "/api/v1/serviceaccounts": 1,
    "/api/v1/configmaps": 1,
    "/api/v1/services": 2,
    "/apis/apps/v1/deployments": 1,
    "/apis/networking.k8s.io/v1/networkpolicies": 1,
    "/apis/policy/v1/poddisruptionbudgets": 1,
    "/apis/resource.k8s.io/v1/resourceclaimtemplates": 1,
}


@dataclass(frozen=True, slots=True)
class Fleet:
    """The models of the bench."""

    count: int

    @property
    def namespaces(self) -> list[str]:
        """Where they are."""
        return [f"team-{number}" for number in range(min(_NAMESPACES, self.count))]

    def places(self) -> list[tuple[str, str]]:
        """Return namespace and name of each."""
        return [(self.namespaces[number % len(self.namespaces)], f"model-{number}") for number in range(self.count)]

    def manifest(self, namespace: str, name: str) -> Object:
        """Return a model with every child that the default settings can lead to."""
        return {
            "apiVersion": "phoenix-ml.io/v1alpha1",
            "kind": "PhoenixModel",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "model": {"uri": "https://models.example/iris/model.onnx", "sha256": "0" * 64, "version": "1"},
                "runtime": {"accelerator": {"provider": "CUDA", "deviceClassName": "gpu.example.com"}},
                "batching": {"maxRows": 32},
                "resources": {"requests": {"cpu": "250m", "memory": "256Mi"}},
                "replicas": 2,
            },
        }

    def children(self, namespace: str, name: str) -> list[Object]:
        """Return what the operator makes of a model, with an owner that is nobody."""
        model = PhoenixModel.read(self.manifest(namespace, name), strict=True)
        subject = Subject(model, uid=NO_UID, generation=1, created="", status={})
        return desired_objects(subject, Observed(), Settings(), operator_namespace=OPERATOR_NAMESPACE)


class Costs:
    """Processor time of operator, API server, etcd, and of everybody else on the machine, over a span of time."""

    def __init__(self, lab: Lab, others: dict[str, int]) -> None:
        self._lab, self._pids = lab, others | {"bench": os.getpid()}
        self._started, self._before = time.perf_counter(), self._now()

    def figures(self) -> dict[str, float]:
        """Return seconds of processor time since the start; what others took as a number of cores."""
        spent = {name: after - self._before[name] for name, after in self._now().items()}
        others = spent.pop("machine") - sum(spent.values())
        figures = {f"{name}_cpu_s": seconds for name, seconds in spent.items()}
        return figures | {"other_cores": max(0.0, others / (time.perf_counter() - self._started))}

    def _now(self) -> dict[str, float]:
        own = {name: cpu_s(pid) for name, pid in self._pids.items()}
        return {"machine": machine_busy_s(), **self._lab.cpu_s(), **own}


class Bench:
    """One run: the plain loop and the operator in turn, each on a new API server."""

    def __init__(self, options: argparse.Namespace, folder: Path, console: Console) -> None:
        self._options, self._folder, self._console = options, folder, console
        self._fleet, self._lab, self.outcome = Fleet(options.models), Lab(options.lab), Outcome()

    async def run(self) -> None:
        """Measure all rounds; the lab is gone afterwards."""
        try:
            for number in range(self._options.rounds):
                self._say(f"round {number + 1} of {self._options.rounds}")
                self._lab.renew()
                await self._measure_loop()
                self._lab.renew()
                await self._measure_operator()
        finally:
            self._lab.remove()

    async def _measure_loop(self) -> None:
        """Apply the same objects without an operator: as fast as the API server takes them from a client like ours."""
        self._say("plain loop: applying every child")
        requests = [
            (kind_of(body).path(namespace, body["metadata"]["name"]), json.dumps(body).encode())
            for namespace, name in self._fleet.places()
            for body in self._fleet.children(namespace, name)
        ]
        async with Api(self._lab.kubeconfig, agent="operator-bench") as admin:
            await self._make_namespaces(admin)
            token = await operator_token(admin)
        async with Api(self._lab.kubeconfig, agent=LOOP_AGENT, token=token) as api:
            costs, started = Costs(self._lab, {}), time.perf_counter()
            await at_once([functools.partial(api.apply, *request) for request in requests], self._options.concurrency)
            seconds = time.perf_counter() - started
        self._keep("loop", {"seconds": seconds, "objects_per_s": len(requests) / seconds, **costs.figures()})

    async def _measure_operator(self) -> None:
        async with Api(self._lab.kubeconfig, agent="operator-bench") as api:
            self.outcome.kubernetes = (await api.get("/version"))["gitVersion"]
            kubeconfig = self._folder / "operator.kubeconfig"
            write_kubeconfig(kubeconfig, api, await operator_token(api))
            await self._make_namespaces(api)
            log = AuditLog(self._lab.audit_log)
            with running(self._start(kubeconfig, {})) as operator:
                await operator.wait_until_ready()
                await asyncio.sleep(2)
                self._keep("idle", memory_mb(operator.pid))
                await self._create(api, operator, log)
                await self._edit(api, operator, log)
            with running(self._start(kubeconfig, {"resyncSeconds": _RESYNC_S})) as operator:
                await self._restart(operator, log)
                await self._rest(operator, log)

    def _start(self, kubeconfig: Path, settings: Object) -> Operator:
        port, file = free_port(), self._folder / "settings.yaml"
        file.write_text(json.dumps({"httpPort": port, **settings}))
        return Operator(kubeconfig=kubeconfig, settings=file, port=port, log=self._folder / "operator.log")

    # --- what is measured --------------------------------------------------------------------------------------------

    async def _create(self, api: Api, operator: Operator, log: AuditLog) -> None:
        """Create the models; done when the last child is answered, by the API server's own clock."""
        self._say("operator: creating the models")
        log.read()
        costs, calls = Costs(self._lab, {"operator": operator.pid}), []
        for namespace, name in self._fleet.places():
            body = json.dumps(self._fleet.manifest(namespace, name)).encode()
            calls.append(functools.partial(api.send, "POST", _MODELS.format(namespace), body))
        await at_once(calls, _CREATORS)
        await operator.wait_for_reconciles(self._fleet.count, deadline_s=_DEADLINE_S)
        reconciles = await operator.wait_until_quiet()
        figures = costs.figures() | memory_mb(operator.pid)
        figures["reconciles_each"] = reconciles / self._fleet.count
        await self._check_children(api)
        requests = log.read()
        started = min(row.received for row in requests if (row.verb, row.resource) == ("create", "phoenixmodels"))
        own = of_operator(requests)
        ended = max(row.answered for row in own if row.is_write and row.resource != "phoenixmodels")
        children = self._fleet.count * sum(_CHILDREN.values())
        figures |= {"seconds": ended - started, "objects_per_s": children / (ended - started)}
        self._keep("create", figures | _per_model(own, self._fleet.count))

    async def _edit(self, api: Api, operator: Operator, log: AuditLog) -> None:
        """Edit one model after another; each is done when a watch shows its Deployment with another template."""
        self._say("operator: editing models")
        deployments = f"/apis/apps/v1/deployments?labelSelector={MODEL}"
        listed = await api.get(deployments)
        templates = {_place(body): _template(body) for body in listed["items"]}
        log.read()
        waits_ms, choice = [], random.Random(1)
        async with aclosing(api.watch(deployments, listed["metadata"]["resourceVersion"])) as events:
            for number in range(self._options.edits):
                place = choice.choice(self._fleet.places())
                body = json.dumps({"spec": {"batching": {"maxRows": 100 + number}}}).encode()
                started = time.perf_counter()
                path = f"{_MODELS.format(place[0])}/{place[1]}"
                await api.send("PATCH", path, body, content_type="application/merge-patch+json")
                async with asyncio.timeout(_EDIT_DEADLINE_S):
                    async for event in events:
                        seen = event["object"]
                        if _place(seen) == place and _template(seen) != templates[place]:
                            break
                waits_ms.append((time.perf_counter() - started) * 1e3)
                templates[place] = _template(seen)
                await asyncio.sleep(_BETWEEN_EDITS_S)
        await asyncio.sleep(2)
        own = of_operator(log.read())
        cuts = quantiles(waits_ms, n=100, method="inclusive")
        figures = {"p50_ms": cuts[49], "p99_ms": cuts[98], "max_ms": max(waits_ms), **memory_mb(operator.pid)}
        self._keep("edit", figures | _per_model(own, self._options.edits))

    async def _restart(self, operator: Operator, log: AuditLog) -> None:
        """From exec to the first reconcile of every model."""
        self._say("operator: restarted with all models")
        costs = Costs(self._lab, {"operator": operator.pid})
        await operator.wait_until_ready()
        ready_s = time.perf_counter() - operator.started_s
        await operator.wait_for_reconciles(self._fleet.count, deadline_s=_DEADLINE_S)
        figures = {"ready_s": ready_s, "seconds": time.perf_counter() - operator.started_s, **costs.figures()}
        await asyncio.sleep(1)
        own = of_operator(log.read())
        watching = [row for row in own if row.agent.startswith("kopf/") and not row.is_continued]
        for verb in ("list", "watch"):
            kinds = Counter(row.resource for row in watching if row.verb == verb)
            figures |= {f"{verb}: kinds": len(kinds), f"{verb}: most of a kind": max(kinds.values())}
        figures |= memory_mb(operator.pid) | {"reconciles": await operator.reconciles()}
        self._keep("restart", figures | _totals(own))

    async def _rest(self, operator: Operator, log: AuditLog) -> None:
        """Nothing happens but that the operator looks at every model again, and again."""
        rounds = self._options.resyncs
        self._say(f"operator: at rest for {rounds} looks at every model")
        log.read()
        costs, started = Costs(self._lab, {"operator": operator.pid}), time.perf_counter()
        before = await operator.reconciles()
        least = before + rounds * self._fleet.count
        count = await operator.wait_for_reconciles(least, deadline_s=_DEADLINE_S * rounds) - before
        figures = {"seconds": time.perf_counter() - started, "reconciles": count, **costs.figures()}
        figures["operator_cpu_ms_each"] = figures["operator_cpu_s"] * 1e3 / count
        self._keep("rest", figures | memory_mb(operator.pid) | _totals(of_operator(log.read())))

    # --- around it ---------------------------------------------------------------------------------------------------

    async def _make_namespaces(self, api: Api) -> None:
        for name in self._fleet.namespaces:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            await api.send("POST", "/api/v1/namespaces", json.dumps(body).encode())

    async def _check_children(self, api: Api) -> None:
        """Every child is there, once."""
        for path, each in _CHILDREN.items():
            listed = await api.get(f"{path}?labelSelector={MODEL}")
            owners = Counter(body["metadata"]["labels"][MODEL] for body in listed["items"])
            if owners != Counter({name: each for _, name in self._fleet.places()}):
                raise BenchError(
                    f"{path}: {owners.total()} objects for {self._fleet.count} models, {each} each expected"
                )

    def _keep(self, phase: str, figures: dict[str, float]) -> None:
        self.outcome.add(phase, figures)
        self._say("  " + ", ".join(f"{name} {number(value)}" for name, value in figures.items()))

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)


def _per_model(requests: Sequence[Request], models: int) -> dict[str, float]:
    return {name: count / models for name, count in _totals(requests).items()}


def _totals(requests: Sequence[Request]) -> dict[str, float]:
    """Count requests, all and by verb, and writes by what they write."""
    figures: dict[str, float] = {"requests": len(requests), "writes": sum(row.is_write for row in requests)}
    figures |= {f"requests: {verb}": count for verb, count in by_verb(requests).items()}
    return figures | {f"writes: {what}": count for what, count in writes(requests).items()}


def _place(body: Object) -> tuple[str, str]:
    return body["metadata"]["namespace"], body["metadata"]["name"]


def _template(body: Object) -> str:
    return str(body["spec"]["template"]["metadata"]["annotations"][TEMPLATE])


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measures what the operator costs with many PhoenixModels.")
    parser.add_argument("--models", type=int, default=1000, help="how many models (default 1000)")
    parser.add_argument("--edits", type=int, default=200, help="how many edits (default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is repeated (default 3)")
    parser.add_argument("--resyncs", type=int, default=3, help="looks at every model, at rest (default 3)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests of the plain loop at the same time")
    parser.add_argument("--quick", action="store_true", help="5 models, once: does the bench work?")
    parser.add_argument("--lab", default="bench-operator", help="name of the lab, which is made anew and removed")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/operator", help="folder for results"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.edits, options.rounds, options.resyncs = 5, 3, 1, 1
    if min(options.models, options.rounds, options.resyncs, options.concurrency) < 1 or options.edits < 2:
        parser.error("--models, --rounds, --resyncs and --concurrency must be at least 1, --edits at least 2")
    if options.lab == "default":
        parser.error("--lab: this lab is removed afterwards, and default is the one to work with")
    return options


def main() -> int:
    """Run the bench; return the exit code."""
    options, console = read_options(), Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is removed then, too
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="operator-bench-") as folder:
        bench = Bench(options, Path(folder), console)
        try:
            asyncio.run(bench.run())
        except (BenchError, TimeoutError, ClientError) as error:
            console.print(f"operator-bench: {type(error).__name__}: {error}", style="red", highlight=False)
            return 1
    bench.outcome.notes.append(
        f"Load average when the bench began: {load:.1f}. What others took while children were made stands in its table."
    )
    console = Console()
    for content in tables(bench.outcome):
        table = Table(*content.columns, title=content.title, title_justify="left", title_style="bold")
        for row in content.rows:
            table.add_row(*row, style={"met": "green", "MISSED": "yellow"}.get(row[-1]))
        console.print(table)
    console.print(f"written to {write(bench.outcome, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
