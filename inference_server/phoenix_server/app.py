"""Owns every lifetime of a serving process: what is entered, in which order, and how it ends.

Order: settings → metrics → sockets → models → gRPC → ready. The sockets are bound first, so that a taken port is an
error at once and liveness is answered while models are fetched. The end is the reverse, doors first: not ready → wait
`drain_seconds` → stop accepting → finish what is in flight → free the models.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoenix_api import Manifest
from phoenix_server.artifacts import ArtifactStore, Progress
from phoenix_server.auth import ApiKeys
from phoenix_server.dataplane import DataPlane
from phoenix_server.engine import intra_op_threads
from phoenix_server.errors import ModelLoadError, StartError
from phoenix_server.events import Events
from phoenix_server.features import Features
from phoenix_server.hotpath import AsgiApp, HotPath, InferEndpoint
from phoenix_server.http_server import HttpServer
from phoenix_server.logs import LogSettings
from phoenix_server.metrics import Metrics
from phoenix_server.recording import Recording
from phoenix_server.repository import Repository
from phoenix_server.settings import Settings, load_settings
from phoenix_server.tracing import tracer_from_environment

_log = logging.getLogger(__name__)
# The gRPC transport's limit cannot grow while it serves; this leaves room for models that are loaded later.
_LEAST_MESSAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it listens and what it serves."""

    http_port: int
    grpc_port: int
    plane: DataPlane


@contextlib.asynccontextmanager
async def running(settings: Settings, manifests: Iterable[Manifest], paths: list[Path]) -> AsyncIterator[Server]:
    """Run a server: load the manifests, serve until the block ends, then drain.

    `paths` are watched for changes of the manifests. Raises `ModelLoadError` (and its subclass `StartError`).
    """
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        keys = ApiKeys(settings.api_keys_file) if settings.api_keys_file else None
        log_settings = LogSettings()
        features = await stack.enter_async_context(Features(settings, metrics))
        repository = Repository(settings, metrics, new_store(settings), features)
        tracer = tracer_from_environment()
        if tracer is not None:
            stack.callback(tracer.close)
        events = await stack.enter_async_context(Events(settings, metrics))
        recording = await stack.enter_async_context(Recording(settings, metrics, events))
        repository.followers += [events.follow, recording.follow]
        plane = DataPlane(repository, metrics, recorder=recording, tracer=tracer, is_access_logged=settings.access_log)

        decoders = ThreadPoolExecutor(intra_op_threads(0, settings.cpus), thread_name_prefix="decode")
        stack.callback(decoders.shutdown, wait=False, cancel_futures=True)
        endpoint = InferEndpoint(plane, keys, decoders=decoders)

        def make_rest() -> AsgiApp:
            from phoenix_server.rest import create_rest

            return create_rest(plane, endpoint, log_settings, keys)

        http = HttpServer(HotPath(plane, endpoint, make_rest), endpoint, settings)
        http_port = http.bind()
        stack.push_async_callback(repository.close)
        http.start()
        stack.push_async_callback(http.stop, settings.shutdown_seconds)

        from phoenix_server.grpc_server import GrpcServer

        manifests = list(manifests)
        limits = [int(manifest.model.spec.limits.max_request_bytes.value) for manifest in manifests]
        grpc = GrpcServer(plane, settings, keys, log_settings, max_message_bytes=max([_LEAST_MESSAGE_BYTES, *limits]))
        grpc_port = await grpc.start()
        stack.push_async_callback(grpc.stop, settings.shutdown_seconds)

        await repository.start(manifests)
        if settings.kafka_bootstrap_servers is not None:
            from phoenix_server.async_inference import AsyncInference

            await stack.enter_async_context(AsyncInference(settings, plane, metrics))
        if settings.watch and paths:
            watcher = asyncio.create_task(repository.watch(paths))
            stack.push_async_callback(_cancel, watcher)
        stack.push_async_callback(_drain, repository, http, settings.drain_seconds)
        yield Server(http_port, grpc_port, plane)


async def serve(
    settings: Settings, manifests: Iterable[Manifest], paths: list[Path], on_ready: Callable[[Server], None]
) -> None:
    """Serve until SIGTERM or SIGINT. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    main = asyncio.current_task()
    assert main is not None
    is_up = False

    def on_signal(name: str) -> None:
        if stop.is_set():
            logging.shutdown()
            os._exit(130)  # at once: unwinding under threads of native code can crash instead
        _log.info("stopping", extra={"signal": name})
        stop.set()
        if not is_up:
            main.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal, signum.name)
    started = time.perf_counter()
    with contextlib.suppress(asyncio.CancelledError):
        async with running(settings, manifests, paths) as server:
            is_up = True
            _log.info(
                "ready" if server.plane.is_ready() else "serving, not ready: some models could not be loaded",
                extra={
                    "rest": f"http://{_reachable(settings.host)}:{server.http_port}",
                    "grpc": f"{_reachable(settings.host)}:{server.grpc_port}",
                    "models": [f"{model.name}/{model.version}" for model in server.plane.repository.served()],
                    "seconds": round(time.perf_counter() - started, 3),
                },
            )
            on_ready(server)
            await stop.wait()
    _log.info("stopped")


def new_store(settings: Settings, progress: Callable[[Progress], None] | None = None) -> ArtifactStore:
    """Return the artifact store of these settings; `progress` is told of long fetches, else the log is."""
    return ArtifactStore(
        model_store=settings.model_store, cache_dir=settings.state_dir, progress=progress or _log_progress
    )


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of the REST API."""
    from phoenix_server.rest import create_rest

    settings = load_settings()
    metrics = Metrics()
    plane = DataPlane(Repository(settings, metrics, new_store(settings)), metrics)
    return create_rest(plane, InferEndpoint(plane), LogSettings(), None).openapi()


def report_failure(error: ModelLoadError, termination_log: Path) -> None:
    """Leave the reason where Kubernetes keeps it, so that the operator can show it in the PhoenixModel's status."""
    import json

    kind = "the server cannot start" if isinstance(error, StartError) else "the model cannot be served"
    _log.error(kind, extra={"reason": error.reason, "cause": error.message})
    with contextlib.suppress(OSError):
        if termination_log.exists():
            # Kubernetes cuts the message at 4096 bytes, which would break the JSON.
            text = json.dumps({"reason": error.reason, "message": error.message[:3000]})
            termination_log.write_text(text)


def _log_progress(progress: Progress) -> None:
    _log.info("fetching", extra={"uri": progress.uri, "bytes": progress.done_bytes, "of": progress.total_bytes})


async def _drain(repository: Repository, http: HttpServer, seconds: float) -> None:
    """Answer as not ready, and give load balancers the time to see it."""
    repository.is_draining = True
    http.begin_drain()
    await asyncio.sleep(seconds)


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
