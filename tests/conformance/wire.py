"""What both clients of the table have in common: neutral calls, and refusals in one vocabulary.

Requests and answers are the documents of the REST protocol (`{"name", "datatype", "shape", "data"}`); the gRPC client
translates them to messages and back. Rules that are about one transport's own form use that client's lower calls.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance.datatypes import DATATYPES, Array

Document = dict[str, Any]
CALL_DEADLINE_S = 30


class Refusal(Exception):
    """An answer that says no. `kind` is a word of `KINDS`, `code` the transport's own, `message` the server's."""

    def __init__(self, kind: str, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.kind = kind
        self.code = code
        self.message = message


# Kind of refusal -> HTTP status, gRPC status.
KINDS = {
    "invalid": (400, "INVALID_ARGUMENT"),
    "not-found": (404, "NOT_FOUND"),
    "wrong-method": (405, ""),
    "too-large": (413, "RESOURCE_EXHAUSTED"),
    "unsupported-encoding": (415, ""),
    "headers-too-large": (431, ""),
    "failed": (500, "INTERNAL"),
    "unsupported": (501, "UNIMPLEMENTED"),
    "unavailable": (503, "UNAVAILABLE"),
    "deadline": (504, "DEADLINE_EXCEEDED"),
}


@dataclass
class Refused:
    """Filled in when the block of `Client.refused` has ended."""

    kind: str = ""
    code: str = ""
    message: str = ""


@dataclass
class Client(ABC):
    """A server over one transport.

    `is_strict`: refusals must have exactly the code of `KINDS` (profile phoenix); else any client error will do.
    `folder`: where the models lie, if the check may change them. `missing`: conformance models that are not served.
    """

    is_strict: bool = True
    folder: Path | None = None
    missing: frozenset[str] = field(default_factory=frozenset)

    @contextlib.contextmanager
    def refused(self, kind: str) -> Iterator[Refused]:
        """Expect the block to be refused, with the code for `kind`, and a message that is no stack trace."""
        caught = Refused()
        try:
            yield caught
        except Refusal as refusal:
            caught.kind, caught.code, caught.message = refusal.kind, refusal.code, refusal.message
        assert caught.code, f"the request was answered; expected a refusal: {kind}"
        said = f"{caught.code}: {caught.message}"
        if self.is_strict:
            assert caught.kind == kind, f"expected {kind} {KINDS[kind]}, got {said}"
        else:
            assert kind == "failed" or caught.kind != "failed", f"expected a client error, got {said}"
        assert caught.message, "the refusal has no message"
        for trace in ("Traceback", 'File "', ".py:", ".cc:", "site-packages"):
            assert trace not in caught.message, f"the message shows the server's insides: {caught.message}"

    def served(self, model: str) -> str:
        """Return `model`; skip the rule if the server does not serve that conformance model."""
        if model in self.missing:
            pytest.skip(f"the server does not serve the conformance model {model}")
        return model

    @property
    def models_folder(self) -> Path:
        """The folder of the models, for rules with `needs_folder`."""
        assert self.folder is not None
        return self.folder

    def infer(self, model: str, *inputs: Document, version: str = "", **members: Any) -> Document:
        """Infer and return the answer's document; `members` (`id`, `outputs`, `parameters`) join the request's."""
        return self.infer_document(model, {"inputs": list(inputs), **members}, version)

    @abstractmethod
    def infer_document(self, model: str, document: Document, version: str = "") -> Document:
        """Send a whole request document; return the answer's. Raises `Refusal`, as every call here does."""

    @abstractmethod
    def live(self) -> bool: ...

    @abstractmethod
    def ready(self) -> bool: ...

    @abstractmethod
    def model_ready(self, model: str, version: str = "") -> bool: ...

    @abstractmethod
    def server_metadata(self) -> Document: ...

    @abstractmethod
    def metadata(self, model: str, version: str = "") -> Document: ...

    @abstractmethod
    def config(self, model: str, version: str = "") -> Document: ...

    @abstractmethod
    def statistics(self, model: str = "", version: str = "") -> list[Document]: ...

    @abstractmethod
    def index(self, *, ready_only: bool = False) -> list[Document]: ...

    @abstractmethod
    def load(self, model: str, parameters: Document | None = None) -> None: ...

    @abstractmethod
    def unload(self, model: str) -> None: ...

    @abstractmethod
    def log_settings(self) -> Document: ...

    @abstractmethod
    def update_log_settings(self, settings: Document) -> Document: ...


def tensor(name: str, datatype: str, shape: Sequence[int], data: Any) -> Document:
    """Return a tensor's document; `data` as it shall travel, flat or nested."""
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


def tensor_of(name: str, array: Array) -> Document:
    """Return the document of an array, its data flat."""
    datatype = next(name for name, of in DATATYPES.items() if of.numpy == array.dtype)
    return tensor(name, datatype, array.shape, array.reshape(-1).tolist())


def floats(name: str, *values: float) -> Document:
    """Return an FP32 vector."""
    return tensor(name, "FP32", [len(values)], list(values))


def output(answer: Document, name: str) -> Document:
    """Return the output of that name."""
    found = [item for item in answer["outputs"] if item["name"] == name]
    assert len(found) == 1, f"expected one output '{name}', got {[item['name'] for item in answer['outputs']]}"
    return dict(found[0])


def data_of(answer: Document, name: str) -> list[Any]:
    """Return an output's data, flat."""
    return list(output(answer, name)["data"])


def array_of(item: Document) -> Array:
    """Return a tensor's document as an array of its datatype."""
    array = np.array(item["data"], DATATYPES[item["datatype"]].numpy)
    return array.reshape(item["shape"])
