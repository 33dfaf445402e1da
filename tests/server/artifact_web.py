"""An HTTPS server that answers by script, its private CA, and a child process that fetches: tests of `artifacts`."""

import asyncio
import datetime
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from phoenix_server.artifacts import ArtifactStore
from phoenix_server.errors import ModelLoadError

DEADLINE_S = 30.0


@dataclass
class Answer:
    """One answer. `cut` ends the connection after so many bytes, `gate` holds it there until the event is set."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    gate: threading.Event | None = None
    gate_at: int = 0
    has_length: bool = True


@dataclass
class Web:
    """The running server. The answers of a path are used up one by one; the last one stays."""

    url: str
    ca: str
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def put(self, path: str, *answers: Answer | bytes, etag: str | None = None) -> str:
        """Set the answers of a path and return its address."""
        headers = {"ETag": f'"{etag}"'} if etag else {}
        self.answers[path] = [a if isinstance(a, Answer) else Answer(a, headers=headers) for a in answers]
        return self.url + path

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """Serve on a free port of this machine until the block ends; held connections are let go then."""
    ca = _certificates(folder)
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
            script = web.answers.get(self.path, [Answer(b"no such page", 404)])
            answer = script.pop(0) if len(script) > 1 else script[0]
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            if answer.has_length:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            body = answer.body if answer.cut is None else answer.body[: answer.cut]
            if answer.gate:
                self.wfile.write(body[: answer.gate_at])
                while not answer.gate.wait(0.02) and not closing.is_set():
                    pass
                body = body[answer.gate_at :]
            self.wfile.write(body)
            self.close_connection = answer.cut is not None or not answer.has_length

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients that hang up or do not trust the CA are part of the tests

        def finish_request(self, request: object, client_address: object) -> None:
            with context.wrap_socket(request, server_side=True) as secured:  # type: ignore[arg-type]
                super().finish_request(secured, client_address)  # type: ignore[arg-type]

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with Server(("127.0.0.1", 0), Handler) as server:
        web = Web(f"https://localhost:{server.server_port}", ca)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield web
        finally:
            closing.set()
            server.shutdown()
            thread.join()


def _certificates(folder: Path) -> str:
    """Write server.pem and server.key, signed by a CA made for the occasion; return the CA as PEM."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test CA")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])

    def sign(subject: x509.Name, public: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType) -> str:
        builder = x509.CertificateBuilder(ca_name, subject, public, x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    (folder / "server.pem").write_text(sign(name, key.public_key(), hosts, x509.BasicConstraints(False, None)))
    (folder / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    ca = sign(ca_name, ca_key.public_key(), x509.BasicConstraints(True, None))
    (folder / "ca.pem").write_text(ca)
    return ca


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that another thread or process brings about."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {DEADLINE_S:g} s: {what}")
        time.sleep(0.01)


def start_fetch(
    cache: Path, uri: str, *, sha256: str = "", ca: str = "", max_file_bytes: int = 0, mount: str = ""
) -> subprocess.Popen[str]:
    """Start a process that fetches once and prints its answer as JSON: a path, or a reason and a message.

    `mount` is what to mount over the cache, for this process alone.
    """
    job = {"cache": str(cache), "uri": uri, "sha256": sha256, "ca": ca, "max_file_bytes": max_file_bytes}
    command = [sys.executable, __file__, json.dumps(job)]
    if mount:
        script = f'mount {mount} "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", script, str(cache), *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _child(job: dict[str, str]) -> None:
    if limit := int(job["max_file_bytes"]):
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    store = ArtifactStore(model_store=Path(), cache_dir=Path(job["cache"]))
    credentials = {"ca.crt": job["ca"]} if job["ca"] else {}
    try:
        artifact = asyncio.run(store.fetch(job["uri"], sha256=job["sha256"] or None, credentials=credentials))
        print(json.dumps({"path": str(artifact.path), "sha256": artifact.sha256}))
    except ModelLoadError as error:
        print(json.dumps({"reason": error.reason, "message": error.message}))


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
