"""The command line: `phoenix-operator run | metrics-api | render | manifests | simulate`.

The only place that reads the environment.
"""

import argparse
import asyncio
import logging
import math
import os
import socket
import sys
from pathlib import Path

from phoenix_operator import __version__
from phoenix_operator.settings import Settings, SettingsError, read_settings

_log = logging.getLogger(__name__)
# The API server stores objects of up to 10,000 levels of JSON, and a list of them has two more. Python gives up at a
# thousand, which would end the watches again and again, for all models because of one.
_JSON_LEVELS = 12_000


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 for a failure, 2 for wrong usage or settings."""
    options = _parser().parse_args(arguments)
    try:
        settings = read_settings(getattr(options, "settings", None))
        return int(options.command(options, settings))
    except SettingsError as error:
        print(f"phoenix-operator: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phoenix-operator", description=sys.modules["phoenix_operator"].__doc__)
    parser.add_argument("--version", action="version", version=f"phoenix-operator {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the operator", description="Run the operator until SIGTERM.")
    run.add_argument("--settings", type=Path, metavar="FILE", help="settings (YAML)")
    run.add_argument("--namespaces", type=_names, default=(), metavar="A,B", help="namespaces; absent: the cluster")
    run.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    run.set_defaults(command=_run)

    metrics_api = commands.add_parser(
        "metrics-api",
        help="answer the autoscaler's questions",
        description="Serve custom.metrics.k8s.io for PhoenixModels from Prometheus until SIGTERM.",
    )
    metrics_api.add_argument("--settings", type=Path, metavar="FILE", help="settings (YAML)")
    metrics_api.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    metrics_api.set_defaults(command=_metrics_api)

    render = commands.add_parser(
        "render",
        help="print what the operator would apply",
        description="Print what the operator would apply for the PhoenixModels of files and folders; needs no cluster.",
    )
    render.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    render.add_argument("--settings", type=Path, metavar="FILE", help="settings (YAML)")
    render.set_defaults(command=_render)

    _add_simulate(commands)

    manifests = commands.add_parser(
        "manifests",
        help="write the operator's own manifests",
        description="Write a folder for `kubectl apply -k`: CRD, rights, settings, Deployment.",
    )
    manifests.add_argument("folder", type=Path, metavar="FOLDER")
    manifests.add_argument(
        "--namespaces", type=_names, default=(), metavar="A,B", help="install with Roles in these namespaces only"
    )
    manifests.add_argument(
        "--secrets", type=_names, default=(), metavar="A,B", help="Secrets that it may read, with --namespaces"
    )
    manifests.add_argument(
        "--bindings",
        type=_names,
        default=(),
        metavar="A,B",
        help="admin Secrets of backends in the operator's namespace; with it the rights that bindings need",
    )
    manifests.add_argument(
        "--metrics-api", action="store_true", help="with the metrics API, which the provider `builtin` needs"
    )
    manifests.set_defaults(command=_manifests)
    return parser


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from phoenix_operator.simulation.policies import POLICIES

    simulate = commands.add_parser(
        "simulate",
        help="simulate the autoscaling of a model",
        description="Simulate a model under a load, with our autoscaling, one on the plain percentile and one on CPU. "
        "Needs no cluster.",
    )
    simulate.add_argument("manifest", type=Path, metavar="MODEL.yaml", help="a PhoenixModel with autoscaling")
    simulate.add_argument("trace", type=Path, metavar="TRACE.csv", help="lines of seconds,requests_per_second")
    simulate.add_argument(
        "--capacity", type=_count, metavar="N", help="requests that a replica serves at once; absent: from the manifest"
    )
    simulate.add_argument(
        "--service-ms", type=_amount, metavar="X", help="time of a request alone; absent: a quarter of the objective"
    )
    simulate.add_argument(
        "--loaded-service-ms", type=_amount, metavar="X", help="time of a request among as many as the capacity"
    )
    simulate.add_argument(
        "--variation", type=_amount, default=0.25, metavar="V", help="squared coefficient of variation of that time"
    )
    simulate.add_argument("--load-seconds", type=_amount, default=30.0, metavar="S", help="until a new pod is ready")
    simulate.add_argument(
        "--cpu-share", type=_amount, default=1.0, metavar="X", help="of the CPU request, used at full load"
    )
    simulate.add_argument("--replicas", type=_count, metavar="N", help="at the beginning; absent: what the load needs")
    simulate.add_argument("--seed", type=int, default=1, metavar="N", help="of the random arrivals")
    simulate.add_argument(
        "--policy", action="append", choices=list(POLICIES), help="one of those that are compared; may be repeated"
    )
    simulate.add_argument("--csv", type=Path, metavar="FILE", help="write every step")
    simulate.add_argument("--picture", type=Path, metavar="FILE", help="draw it (.svg, .png); needs the extra simulate")
    simulate.set_defaults(command=_simulate)


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return number


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1e9:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1e9, got {text!r}")
    return number


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _run(options: argparse.Namespace, settings: Settings) -> int:
    from phoenix_operator import app, logs

    logs.configure(options.log_level)
    sys.setrecursionlimit(_JSON_LEVELS)
    identity = os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}"
    place = app.Place(os.environ.get("POD_NAMESPACE") or "phoenix-system", identity, options.namespaces)
    try:
        asyncio.run(app.run(settings, place))
    except Exception:
        _log.exception("the operator ended; it should be started again")
        return 1
    return 0


def _metrics_api(options: argparse.Namespace, settings: Settings) -> int:
    from phoenix_operator import logs
    from phoenix_operator.metrics_api import app

    logs.configure(options.log_level)
    try:
        asyncio.run(app.run(settings, app.Place(os.environ.get("POD_NAMESPACE") or "phoenix-system")))
    except SettingsError:
        raise
    except Exception:
        _log.exception("the metrics API ended; it should be started again")
        return 1
    return 0


def _render(options: argparse.Namespace, settings: Settings) -> int:
    from phoenix_api import ManifestError
    from phoenix_operator.install_program import NAMESPACE
    from phoenix_operator.render import render

    try:
        return render(options.paths, settings, operator_namespace=NAMESPACE)
    except ManifestError as error:
        print(error, file=sys.stderr)
        return 1


def _simulate(options: argparse.Namespace, _: Settings) -> int:
    from phoenix_api import ManifestError
    from phoenix_operator.simulation.command import Options, SimulateError, command
    from phoenix_operator.simulation.picture import PictureError
    from phoenix_operator.simulation.policies import POLICIES
    from phoenix_operator.simulation.trace import TraceError

    asked = Options(
        options.manifest,
        options.trace,
        capacity=options.capacity,
        service_ms=options.service_ms,
        loaded_service_ms=options.loaded_service_ms,
        variation=options.variation,
        load_s=options.load_seconds,
        cpu_share=options.cpu_share,
        replicas=options.replicas,
        seed=options.seed,
        policies=tuple(dict.fromkeys(options.policy or POLICIES)),
        csv=options.csv,
        picture=options.picture,
    )
    try:
        return command(asked)
    except (ManifestError, SimulateError, TraceError, PictureError) as error:
        print(f"phoenix-operator: {error}", file=sys.stderr)
        return 1


def _manifests(options: argparse.Namespace, _: Settings) -> int:
    from phoenix_api import crd
    from phoenix_operator import install, install_metrics_api

    options.folder.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(options, name) for name in ("namespaces", "secrets", "bindings")}
    more = {}
    if options.metrics_api:
        more[install_metrics_api.FILE] = install_metrics_api.manifests(namespaces=options.namespaces)
    for name, text in install.files(crd.render(), **asked, more=more).items():
        (options.folder / name).write_text(text)
        print(f"wrote {options.folder / name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
