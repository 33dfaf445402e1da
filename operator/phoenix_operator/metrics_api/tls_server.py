"""The TLS socket: one port whose certificate and trusted client authorities change while it is open.

Hides that an `SSLContext` cannot be taken back: each change gets a new one, on a second descriptor of the same
listening socket, so that no connection that waits is lost. When the authorities change, connections made before end
with the request that they serve, because they were verified by what no longer counts. A connection that asks nothing
worth an answer is not kept for long: whoever reaches the port can open any number of them.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import tempfile
import weakref
from collections.abc import Iterator

from aiohttp import web

from phoenix_operator.metrics_api.certificates import CertificateError, Pair

_BACKLOG = 128
_STRANGERS, _STRANGER_S = 256, 30.0


class TlsServer:
    """A port of a runner that has been set up. Nothing is accepted before the first `use`."""

    def __init__(self, runner: web.AppRunner, port: int) -> None:
        """Bind the port. Raises `OSError` if it is taken."""
        self._runner, self._socket = runner, _listening(port)
        self._site: web.SockSite | None = None
        self._authorities_pem = ""
        self._current: weakref.WeakSet[ssl.SSLContext] = weakref.WeakSet()  # those with these authorities
        self._busy: set[asyncio.Transport] = set()
        self._known: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()  # those that were answered
        self._strangers: weakref.WeakKeyDictionary[asyncio.BaseTransport, float] = weakref.WeakKeyDictionary()

    @property
    def port(self) -> int:
        """The port that is bound."""
        port: int = self._socket.getsockname()[1]
        return port

    async def use(self, pair: Pair, authorities_pem: str) -> None:
        """Serve with this certificate, to clients of these authorities. Raises `CertificateError`."""
        context = _context(pair, authorities_pem)
        if authorities_pem != self._authorities_pem:
            self._authorities_pem = authorities_pem
            self._current.clear()
        self._current.add(context)
        before = self._site
        self._site = web.SockSite(self._runner, self._socket.dup(), ssl_context=context, backlog=_BACKLOG)
        await self._site.start()
        if before is not None:
            await before.stop()
        self._end_others()

    def is_current(self, connection: ssl.SSLObject) -> bool:
        """Return whether a connection was verified by what counts now; one may have been under way at a change."""
        return connection.context in self._current

    @contextlib.contextmanager
    def answering(self, transport: asyncio.Transport) -> Iterator[None]:
        """Let the connection of a request live until it is answered."""
        self._busy.add(transport)
        self._known.add(transport)
        try:
            yield
        finally:
            self._busy.discard(transport)

    def end_strangers(self, now: float) -> None:
        """Close connections that have asked for nothing that they may know, after 30 s or when there are too many."""
        server = self._runner.server
        found = [
            (self._strangers.setdefault(transport, now), connection)
            for connection in (server.connections if server else ())
            if (transport := connection.transport) is not None and transport not in self._known
        ]
        for rank, (seen_at, connection) in enumerate(reversed(found)):  # the server lists the oldest first
            if rank >= _STRANGERS or now - seen_at > _STRANGER_S:
                connection.force_close()

    def _end_others(self) -> None:
        server = self._runner.server
        for connection in server.connections if server else ():
            transport = connection.transport
            if transport is None or self.is_current(transport.get_extra_info("ssl_object")):
                continue
            if transport in self._busy:
                connection.close()  # once its request is answered
            else:
                connection.force_close()

    def close(self) -> None:
        """Close the socket; the runner's clean-up closes what it serves."""
        self._socket.close()


def _listening(port: int) -> socket.socket:
    """Return a socket for IPv4 and, where there is any, IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=_BACKLOG)


def _context(pair: Pair, authorities_pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # optional, so that who has none is answered with 401; one of somebody else is refused in the handshake
    context.verify_mode = ssl.CERT_OPTIONAL
    # as the API server does it: every certificate of the file is trusted, one that is not self-signed too
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=authorities_pem)
    except (ssl.SSLError, ValueError):
        raise CertificateError("requestheader-client-ca-file: expected certificates in PEM") from None
    try:
        with _file(pair.certificate) as certificate, _file(pair.key) as key:
            context.load_cert_chain(certificate, key)
    except ssl.SSLError:
        raise CertificateError("expected a certificate with its key in PEM") from None
    return context


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[str]:
    """Yield a file of this process alone; OpenSSL reads files only."""
    descriptor, name = tempfile.mkstemp()
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        yield name
    finally:
        os.unlink(name)
