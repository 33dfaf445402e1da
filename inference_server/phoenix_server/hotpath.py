"""Answers what is asked all the time: inferences, probes and scrapes; bytes in, bytes out.

`InferEndpoint.infer` is the whole path of a REST inference and knows no server: `http_server` calls it directly,
`HotPath` puts it in front of the FastAPI application for any other ASGI server, and `rest` declares it for the OpenAPI
document. Probes and scrapes are answered here too, so that FastAPI need not be loaded where nobody asks for more.
"""

import asyncio
import functools
import logging
import re
import time
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import orjson

from phoenix_server import codec_big_json, codec_binary, codec_json
from phoenix_server.auth import ApiKeys
from phoenix_server.codec_json import OutputForms
from phoenix_server.dataplane import DataPlane
from phoenix_server.errors import Code, PhoenixError, invalid
from phoenix_server.rate_limits import Limit
from phoenix_server.served_model import ServedModel
from phoenix_server.tensors import InferRequest

_log = logging.getLogger(__name__)

HTTP_STATUS = {
    Code.INVALID: 400,
    Code.UNAUTHENTICATED: 401,
    Code.FORBIDDEN: 403,
    Code.NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.TIMED_OUT_READING: 408,
    Code.TOO_LARGE: 413,
    Code.UNSUPPORTED_ENCODING: 415,
    Code.LIMITED: 429,
    Code.HEADERS_TOO_LARGE: 431,
    Code.CANCELLED: 499,
    Code.INTERNAL: 500,
    Code.UNSUPPORTED: 501,
    Code.OVERLOADED: 503,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE: 504,
}
_INFER_PATH = re.compile(rb"/v2/models/([^/?]+)(?:/versions/([^/?]+))?/infer")
# Below this, compressing costs more than it saves on any wire.
_COMPRESS_FROM_BYTES = 1024
# Longer paths are nobody's model, and must not fill the cache's memory.
_CACHED_PATH_BYTES = 256
_ENCODINGS = {b"gzip": 31, b"deflate": 15}  # zlib's window bits: with gzip header, with zlib header
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")

Headers = dict[bytes, bytes]


@dataclass(slots=True)
class HttpReply:
    """What goes back: status, headers without content-length, body."""

    status: int
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""


def match(path: bytes) -> tuple[str, str] | None:
    """Return model name and version ("" if none) of an infer path, or None for any other path."""
    return _match_cached(path) if len(path) <= _CACHED_PATH_BYTES else _match(path)


def _match(path: bytes) -> tuple[str, str] | None:
    found = _INFER_PATH.fullmatch(path)
    if found is None:
        return None
    name, version = found.groups(b"")
    return _unquote(name), _unquote(version)


_match_cached = functools.lru_cache(maxsize=1024)(_match)


def error_reply(error: PhoenixError) -> HttpReply:
    """Return the reply for a failed request: `{"error": …}` with the status of its code."""
    headers = [_JSON]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if error.code is Code.UNSUPPORTED_ENCODING:
        headers.append((b"accept-encoding", b"gzip, deflate"))
    if error.code is Code.UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    return HttpReply(HTTP_STATUS[error.code], headers, orjson.dumps({"error": error.message}))


class InferEndpoint:
    """The inference endpoint of one data plane.

    `decoders` runs the decoding of big bodies: no more threads than CPUs, since each keeps a parser's memory.
    """

    def __init__(self, plane: DataPlane, keys: ApiKeys | None = None, *, decoders: Executor | None = None) -> None:
        self._plane = plane
        self._keys = keys
        self._decoders = decoders

    def admit(self, target: tuple[str, str], headers: Headers) -> ServedModel:
        """Return the model for a request whose head has arrived; raise `PhoenixError` before its body is read."""
        if self._keys is not None:
            self._keys.check(headers.get(b"authorization"))
        model = self._plane.admit(*target)
        length = headers.get(b"content-length")
        if length is not None and int(length) > model.max_request_bytes:
            raise too_large(int(length), model.max_request_bytes)
        return model

    def refuse(self, error: PhoenixError) -> HttpReply:
        """Count and word a request that never reached a model."""
        self._plane.metrics.reject("rest", error.code.value)
        return error_reply(error)

    async def infer(
        self, model: ServedModel, headers: Headers, body: bytes, peer: tuple[str, int] | None = None
    ) -> HttpReply:
        """Answer one request whose body is complete. Never raises, but for cancellation. `peer` is who is connected."""
        if model.limit is not None:
            try:
                await _limit(model.limit, headers, peer)
            except PhoenixError as error:
                return self.refuse(error)
        started = time.perf_counter()
        metrics = model.metrics
        metrics.inflight += 1
        failure: PhoenixError | None = None
        rows = 0
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        try:
            if b"content-encoding" in headers:
                body = await decompress(body, headers[b"content-encoding"], model.max_request_bytes)
            request, forms = await self._decode(model, headers, body)
            request_id = request.id = request.id or request_id or self._plane.new_id()
            if self._keys is not None and model.is_bound:
                request.caller = self._keys.caller(headers.get(b"authorization"))
            response = await self._plane.infer(model, request)
            rows = response.rows
            payload, header_size = codec_binary.encode(response, forms)
            reply = HttpReply(200, [_JSON], payload)
            if header_size is not None:
                reply.headers = [_BINARY, (b"inference-header-content-length", b"%d" % header_size)]
            if b"accept-encoding" in headers and len(payload) >= _COMPRESS_FROM_BYTES:
                await compress(reply, headers[b"accept-encoding"])
        except PhoenixError as error:
            failure = error
            request_id = error.request_id or request_id
            reply = error_reply(error)
        except asyncio.CancelledError:
            failure = PhoenixError(Code.CANCELLED, "the client went away")
            reply = error_reply(failure)
            raise
        except Exception as error:
            reference = request_id or self._plane.new_id()
            _log.exception("unexpected failure of a request", extra={"request_id": reference, "model": model.name})
            failure = PhoenixError(Code.INTERNAL, f"internal error; the log has it under request id {reference}")
            failure.__cause__ = error
            reply = error_reply(failure)
        finally:
            metrics.inflight -= 1
            self._plane.finished(
                model,
                "rest",
                failure,
                time.perf_counter() - started,
                (rows, len(body), len(reply.body)),
                request_id=request_id,
                traceparent=headers[b"traceparent"].decode("latin-1") if b"traceparent" in headers else "",
            )
        return reply

    async def _decode(self, model: ServedModel, headers: Headers, body: bytes) -> tuple[InferRequest, OutputForms]:
        length = headers.get(b"inference-header-content-length")
        if length is None:
            if len(body) >= codec_json.BIG_BODY_BYTES:
                return await asyncio.get_running_loop().run_in_executor(self._decoders, codec_big_json.decode, body)
            return codec_json.decode(codec_json.parse(body), may_hold_bool=codec_json.may_hold_bool(body))
        size, view = codec_binary.header_size(length, len(body)), memoryview(body)
        if size == 0:
            return codec_binary.decode_raw(view, model.signature, model.name)
        if size >= codec_json.BIG_BODY_BYTES:
            document = await asyncio.to_thread(codec_json.parse, view[:size])
        else:
            document = codec_json.parse(view[:size])
        return codec_binary.decode(document, view[size:], model.name)


async def _limit(limit: Limit, headers: Headers, peer: tuple[str, int] | None) -> None:
    """Return once the model's rate limit lets the request through; raise LIMITED if it does not."""
    pending = limit.take(
        peer[0] if peer else "",
        headers.get(b"authorization", b"").decode("latin-1"),
        headers.get(b"x-forwarded-for", b"").decode("latin-1"),
    )
    if pending is not None:
        await pending


def routine_reply(plane: DataPlane, path: str, accept: str = "") -> HttpReply | None:
    """Return the reply to `GET` of a server probe or of the metrics page, which need no key; None for other paths."""
    if path == "/v2/health/live":
        return HttpReply(200, [_JSON], b'{"live":true}')
    if path == "/v2/health/ready":
        is_ready = plane.is_ready()
        return HttpReply(200 if is_ready else 503, [_JSON], orjson.dumps({"ready": is_ready, "live": True}))
    if path == "/metrics":
        body, content_type = plane.metrics.exposition(accept)
        return HttpReply(200, [(b"content-type", content_type.encode())], body)
    return None


def too_large(size: int, limit: int) -> PhoenixError:
    """Return the refusal of a body that is over the model's limit."""
    return PhoenixError(Code.TOO_LARGE, f"the request body has {size} bytes, at most {limit} are accepted")


async def decompress(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Return the body behind a `Content-Encoding`, of at most `limit` bytes."""
    encoding = encoding.strip().lower()
    if encoding == b"identity":
        return body
    if encoding not in _ENCODINGS:
        raise PhoenixError(
            Code.UNSUPPORTED_ENCODING,
            f"content encoding '{encoding.decode('latin-1')}' is not supported; use gzip or deflate",
        )

    def inflate() -> bytes:
        parts: list[bytes] = []
        left, rest = limit, body
        while True:
            stream = zlib.decompressobj(_ENCODINGS[encoding])
            try:
                parts.append(stream.decompress(rest, left + 1))
            except zlib.error as error:
                raise invalid(f"the body is not valid {encoding.decode()}: {error}") from None
            left -= len(parts[-1])
            if left < 0:
                raise PhoenixError(Code.TOO_LARGE, f"the decompressed body has more than {limit} bytes")
            if not stream.eof:
                raise invalid(f"the body is not valid {encoding.decode()}: it ends too early")
            rest = stream.unused_data
            if not rest:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            if encoding != b"gzip":  # which may have several members: RFC 1952, section 2.2
                raise invalid(f"the body is not valid {encoding.decode()}: {len(rest)} bytes follow its end")

    return inflate() if len(body) < codec_json.BIG_BODY_BYTES // 10 else await asyncio.to_thread(inflate)


async def compress(reply: HttpReply, accepted: bytes) -> None:
    """Compress a reply in place with the first encoding of `Accept-Encoding` that is known and not refused."""
    for item in accepted.lower().split(b","):
        encoding, _, weight = (part.strip() for part in item.partition(b";"))
        if encoding in _ENCODINGS and weight.replace(b" ", b"") not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000"):
            break
    else:
        return

    def deflate() -> bytes:
        stream = zlib.compressobj(1, zlib.DEFLATED, _ENCODINGS[encoding])
        return stream.compress(reply.body) + stream.flush()

    is_big = len(reply.body) > codec_json.BIG_BODY_BYTES // 10
    reply.body = await asyncio.to_thread(deflate) if is_big else deflate()
    reply.headers += [(b"content-encoding", encoding), (b"vary", b"accept-encoding")]


def _unquote(text: bytes) -> str:
    if b"%" not in text:
        return text.decode("latin-1")
    from urllib.parse import unquote_to_bytes

    return unquote_to_bytes(text).decode("utf-8", "replace")


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class HotPath:
    """The endpoint, probes and scrapes as an ASGI application in front of another one, which gets every other request.

    The other one is made by `make_others` when it is first needed: FastAPI takes a quarter of a second and 10 MB.
    """

    def __init__(self, plane: DataPlane, endpoint: InferEndpoint, make_others: Callable[[], AsgiApp]) -> None:
        self._plane = plane
        self._endpoint = endpoint
        self._make_others = functools.lru_cache(make_others)
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is hot, or hand on."""
        headers: Headers = dict(scope["headers"])
        target = match(scope["raw_path"]) if scope["method"] == "POST" else None
        if target is not None:
            reply = await self._infer(target, headers, receive, scope.get("client"))
        elif scope["method"] in ("GET", "HEAD"):
            reply = routine_reply(self._plane, scope["path"], headers.get(b"accept", b"").decode("latin-1"))
        else:
            reply = None
        if reply is not None:
            await send_reply(reply, send)
        elif target is None:
            async with self._lock:  # one thread imports, the event loop goes on
                others = await asyncio.to_thread(self._make_others)
            if scope["method"] == "HEAD":  # RFC 9110, section 9.1; the server leaves out the body
                scope = {**scope, "method": "GET"}
            await others(scope, receive, send)

    async def _infer(
        self, target: tuple[str, str], headers: Headers, receive: Receive, peer: tuple[str, int] | None
    ) -> HttpReply | None:
        """Return the reply, or None when the client has gone."""
        try:
            model = self._endpoint.admit(target, headers)
            body = await _read(receive, model.max_request_bytes)
        except PhoenixError as error:
            return self._endpoint.refuse(error)
        return None if body is None else await self._endpoint.infer(model, headers, body, peer)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """Return the whole body, or None when the client has gone; raise TOO_LARGE as soon as it passes `limit`."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large(size, limit)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def send_reply(reply: HttpReply, send: Send) -> None:
    """Send a reply over ASGI."""
    headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body))]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
