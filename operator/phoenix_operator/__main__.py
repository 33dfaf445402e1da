"""The command line: `phoenix-operator run | metrics-api | render | manifests`. It alone reads the environment."""

import argparse
import asyncio
import logging
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
    from phoenix_operator.install import NAMESPACE
    from phoenix_operator.render import render

    try:
        return render(options.paths, settings, operator_namespace=NAMESPACE)
    except ManifestError as error:
        print(error, file=sys.stderr)
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
