"""The command line: `phoenix-server serve | check | features import | replay-requests | migrate | audit | openapi`."""

import argparse
import gc
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# One thread of BLAS: numpy only moves data here, and each idle thread would hold memory.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Looking for plugins of pydantic in every installed distribution takes a tenth of the start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from phoenix_server import __version__
from phoenix_server.errors import ModelLoadError, Reason, StartError
from phoenix_server.logs import configure

if TYPE_CHECKING:
    from phoenix_api import Manifest

_DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for wrong usage, or the code of the reason (`Reason`)."""
    options = _parser().parse_args(arguments)
    configure("info")
    try:
        return int(options.command(options))
    except ModelLoadError as error:
        return error.reason.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phoenix-server", description=sys.modules["phoenix_server"].__doc__)
    parser.add_argument("--version", action="version", version=f"phoenix-server {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("serve", _serve, "serve every PhoenixModel found in files and folders"),
        ("check", _check, "validate, fetch, verify, load and measure models; exit 0, or with the reason"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a manifest, or a folder of manifests")
        command.set_defaults(command=run)
        if name == "serve":
            command.add_argument("--host", help="address to listen on (PHOENIX_HOST)")
            command.add_argument("--http-port", type=int, help="REST port (PHOENIX_HTTP_PORT)")
            command.add_argument("--grpc-port", type=int, help="gRPC port (PHOENIX_GRPC_PORT)")
        command.add_argument("--model-store", type=Path, help="folder for relative URIs (PHOENIX_MODEL_STORE)")
    _add_features(commands)
    _add_replay(commands)
    command = commands.add_parser(
        "openapi", help="print the OpenAPI document", description="print the OpenAPI document"
    )
    command.set_defaults(command=_openapi)
    _add_audit(commands)
    return parser


def _add_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "bring the audit's tables to this version; the server does it by itself where its login may"
    command = commands.add_parser("migrate", help=text, description=text)
    command.set_defaults(command=_audit, what="migrate")
    text = "look at the audit: verify | replay; exit 0, 3 if something differs, 4 if it cannot be looked at"
    audit = commands.add_parser("audit", help=text, description=text).add_subparsers(required=True, metavar="WHAT")
    text = "walk every hash chain and name the first row that was changed, removed or swapped"
    command = audit.add_parser("verify", help=text, description=text)
    command.add_argument(
        "--head", action="append", default=[], metavar="WRITER:SEQUENCE:HASH",
        help="a head that the log or the topic has (repeatable): what it covers cannot be missing unnoticed",
    )  # fmt: skip
    command.set_defaults(command=_audit, what="verify")
    text = "run logged inputs on the logged model again, on CPU, and compare bit for bit"
    command = audit.add_parser("replay", help=text, description=text)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", metavar="ID", help="a row (WRITER-SEQUENCE), a request's id or an event's")
    which.add_argument("--last", type=int, default=0, metavar="N", help="the newest N predictions")
    command.add_argument("--model-store", type=Path, help="folder for relative URIs (PHOENIX_MODEL_STORE)")
    command.set_defaults(command=_audit, what="replay")


def _add_replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "answer a file of OIP JSON requests, one a line; exit 1 if some could not be served"
    command = commands.add_parser("replay-requests", help=text, description=text)
    command.add_argument("requests", type=Path, metavar="FILE", help="requests, one a line; - reads standard input")
    command.add_argument("--models", nargs="+", type=Path, required=True, metavar="PATH", help="manifests, as of serve")
    command.add_argument("--name", help="the model to ask, where the paths have several")
    command.add_argument("--output", type=Path, help="file for the results; else standard output")
    command.add_argument("--dead-letters", type=Path, help="file for lines not served; else FILE.dead-letters.jsonl")
    command.add_argument("--model-store", type=Path, help="folder for relative URIs (PHOENIX_MODEL_STORE)")
    command.set_defaults(command=_replay_requests)


def _add_features(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "the online features of models"
    actions = commands.add_parser("features", help=text, description=text).add_subparsers(
        required=True, metavar="ACTION"
    )
    text = (
        "write a table of features into the Redis hashes that a model reads; nothing is written if a row is wrong; "
        "exit 0, 3 for a fault in the file, 4 when Redis fails"
    )
    command = actions.add_parser("import", help="write a table of features into Redis", description=text)
    command.add_argument("file", type=Path, metavar="FILE", help="CSV with a header, or Parquet")
    command.add_argument("--manifest", type=Path, required=True, help="the model's manifest, or its folder")
    command.add_argument("--model", default="", help="name of the model, where the manifests have several")
    command.add_argument("--url", help="Redis, without a password on the command line (PHOENIX_REDIS_URL)")
    command.add_argument("--entity-column", default="", help="column of the entity (default: the entityParameter)")
    text = f"datatype of the input, to spare a look at the model: {', '.join(_DATATYPES)}"
    command.add_argument("--datatype", default="", choices=_DATATYPES, metavar="TYPE", help=text)
    command.add_argument("--check-only", action="store_true", help="check the file and write nothing")
    command.add_argument("--model-store", type=Path, help="folder for relative URIs (PHOENIX_MODEL_STORE)")
    command.set_defaults(command=_import_features)


def _import_features(options: argparse.Namespace) -> int:
    from phoenix_server.feature_import import ImportOptions, import_features
    from phoenix_server.settings import load_settings

    try:
        settings = load_settings(redis_url=options.url, model_store=options.model_store)
        configure("warning")
        found = [
            manifest
            for manifest in _manifests([options.manifest], strict=True)
            if options.model in ("", manifest.model.metadata.name) and (options.model or manifest.model.spec.features)
        ]
        if len({manifest.model.metadata.name for manifest in found}) != 1:
            names = ", ".join(sorted({manifest.model.metadata.name for manifest in found}))
            what = f"several models with features: {names}; give --model" if found else "no such model with features"
            raise StartError(Reason.INVALID_SPEC, f"{options.manifest}: {what}")
        how = ImportOptions(options.file, options.entity_column, options.datatype, options.check_only)
        return import_features(settings, found[-1], how)
    except ModelLoadError as error:
        print(f"FAILED {error.reason}: {error.message}", file=sys.stderr)
        raise


def _serve(options: argparse.Namespace) -> int:
    import uvloop

    from phoenix_server.app import Server, report_failure, serve
    from phoenix_server.settings import Settings, load_settings

    termination_log = Settings.model_fields["termination_log"].default
    try:
        settings = load_settings(
            host=options.host, http_port=options.http_port, grpc_port=options.grpc_port, model_store=options.model_store
        )
        configure(settings.log_level)
        termination_log = settings.termination_log
        manifests = _manifests(options.paths, strict=False)

        def on_ready(_: Server) -> None:
            # What start-up left behind is permanent: keep the collector from walking it again and again.
            gc.collect()
            gc.freeze()

        uvloop.run(serve(settings, manifests, options.paths, on_ready))
    except ModelLoadError as error:
        report_failure(error, termination_log)
        raise
    return 0


def _check(options: argparse.Namespace) -> int:
    from phoenix_server.check import check
    from phoenix_server.settings import load_settings

    try:
        settings = load_settings(model_store=options.model_store)
        configure("warning")
        return check(settings, _manifests(options.paths, strict=True))
    except ModelLoadError as error:
        print(f"FAILED {error.reason}: {error.message}")
        raise


def _audit(options: argparse.Namespace) -> int:
    from phoenix_server.audit import command
    from phoenix_server.settings import load_settings

    configure("warning")
    try:
        settings = load_settings(model_store=getattr(options, "model_store", None))
        if options.what == "migrate":
            return command.migrate(settings)
        if options.what == "verify":
            try:
                heads = [command.parse_head(text) for text in options.head]
            except ValueError:
                print("--head: expected WRITER:SEQUENCE:HASH, HASH in hex digits", file=sys.stderr)
                return 2
            return command.verify(settings, heads)
        from phoenix_server.app import new_store

        return command.replay(settings, new_store(settings), options.id, options.last)
    except ModelLoadError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        raise


def _replay_requests(options: argparse.Namespace) -> int:
    from phoenix_server.replay_requests import run
    from phoenix_server.settings import load_settings

    try:
        settings = load_settings(model_store=options.model_store)
        configure("warning")
        return run(
            settings,
            _manifests(options.models, strict=False),
            model_name=options.name,
            requests=options.requests,
            output=options.output,
            dead_letters=options.dead_letters,
        )
    except ModelLoadError as error:
        print(f"FAILED {error.reason}: {error.message}", file=sys.stderr)
        raise


def _openapi(_: argparse.Namespace) -> int:
    import json

    from phoenix_server.app import openapi_document

    print(json.dumps(openapi_document(), indent=2))
    return 0


def _manifests(paths: list[Path], *, strict: bool) -> "list[Manifest]":
    """Read the manifests; unknown fields are an error when strict, else a warning.

    Of several paths, files that are named like no manifest are left out: a shell makes `examples/README.md` of
    `examples/*` too.
    """
    from phoenix_api import MANIFEST_SUFFIXES, ManifestError, read_manifests

    if len(paths) > 1:
        paths = [path for path in paths if path.is_dir() or path.suffix in MANIFEST_SUFFIXES] or paths
    try:
        return read_manifests(paths, strict=True)
    except ManifestError as error:
        fault = error
    if not strict:
        try:
            manifests = read_manifests(paths, strict=False)
        except ManifestError as error:
            fault = error
        else:
            logging.getLogger(__name__).warning("unknown fields ignored", extra={"cause": str(fault)})
            return manifests
    raise StartError(Reason.INVALID_SPEC, str(fault)) from fault


if __name__ == "__main__":
    sys.exit(main())
