"""The gRPC port: one servicer under two engines, pygrpc-native and, where that is missing or not wanted, grpc.aio.

Hides the engines, their options and their ends. `app` starts a `GrpcServer` and stops it.
"""

import socket
import time
from typing import Any

import grpc
import grpc.aio

from phoenix_server.auth import ApiKeys
from phoenix_server.dataplane import DataPlane
from phoenix_server.errors import Reason, StartError
from phoenix_server.grpc_service import Servicer
from phoenix_server.logs import LogSettings
from phoenix_server.settings import Settings

# Above a model's own limit, so that a message a little over it meets the error that names the limit.
_TRANSPORT_SLACK_BYTES = 4 << 20
# Longest time to wait at the end until the last answers are sent, and then for clients to read them: a connection that
# is closed while its client still acknowledges is reset, and what the client had not read is gone.
_FLUSH_S = 5.0
_SETTLE_S = 0.2
# A second one only fights the event loop for its core: 22 to 28 % fewer calls, measured on one.
_IO_THREADS = 1


class GrpcServer:
    """The gRPC port of one data plane.

    `max_message_bytes`: the largest `maxRequestBytes` of the manifests; a model's own limit is checked besides.
    """

    def __init__(
        self,
        plane: DataPlane,
        settings: Settings,
        keys: ApiKeys | None,
        log_settings: LogSettings,
        *,
        max_message_bytes: int,
    ) -> None:
        self._settings = settings
        self._servicer = Servicer(plane, keys, log_settings)
        self._max_message_bytes = max_message_bytes
        self._server: Any = None

    async def start(self) -> int:
        """Listen and serve; return the port. Raises `StartError`: PORT_IN_USE, INVALID_SETTING."""
        settings = self._settings
        _check_free(settings.host, settings.grpc_port)
        server = self._server = _new_server(
            settings.grpc_engine,
            [
                ("grpc.max_receive_message_length", min(self._max_message_bytes + _TRANSPORT_SLACK_BYTES, 2**31 - 1)),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        for service, handlers in self._servicer.handlers().items():
            # Both, as generated code does: grpc.aio knows only the first, pygrpc-native serves natively the second.
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
            server.add_registered_method_handlers(service, handlers)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            port: int = server.add_insecure_port(f"{host}:{settings.grpc_port}")
        except RuntimeError as error:
            raise _port_in_use(settings.host, settings.grpc_port, str(error)) from error
        await server.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, end idle streams, finish what is in flight for at most `grace_s` seconds, and close."""
        self._servicer.begin_stop()
        server = self._server
        if server is not None:
            if hasattr(server, "_front"):  # pygrpc-native
                server._front = _FlushingFront(server._front, time.monotonic() + grace_s)
            await server.stop(grace_s)


def _new_server(engine: str, options: list[tuple[str, int]]) -> Any:
    if engine in ("auto", "native"):
        try:
            import pygrpc_native.aio

            server = pygrpc_native.aio.Server(None, options=options, io_threads=_IO_THREADS)
            server._front_args["metrics"] = True  # `_FlushingFront` counts with them
            return server
        except ImportError as error:
            if engine == "native":
                raise StartError(
                    Reason.INVALID_SETTING,
                    "PHOENIX_GRPC_ENGINE: 'native' needs the package pygrpc-native, which is not installed here; "
                    "use 'auto' or 'grpcio'",
                ) from error
    return grpc.aio.server(options=options)


class _FlushingFront:
    """Stands in for pygrpc-native's front while it stops: `close` waits until answers have left.

    The front of pygrpc-native 0.5 drops what it was given and has not sent: 33 to 39 of 40 answers of 100 kB, measured.
    """

    def __init__(self, front: Any, deadline_s: float) -> None:
        self._front = front
        self._deadline_s = deadline_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)

    def close(self) -> None:
        """Wait, but not beyond the deadline, then close. Blocks; the engine calls it in a thread."""
        give_up_s = min(self._deadline_s, time.monotonic() + _FLUSH_S)
        while self._unsent() and time.monotonic() < give_up_s:
            time.sleep(0.005)
        time.sleep(_SETTLE_S)  # also for the streams that grpcio serves behind the front, which are not counted
        self._front.close()

    def _unsent(self) -> int:
        """Return the calls that have begun and whose last byte is not sent."""
        methods = self._front.metrics()["methods"].values()
        return sum(of["started"] - sum(ended["count"] for ended in of["status"].values()) for of in methods)


def _check_free(host: str, port: int) -> None:
    """Raise PORT_IN_USE with the system's own reason, which the engines do not give."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _port_in_use(host, port, error.strerror or str(error)) from error


def _port_in_use(host: str, port: int, cause: str) -> StartError:
    return StartError(Reason.PORT_IN_USE, f"cannot listen on {host}:{port}: {cause}; set PHOENIX_GRPC_PORT")
