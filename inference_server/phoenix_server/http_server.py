"""The HTTP/1.1 server: uvicorn's protocol with Phoenix's checks in it, an accept loop of its own, and a drain.

Three things are added to uvicorn. Inference requests on an idle connection go straight from the parser to
`hotpath.InferEndpoint`, without ASGI's messages between (`_InferCycle`); everything else takes uvicorn's way. Requests
that are malformed, too slow or too large are refused with a JSON error, mostly before their body is read. And all
connections that wait are accepted in one turn of the loop, because uvloop takes one a turn and a storm has to queue.
"""

import asyncio
import logging
import re
import socket
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from phoenix_server import hotpath
from phoenix_server.errors import Code, PhoenixError, Reason, StartError, invalid
from phoenix_server.hotpath import AsgiApp, Headers, HttpReply, InferEndpoint
from phoenix_server.served_model import ServedModel
from phoenix_server.settings import Settings

_log = logging.getLogger(__name__)
_MAX_HEADER_BYTES = 64 * 1024
# Bodies of everything that is not an inference: settings and parameters.
_MAX_SMALL_BODY_BYTES = 1 << 20
_SWEEP_S = 0.5
# An idle connection may carry a request that is on its way; closed at once, that request would be lost.
_LINGER_S = 0.25
# How long a refused client may go on sending before its connection is reset.
_REFUSED_S = 2.0
_DIGITS = re.compile(rb"[0-9]+")


class HttpServer:
    """Serves one application and one inference endpoint on one socket."""

    def __init__(self, app: AsgiApp, endpoint: InferEndpoint, settings: Settings) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self.is_draining = False
        self.state = ServerState()
        self._app = app
        self._socket: socket.socket | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._accepting: set[asyncio.Task[Any]] = set()

    def bind(self) -> int:
        """Bind the port and return it; raise `StartError(PORT_IN_USE)` if it is taken."""
        settings = self.settings
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((settings.host, settings.http_port))
            sock.listen(4096)
        except OSError as error:
            sock.close()
            raise StartError(
                Reason.PORT_IN_USE,
                f"cannot listen on {settings.host}:{settings.http_port}: {error.strerror}; set PHOENIX_HTTP_PORT",
            ) from error
        sock.setblocking(False)
        self._socket = sock
        return int(sock.getsockname()[1])

    def start(self) -> None:
        """Accept connections on the running loop."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        config = Config(self._app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
        config.load()
        self._config = config
        loop.add_reader(self._socket.fileno(), self._accept)
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)

    def begin_drain(self) -> None:
        """Ask every client to open its next connection elsewhere, by `Connection: close` on each answer."""
        self.is_draining = True

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, let requests in flight finish for at most `grace_s` seconds, close everything."""
        loop = asyncio.get_running_loop()
        self.is_draining = True
        if self._socket is not None:
            # Connections that the kernel has already completed are ours: serve them.
            self._accept()
            loop.remove_reader(self._socket.fileno())
            self._socket.close()
        if self._accepting:
            await asyncio.wait(self._accepting)
        deadline = loop.time() + grace_s
        while self.state.connections and loop.time() < deadline:
            for connection in self._connections():
                connection.close_if_idle(loop.time(), _LINGER_S)
            await asyncio.sleep(0.01)
        if self.state.connections:
            _log.error("connections closed with requests in flight", extra={"count": len(self.state.connections)})
        for connection in self._connections():
            connection.transport.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _connections(self) -> "list[PhoenixProtocol]":
        return list(self.state.connections)  # type: ignore[arg-type]

    def _accept(self) -> None:
        """Take every connection that waits."""
        loop = asyncio.get_running_loop()
        assert self._socket is not None
        while True:
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # out of file descriptors, or the peer is gone: serve what is open
                _log.warning("cannot accept a connection", extra={"cause": str(error)})
                return
            if len(self.state.connections) >= self.settings.max_connections:
                connection.close()
                continue
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(loop.connect_accepted_socket(self._new_protocol, connection))
            self._accepting.add(task)
            task.add_done_callback(self._accepted)

    def _accepted(self, task: "asyncio.Task[Any]") -> None:
        self._accepting.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.debug("connection lost while it was accepted", exc_info=task.exception())

    def _new_protocol(self) -> "PhoenixProtocol":
        return PhoenixProtocol(self, self._config, self.state)

    def _sweep(self) -> None:
        """Close connections that keep their request, or the silence between two, for too long."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in self._connections():
            connection.check_time(now)
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)


class _InferCycle:
    """One inference on a connection, in the place where uvicorn keeps its `RequestResponseCycle`."""

    __slots__ = ("body", "disconnected", "keep_alive", "message_event", "more_body", "response_complete", "target",
                 "task")  # fmt: skip

    def __init__(self, target: ServedModel | PhoenixError, *, keep_alive: bool) -> None:
        """`target` is the model that will answer, or why none will once the body is read."""
        self.target = target
        self.keep_alive = keep_alive
        self.body: list[bytes] = []
        self.task: asyncio.Task[None] | None = None
        self.response_complete = False
        # What uvicorn's protocol touches of a cycle:
        self.disconnected = False
        self.more_body = True
        self.message_event = _NoEvent


class _NoEvent:
    """Stands for the event that tells an ASGI application of more body; nobody waits for it here."""

    @staticmethod
    def set() -> None:
        """Do nothing."""


class PhoenixProtocol(HttpToolsProtocol):
    """One connection."""

    cycle: Any  # uvicorn's `RequestResponseCycle`, or an `_InferCycle`

    def __init__(self, server: HttpServer, config: Config, state: ServerState) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._server = server
        self._header_bytes = 0
        # When the request that is being read began, and whether its head is complete; 0: none is being read.
        self._reading_since = 0.0
        self._is_head_complete = True
        self._is_reading = False
        self._idle_since = self.loop.time()
        self._is_refused = False
        self._refused_since = 0.0
        self._unread_since = 0.0
        self._body_bytes = 0
        self._body_limit = _MAX_SMALL_BODY_BYTES
        self._header_map: Headers = {}

    # --- the parser's events -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse; answer what is not HTTP with a JSON error and close."""
        if self._is_refused:
            return
        if not self._is_head_complete or not self._is_reading:
            self._header_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is offered: the request is answered as it is
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, PhoenixError):
                raise
            self._refuse(cause)
        except httptools.HttpParserError as error:
            self._refuse(invalid(f"malformed HTTP request: {error}"))
        else:
            if self._is_reading:
                if not self._reading_since:
                    self._reading_since = self.loop.time()
                if not self._is_head_complete and self._header_bytes > _MAX_HEADER_BYTES:
                    self._refuse(_headers_too_large())
            else:
                self._reading_since = 0.0

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._is_reading, self._is_head_complete = True, False
        self._reading_since = 0.0

    def on_headers_complete(self) -> None:
        """Check the head; send an inference on its short way."""
        self._is_head_complete = True
        header_bytes, self._header_bytes = self._header_bytes, 0
        if header_bytes > _MAX_HEADER_BYTES and sum(len(n) + len(v) + 4 for n, v in self.headers) > _MAX_HEADER_BYTES:
            raise _headers_too_large()
        headers = self._header_map = dict(self.headers)
        self._check_head(headers)
        self._body_bytes, self._body_limit = 0, _MAX_SMALL_BODY_BYTES
        target = hotpath.match(self.url.partition(b"?")[0]) if self.parser.get_method() == b"POST" else None
        if target is None:
            length = headers.get(b"content-length")
            if length is not None and int(length) > self._body_limit:
                raise hotpath.too_large(int(length), self._body_limit)
            super().on_headers_complete()
            if self._server.is_draining:
                self.cycle.keep_alive = False
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if not is_idle:
            # Pipelined: uvicorn keeps the order, the middleware answers.
            self._body_limit = 1 << 62
            super().on_headers_complete()
            return
        self._unset_keepalive_if_required()
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        try:
            model = self._server.endpoint.admit(target, headers)
        except PhoenixError as error:
            size = int(headers.get(b"content-length", 0))
            if error.code is Code.TOO_LARGE or b"transfer-encoding" in headers or size > _MAX_SMALL_BODY_BYTES:
                self._server.endpoint.refuse(error)
                raise
            # A small body is read and dropped, so that the connection can go on.
            self.cycle = _InferCycle(error, keep_alive=keep_alive)
            return
        self._body_limit = model.max_request_bytes
        self.cycle = _InferCycle(model, keep_alive=keep_alive)
        if self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body, within the limit."""
        self._body_bytes += len(body)
        if self._body_bytes > self._body_limit:
            raise hotpath.too_large(self._body_bytes, self._body_limit)
        if type(self.cycle) is _InferCycle:
            self.cycle.body.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Answer an inference whose body is complete."""
        self._is_reading = False
        cycle = self.cycle
        if type(cycle) is not _InferCycle:
            super().on_message_complete()
            return
        if cycle.response_complete or cycle.task is not None:
            return
        if isinstance(cycle.target, PhoenixError):
            self._reply(cycle, self._server.endpoint.refuse(cycle.target))
            return
        body = cycle.body[0] if len(cycle.body) == 1 else b"".join(cycle.body)
        cycle.body = []
        cycle.task = self.loop.create_task(self._infer(cycle, cycle.target, self._header_map, body))

    def pause_writing(self) -> None:
        """Note since when the client has not read what waits for it."""
        self._unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Forget it: the client reads."""
        self._unread_since = 0.0
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up the place of an inference whose client has gone."""
        if type(self.cycle) is _InferCycle and self.cycle.task is not None:
            self.cycle.task.cancel()
        super().connection_lost(exc)

    # --- answers -----------------------------------------------------------------------------------------------------

    async def _infer(self, cycle: _InferCycle, model: ServedModel, headers: Headers, body: bytes) -> None:
        reply = await self._server.endpoint.infer(model, headers, body, self.client)
        if self.flow.write_paused:
            await self.flow.drain()
        self._reply(cycle, reply)

    def _reply(self, cycle: _InferCycle, reply: HttpReply) -> None:
        cycle.task = None
        cycle.response_complete = True
        if self.transport.is_closing():
            return
        if self._server.is_draining:
            cycle.keep_alive = False
        self._write(reply, is_last=not cycle.keep_alive)
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _write(self, reply: HttpReply, *, is_last: bool) -> None:
        """Send a reply; `is_last` tells the client that nothing more will be answered here."""
        parts = [STATUS_LINE[reply.status]]
        for name, value in reply.headers:
            parts += (name, b": ", value, b"\r\n")
        parts.append(b"content-length: %d\r\n%s\r\n" % (len(reply.body), b"connection: close\r\n" if is_last else b""))
        parts.append(reply.body)
        self.transport.write(b"".join(parts))

    def on_response_complete(self) -> None:
        """Go on with a pipelined request, or wait for the next; `check_time` does uvicorn's keep-alive timer's work."""
        self.server_state.total_requests += 1
        self._idle_since = self.loop.time()
        if self.transport.is_closing():
            return
        if self.pipeline:
            self.flow.resume_reading()
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        if self.flow.read_paused:
            self.flow.resume_reading()

    def _refuse(self, error: PhoenixError) -> None:
        """Answer a request that cannot be read any further: where the next one begins is unknown.

        The connection is closed later. At once, with bytes still unread, it would be reset and the answer lost (RFC
        9112, section 9.6); so what comes is dropped until the client closes, or `check_time` does.
        """
        self._is_refused = True
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and isinstance(self.cycle, RequestResponseCycle) and self.cycle.response_started:
            self.transport.close()
            return
        if type(self.cycle) is _InferCycle and self.cycle.task is not None:
            self.cycle.task.cancel()
        self._refused_since = self.loop.time()
        self._write(hotpath.error_reply(error), is_last=True)

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_head(self, headers: Headers) -> None:
        """Refuse heads that a proxy in front might read otherwise (RFC 9112, sections 3.2 and 6.3)."""
        if len(headers) != len(self.headers):
            names = [name for name, _ in self.headers]
            for name in (b"host", b"content-length", b"transfer-encoding"):
                if names.count(name) > 1:
                    raise invalid(f"malformed HTTP request: more than one {name.decode()} header")
        if b"host" not in headers and self.parser.get_http_version() == "1.1":
            raise invalid("malformed HTTP request: HTTP/1.1 needs a Host header")
        length = headers.get(b"content-length")
        if length is not None:
            if b"transfer-encoding" in headers:
                raise invalid("malformed HTTP request: both Content-Length and Transfer-Encoding")
            if not _DIGITS.fullmatch(length):
                raise invalid("malformed HTTP request: Content-Length is not a number")

    def check_time(self, now: float) -> None:
        """Refuse a request that arrives, drop an answer that is read, too slowly; close what is idle for too long."""
        settings = self._server.settings
        if self._unread_since and now - self._unread_since > settings.body_timeout_seconds:
            self.transport.abort()  # the client takes too long to read its answer
        elif self._is_refused:
            if now - self._refused_since > _REFUSED_S:
                self.transport.close()
        elif self._reading_since:
            limit = settings.body_timeout_seconds if self._is_head_complete else settings.header_timeout_seconds
            if now - self._reading_since > limit:
                part = "body" if self._is_head_complete else "head"
                self._refuse(
                    PhoenixError(
                        Code.TIMED_OUT_READING, f"the request's {part} did not arrive within {limit:g} seconds"
                    )
                )
        elif self.cycle is None:
            if now - self._idle_since > settings.header_timeout_seconds:
                self.transport.close()  # connected and said nothing
        elif self.cycle.response_complete and now - self._idle_since > settings.keep_alive_seconds:
            self.transport.close()

    def close_if_idle(self, now: float, linger_s: float) -> None:
        """Close the connection if it has been idle for that long."""
        if self._is_refused:
            self.transport.close()
        is_answered = self.cycle is None or self.cycle.response_complete
        if is_answered and not self._is_reading and now - self._idle_since >= linger_s:
            self.transport.close()


def _headers_too_large() -> PhoenixError:
    return PhoenixError(Code.HEADERS_TOO_LARGE, f"the request's head is over {_MAX_HEADER_BYTES} bytes")
