"""The model repository extension: what is there, load, unload."""

from conformance.models import MODELS
from conformance.table import PHOENIX, REPOSITORY, REST, rule
from conformance.wire import Client, data_of, floats
from conformance.wire_rest import RestClient

_INDEX = f"{REPOSITORY}, Index"
_LOAD = f"{REPOSITORY}, Load"
_UNLOAD = f"{REPOSITORY}, Unload"


@rule("repository.index", _INDEX)
def index(server: Client) -> None:
    """The index lists every model and version with its state, which is READY for what is served."""
    states = {(item["name"], item["version"]): item["state"] for item in server.index()}
    for model in MODELS:
        if model.name not in server.missing:
            assert states[model.name, model.version] == "READY"


@rule("repository.index-fields", _INDEX)
def index_fields(server: Client) -> None:
    """An entry has name, version, state and reason, all strings; the state is one of the extension's."""
    for item in server.index():
        assert set(item) <= {"name", "version", "state", "reason"}
        assert all(isinstance(value, str) for value in item.values())
        assert item["state"] in ("UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING")


@rule("repository.index-ready", _INDEX)
def index_ready(server: Client) -> None:
    """With `ready: true` the index lists only what is READY."""
    server.unload("oip-spare")
    try:
        every, ready = server.index(), server.index(ready_only=True)
    finally:
        server.load("oip-spare")
    assert "oip-spare" in {item["name"] for item in every}
    assert "oip-spare" not in {item["name"] for item in ready}
    assert {item["state"] for item in ready} == {"READY"}


@rule("repository.index-without-body", _INDEX, on=REST)
def index_without_body(server: RestClient) -> None:
    """The index may be asked for with an empty body, an empty object, or under a repository's name."""
    expected = server.index()
    assert server.post("/v2/repository/index").document == expected
    assert server.post("/v2/repository/index", {}).document == expected
    assert server.post("/v2/repository/models/index", {}).document == expected


@rule("repository.unload", _UNLOAD)
def unload(server: Client) -> None:
    """An unloaded model is UNAVAILABLE in the index and refuses inferences; loaded again it answers."""
    server.unload("oip-spare")
    try:
        assert {item["state"] for item in server.index() if item["name"] == "oip-spare"} == {"UNAVAILABLE"}
        with server.refused("unavailable"):
            server.infer("oip-spare", floats("x", 1.0))
        with server.refused("unavailable"):
            server.metadata("oip-spare")
    finally:
        server.load("oip-spare")
    assert {item["state"] for item in server.index() if item["name"] == "oip-spare"} == {"READY"}
    assert data_of(server.infer("oip-spare", floats("x", 1.0)), "y") == [-1.0]


@rule("repository.unload-versions", _UNLOAD)
def unload_versions(server: Client) -> None:
    """Unloading a model unloads all its versions; loading it loads them all."""
    server.unload("oip-version")
    try:
        states = [item["state"] for item in server.index() if item["name"] == "oip-version"]
        assert states == ["UNAVAILABLE", "UNAVAILABLE"]
    finally:
        server.load("oip-version")
    for version in ("1", "2"):
        answer = server.infer("oip-version", floats("x", 0.0), version=version)
        assert data_of(answer, "y") == [float(version)]


@rule("repository.unload-twice", _UNLOAD, profile="phoenix")
def unload_twice(server: Client) -> None:
    """To unload what is not loaded, and to load what is, changes nothing and is no error."""
    server.unload("oip-spare")
    server.unload("oip-spare")
    server.load("oip-spare")
    server.load("oip-spare")
    assert data_of(server.infer("oip-spare", floats("x", 1.0)), "y") == [-1.0]


@rule("repository.load-unknown", _LOAD)
def load_unknown(server: Client) -> None:
    """Loading a model that nobody declared is refused, and the message names it."""
    with server.refused("not-found") as refused:
        server.load("oip-nobody-made-this")
    assert "oip-nobody-made-this" in refused.message


@rule("repository.unload-unknown", _UNLOAD, profile="phoenix")
def unload_unknown(server: Client) -> None:
    """Unloading a model that nobody declared is refused."""
    with server.refused("not-found"):
        server.unload("oip-nobody-made-this")


@rule("repository.load-override", PHOENIX, profile="phoenix")
def load_override(server: Client) -> None:
    """A load that brings a configuration of its own is refused: the manifest is the only one."""
    with server.refused("invalid") as refused:
        server.load("oip-spare", {"config": "{}"})
    assert "config" in refused.message
    assert data_of(server.infer("oip-spare", floats("x", 1.0)), "y") == [-1.0]


@rule("repository.named", _LOAD, on=REST)
def named(server: RestClient) -> None:
    """Load and unload may stand under a repository's name; their success is 200 with a JSON body."""
    server.served("oip-spare")
    try:
        unloaded = server.post(
            "/v2/repository/main/models/oip-spare/unload", {"parameters": {"unload_dependents": False}}
        )
    finally:
        loaded = server.post("/v2/repository/main/models/oip-spare/load", {})
    if server.is_strict:
        assert unloaded.document == {"name": "oip-spare", "unload": True}
        assert loaded.document == {"name": "oip-spare", "load": True}


@rule("repository.parameters-not-object", REPOSITORY, on=REST)
def parameters_not_object(server: RestClient) -> None:
    """Parameters of a load or unload that are no object are refused; null means none."""
    path = f"/v2/repository/models/{server.served('oip-spare')}"
    try:
        for operation in ("unload", "load"):
            for parameters in (7, "fast", [1], True):
                with server.refused("invalid"):
                    server.post(f"{path}/{operation}", {"parameters": parameters})
    finally:
        server.post(f"{path}/load", {"parameters": None})


@rule("repository.malformed", REPOSITORY, on=REST)
def malformed(server: RestClient) -> None:
    """A body that is not a JSON object is refused."""
    for path in ("index", "models/oip-spare/load", "models/oip-spare/unload"):
        for body in (b"{", b"[]", b"7"):
            with server.refused("invalid"):
                server.http("POST", f"/v2/repository/{path}", body).accepted()
    assert server.model_ready("oip-spare")
