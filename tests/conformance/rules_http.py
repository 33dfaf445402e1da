"""Compression, and what every error looks like, from a wrong route to bytes that are no HTTP."""

import gzip
import http.client
import json
import socket
import zlib
from collections.abc import Callable

import numpy as np
from conformance.datatypes import assert_same
from conformance.models import LIMITED_BYTES
from conformance.table import BINARY, HTTP, HTTP_1_1, OIP_REST, PHOENIX, REST, rule
from conformance.wire import CALL_DEADLINE_S, data_of, floats, tensor
from conformance.wire_rest import HEADER_LENGTH, Reply, RestClient, binary_tensor, read_binary

Compress = Callable[[bytes], bytes]
CODINGS: dict[str, tuple[Compress, Compress]] = {
    "gzip": (gzip.compress, gzip.decompress),
    "deflate": (zlib.compress, zlib.decompress),  # RFC 9110: the zlib format
}
_X = np.array([[1.5, -2.5]], np.float32)
_JSON = json.dumps({"inputs": [tensor("x", "FP32", [1, 2], [1.5, -2.5])]}).encode()
# Enough that compressing pays, whatever a server's threshold is.
_LARGE = np.zeros((4096, 2), np.float32)
_ERROR = f"{OIP_REST}, Inference Response JSON Error"


def _send(server: RestClient, body: bytes, **headers: str) -> Reply:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http("POST", server.infer_path("oip-many"), body, sent).accepted()


@rule("compression.request", HTTP, on=REST, each=CODINGS)
def compressed_request(server: RestClient, coding: str) -> None:
    """A JSON body in {each} is read as the plain one is."""
    compress, _ = CODINGS[coding]
    reply = _send(server, compress(_JSON), content_encoding=coding)
    assert data_of(reply.document, "doubled") == [3.0, -5.0]


@rule("compression.response", HTTP, on=REST, each=CODINGS)
def compressed_response(server: RestClient, coding: str) -> None:
    """An answer of some size comes in {each} where Accept-Encoding asks, says so, and has the right length."""
    _, decompress = CODINGS[coding]
    body = json.dumps({"inputs": [tensor("x", "FP32", list(_LARGE.shape), _LARGE.reshape(-1).tolist())]}).encode()
    reply = _send(server, body, accept_encoding=coding)
    assert reply.headers["content-encoding"] == coding
    assert int(reply.headers["content-length"]) == len(reply.body)
    plain = Reply(reply.status, reply.headers, decompress(reply.body))
    assert data_of(plain.document, "doubled") == [0.0] * _LARGE.size


@rule("compression.binary", f"{BINARY}, Compression", on=REST, each=CODINGS)
def compressed_binary(server: RestClient, coding: str) -> None:
    """With {each} both ways, Inference-Header-Content-Length counts the bytes before compression."""
    compress, decompress = CODINGS[coding]
    item, blob = binary_tensor("x", _LARGE)
    header = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True}}).encode()
    reply = server.http(
        "POST",
        server.infer_path("oip-many"),
        compress(header + blob),
        {"Content-Encoding": coding, "Accept-Encoding": coding, HEADER_LENGTH: str(len(header))},
    ).accepted()
    assert reply.headers["content-encoding"] == coding
    found = read_binary(Reply(reply.status, reply.headers, decompress(reply.body)))
    assert_same(found[0][1], _LARGE * 2)


@rule("compression.not-asked", HTTP, on=REST)
def not_asked(server: RestClient) -> None:
    """Nothing is compressed that was not asked for: no Accept-Encoding, identity, only unknown codings, or q=0."""
    item, blob = binary_tensor("x", _LARGE)
    for accepted in ("identity", "zstd, br", "gzip;q=0, deflate;q=0.0", ""):
        reply = server.infer_binary("oip-many", {"inputs": [item]}, [blob], headers={"Accept-Encoding": accepted})
        assert "content-encoding" not in reply.headers
        assert len(data_of(reply.document, "doubled")) == _LARGE.size


@rule("compression.identity", HTTP, on=REST)
def identity(server: RestClient) -> None:
    """Content-Encoding: identity is no compression."""
    assert data_of(_send(server, _JSON, content_encoding="identity").document, "doubled") == [3.0, -5.0]


@rule("compression.coding-case", HTTP, on=REST)
def coding_case(server: RestClient) -> None:
    """Names of codings know no case."""
    assert data_of(_send(server, gzip.compress(_JSON), content_encoding="GZip").document, "doubled") == [3.0, -5.0]


@rule("compression.corrupt", HTTP, on=REST, each=CODINGS)
def corrupt(server: RestClient, coding: str) -> None:
    """A body that says {each} and is none, is cut short, or fails its checksum is refused."""
    whole = CODINGS[coding][0](_JSON)
    wrong_checksum = whole[:-8] + bytes(8) if coding == "gzip" else whole[:-4] + bytes(4)
    for body in (_JSON, b"", whole[:-1], whole[: len(whole) // 2], wrong_checksum):
        with server.refused("invalid"):
            _send(server, body, content_encoding=coding)


@rule("compression.trailing-bytes", PHOENIX, on=REST, profile="phoenix")
def trailing_bytes(server: RestClient) -> None:
    """Bytes behind the compressed data are refused, not dropped in silence."""
    for coding, (compress, _) in CODINGS.items():
        with server.refused("invalid"):
            _send(server, compress(_JSON) + b"more", content_encoding=coding)


@rule("compression.unsupported", HTTP, on=REST, profile="phoenix")
def unsupported(server: RestClient) -> None:
    """A coding that is not supported is refused with 415 and Accept-Encoding that lists those that are."""
    for coding in ("br", "zstd", "compress", "gzip, gzip"):
        reply = server.http("POST", server.infer_path("oip-many"), _JSON, {"Content-Encoding": coding})
        with server.refused("unsupported-encoding"):
            reply.accepted()
        assert {item.strip() for item in reply.headers["accept-encoding"].split(",")} == {"gzip", "deflate"}


@rule("compression.gzip-members", "RFC 1952, GZIP, section 2.2", on=REST)
def gzip_members(server: RestClient) -> None:
    """A gzip body of several members, as parallel compressors write it, is read whole."""
    body = b"".join(gzip.compress(_JSON[index : index + 20]) for index in range(0, len(_JSON), 20))
    assert data_of(_send(server, body, content_encoding="gzip").document, "doubled") == [3.0, -5.0]


@rule("compression.bomb", PHOENIX, on=REST, profile="phoenix", each=CODINGS)
def bomb(server: RestClient, coding: str) -> None:
    """A small body in {each} that grows beyond the model's limit is refused with 413."""
    body = CODINGS[coding][0](b" " * LIMITED_BYTES + b'{"inputs": []}')
    assert len(body) < LIMITED_BYTES
    with server.refused("too-large"):
        server.http("POST", server.infer_path("oip-limited"), body, {"Content-Encoding": coding}).accepted()


@rule("error.object", _ERROR, on=REST)
def error_object(server: RestClient) -> None:
    """Every refusal is {"error": "<message>"} as application/json, whichever part of the server it comes from."""
    refusals = [
        server.http("POST", server.infer_path("oip-many"), b"{"),
        server.http("POST", "/v2/models/oip-nobody-made-this/infer", _JSON),
        server.http("GET", "/v2/models/oip-nobody-made-this"),
        server.http("GET", "/v2/models/oip-nobody-made-this/ready"),
        server.http("GET", "/v2/models/oip-nobody-made-this/stats"),
        server.http("GET", "/v2/models/oip-many/versions/9/config"),
        server.http("GET", "/v2/no-such-route"),
        server.http("DELETE", "/v2/models/oip-many"),
        server.http("GET", server.infer_path("oip-many")),
        server.http("POST", "/v2/repository/index", b"{"),
        server.http("POST", "/v2/repository/index", b"[]"),
        server.http("POST", "/v2/logging", b'{"log_poetry": true}'),
    ]
    for reply in refusals:
        assert reply.status >= 400
        with server.refused(
            "invalid" if reply.status == 400 else "not-found" if reply.status == 404 else "wrong-method"
        ):
            reply.accepted()


@rule("error.success-is-200", OIP_REST, on=REST)
def success_is_200(server: RestClient) -> None:
    """Success is exactly 200: stock clients take any other status for an error."""
    for method, path, body in (
        ("GET", "/v2", None),
        ("POST", server.infer_path("oip-many"), _JSON),
        ("POST", "/v2/repository/index", b""),
        ("POST", "/v2/repository/models/oip-spare/load", b""),
        ("POST", "/v2/logging", b"{}"),
    ):
        assert server.http(method, path, body).status == 200


@rule("error.unknown-route", HTTP, on=REST)
def unknown_route(server: RestClient) -> None:
    """A path that nothing serves is refused with 404."""
    for path in ("/v3", "/v2/model/oip-many", "/v2/models/oip-many/infers", "/v2/models//ready", "/v2/health"):
        with server.refused("not-found"):
            server.get(path)


@rule("error.trailing-slash", PHOENIX, on=REST, profile="phoenix")
def trailing_slash(server: RestClient) -> None:
    """A path with a slash too many is an unknown route, not a redirection, which stock clients take for an error."""
    for method, path in (("GET", "/v2/"), ("GET", "/v2/health/live/"), ("POST", f"{server.infer_path('oip-many')}/")):
        with server.refused("not-found"):
            server.http(method, path).accepted()


@rule("error.head", f"{HTTP}, section 9.1", on=REST, profile="phoenix")
def head(server: RestClient) -> None:
    """HEAD is answered wherever GET is, with the same headers and without a body."""
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/oip-many/ready"):
        got, reply = server.http("GET", path), server.http("HEAD", path)
        assert (reply.status, reply.body) == (200, b"")
        assert reply.headers["content-length"] == got.headers["content-length"]


@rule("error.wrong-method", HTTP, on=REST, profile="phoenix")
def wrong_method(server: RestClient) -> None:
    """A method that the path does not have is refused with 405, and Allow lists those that it has."""
    for method, path, allowed in (
        ("GET", server.infer_path("oip-many"), "POST"),
        ("PUT", server.infer_path("oip-many"), "POST"),
        ("POST", "/v2/models/oip-many", "GET"),
        ("DELETE", "/v2/health/live", "GET"),
        ("GET", "/v2/repository/index", "POST"),
    ):
        reply = server.http(method, path)
        with server.refused("wrong-method"):
            reply.accepted()
        assert allowed in reply.headers["allow"]
    reply = server.http("DELETE", "/v2/logging")
    assert {item.strip() for item in reply.headers["allow"].split(",")} >= {"GET", "POST"}


@rule("error.not-ready", PHOENIX, on=REST, profile="phoenix")
def not_ready(server: RestClient) -> None:
    """A model that is not loaded refuses with 503 and a Retry-After in seconds; the message tells its state."""
    server.unload("oip-spare")
    try:
        reply = server.http("POST", server.infer_path("oip-spare"), _JSON)
        with server.refused("unavailable") as refused:
            reply.accepted()
    finally:
        server.load("oip-spare")
    assert int(reply.headers["retry-after"]) > 0
    assert "UNAVAILABLE" in refused.message


@rule("error.body-too-large", PHOENIX, on=REST, profile="phoenix")
def body_too_large(server: RestClient) -> None:
    """A body over the model's limit is refused with 413 on its Content-Length alone, before it is sent."""
    head = (
        f"POST {server.infer_path('oip-limited')} HTTP/1.1\r\nHost: conformance\r\n"
        f"Content-Length: {LIMITED_BYTES + 1}\r\n\r\n"
    )
    with server.refused("too-large") as refused:
        server.bytes_on_a_socket(head.encode()).accepted()
    assert str(LIMITED_BYTES) in refused.message


@rule("error.body-at-limit", PHOENIX, on=REST, profile="phoenix")
def body_at_limit(server: RestClient) -> None:
    """A body of exactly the limit is taken."""
    body = json.dumps({"inputs": [tensor("x", "UINT8", [1], [7])]}).encode().ljust(LIMITED_BYTES)
    reply = server.http("POST", server.infer_path("oip-limited"), body).accepted()
    assert data_of(reply.document, "y") == [7]


@rule("error.chunked-body-too-large", PHOENIX, on=REST, profile="phoenix")
def chunked_body_too_large(server: RestClient) -> None:
    """A body in chunks is refused with 413 as soon as it passes the limit, before its end."""
    head = (
        f"POST {server.infer_path('oip-limited')} HTTP/1.1\r\nHost: conformance\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    with server.refused("too-large"):
        server.bytes_on_a_socket(head.encode() + chunk * (LIMITED_BYTES // 1024 + 1)).accepted()


@rule("error.small-body-too-large", PHOENIX, on=REST, profile="phoenix")
def small_body_too_large(server: RestClient) -> None:
    """The bodies of everything that is not an inference have a limit too."""
    head = f"POST /v2/repository/index HTTP/1.1\r\nHost: conformance\r\nContent-Length: {1 << 40}\r\n\r\n"
    with server.refused("too-large"):
        server.bytes_on_a_socket(head.encode()).accepted()


@rule("error.refusal-reaches-the-sender", f"{HTTP_1_1}, section 9.6", on=REST, profile="phoenix")
def refusal_reaches_the_sender(server: RestClient) -> None:
    """A client that sends its whole body before it reads still gets the 413, not a reset connection."""
    with server.refused("too-large"):
        server.http("POST", server.infer_path("oip-limited"), b" " * (8 << 20)).accepted()


@rule("error.after-a-refusal", HTTP_1_1, on=REST)
def after_a_refusal(server: RestClient) -> None:
    """A refused inference leaves the connection usable."""
    connection = http.client.HTTPConnection(*server.address, timeout=CALL_DEADLINE_S)
    try:
        for body, status in ((b"{", 400), (_JSON, 200), (b"", 400), (_JSON, 200)):
            connection.request("POST", server.infer_path("oip-many"), body)
            response = connection.getresponse()
            response.read()
            assert response.status == status or (status == 400 and not server.is_strict and response.status >= 400)
        connection.request("POST", "/v2/models/oip-nobody-made-this/infer", _JSON)
        response = connection.getresponse()
        response.read()
        assert response.status >= 400
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200
    finally:
        connection.close()


@rule("error.pipelined", HTTP_1_1, on=REST)
def pipelined(server: RestClient) -> None:
    """Requests that are sent without waiting are answered in their order."""
    paths = ["/v2/health/live", server.infer_path("oip-many"), "/v2/no-such-route", server.infer_path("oip-many")]
    requests = [
        f"{'POST' if path.endswith('infer') else 'GET'} {path} HTTP/1.1\r\nHost: conformance\r\n".encode()
        + (b"Content-Length: %d\r\n\r\n" % len(_JSON) + _JSON if path.endswith("infer") else b"\r\n")
        for path in paths
    ]
    with socket.create_connection(server.address, timeout=CALL_DEADLINE_S) as connection:
        connection.sendall(b"".join(requests))
        statuses = []
        stream = connection.makefile("rb")
        for _ in paths:
            status = int(stream.readline().split()[1])
            length = 0
            while (line := stream.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            stream.read(length)
            statuses.append(status)
    assert statuses == [200, 200, 404, 200]


@rule("error.expect-continue", HTTP, on=REST)
def expect_continue(server: RestClient) -> None:
    """A client that waits for 100 Continue gets it, and is then answered."""
    head = (
        f"POST {server.infer_path('oip-many')} HTTP/1.1\r\nHost: conformance\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(_JSON)}\r\n\r\n"
    )
    with socket.create_connection(server.address, timeout=CALL_DEADLINE_S) as connection:
        connection.sendall(head.encode())
        stream = connection.makefile("rb")
        assert stream.readline().split()[1] == b"100"
        assert stream.readline() == b"\r\n"
        connection.sendall(_JSON)
        assert stream.readline().split()[1] == b"200"


@rule("error.garbage", HTTP_1_1, on=REST, profile="phoenix")
def garbage(server: RestClient) -> None:
    """Bytes that are no HTTP are refused with 400 and {"error"}, and the connection is closed."""
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"HELLO\r\n\r\n", b"GET /v2 HTTP/9.9\r\n\r\n"):
        reply = server.bytes_on_a_socket(sent)
        with server.refused("invalid"):
            reply.accepted()
        assert reply.headers["connection"] == "close"


@rule("error.smuggling", HTTP_1_1, on=REST, profile="phoenix")
def smuggling(server: RestClient) -> None:
    """Heads that a proxy might read otherwise are refused with 400: two lengths, length and chunks, no or two hosts."""
    path, length = server.infer_path("oip-many"), len(_JSON)
    for headers in (
        f"Host: a\r\nContent-Length: {length}\r\nContent-Length: {length + 1}\r\n",
        f"Host: a\r\nContent-Length: {length}\r\nTransfer-Encoding: chunked\r\n",
        f"Host: a\r\nContent-Length: +{length}\r\n",
        f"Host: a\r\nContent-Length: -{length}\r\n",
        f"Content-Length: {length}\r\n",
        f"Host: a\r\nHost: b\r\nContent-Length: {length}\r\n",
    ):
        sent = f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode() + _JSON
        with server.refused("invalid"):
            server.bytes_on_a_socket(sent).accepted()


@rule("error.bad-chunk", HTTP_1_1, on=REST, profile="phoenix")
def bad_chunk(server: RestClient) -> None:
    """A chunk whose size is no number is refused with 400."""
    head = f"POST {server.infer_path('oip-many')} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.refused("invalid"):
        server.bytes_on_a_socket(head.encode() + b"zz\r\n").accepted()


@rule("error.headers-too-large", HTTP, on=REST, profile="phoenix")
def headers_too_large(server: RestClient) -> None:
    """More than 64 KiB of headers are refused with 431."""
    with server.refused("headers-too-large"):
        server.bytes_on_a_socket(b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n").accepted()


@rule("error.model-name-encoded", HTTP, on=REST)
def model_name_encoded(server: RestClient) -> None:
    """A model's name may be percent-encoded; one that decodes to something strange is an unknown model."""
    reply = server.http("POST", "/v2/models/oip%2Dmany/infer", _JSON).accepted()
    assert data_of(reply.document, "doubled") == [3.0, -5.0]
    for name in ("%00", "%FF", "..%2F..%2Fetc", "oip-many%20", "%E2%82%AC", "OIP-MANY"):
        with server.refused("not-found"):
            server.http("POST", f"/v2/models/{name}/infer", _JSON).accepted()


@rule("error.query-ignored", HTTP, on=REST)
def query_ignored(server: RestClient) -> None:
    """A query that nobody knows changes nothing: stock clients let their users add one."""
    reply = server.http("POST", f"{server.infer_path('oip-many')}?tenant=a&b", _JSON).accepted()
    assert data_of(reply.document, "doubled") == [3.0, -5.0]


@rule("error.engine-failure", PHOENIX, on=REST, profile="phoenix")
def engine_failure(server: RestClient) -> None:
    """A failure of the model is 500 with {"error"} and without a stack trace; the next request is answered."""
    with server.refused("failed"):
        server.infer("oip-lookup", tensor("index", "INT64", [1], [7]))
    assert data_of(server.infer("oip-lookup", tensor("index", "INT64", [1], [2])), "value") == [30.0]


@rule(
    "error.unserved-extension",
    PHOENIX,
    on=REST,
    profile="phoenix",
    each=("systemsharedmemory/status", "cudasharedmemory/status", "trace/setting"),
)
def unserved_extension(server: RestClient, path: str) -> None:
    """/v2/{each} belongs to an extension that is not advertised and is refused with 404."""
    with server.refused("not-found"):
        server.get(f"/v2/{path}")


@rule("error.deadline", PHOENIX, on=REST, profile="phoenix")
def deadline(server: RestClient) -> None:
    """A deadline that passes is 504, and does not harm the next request."""
    with server.refused("deadline"):
        server.infer("oip-slow", floats("x", 1.0), parameters={"timeout": 1})
    assert data_of(server.infer("oip-slow", floats("x", 1.0)), "y") == [1.0]
