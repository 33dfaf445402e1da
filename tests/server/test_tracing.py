"""Spans and access lines of inferences: a real collector's protocol, a real server process, REST and gRPC."""

import gzip
import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import phoenix_process
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from phoenix_process import Running, wait_until

from phoenix_server._proto import inference as proto
from phoenix_server.grpc_service import SERVICE

IRIS = Path(__file__).parents[2] / "examples" / "iris"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
ROWS = [5.1, 3.5, 1.4, 0.2, 6.7, 3.0, 5.2, 2.3]
# Longer than any test: spans leave at the end of the process or not at all.
ONLY_AT_THE_END = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}


@dataclass
class Collector:
    """What a collector got over OTLP/HTTP. `answers` scripts the status of the next exports."""

    url: str
    exports: list[ExportTraceServiceRequest] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def spans(self) -> list[Span]:
        return [
            span
            for export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector on a free port; see https://opentelemetry.io/docs/specs/otlp/#otlphttp."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            collector.paths.append(self.path)
            status = collector.answers.pop(0) if collector.answers else 200
            if status == 200:
                collector.exports.append(ExportTraceServiceRequest.FromString(body))
            reply = ExportTraceServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield collector
        server.shutdown()
        thread.join()


@contextmanager
def traced(collector: Collector, **env: str) -> Iterator[Running]:
    with phoenix_process.start(
        [IRIS], {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **ONLY_AT_THE_END, **env}
    ) as server:
        yield server


def infer_rest(server: Running, headers: dict[str, str], data: list[float], request_id: str = "rest-1") -> int:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": data}
    connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v2/models/iris/infer", json.dumps({"id": request_id, "inputs": [tensor]}), headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def infer_grpc(
    server: Running, metadata: list[tuple[str, str]], data: list[float], request_id: str = "grpc-1"
) -> grpc.StatusCode:
    message = proto.ModelInferRequest(model_name="iris", id=request_id)
    message.inputs.add(name="x", datatype="FP32", shape=[2, 4]).contents.fp32_contents.extend(data)
    with grpc.insecure_channel(server.grpc_target) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        try:
            call(message.SerializeToString(), metadata=metadata, timeout=30)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
            return code
    return grpc.StatusCode.OK


def attributes(span: Span) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


# --- spans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_inference_with_traceparent_is_one_span_of_that_trace(collector: Collector, protocol: str) -> None:
    with traced(collector) as server:
        if protocol == "rest":
            assert infer_rest(server, {"traceparent": TRACEPARENT}, ROWS) == 200
        else:
            assert infer_grpc(server, [("traceparent", TRACEPARENT)], ROWS) is grpc.StatusCode.OK
        assert collector.spans() == []
    # SIGTERM has flushed what the batch held.
    assert collector.paths == ["/v1/traces"]
    (span,) = collector.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert (span.name, span.kind, span.status.code) == ("infer", Span.SPAN_KIND_SERVER, Status.STATUS_CODE_UNSET)
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 30 * 10**9
    expected = {"model": "iris", "version": "1", "request_id": f"{protocol}-1", "outcome": "ok", "protocol": protocol,
                "rows": 2}  # fmt: skip
    assert attributes(span) == expected
    resource = {
        item.key: item.value.string_value for item in collector.exports[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "phoenix-server"


def test_inference_without_trace_context_begins_a_trace_of_its_own(collector: Collector) -> None:
    with traced(collector, OTEL_SERVICE_NAME="fraud") as server:
        assert infer_rest(server, {}, ROWS) == 200
        assert infer_rest(server, {"traceparent": "00-broken"}, ROWS) == 200
    first, second = collector.spans()
    assert first.parent_span_id == second.parent_span_id == b""
    assert first.trace_id != second.trace_id
    resource = {
        item.key: item.value.string_value for item in collector.exports[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "fraud"


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_failed_inference_is_a_span_with_an_error(collector: Collector, protocol: str) -> None:
    with traced(collector) as server:
        if protocol == "rest":
            assert infer_rest(server, {"traceparent": TRACEPARENT}, ROWS[:3]) == 400
        else:
            assert infer_grpc(server, [("traceparent", TRACEPARENT)], ROWS[:3]) is grpc.StatusCode.INVALID_ARGUMENT
    (span,) = collector.spans()
    assert span.trace_id.hex() == TRACE_ID
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert "needs 8 elements" in span.status.message
    assert attributes(span)["outcome"] == "client_error"
    assert attributes(span)["request_id"] == f"{protocol}-1"


def test_spans_leave_before_the_end_when_their_time_has_come(collector: Collector) -> None:
    with traced(collector, OTEL_BSP_SCHEDULE_DELAY="50") as server:
        assert infer_rest(server, {"traceparent": TRACEPARENT}, ROWS) == 200
        wait_until(lambda: len(collector.spans()) == 1, "the span")
    assert len(collector.spans()) == 1


def test_collector_that_is_down_harms_no_inference(collector: Collector) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with traced(collector, **env) as server:
        assert infer_rest(server, {"traceparent": TRACEPARENT}, ROWS) == 200
    assert collector.spans() == []


WITHOUT = """
import asyncio, sys
from pathlib import Path
from phoenix_api import read_manifests
from phoenix_server.app import running
from phoenix_server.settings import load_settings

async def main():
    paths = [Path(sys.argv[1])]
    settings = load_settings(host="127.0.0.1", http_port=0, grpc_port=0, state_dir=Path(sys.argv[2]))
    async with running(settings, read_manifests(paths, strict=True), paths):
        print(*[name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])

asyncio.run(main())
"""


def test_nothing_of_opentelemetry_is_loaded_without_a_collector(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(IRIS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# --- access log -------------------------------------------------------------------------------------------------------


def access_lines(server: Running) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, server.stderr) if line["logger"] == "phoenix_server.access"]


def test_access_log_has_one_line_for_each_inference() -> None:
    with phoenix_process.start([IRIS], {"PHOENIX_ACCESS_LOG": "1"}) as server:
        assert infer_rest(server, {"traceparent": TRACEPARENT}, ROWS) == 200
        assert infer_rest(server, {}, ROWS[:3], request_id="rest-2") == 400
        assert infer_rest(server, {"x-request-id": "from-header"}, ROWS, request_id="") == 200
        assert infer_grpc(server, [("traceparent", TRACEPARENT)], ROWS) is grpc.StatusCode.OK
        assert infer_grpc(server, [], ROWS[:3], request_id="grpc-2") is grpc.StatusCode.INVALID_ARGUMENT
        wait_until(lambda: len(access_lines(server)) >= 5, "five access lines")
    lines = access_lines(server)
    keys = ("protocol", "model", "version", "request_id", "outcome", "rows", "traceparent")
    assert [tuple(line[key] for key in keys) for line in lines] == [
        ("rest", "iris", "1", "rest-1", "ok", 2, TRACEPARENT),
        ("rest", "iris", "1", "rest-2", "client_error", 0, ""),
        ("rest", "iris", "1", "from-header", "ok", 2, ""),
        ("grpc", "iris", "1", "grpc-1", "ok", 2, TRACEPARENT),
        ("grpc", "iris", "1", "grpc-2", "client_error", 0, ""),
    ]
    assert all(0 < line["seconds"] < 30 and line["level"] == "info" for line in lines)


def test_access_log_is_silent_unless_asked_for() -> None:
    with phoenix_process.start([IRIS]) as server:
        assert infer_rest(server, {"traceparent": TRACEPARENT}, ROWS) == 200
    assert access_lines(server) == []
