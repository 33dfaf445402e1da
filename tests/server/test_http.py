"""The HTTP server at the level of bytes: malformed requests, slow and vanishing clients, pipelining, limits, drain."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import phoenix_process
import pytest
from phoenix_process import Running, wait_until

IRIS = Path(__file__).parents[2] / "examples" / "iris"
BODY = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[5.1,3.5,1.4,0.2]}]}'


def infer_request(body: bytes = BODY, *headers: bytes, path: bytes = b"/v2/models/iris/infer") -> bytes:
    lines = [b"POST %s HTTP/1.1" % path, b"Host: x", b"Content-Length: %d" % len(body), *headers, b"", body]
    return b"\r\n".join(lines)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    env = {
        "PHOENIX_HEADER_TIMEOUT_SECONDS": "1",
        "PHOENIX_BODY_TIMEOUT_SECONDS": "1",
        "PHOENIX_KEEP_ALIVE_SECONDS": "2",
    }
    with phoenix_process.start([IRIS], env) as running:
        yield running


class Reader:
    """Reads responses off a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.file = sock.makefile("rb")

    def response(self) -> tuple[int, dict[str, str], bytes]:
        line = self.file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        while (header := self.file.readline().strip()) != b"":
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        return int(line.split()[1]), headers, self.file.read(int(headers["content-length"]))

    def is_closed(self) -> bool:
        try:
            return self.file.read() == b""
        except ConnectionError:
            return True


@contextlib.contextmanager
def connection(server: Running) -> Iterator[tuple[socket.socket, Reader]]:
    host, port = server.rest_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        reader = Reader(sock)
        with reader.file:
            yield sock, reader


def ask(server: Running, data: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    with connection(server) as (sock, reader):
        sock.sendall(data)
        status, headers, body = reader.response()
        return status, headers, json.loads(body)


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"garbage\r\n\r\n", 400, "malformed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed"),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "host"),
        (b"GET /v2 HTTP/9.9\r\nHost: x\r\n\r\n", 400, "malformed"),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400, "malformed"),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400, "malformed"),
        (b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", 400, "malformed"),
        (b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "malformed"),
        (
            b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            400,
            "malformed",
        ),
        (
            b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "malformed",
        ),
        (
            b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
            "malformed",
        ),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nBig: " + b"a" * 70_000 + b"\r\n\r\n", 431, "65536"),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", 431, "65536"),
        (b"GET /" + b"a" * 70_000, 431, "65536"),
        (b"POST /v2/logging HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n", 413, "at most 1048576"),
        (
            b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n",
            413,
            "at most 67108864",
        ),
        (b"POST /v2/models/none/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n", 404, "not found"),
    ],
)
def test_request_that_cannot_be_read_gets_an_error_and_a_closed_connection(
    server: Running, data: bytes, status: int, message: str
) -> None:
    with connection(server) as (sock, reader):
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        got, headers, body = reader.response()
        assert (got, headers["connection"]) == (status, "close")
        error = json.loads(body)["error"]
        assert message in error
        assert "Traceback" not in error
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)  # else the server waits a little for what may still come
        assert reader.is_closed()


def test_chunked_body_over_the_limit_is_refused_while_it_comes(server: Running) -> None:
    with connection(server) as (sock, reader):
        sock.sendall(b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                sock.sendall(chunk)
        # The answer may be lost with the reset that ends an unread upload; the connection never goes on.
        with contextlib.suppress(ConnectionError, AssertionError):
            assert reader.response()[0] == 413
        assert reader.is_closed()
    assert ask(server, infer_request())[0] == 200


@pytest.mark.parametrize(
    ("sent", "part"),
    [(b"POST /v2/models/iris/infer HTTP/1.1\r\nHo", "head"), (infer_request()[:-5], "body")],
)
def test_request_that_never_ends_times_out(server: Running, sent: bytes, part: str) -> None:
    with connection(server) as (sock, reader):
        sock.sendall(sent)
        status, headers, body = reader.response()
        assert (status, headers["connection"]) == (408, "close")
        assert part in json.loads(body)["error"]


def test_header_byte_by_byte_times_out(server: Running) -> None:
    with connection(server) as (sock, reader):
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.1):
                    sock.sendall(b"A")

        sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-")
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert reader.response()[0] == 408
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("sent", [b"", infer_request()], ids=["never-spoke", "idle"])
def test_silent_connection_is_closed(server: Running, sent: bytes) -> None:
    with connection(server) as (sock, reader):
        if sent:
            sock.sendall(sent)
            assert reader.response()[0] == 200
        assert reader.is_closed()


def test_client_that_hangs_up_in_the_middle_harms_nobody(server: Running) -> None:
    for cut in (1, 30, 100, len(infer_request()) - 1):
        with connection(server) as (sock, _):
            sock.sendall(infer_request()[:cut])
    with connection(server) as (sock, _):
        sock.sendall(infer_request())  # gone before the answer
    assert ask(server, infer_request())[0] == 200
    _, _, stats = ask(server, b"GET /v2/models/iris/stats HTTP/1.1\r\nHost: x\r\n\r\n")
    assert stats["model_stats"][0]["inference_stats"]["fail"]["count"] >= 0


def test_client_that_never_reads_its_answer_is_dropped(server: Running) -> None:
    rows = 400_000
    tensor = {"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": [1.5] * (rows * 4)}
    body = json.dumps({"inputs": [tensor]}).encode()
    files = Path(f"/proc/{server.process.pid}/fd")
    with connection(server) as (sock, _):
        before = len(list(files.iterdir()))
        sock.sendall(infer_request(body))  # the answer is larger than what the kernels keep for both sides
        wait_until(lambda: len(list(files.iterdir())) < before, "the server gives the connection up")
    assert ask(server, infer_request())[0] == 200


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    bodies = [json.dumps({"id": str(i), "inputs": json.loads(BODY)["inputs"]}).encode() for i in range(20)]
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with connection(server) as (sock, reader):
        sock.sendall(b"".join(infer_request(body) + live for body in bodies))
        for i in range(20):
            assert json.loads(reader.response()[2])["id"] == str(i)
            assert json.loads(reader.response()[2]) == {"live": True}


def test_request_in_single_bytes_is_answered(server: Running) -> None:
    with connection(server) as (sock, reader):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in infer_request():
            sock.sendall(bytes([byte]))
        assert reader.response()[0] == 200


def test_chunked_and_expect_continue(server: Running) -> None:
    with connection(server) as (sock, reader):
        sock.sendall(
            b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:10], BODY[10:]))
            + b"0\r\n\r\n"
        )
        assert reader.response()[0] == 200
        sock.sendall(infer_request(b"", b"Expect: 100-continue").replace(b": 0", b": %d" % len(BODY)))
        assert reader.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert reader.file.readline() == b"\r\n"
        sock.sendall(BODY)
        assert reader.response()[0] == 200


def test_http_1_0_and_connection_close_end_the_connection(server: Running) -> None:
    for request in (
        infer_request().replace(b"HTTP/1.1", b"HTTP/1.0"),
        infer_request(BODY, b"Connection: close"),
    ):
        with connection(server) as (sock, reader):
            sock.sendall(request)
            assert reader.response()[0] == 200
            assert reader.is_closed()


def test_small_refused_body_keeps_the_connection(server: Running) -> None:
    with connection(server) as (sock, reader):
        sock.sendall(infer_request(path=b"/v2/models/none/infer"))
        status, _, body = reader.response()
        assert status == 404
        assert "served: iris" in json.loads(body)["error"]
        sock.sendall(infer_request())
        assert reader.response()[0] == 200


def test_path_with_query_and_escapes(server: Running) -> None:
    assert ask(server, infer_request(path=b"/v2/models/iris/infer?a=b"))[0] == 200
    assert ask(server, infer_request(path=b"/v2/models/ir%69s/versions/1/infer"))[0] == 200
    assert ask(server, infer_request(path=b"/v2/models/../iris/infer"))[0] == 404


def test_storm_of_connections_is_accepted(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connection(server)) for _ in range(256)]
        for sock, _ in connections:
            sock.sendall(infer_request())
        assert all(reader.response()[0] == 200 for _, reader in connections)


def test_connections_over_the_limit_are_closed() -> None:
    with phoenix_process.start([IRIS], {"PHOENIX_MAX_CONNECTIONS": "2"}) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            sock, reader = stack.enter_context(connection(server))
            sock.sendall(infer_request())
            assert reader.response()[0] == 200
        sock, reader = stack.enter_context(connection(server))
        with contextlib.suppress(ConnectionError):
            sock.sendall(infer_request())
        assert reader.is_closed()


@pytest.mark.slow
def test_sigterm_under_load_loses_no_request() -> None:
    """Clients go to the second replica when the first refuses a connection; a request that was sent is answered."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(phoenix_process.start([IRIS], {"PHOENIX_DRAIN_SECONDS": "0.5"}))
        second = stack.enter_context(phoenix_process.start([IRIS]))
        answered, lost, stop = [0] * 8, [], threading.Event()

        def client(index: int) -> None:
            replicas = [first, second]
            while not stop.is_set():
                try:
                    opened = connection(replicas[0])
                    sock, reader = opened.__enter__()
                except ConnectionRefusedError:
                    replicas.pop(0)
                    continue
                with contextlib.ExitStack() as closing:
                    closing.push(opened)
                    while not stop.is_set():
                        try:
                            sock.sendall(infer_request())
                            status, headers, _ = reader.response()
                        except (ConnectionError, AssertionError) as error:
                            lost.append(repr(error))
                            break
                        assert status == 200
                        answered[index] += 1
                        if headers.get("connection") == "close":
                            break

        threads = [threading.Thread(target=client, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(answered) > 2000, "the first answers")
        first.process.terminate()
        assert first.process.wait(30) == 0
        before = sum(answered)
        wait_until(lambda: sum(answered) > before + 2000, "answers of the second replica")
        stop.set()
        for thread in threads:
            thread.join()
        assert lost == []
