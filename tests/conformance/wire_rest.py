"""The table's REST client: `http.client`, one connection a call, nothing decoded that the server did not send."""

import http.client
import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from conformance.datatypes import DATATYPES, Array, pack, unpack
from conformance.wire import CALL_DEADLINE_S, KINDS, Client, Document, Refusal, array_of

HEADER_LENGTH = "Inference-Header-Content-Length"
_KIND_OF = {status: kind for kind, (status, _) in KINDS.items()}


@dataclass
class Reply:
    """One HTTP response; `headers` in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        """The body as JSON, as strictly as RFC 8259 has it."""
        return json.loads(self.body, parse_constant=_refuse_constant)

    def accepted(self) -> "Reply":
        """Return this reply if it is a success, which is exactly 200; raise `Refusal` for an error object."""
        if self.status == 200:
            return self
        shown = f"{self.status} {self.body[:300]!r}"
        try:
            document = self.document
        except ValueError:
            raise AssertionError(f"the error body is not JSON: {shown}") from None
        assert isinstance(document, dict), f"the error body is not an object: {shown}"
        assert set(document) == {"error"}, f"the error body is not {{'error': …}}: {shown}"
        assert isinstance(document["error"], str), f"the error is not a string: {shown}"
        assert self.headers.get("content-type", "").startswith("application/json"), self.headers
        kind = _KIND_OF.get(self.status, f"status {self.status}")
        raise Refusal(kind, str(self.status), document["error"])


@dataclass
class RestClient(Client):
    """A server's REST address (`http://host:port`)."""

    url: str = field(default="", kw_only=True)

    # --- HTTP --------------------------------------------------------------------------------------------------------

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "localhost", parts.port or 80

    def http(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """Send one request; an iterable body goes out chunked. The response is returned as it came."""
        connection = http.client.HTTPConnection(*self.address, timeout=CALL_DEADLINE_S)
        try:
            is_chunked = body is not None and not isinstance(body, bytes)
            sent = {"Transfer-Encoding": "chunked"} if is_chunked else {}
            connection.request(method, path, body, {**sent, **(headers or {})}, encode_chunked=is_chunked)
            return _reply(connection.getresponse())
        finally:
            connection.close()

    def bytes_on_a_socket(self, sent: bytes) -> Reply:
        """Send bytes that no HTTP library would, and return what comes back while the socket stays open."""
        with socket.create_connection(self.address, timeout=CALL_DEADLINE_S) as connection:
            connection.sendall(sent)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return _reply(response)

    def get(self, path: str) -> Any:
        """GET a document."""
        return self.http("GET", path).accepted().document

    def post(self, path: str, document: Any = None) -> Reply:
        """POST a document, or nothing."""
        body = b"" if document is None else json.dumps(document).encode()
        return self.http("POST", path, body, {"Content-Type": "application/json"}).accepted()

    # --- paths -------------------------------------------------------------------------------------------------------

    def model_path(self, model: str, version: str = "", what: str = "") -> str:
        """Return `/v2/models/MODEL[/versions/VERSION][/WHAT]`."""
        path = f"/v2/models/{quote(self.served(model), safe='')}"
        path += f"/versions/{quote(version, safe='')}" if version else ""
        return path + (f"/{what}" if what else "")

    def infer_path(self, model: str, version: str = "") -> str:
        """Return the path of an inference."""
        return self.model_path(model, version, "infer")

    # --- inference ---------------------------------------------------------------------------------------------------

    def infer_json(self, model: str, body: bytes | str, headers: dict[str, str] | None = None) -> Reply:
        """Send a body that is JSON, or nearly."""
        body = body if isinstance(body, bytes) else body.encode()
        return self.http("POST", self.infer_path(model), body, headers).accepted()

    def infer_document(self, model: str, document: Document, version: str = "") -> Document:
        """Send a request as JSON and return the answer, which must be JSON."""
        reply = self.post(self.infer_path(model, version), document)
        return dict(reply.document)

    def infer_binary(
        self,
        model: str,
        document: Document,
        blobs: Sequence[bytes] = (),
        header_length: str | None = "",
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """Send a JSON header and blobs behind it. `header_length`: "" for the right one, None to leave it out."""
        header = json.dumps(document).encode()
        sent = dict(headers or {})
        if header_length is not None:
            sent[HEADER_LENGTH] = header_length or str(len(header))
        return self.http("POST", self.infer_path(model), b"".join([header, *blobs]), sent).accepted()

    def infer_arrays(self, model: str, inputs: dict[str, Array]) -> dict[str, Array]:
        """Send arrays as binary tensors and return all outputs as they came, binary."""
        items, blobs = [], []
        for name, array in inputs.items():
            item, blob = binary_tensor(name, array)
            items.append(item)
            blobs.append(blob)
        document = {"inputs": items, "parameters": {"binary_data_output": True}}
        return {name: array for name, array, _ in read_binary(self.infer_binary(model, document, blobs))}

    # --- the rest of the protocol ------------------------------------------------------------------------------------

    def live(self) -> bool:
        """200 says yes, any other status no."""
        return self.http("GET", "/v2/health/live").status == 200

    def ready(self) -> bool:
        """As `live`."""
        return self.http("GET", "/v2/health/ready").status == 200

    def model_ready(self, model: str, version: str = "") -> bool:
        """As `live`; raises `Refusal` where there is no such model."""
        reply = self.http("GET", self.model_path(model, version, "ready"))
        if reply.status == 404:
            reply.accepted()
        return reply.status == 200

    def server_metadata(self) -> Document:
        """GET /v2."""
        return dict(self.get("/v2"))

    def metadata(self, model: str, version: str = "") -> Document:
        """GET the model's metadata."""
        return dict(self.get(self.model_path(model, version)))

    def config(self, model: str, version: str = "") -> Document:
        """GET the model's configuration."""
        return dict(self.get(self.model_path(model, version, "config")))

    def statistics(self, model: str = "", version: str = "") -> list[Document]:
        """GET statistics of one model, or of all."""
        path = self.model_path(model, version, "stats") if model else "/v2/models/stats"
        return list(self.get(path)["model_stats"])

    def index(self, *, ready_only: bool = False) -> list[Document]:
        """POST /v2/repository/index."""
        return list(self.post("/v2/repository/index", {"ready": True} if ready_only else {}).document)

    def load(self, model: str, parameters: Document | None = None) -> None:
        """POST …/load."""
        path = f"/v2/repository/models/{self.served(model)}/load"
        self.post(path, {"parameters": parameters} if parameters else None)

    def unload(self, model: str) -> None:
        """POST …/unload."""
        self.post(f"/v2/repository/models/{self.served(model)}/unload")

    def log_settings(self) -> Document:
        """GET /v2/logging."""
        return dict(self.get("/v2/logging"))

    def update_log_settings(self, settings: Document) -> Document:
        """POST /v2/logging."""
        return dict(self.post("/v2/logging", settings).document)


def binary_tensor(name: str, array: Array, **parameters: Any) -> tuple[Document, bytes]:
    """Return an input's document without data, and the blob that goes behind the header."""
    datatype = next(name for name, of in DATATYPES.items() if of.numpy == array.dtype)
    blob = pack(array)
    size = {"binary_data_size": len(blob), **parameters}
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": size}, blob


def read_binary(reply: Reply) -> list[tuple[str, Array, bool]]:
    """Read a response by the rules of the extension: name, array and whether it was binary, in the response's order."""
    length = reply.headers.get(HEADER_LENGTH.lower())
    header_size = len(reply.body) if length is None else int(length)
    document, rest = json.loads(reply.body[:header_size]), reply.body[header_size:]
    found = []
    for item in document["outputs"]:
        size = item.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = array_of(item)
        else:
            assert "data" not in item, f"output '{item['name']}' has both data and binary_data_size"
            array, rest = unpack(rest[:size], item["datatype"], item["shape"]), rest[size:]
        found.append((item["name"], array, size is not None))
    assert rest == b"", f"{len(rest)} bytes are left behind the last output"
    return found


def _reply(response: http.client.HTTPResponse) -> Reply:
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
