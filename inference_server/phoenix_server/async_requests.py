"""Requests that come as records: how they are read, answered, refused, and which faults pass by themselves.

Pure. A request record is an OIP JSON request, or a binary one whose header `inference-header-content-length` says how
long its JSON is, as over HTTP. A result has the key of its request, its other headers, and the `id` in its body. A
request that cannot be served becomes a dead letter: its own key, value and headers, and the reason in new ones.
"""

from dataclasses import dataclass

from phoenix_server import codec_binary, codec_json
from phoenix_server.codec_json import OutputForms
from phoenix_server.errors import Code, PhoenixError, invalid
from phoenix_server.served_model import ServedModel
from phoenix_server.tensors import InferRequest, InferResponse

Headers = tuple[tuple[str, bytes | None], ...]
_LENGTH = "inference-header-content-length"
_OWN = "phoenix-"
_MOST_MESSAGE_BYTES = 2000
# A model that is loading, a full queue, a feature store or an audit that is down: the request waits for them.
_PASSING = (Code.UNAVAILABLE, Code.OVERLOADED, Code.NOT_FOUND)
# These may be a moment's trouble or the request's own fault, which time cannot tell.
_PERHAPS_PASSING = (Code.DEADLINE, Code.INTERNAL)
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Record:
    """A consumed record."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What is produced for one request: a result, or a dead letter if there is a `dead_reason`."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    dead_reason: str | None = None


def decode(record: Record, model: ServedModel) -> tuple[InferRequest, OutputForms]:
    """Return the request in a record; one without an id gets the record's place for one, the same at each reading.

    Raises `PhoenixError`: INVALID, TOO_LARGE.
    """
    body = record.value
    if not body:
        raise invalid("the record has no value")
    if len(body) > model.max_request_bytes:
        raise PhoenixError(
            Code.TOO_LARGE, f"the record has {len(body)} bytes, at most {model.max_request_bytes} are accepted"
        )
    length = next((value for name, value in record.headers if name.lower() == _LENGTH), None)
    if length is None:
        request, forms = codec_json.decode(codec_json.parse(body), may_hold_bool=codec_json.may_hold_bool(body))
    else:
        size, view = codec_binary.header_size(length, len(body)), memoryview(body)
        if size == 0:
            request, forms = codec_binary.decode_raw(view, model.signature, model.name)
        else:
            request, forms = codec_binary.decode(codec_json.parse(view[:size]), view[size:], model.name)
    if not request.id:
        request.id = place_of(record)
    return request, forms


def result(record: Record, response: InferResponse, forms: OutputForms) -> Reply:
    """Return the result of a request; raises `PhoenixError(INVALID)` where an output has no JSON form."""
    body, header_size = codec_binary.encode(response, forms)
    headers = tuple((name, value) for name, value in record.headers if not _is_own(name))
    if header_size is not None:
        headers += ((_LENGTH, b"%d" % header_size),)
    return Reply(record.key, body, headers)


def dead_letter(record: Record, code: str, message: str, *, has_value: bool = True) -> Reply:
    """Return the dead letter of a request; without its value where that is too large to be sent."""
    reason = (
        ("phoenix-reason", code.encode()),
        ("phoenix-message", message.encode(errors="replace")[:_MOST_MESSAGE_BYTES]),
        ("phoenix-topic", record.topic.encode()),
        ("phoenix-partition", b"%d" % record.partition),
        ("phoenix-offset", b"%d" % record.offset),
    )
    kept = tuple((name, value) for name, value in record.headers if not name.lower().startswith(_OWN))
    return Reply(record.key, record.value if has_value else None, kept + reason, code)


def smaller(record: Record, reply: Reply) -> Reply | None:
    """Return what to send in place of a reply that was too large for the broker; None if nothing is smaller."""
    if reply.dead_reason is None:
        size = len(reply.value or b"")
        return dead_letter(record, Code.TOO_LARGE.value, f"the result has {size} bytes, more than its topic takes")
    if reply.value is None:
        return None
    message = next((value for name, value in reply.headers if name == "phoenix-message"), None) or b""
    text = f"{message.decode(errors='replace')}; the request itself, of {len(reply.value)} bytes, is too large to keep"
    return dead_letter(record, reply.dead_reason, text, has_value=False)


def passes(error: PhoenixError, request: InferRequest | None, attempt: int) -> bool:
    """Whether to try a request again after this failure of attempt number `attempt` (from 0)."""
    if error.code in _PASSING:
        return True
    if error.code not in _PERHAPS_PASSING or attempt + 1 >= _ATTEMPTS:
        return False
    return not (error.code is Code.DEADLINE and request is not None and request.timeout_us)


def place_of(record: Record) -> str:
    """Return where a record stands: topic, partition and offset."""
    return f"{record.topic}-{record.partition}-{record.offset}"


def _is_own(name: str) -> bool:
    name = name.lower()
    return name == _LENGTH or name.startswith(_OWN)
