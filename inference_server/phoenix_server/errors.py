"""Every failure that a caller or an operator can meet, as one code each.

Transports translate: `hotpath.HTTP_STATUS` and `grpc_service.GRPC_STATUS` are the only tables from `Code` to a wire
status. `Reason` is the vocabulary of the PhoenixModel's `ModelVerified` and `AcceleratorReady` conditions; a process
that cannot serve ends with `Reason.exit_code` and writes the reason to its termination message.
"""

import reprlib
from enum import Enum, StrEnum

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


class Code(Enum):
    """What went wrong with one request, independent of the transport."""

    INVALID = "invalid"
    NOT_FOUND = "not_found"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    TIMED_OUT_READING = "timed_out_reading"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TOO_LARGE = "too_large"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    HEADERS_TOO_LARGE = "headers_too_large"
    UNSUPPORTED = "unsupported"
    LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class Outcome(StrEnum):
    """The `outcome` label of the request metrics."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    SHED = "shed"
    TIMEOUT = "timeout"
    ERROR = "error"


_OUTCOMES = {
    Code.LIMITED: Outcome.SHED,
    Code.OVERLOADED: Outcome.SHED,
    Code.UNAVAILABLE: Outcome.SHED,
    Code.DEADLINE: Outcome.TIMEOUT,
    Code.INTERNAL: Outcome.ERROR,
}


class PhoenixError(Exception):
    """A request that cannot be answered: a code, a sentence for the caller, and when to come back."""

    def __init__(self, code: Code, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        # The caller's id of a request that could not be decoded, for the log and the trace.
        self.request_id = ""

    @property
    def outcome(self) -> Outcome:
        """How the metrics count this failure."""
        return _OUTCOMES.get(self.code, Outcome.CLIENT_ERROR)


def invalid(message: str) -> PhoenixError:
    """Return the error for input that the caller has to change."""
    return PhoenixError(Code.INVALID, message)


def shown(value: object) -> str:
    """Return a caller's value as it may stand in a message: short, and at any depth of nesting, which `repr` cannot."""
    return _SHOWN.repr(value)


class Reason(StrEnum):
    """Why a model cannot be served; the names are API (status conditions, termination message, exit codes)."""

    INVALID_SPEC = "InvalidSpec"
    NAME_CLASH = "NameClash"
    NOT_FOUND = "NotFound"
    FETCH_FAILED = "FetchFailed"
    DIGEST_MISMATCH = "DigestMismatch"
    INVALID_MODEL = "InvalidModel"
    UNSUPPORTED_OPSET = "UnsupportedOpset"
    EXTERNAL_DATA_MISSING = "ExternalDataMissing"
    PROVIDER_UNAVAILABLE = "ProviderUnavailable"
    PORT_IN_USE = "PortInUse"
    INVALID_SETTING = "InvalidSetting"

    @property
    def exit_code(self) -> int:
        """The process exit code: 10 for the first reason, counting up (1 and 2 stay Python's and argparse's)."""
        return 10 + list(Reason).index(self)

    @property
    def meaning(self) -> str:
        """What is wrong and what to do, in one sentence for the reference page."""
        return _MEANINGS[self]


_MEANINGS = {
    Reason.INVALID_SPEC: "The manifest is broken; the message names file, document, field and every fault.",
    Reason.NAME_CLASH: "Two manifests declare the same model and version; rename one or change its version.",
    Reason.NOT_FOUND: "No file at `spec.model.uri`; the message lists every place that was looked at.",
    Reason.FETCH_FAILED: "The store did not give the model; the message says why and what to check.",
    Reason.DIGEST_MISMATCH: "The file is not the one that `spec.model.sha256` names; it is never loaded.",
    Reason.INVALID_MODEL: "The file is truncated, no ONNX model, or one that ONNX Runtime refuses.",
    Reason.UNSUPPORTED_OPSET: "The model needs a newer ONNX Runtime; export it with an older opset or IR version.",
    Reason.EXTERNAL_DATA_MISSING: "A weights file is missing; put it beside the model, or save the model as one file.",
    Reason.PROVIDER_UNAVAILABLE: "The accelerator asked for is not there and `policy` is `Require`.",
    Reason.PORT_IN_USE: "Another process listens on the port; set `PHOENIX_HTTP_PORT` or `PHOENIX_GRPC_PORT`.",
    Reason.INVALID_SETTING: "A `PHOENIX_*` variable is unknown or wrong; the message names it.",
}


class ModelLoadError(Exception):
    """A model that cannot be loaded: a reason of the API and a message that names the next step."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class StartError(ModelLoadError):
    """The server cannot start for a reason that lies outside any model (port, settings, state folder)."""
