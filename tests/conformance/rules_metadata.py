"""Metadata of the server and of models, and Triton's model configuration."""

from conformance.datatypes import DATATYPES
from conformance.models import MODELS
from conformance.table import BINARY, CONFIGURATION, KSERVE, LOGGING, OIP_GRPC, OIP_REST, PHOENIX, REST, rule
from conformance.wire import Client, Document, Refusal
from conformance.wire_rest import RestClient

# https://github.com/triton-inference-server/server/tree/main/docs/protocol
EXTENSIONS = {
    "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
    "model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters",
    "statistics", "trace", "logging",
}  # fmt: skip
_TENSORS = {model.name: model for model in MODELS}


@rule("metadata.server", f"{OIP_REST}, Server Metadata")
def server_metadata(server: Client) -> None:
    """The server tells its name, its version and its extensions, all strings."""
    metadata = server.server_metadata()
    assert set(metadata) == {"name", "version", "extensions"}
    assert metadata["name"]
    assert metadata["version"]
    assert all(isinstance(name, str) for name in metadata["extensions"])


@rule("metadata.extensions-known", f"{OIP_REST}, Server Metadata")
def extensions_known(server: Client) -> None:
    """Extensions are advertised once each, under the names that clients compare with."""
    extensions = server.server_metadata()["extensions"]
    assert len(set(extensions)) == len(extensions)
    assert set(extensions) <= EXTENSIONS


@rule("metadata.extensions-work", PHOENIX, profile="phoenix", on=REST)
def extensions_work(server: RestClient) -> None:
    """Exactly the extensions that work are advertised."""
    probes = {
        "model_repository": ("POST", "/v2/repository/index"),
        "statistics": ("GET", "/v2/models/stats"),
        "model_configuration": ("GET", "/v2/models/oip-add/config"),
        "logging": ("GET", "/v2/logging"),
        "trace": ("GET", "/v2/trace/setting"),
        "system_shared_memory": ("GET", "/v2/systemsharedmemory/status"),
        "cuda_shared_memory": ("GET", "/v2/cudasharedmemory/status"),
    }
    advertised = set(server.server_metadata()["extensions"])
    answered = {name for name, probe in probes.items() if server.http(*probe).status == 200}
    assert advertised & set(probes) == answered


@rule("metadata.model", f"{OIP_REST}, Model Metadata")
def model_metadata(server: Client) -> None:
    """A model has name, versions, platform, inputs and outputs; a tensor has name, datatype and shape."""
    metadata = server.metadata("oip-add")
    assert metadata["name"] == "oip-add"
    assert metadata["versions"] == ["1"]
    assert metadata["platform"]
    assert [_tensor(item) for item in metadata["inputs"]] == [("a", "FP32", [2, 3]), ("b", "FP32", [2, 3])]
    assert [_tensor(item) for item in metadata["outputs"]] == [("sum", "FP32", [2, 3])]


@rule("metadata.datatype", f"{OIP_REST}, Tensor Data Types", each=DATATYPES)
def datatype(server: Client, name: str) -> None:
    """The ONNX type of a tensor is told as {each}."""
    metadata = server.metadata(f"oip-identity-{name.lower()}")
    assert [item["datatype"] for item in (*metadata["inputs"], *metadata["outputs"])] == [name, name]


@rule("metadata.dynamic-dimension", f"{OIP_REST}, Model Metadata")
def dynamic_dimension(server: Client) -> None:
    """A dimension of any size is told as -1."""
    assert _tensor(server.metadata("oip-cube")["inputs"][0]) == ("x", "INT32", [-1, -1, -1])
    assert _tensor(server.metadata("oip-many")["inputs"][0]) == ("x", "FP32", [-1, 2])


@rule("metadata.scalar", f"{OIP_REST}, Model Metadata")
def scalar(server: Client) -> None:
    """A scalar has the shape []."""
    assert _tensor(server.metadata("oip-scalar")["inputs"][0]) == ("x", "FP32", [])
    assert _tensor(server.metadata("oip-total")["outputs"][0]) == ("total", "FP32", [])


@rule("metadata.order", f"{OIP_REST}, Model Metadata")
def order(server: Client) -> None:
    """Inputs and outputs are told in the model's order."""
    assert [item["name"] for item in server.metadata("oip-many")["outputs"]] == ["doubled", "negated", "integer"]


@rule("metadata.versions", f"{OIP_REST}, Model Metadata")
def versions(server: Client) -> None:
    """All versions of a model are told, as strings."""
    assert sorted(server.metadata("oip-version")["versions"]) == ["1", "2"]


@rule("metadata.of-version", f"{OIP_REST}, Model Metadata")
def of_version(server: Client) -> None:
    """Metadata can be asked of one version."""
    assert server.metadata("oip-version", "1")["name"] == "oip-version"


@rule("metadata.unknown-model", f"{OIP_REST}, Model Metadata")
def unknown_model(server: Client) -> None:
    """Metadata of an unknown model is refused as not found, and the message names it."""
    with server.refused("not-found") as refused:
        server.metadata("oip-nobody-made-this")
    assert "oip-nobody-made-this" in refused.message


@rule("metadata.unknown-version", f"{OIP_REST}, Model Metadata")
def unknown_version(server: Client) -> None:
    """Metadata of an unknown version is refused as not found."""
    with server.refused("not-found"):
        server.metadata("oip-version", "3")


@rule("metadata.content-type", f"{OIP_REST}, HTTP/REST", on=REST)
def content_type(server: RestClient) -> None:
    """Documents come as application/json."""
    for path in ("/v2", "/v2/models/oip-add"):
        assert server.http("GET", path).headers["content-type"].startswith("application/json")


@rule("metadata.model-list", KSERVE, on=REST, profile="phoenix")
def model_list(server: RestClient) -> None:
    """GET /v2/models lists the names of the loaded models, each once."""
    names = server.get("/v2/models")["models"]
    assert len(set(names)) == len(names)
    assert set(_TENSORS) - server.missing <= set(names)


@rule("metadata.all-models", f"{OIP_GRPC}, Model Metadata")
def all_models(server: Client) -> None:
    """Metadata of every conformance model agrees with its graph."""
    for name, model in _TENSORS.items():
        metadata = server.metadata(name)
        assert [_tensor(item) for item in metadata["inputs"]] == [(t.name, t.datatype, t.shape) for t in model.inputs]
        assert [_tensor(item) for item in metadata["outputs"]] == [(t.name, t.datatype, t.shape) for t in model.outputs]


@rule("config.model", f"{CONFIGURATION}, Model Configuration")
def config_model(server: Client) -> None:
    """A model's configuration has its name, a platform or backend, and its tensors by Triton's type names."""
    config = server.config("oip-add")
    assert config["name"] == "oip-add"
    assert config["platform"] or config["backend"]
    assert [(item["name"], item["data_type"]) for item in config["input"]] == [("a", "TYPE_FP32"), ("b", "TYPE_FP32")]
    assert [item["name"] for item in config["output"]] == ["sum"]


@rule("config.dims", f"{CONFIGURATION}, Model Configuration")
def config_dims(server: Client) -> None:
    """With a `max_batch_size` dims leave out the first dimension; with 0 they are the metadata's shape."""
    for name in ("oip-add", "oip-many", "oip-cube", "oip-scalar", "oip-total"):
        config, metadata = server.config(name), server.metadata(name)
        skipped = 1 if config["max_batch_size"] > 0 else 0
        for of_config, of_metadata in (("input", "inputs"), ("output", "outputs")):
            dims = [list(item["dims"]) for item in config[of_config]]
            assert dims == [list(item["shape"])[skipped:] for item in metadata[of_metadata]]


@rule("config.batching", f"{CONFIGURATION}, Maximum Batch Size")
def config_batching(server: Client) -> None:
    """A model whose output has no rows has `max_batch_size` 0."""
    assert server.config("oip-total")["max_batch_size"] == 0
    assert server.config("oip-scalar")["max_batch_size"] == 0


@rule("config.datatype", f"{CONFIGURATION}, Datatypes", each=DATATYPES)
def config_datatype(server: Client, name: str) -> None:
    """The configuration spells {each} as Triton's model_config.proto does; BYTES is TYPE_STRING."""
    config = server.config(f"oip-identity-{name.lower()}")
    assert config["input"][0]["data_type"] == ("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}")


@rule("config.of-version", f"{CONFIGURATION}, Model Configuration")
def config_of_version(server: Client) -> None:
    """The configuration can be asked of one version."""
    assert server.config("oip-version", "2")["name"] == "oip-version"


@rule("config.unknown-model", f"{CONFIGURATION}, Model Configuration")
def config_unknown_model(server: Client) -> None:
    """The configuration of an unknown model is refused as not found."""
    with server.refused("not-found"):
        server.config("oip-nobody-made-this")


@rule("logging.get", f"{LOGGING}, Get Log Settings")
def logging_get(server: Client) -> None:
    """The log settings have the extension's names and types."""
    settings = server.log_settings()
    assert {type(settings[name]) for name in ("log_info", "log_warning", "log_error")} == {bool}
    assert type(settings["log_verbose_level"]) is int
    assert isinstance(settings["log_file"], str)
    assert isinstance(settings["log_format"], str)


@rule("logging.update", f"{LOGGING}, Update Log Settings")
def logging_update(server: Client) -> None:
    """An update answers with all settings, changes what it names and leaves the rest."""
    before = server.log_settings()
    wanted = {"log_verbose_level": before["log_verbose_level"] + 1}
    try:
        assert server.update_log_settings(wanted) == {**before, **wanted}
        assert server.log_settings() == {**before, **wanted}
    finally:
        server.update_log_settings({"log_verbose_level": before["log_verbose_level"]})
    assert server.log_settings() == before


@rule("logging.update-boolean", f"{LOGGING}, Update Log Settings")
def logging_update_boolean(server: Client) -> None:
    """Information messages can be switched off and on again."""
    before = server.log_settings()
    try:
        assert server.update_log_settings({"log_info": not before["log_info"]})["log_info"] is not before["log_info"]
    finally:
        server.update_log_settings({"log_info": before["log_info"]})
    assert server.log_settings() == before


@rule("logging.applied-or-refused", PHOENIX, profile="phoenix", each=("log_info", "log_warning", "log_error"))
def logging_applied_or_refused(server: Client, name: str) -> None:
    """{each} is switched off when that is asked, or the request is refused; it is never accepted in vain."""
    before = server.log_settings()
    try:
        is_on = server.update_log_settings({name: False})[name]
    except Refusal as refusal:
        is_on = refusal.kind != "invalid"
    finally:
        server.update_log_settings({key: value for key, value in before.items() if type(value) is bool})
    assert not is_on
    assert server.log_settings() == before


@rule("logging.unknown-setting", f"{LOGGING}, Update Log Settings")
def logging_unknown_setting(server: Client) -> None:
    """An unknown setting is refused, and nothing changes."""
    before = server.log_settings()
    with server.refused("invalid") as refused:
        server.update_log_settings({"log_poetry": True})
    assert "log_poetry" in refused.message
    assert server.log_settings() == before


@rule("logging.wrong-type", f"{LOGGING}, Update Log Settings")
def logging_wrong_type(server: Client) -> None:
    """A setting of the wrong type is refused, and nothing changes."""
    before = server.log_settings()
    with server.refused("invalid"):
        server.update_log_settings({"log_verbose_level": "high"})
    assert server.log_settings() == before


@rule("metadata.binary-extension", f"{BINARY}, Binary Tensor Data Extension")
def binary_extension(server: Client) -> None:
    """A server that takes binary tensors says so."""
    assert "binary_tensor_data" in server.server_metadata()["extensions"]


def _tensor(item: Document) -> tuple[str, str, list[int]]:
    return item["name"], item["datatype"], list(item["shape"])
