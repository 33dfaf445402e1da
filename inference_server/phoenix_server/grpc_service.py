"""The handlers of the Open Inference Protocol over gRPC, of health and of reflection; `grpc_server` serves them.

Hides the translation of `PhoenixError` to gRPC statuses, deadlines and cancellation, streams and the health watch.
Handlers get bytes and parse them themselves: a request that is no message is then INVALID_ARGUMENT under both engines.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from phoenix_server import codec_proto
from phoenix_server._proto import inference as proto
from phoenix_server.auth import ApiKeys
from phoenix_server.clients import host_of_grpc
from phoenix_server.codec_json import BIG_BODY_BYTES
from phoenix_server.dataplane import DataPlane
from phoenix_server.errors import Code, PhoenixError, invalid
from phoenix_server.logs import LogSettings
from phoenix_server.rate_limits import Limit

_log = logging.getLogger(__name__)

GRPC_STATUS = {
    Code.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Code.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Code.TIMED_OUT_READING: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.METHOD_NOT_ALLOWED: grpc.StatusCode.UNIMPLEMENTED,
    # What gRPC itself answers to a message over the transport's limit.
    Code.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.UNSUPPORTED_ENCODING: grpc.StatusCode.UNIMPLEMENTED,
    Code.HEADERS_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Code.LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Not RESOURCE_EXHAUSTED: clients retry UNAVAILABLE.
    Code.OVERLOADED: grpc.StatusCode.UNAVAILABLE,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.CANCELLED: grpc.StatusCode.CANCELLED,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
}
SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"
REFLECTION_SERVICE = "grpc.reflection.v1alpha.ServerReflection"
# A status message is a header; clients refuse more than 8 KiB of them.
_MAX_STATUS_BYTES = 4096
# Requests of one stream that are answered at the same time; beyond, the stream is not read.
_STREAM_WINDOW = 64
# An engine ends a call at its deadline by a clock of its own.
_CLOCK_SKEW_S = 0.01
# How soon a health watcher learns of a change.
_WATCH_INTERVAL_S = 0.1
_HEALTH = health_pb2.HealthCheckResponse

Context = grpc.aio.ServicerContext[bytes, bytes]
_Answer = Callable[[Any], Awaitable[Any]]


class Servicer:
    """The handlers. Times are in seconds."""

    def __init__(self, plane: DataPlane, keys: ApiKeys | None, log_settings: LogSettings) -> None:
        self._plane = plane
        self._keys = keys
        self._log_settings = log_settings
        self._stopping = asyncio.Event()
        # Repository operations go on when their caller hangs up; the set keeps them alive.
        self._operations: set[asyncio.Future[None]] = set()

    def begin_stop(self) -> None:
        """End the streams that could otherwise stay open for ever."""
        self._stopping.set()

    def handlers(self) -> dict[str, dict[str, Any]]:
        """Return the handlers of each service by method."""
        unary = {
            "ModelReady": (proto.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (proto.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (proto.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": (proto.ModelConfigRequest, self._model_config),
            "ModelStatistics": (proto.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": (proto.RepositoryIndexRequest, self._repository_index),
            "RepositoryModelLoad": (proto.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": (proto.RepositoryModelUnloadRequest, self._unload),
            "LogSettings": (proto.LogSettingsRequest, self._update_log_settings),
        }
        # Health needs no key: whoever probes has none.
        open_unary = {
            "ServerLive": (proto.ServerLiveRequest, self._server_live),
            "ServerReady": (proto.ServerReadyRequest, self._server_ready),
        }
        return {
            SERVICE: {
                "ModelInfer": grpc.unary_unary_rpc_method_handler(self.infer),
                "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.stream_infer),
                **{name: self._unary(*method) for name, method in unary.items()},
                **{name: self._unary(*method, is_open=True) for name, method in open_unary.items()},
            },
            HEALTH_SERVICE: {
                "Check": self._unary(health_pb2.HealthCheckRequest, self._check_health, is_open=True),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch_health),
            },
            REFLECTION_SERVICE: {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self.reflect)},
        }

    # --- inference ---------------------------------------------------------------------------------------------------

    async def infer(self, payload: bytes, context: Context) -> bytes:
        """Answer ModelInfer."""
        try:
            if self._keys is not None:
                self._check_key(context, is_inference=True)
            reply: bytes = (await self._infer(payload, context)).SerializeToString()
        except PhoenixError as error:
            await _abort(context, error)
        return reply

    async def stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Answer ModelStreamInfer: some requests at a time, answers in their order, a failure only for its request."""
        try:
            self._check_key(context, is_inference=True)
        except PhoenixError as error:
            await _abort(context, error)
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_STREAM_WINDOW)

        async def read() -> None:
            with contextlib.suppress(Exception):  # a stream that breaks is a stream that ends
                async for payload in self._until_stopping(requests):
                    await answers.put(asyncio.create_task(self._stream_answer(payload, context)))
            await answers.put(None)

        reader = asyncio.create_task(read())
        answer: asyncio.Task[bytes] | None = None
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
        finally:
            reader.cancel()
            if answer is not None:
                answer.cancel()
            while not answers.empty():
                if (answer := answers.get_nowait()) is not None:
                    answer.cancel()
        if self._stopping.is_set():
            await _abort(context, _shutting_down())

    async def _stream_answer(self, payload: bytes, context: Context) -> bytes:
        try:
            reply = proto.ModelStreamInferResponse(infer_response=await self._infer(payload, context))
        except PhoenixError as error:
            reply = proto.ModelStreamInferResponse(error_message=error.message)
            with contextlib.suppress(PhoenixError):
                reply.infer_response.id = codec_proto.parse(proto.ModelInferRequest, payload).id
        data: bytes = reply.SerializeToString()
        return data

    async def _infer(self, payload: bytes, context: Context) -> Any:
        """Return the `ModelInferResponse` to one request; raises only `PhoenixError`, but for cancellation."""
        started = time.perf_counter()
        # Big messages are parsed and copied off the event loop, as `hotpath` does with big bodies.
        is_big = len(payload) >= BIG_BODY_BYTES
        try:
            message = await _off_loop(is_big, codec_proto.parse, proto.ModelInferRequest, payload)
            model = self._plane.admit(message.model_name, message.model_version)
            if len(payload) > model.max_request_bytes:
                raise PhoenixError(
                    Code.TOO_LARGE,
                    f"the request message has {len(payload)} bytes, at most {model.max_request_bytes} are accepted",
                )
            if model.limit is not None:
                await _limit(model.limit, context)
        except PhoenixError as error:
            self._plane.metrics.reject("grpc", error.code.value)
            raise
        model.metrics.inflight += 1
        failure: PhoenixError | None = None
        request_id: str = message.id
        rows = reply_bytes = 0
        try:
            request, is_raw = await _off_loop(is_big, codec_proto.decode, message)
            if not request_id:
                request_id = request.id = _metadata(context).get("x-request-id", "")
            if self._keys is not None and model.is_bound:
                request.caller = self._keys.caller(_metadata(context).get("authorization", "").encode())
            _bound_by_deadline(request, context)
            response = await self._plane.infer(model, request)
            request_id, rows = response.id, response.rows
            reply = codec_proto.encode(response, is_raw=is_raw)
            reply_bytes = reply.ByteSize()
            return reply
        except PhoenixError as error:
            failure = error
            raise
        except asyncio.CancelledError:
            is_late = _seconds_left(context) <= _CLOCK_SKEW_S
            failure = _deadline() if is_late else PhoenixError(Code.CANCELLED, "the client went away")
            raise
        except Exception as error:
            failure = self._unexpected(error, request_id, model.name)
            raise failure from error
        finally:
            model.metrics.inflight -= 1
            self._plane.finished(
                model,
                "grpc",
                failure,
                time.perf_counter() - started,
                (rows, len(payload), reply_bytes),
                request_id=request_id,
                traceparent=_metadata(context).get("traceparent", "") if self._plane.is_traced else "",
            )

    # --- everything else of the protocol -----------------------------------------------------------------------------

    def _unary(self, request_type: Any, answer: _Answer, *, is_open: bool = False) -> Any:
        """Return the handler that parses, checks the key unless `is_open`, and turns failures into statuses."""

        async def handle(payload: bytes, context: Context) -> bytes:
            try:
                if not is_open:
                    self._check_key(context)
                data: bytes = (await answer(codec_proto.parse(request_type, payload))).SerializeToString()
                return data
            except PhoenixError as error:
                failure = error
            except Exception as error:
                failure = self._unexpected(error, "", "")
            await _abort(context, failure)

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _server_live(self, _: Any) -> Any:
        return proto.ServerLiveResponse(live=True)

    async def _server_ready(self, _: Any) -> Any:
        return proto.ServerReadyResponse(ready=self._plane.is_ready())

    async def _model_ready(self, request: Any) -> Any:
        return proto.ModelReadyResponse(ready=self._plane.is_model_ready(request.name, request.version))

    async def _server_metadata(self, _: Any) -> Any:
        return proto.ServerMetadataResponse(**self._plane.server_metadata())

    async def _model_metadata(self, request: Any) -> Any:
        return proto.ModelMetadataResponse(**self._plane.model_metadata(request.name, request.version))

    async def _model_config(self, request: Any) -> Any:
        return proto.ModelConfigResponse(config=self._plane.model_config(request.name, request.version))

    async def _model_statistics(self, request: Any) -> Any:
        return proto.ModelStatisticsResponse(**self._plane.statistics(request.name, request.version))

    async def _repository_index(self, request: Any) -> Any:
        return proto.RepositoryIndexResponse(models=self._plane.index(ready_only=request.ready))

    async def _load(self, request: Any) -> Any:
        await self._to_the_end(self._plane.load(request.model_name, dict(request.parameters.items())))
        return proto.RepositoryModelLoadResponse()

    async def _unload(self, request: Any) -> Any:
        await self._to_the_end(self._plane.repository.unload(request.model_name))
        return proto.RepositoryModelUnloadResponse()

    async def _to_the_end(self, operation: Awaitable[None]) -> None:
        """Await an operation that must not stop half-way when the caller hangs up."""
        running = asyncio.ensure_future(operation)
        self._operations.add(running)
        running.add_done_callback(self._operations.discard)
        await asyncio.shield(running)

    async def _update_log_settings(self, request: Any) -> Any:
        wanted = {}
        for name, value in request.settings.items():
            choice = value.WhichOneof("parameter_choice")
            wanted[name] = None if choice is None else getattr(value, choice)
        if faults := self._log_settings.faults(wanted):
            raise invalid("; ".join(faults))
        reply = proto.LogSettingsResponse()
        for name, value in self._log_settings.update(wanted).items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(reply.settings[name], kind, value)
        return reply

    # --- health and reflection ---------------------------------------------------------------------------------------

    def _health(self, service: str) -> Any:
        if service not in ("", SERVICE):
            return _HEALTH.SERVICE_UNKNOWN
        return _HEALTH.SERVING if self._plane.is_ready() and not self._stopping.is_set() else _HEALTH.NOT_SERVING

    async def _check_health(self, request: Any) -> Any:
        status = self._health(request.service)
        if status == _HEALTH.SERVICE_UNKNOWN:
            raise PhoenixError(Code.NOT_FOUND, f"service '{request.service}' is not known; ask for '' or '{SERVICE}'")
        return _HEALTH(status=status)

    async def watch_health(self, payload: bytes, context: Context) -> AsyncIterator[bytes]:
        """Answer Health.Watch: the status now, and again whenever it has changed, until the server stops."""
        try:
            service = codec_proto.parse(health_pb2.HealthCheckRequest, payload).service
        except PhoenixError as error:
            await _abort(context, error)
        last = None
        while True:
            is_last = self._stopping.is_set()
            status = self._health(service)
            if status != last:
                last = status
                yield _HEALTH(status=status).SerializeToString()
            if is_last:
                break
            # The repository announces nothing, so it is asked, and only while somebody watches.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _WATCH_INTERVAL_S)
        await _abort(context, _shutting_down())

    async def reflect(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Answer server reflection, for clients that know no .proto (grpcurl)."""
        # Asked for seldom, so imported only then.
        from grpc_reflection.v1alpha import reflection_pb2

        async def parsed() -> AsyncIterator[Any]:
            async for payload in self._until_stopping(requests):
                yield codec_proto.parse(reflection_pb2.ServerReflectionRequest, payload)

        try:
            self._check_key(context)
            async for reply in _reflection().ServerReflectionInfo(parsed(), context):
                yield reply.SerializeToString()
        except PhoenixError as error:
            await _abort(context, error)

    # --- common ------------------------------------------------------------------------------------------------------

    def _check_key(self, context: Context, *, is_inference: bool = False) -> None:
        if self._keys is None:
            return
        authorization = _metadata(context).get("authorization")
        try:
            self._keys.check(None if authorization is None else authorization.encode())
        except PhoenixError as error:
            if is_inference:
                self._plane.metrics.reject("grpc", error.code.value)
            raise

    def _unexpected(self, error: Exception, request_id: str, model: str) -> PhoenixError:
        """Log what nobody foresaw, and return the error that tells the caller only where to find it."""
        reference = request_id or self._plane.new_id()
        _log.error("unexpected failure of a request", extra={"request_id": reference, "model": model}, exc_info=error)
        return PhoenixError(Code.INTERNAL, f"internal error; the log has it under request id {reference}")

    async def _until_stopping(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the messages of a stream until the client or this server ends it."""
        iterator = aiter(requests)
        stopping = asyncio.create_task(self._stopping.wait())
        following: asyncio.Future[bytes | None] | None = None
        try:
            while not stopping.done():
                following = asyncio.ensure_future(anext(iterator, None))
                await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not following.done() or (payload := following.result()) is None:
                    return
                yield payload
        finally:
            stopping.cancel()
            if following is not None:
                following.cancel()


@functools.cache
def _reflection() -> Any:
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha import reflection_pb2
    from grpc_reflection.v1alpha._async import ReflectionServicer

    pool = DescriptorPool()
    for file in (*proto.FILES, health_pb2.DESCRIPTOR.serialized_pb, reflection_pb2.DESCRIPTOR.serialized_pb):
        pool.AddSerializedFile(file)
    return ReflectionServicer((SERVICE, HEALTH_SERVICE, REFLECTION_SERVICE), pool)


async def _off_loop(is_big: bool, work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.to_thread(work, *arguments) if is_big else work(*arguments)


async def _abort(context: Context, error: PhoenixError) -> NoReturn:
    """End a call with the status of `error`; `retry-after` in seconds goes into the trailing metadata."""
    trailing = () if error.retry_after_s is None else (("retry-after", str(error.retry_after_s)),)
    await context.abort(GRPC_STATUS[error.code], _fitting(error.message), trailing)
    raise AssertionError("abort returned")


def _fitting(message: str) -> str:
    """Cut a message so that it fits a status header, where characters beyond printable ASCII take three bytes each."""
    if len(message) <= _MAX_STATUS_BYTES // 12:
        return message
    while len(quote(message, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")) > _MAX_STATUS_BYTES:
        message = message[: len(message) * 9 // 10] + "…"
    return message


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


async def _limit(limit: Limit, context: Context) -> None:
    """Return once the model's rate limit lets the request through; raise LIMITED if it does not."""
    sent = _metadata(context)
    pending = limit.take(host_of_grpc(context.peer()), sent.get("authorization", ""), sent.get("x-forwarded-for", ""))
    if pending is not None:
        await pending


def _seconds_left(context: Context) -> float:
    left = context.time_remaining()
    return float("inf") if left is None else left


def _bound_by_deadline(request: Any, context: Context) -> None:
    """Let the request's own timeout be no longer than the client's deadline."""
    left_s = _seconds_left(context)
    if left_s <= 0:
        raise _deadline()
    if left_s < 1e6 and not 0 < request.timeout_us <= left_s * 1e6:
        request.timeout_us = max(1, int(left_s * 1e6))


def _deadline() -> PhoenixError:
    return PhoenixError(Code.DEADLINE, "the deadline of the call passed")


def _shutting_down() -> PhoenixError:
    return PhoenixError(Code.UNAVAILABLE, "the server is shutting down", retry_after_s=1)
