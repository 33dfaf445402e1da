"""Health: who answers when, with which body and code."""

import threading
import time

from conformance.table import BOTH, KSERVE, OIP_GRPC, OIP_REST, PHOENIX, REST, rule
from conformance.wire import CALL_DEADLINE_S, Client, Refusal, data_of, floats
from conformance.wire_rest import RestClient


@rule("health.live", f"{OIP_REST}, Health")
def server_is_live(server: Client) -> None:
    """A running server is live."""
    assert server.live()


@rule("health.ready", f"{OIP_REST}, Health")
def server_is_ready(server: Client) -> None:
    """A server with all models loaded is ready."""
    assert server.ready()


@rule("health.model-ready", f"{OIP_REST}, Health")
def model_is_ready(server: Client) -> None:
    """A loaded model is ready."""
    assert server.model_ready("oip-add")


@rule("health.model-ready-version", f"{OIP_REST}, Health")
def model_version_is_ready(server: Client) -> None:
    """Each loaded version of a model is ready under its own name."""
    assert server.model_ready("oip-version", "1")
    assert server.model_ready("oip-version", "2")


@rule("health.live-body", f"{OIP_REST}, Server Live JSON", on=REST)
def live_body(server: RestClient) -> None:
    """The body of the live endpoint is {"live": true}."""
    reply = server.http("GET", "/v2/health/live").accepted()
    assert reply.document == {"live": True}
    assert reply.headers["content-type"].startswith("application/json")


@rule("health.ready-body", KSERVE, on=REST, profile="phoenix")
def ready_body(server: RestClient) -> None:
    """The body of the ready endpoint has "ready", which KServe's client reads, and "live", as in the protocol."""
    assert server.get("/v2/health/ready") == {"ready": True, "live": True}


@rule("health.model-ready-body", f"{OIP_REST}, Model Ready JSON", on=REST)
def model_ready_body(server: RestClient) -> None:
    """The body of a model's ready endpoint is {"name", "ready"}."""
    assert server.get("/v2/models/oip-add/ready") == {"name": "oip-add", "ready": True}


@rule("health.unknown-model", f"{OIP_GRPC}, Model Ready")
def unknown_model(server: Client) -> None:
    """Whether an unknown model is ready is refused as not found."""
    with server.refused("not-found"):
        server.model_ready("oip-nobody-made-this")


@rule("health.unknown-version", f"{OIP_GRPC}, Model Ready")
def unknown_version(server: Client) -> None:
    """Whether an unknown version of a model is ready is refused as not found."""
    with server.refused("not-found"):
        server.model_ready("oip-version", "3")


@rule("health.not-ready-body", PHOENIX, on=REST, profile="phoenix")
def not_ready_body(server: RestClient) -> None:
    """A model that is not loaded answers 503 with {"name", "ready": false}, as probes and load balancers want it."""
    server.unload("oip-spare")
    try:
        reply = server.http("GET", "/v2/models/oip-spare/ready")
    finally:
        server.load("oip-spare")
    assert reply.status == 503
    assert reply.document == {"name": "oip-spare", "ready": False}


@rule("health.server-not-ready-body", PHOENIX, on=REST, profile="phoenix", needs_folder=True)
def server_not_ready_body(server: RestClient) -> None:
    """A server whose model failed to load answers 503 with {"ready": false, "live": true}."""
    server.unload("oip-spare")
    try:
        with _broken(server), server.refused("invalid"):
            server.load("oip-spare")
        reply = server.http("GET", "/v2/health/ready")
    finally:
        server.load("oip-spare")
    assert reply.status == 503
    assert reply.document == {"ready": False, "live": True}


@rule("health.unloaded", PHOENIX, profile="phoenix")
def unloaded(server: Client) -> None:
    """A model that was unloaded by request is not ready; the server stays ready, because that is what was asked."""
    server.unload("oip-spare")
    try:
        assert not server.model_ready("oip-spare")
        assert server.ready()
        with server.refused("unavailable"):
            server.infer("oip-spare", floats("x", 1.0))
    finally:
        server.load("oip-spare")
    assert server.model_ready("oip-spare")


@rule("health.during-load", PHOENIX, on=BOTH, profile="phoenix")
def during_load(server: Client) -> None:
    """While a model loads it is LOADING and refuses, and the server is live but not ready; then all is well."""
    model = server.served("oip-slow")
    server.unload(model)
    failures: list[Refusal] = []

    def load() -> None:
        try:
            server.load(model)
        except Refusal as refusal:
            failures.append(refusal)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        seen = False
        end = time.monotonic() + CALL_DEADLINE_S
        while not seen and loading.is_alive() and time.monotonic() < end:
            state = next(item["state"] for item in server.index() if item["name"] == model)
            if state != "LOADING":
                continue
            assert server.live()
            is_ready, is_model_ready = server.ready(), server.model_ready(model)
            with_inference = _refusal_of(server, model)
            still = next(item["state"] for item in server.index() if item["name"] == model)
            if still == "LOADING":  # else it came up between the questions, and their answers say nothing
                seen = True
                assert not is_ready
                assert not is_model_ready
                assert with_inference == "unavailable"
    finally:
        loading.join()
    assert not failures
    assert seen, "the model was never seen LOADING"
    assert server.ready()
    assert data_of(server.infer(model, floats("x", 1.0, -2.0)), "y") == [1.0, -2.0]


@rule("health.failed-load-keeps-serving", PHOENIX, profile="phoenix", needs_folder=True)
def failed_load_keeps_serving(server: Client) -> None:
    """A load that fails says why, and leaves what served before serving, and the server ready."""
    with _broken(server), server.refused("invalid") as refused:
        server.load("oip-spare")
    assert "oip-spare" in refused.message
    assert server.ready()
    assert server.model_ready("oip-spare")
    assert data_of(server.infer("oip-spare", floats("x", 1.0)), "y") == [-1.0]
    server.load("oip-spare")


@rule("health.after-failed-load", PHOENIX, profile="phoenix", needs_folder=True)
def after_failed_load(server: Client) -> None:
    """A model that failed to load is UNAVAILABLE, the index has the reason, the server is live but not ready."""
    server.unload("oip-spare")
    try:
        with _broken(server), server.refused("invalid"):
            server.load("oip-spare")
        assert server.live()
        assert not server.ready()
        assert not server.model_ready("oip-spare")
        entry = next(item for item in server.index() if item["name"] == "oip-spare")
        assert entry["state"] == "UNAVAILABLE"
        assert "DigestMismatch" in entry["reason"]
    finally:
        server.load("oip-spare")
    assert server.ready()


def _refusal_of(server: Client, model: str) -> str:
    try:
        server.infer(model, floats("x", 1.0))
    except Refusal as refusal:
        return refusal.kind
    return ""


class _broken:
    """The file of `oip-spare` is damaged within the block."""

    def __init__(self, server: Client) -> None:
        self._file = server.models_folder / "oip-spare-1.onnx"

    def __enter__(self) -> None:
        self._good = self._file.read_bytes()
        self._file.write_bytes(self._good[:-1])

    def __exit__(self, *_: object) -> None:
        self._file.write_bytes(self._good)
