"""OpenTelemetry traces, where `OTEL_EXPORTER_OTLP_ENDPOINT` asks for them and the extra `otel` is installed.

One span an inference, made when it is over, with the caller's `traceparent` as its parent. Nothing of OpenTelemetry is
imported, and nothing costs time, when the variable is not set.
"""

import os
import time
from typing import Any, Protocol

from phoenix_server.errors import Reason, StartError


class Tracer(Protocol):
    """Reports finished inferences as spans."""

    def report(self, traceparent: str, seconds: float, attributes: dict[str, Any], error: str | None) -> None:
        """Report a span that ends now and took `seconds`."""

    def close(self) -> None:
        """Send what is left."""


def tracer_from_environment() -> Tracer | None:
    """Return a tracer if the environment names a collector; raise `StartError` if the extra is missing."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") and not os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return None
    try:
        return _OtlpTracer()
    except ImportError as error:
        raise StartError(
            Reason.INVALID_SETTING,
            f"OTEL_EXPORTER_OTLP_ENDPOINT: tracing needs the extra 'otel' (pip install 'phoenix-ml[otel]'): {error}",
        ) from error


class _OtlpTracer:
    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "phoenix-server")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("phoenix_server")
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._error = StatusCode.ERROR

    def report(self, traceparent: str, seconds: float, attributes: dict[str, Any], error: str | None) -> None:
        end_ns = time.time_ns()
        context = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        span = self._tracer.start_span(
            "infer", context=context, kind=self._kind, attributes=attributes, start_time=end_ns - int(seconds * 1e9)
        )
        if error is not None:
            span.set_status(self._error, error)
        span.end(end_ns)

    def close(self) -> None:
        self._provider.shutdown()
