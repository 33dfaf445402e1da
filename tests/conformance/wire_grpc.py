"""The table's gRPC client, on messages that come from Triton's own definition and not from the server's.

protobuf keeps one pool of message types a process, and refuses two files that define `inference.ModelInferRequest`:
`tritonclient.grpc` cannot be imported beside a server's generated code, which other tests of this session import.
So nothing is imported: the file descriptors are constants inside tritonclient's generated modules, are read from their
source, and go into a private pool.
"""

import ast
import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from conformance.datatypes import DATATYPES, Array, pack, unpack
from conformance.wire import CALL_DEADLINE_S, KINDS, Client, Document, Refusal, tensor
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool

SERVICE = "inference.GRPCInferenceService"
_KIND_OF = {status: kind for kind, (_, status) in KINDS.items() if status}
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@functools.cache
def _pool() -> DescriptorPool:
    package = importlib.util.find_spec("tritonclient")
    assert package is not None, "tritonclient is not installed"
    assert package.submodule_search_locations is not None
    folder = Path(next(iter(package.submodule_search_locations))) / "grpc"
    pool = DescriptorPool()
    for module in ("model_config_pb2", "service_pb2"):
        pool.AddSerializedFile(_file_descriptor(folder / f"{module}.py"))
    return pool


def _file_descriptor(source: Path) -> bytes:
    """Return the serialised `FileDescriptorProto` that a generated module hands to `AddSerializedFile`."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        match node:
            case ast.Call(func=ast.Attribute(attr="AddSerializedFile"), args=[ast.Constant(value=bytes() as value)]):
                return value
    raise AssertionError(f"{source}: no file descriptor found")


@functools.cache
def message_type(name: str) -> Any:
    """Return the class of a message of the package `inference`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"inference.{name}"))


def plain(message: Any) -> Document:
    """Return a message as a document: every field, integers as integers, enumerations by name."""
    return {field.name: _plain_field(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain_field(of: Any, value: Any) -> Any:
    if of.message_type is not None and of.message_type.GetOptions().map_entry:
        inner = of.message_type.fields_by_name["value"]
        return {key: _plain_one(inner, value[key]) for key in value}
    return [_plain_one(of, item) for item in value] if of.is_repeated else _plain_one(of, value)


def _plain_one(of: Any, value: Any) -> Any:
    if of.message_type is not None:
        return plain(value)
    return of.enum_type.values_by_number[value].name if of.enum_type is not None else value


@dataclass
class GrpcClient(Client):
    """A server's gRPC address (`host:port`)."""

    target: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.target, _UNLIMITED)

    def close(self) -> None:
        """Close the channel."""
        self.channel.close()

    # --- calls -------------------------------------------------------------------------------------------------------

    def call_bytes(self, method: str, request: bytes, *, service: str = SERVICE, **options: Any) -> bytes:
        """Make a unary call with bytes, whatever they are; raise `Refusal` for any status but OK."""
        call = self.channel.unary_unary(f"/{service}/{method}")
        try:
            return bytes(call(request, **{"timeout": CALL_DEADLINE_S, **options}))
        except grpc.RpcError as error:
            raise _refusal(error) from None

    def call(self, method: str, request: Any, reply_type: str = "", **options: Any) -> Any:
        """Make a unary call of the inference service; the reply's type is the method's name + `Response`."""
        reply = message_type(reply_type or f"{method}Response")()
        reply.ParseFromString(self.call_bytes(method, request.SerializeToString(), **options))
        return reply

    def stream(self, requests: list[Any]) -> list[Any]:
        """Send all `requests` over one `ModelStreamInfer` and return every reply."""
        reply_type = message_type("ModelStreamInferResponse")
        call = self.channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply_type.FromString,
        )
        try:
            return list(call(iter(requests), timeout=CALL_DEADLINE_S))
        except grpc.RpcError as error:
            raise _refusal(error) from None

    def send(self, request: Any, **options: Any) -> Any:
        """Send a `ModelInferRequest` message."""
        return self.call("ModelInfer", request, **options)

    # --- inference ---------------------------------------------------------------------------------------------------

    def request(self, model: str, document: Document, version: str = "") -> Any:
        """Translate a request document into a `ModelInferRequest` with typed contents."""
        message = message_type("ModelInferRequest")(
            model_name=self.served(model), model_version=version, id=document.get("id", "")
        )
        for item in document.get("inputs", ()):
            added = message.inputs.add(name=item["name"], datatype=item["datatype"], shape=item["shape"])
            _set_parameters(added.parameters, item.get("parameters", {}))
            set_contents(added, item["data"])
        for item in document.get("outputs", ()):
            added = message.outputs.add(name=item["name"])
            _set_parameters(added.parameters, item.get("parameters", {}))
        _set_parameters(message.parameters, document.get("parameters", {}))
        return message

    def raw_request(self, model: str, inputs: dict[str, Array]) -> Any:
        """Return a `ModelInferRequest` whose tensors are raw contents."""
        message = message_type("ModelInferRequest")(model_name=self.served(model))
        for name, array in inputs.items():
            datatype = next(name for name, of in DATATYPES.items() if of.numpy == array.dtype)
            message.inputs.add(name=name, datatype=datatype, shape=array.shape)
            message.raw_input_contents.append(pack(array))
        return message

    def infer_document(self, model: str, document: Document, version: str = "") -> Document:
        """Send a request with typed contents."""
        return answer_of(self.send(self.request(model, document, version)))

    # --- the rest of the protocol ------------------------------------------------------------------------------------

    def live(self) -> bool:
        """ServerLive."""
        return bool(self.call("ServerLive", message_type("ServerLiveRequest")()).live)

    def ready(self) -> bool:
        """ServerReady."""
        return bool(self.call("ServerReady", message_type("ServerReadyRequest")()).ready)

    def model_ready(self, model: str, version: str = "") -> bool:
        """ModelReady."""
        request = message_type("ModelReadyRequest")(name=self.served(model), version=version)
        return bool(self.call("ModelReady", request).ready)

    def server_metadata(self) -> Document:
        """ServerMetadata."""
        return plain(self.call("ServerMetadata", message_type("ServerMetadataRequest")()))

    def metadata(self, model: str, version: str = "") -> Document:
        """ModelMetadata."""
        request = message_type("ModelMetadataRequest")(name=self.served(model), version=version)
        return plain(self.call("ModelMetadata", request))

    def config(self, model: str, version: str = "") -> Document:
        """ModelConfig."""
        request = message_type("ModelConfigRequest")(name=self.served(model), version=version)
        return dict(plain(self.call("ModelConfig", request))["config"])

    def statistics(self, model: str = "", version: str = "") -> list[Document]:
        """ModelStatistics."""
        request = message_type("ModelStatisticsRequest")(name=self.served(model), version=version)
        return list(plain(self.call("ModelStatistics", request))["model_stats"])

    def index(self, *, ready_only: bool = False) -> list[Document]:
        """RepositoryIndex."""
        request = message_type("RepositoryIndexRequest")(ready=ready_only)
        return list(plain(self.call("RepositoryIndex", request))["models"])

    def load(self, model: str, parameters: Document | None = None) -> None:
        """RepositoryModelLoad."""
        request = message_type("RepositoryModelLoadRequest")(model_name=self.served(model))
        _set_parameters(request.parameters, parameters or {})
        self.call("RepositoryModelLoad", request)

    def unload(self, model: str) -> None:
        """RepositoryModelUnload."""
        request = message_type("RepositoryModelUnloadRequest")(model_name=self.served(model))
        self.call("RepositoryModelUnload", request)

    def log_settings(self) -> Document:
        """LogSettings that changes nothing."""
        return self.update_log_settings({})

    def update_log_settings(self, settings: Document) -> Document:
        """LogSettings."""
        request = message_type("LogSettingsRequest")()
        for key, value in settings.items():
            choice = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(request.settings[key], choice, value)
        reply = self.call("LogSettings", request)
        return {key: getattr(of, of.WhichOneof("parameter_choice")) for key, of in reply.settings.items()}


def set_contents(item: Any, data: list[Any]) -> None:
    """Fill an input's typed contents with flat data; FP16 has no field, so it goes where FP32 does."""
    values = [value.encode() if isinstance(value, str) else value for value in data]
    name = DATATYPES[item.datatype].contents if item.datatype in DATATYPES else ""
    getattr(item.contents, name or "fp32_contents").extend(values)


def answer_of(reply: Any) -> Document:
    """Return a `ModelInferResponse` as the REST document, whichever contents it has."""
    outputs = []
    for index, item in enumerate(reply.outputs):
        shape = list(item.shape)
        if reply.raw_output_contents:
            assert not item.HasField("contents"), f"output '{item.name}' has both raw and typed contents"
            assert len(reply.raw_output_contents) == len(reply.outputs)
            data = unpack(reply.raw_output_contents[index], item.datatype, shape).reshape(-1).tolist()
        else:
            fields = {field.name: value for field, value in item.contents.ListFields()}
            assert set(fields) <= {DATATYPES[item.datatype].contents}, f"'{item.name}' is in {set(fields)}"
            values = next(iter(fields.values()), [])
            data = [value.decode() if isinstance(value, bytes) else value for value in values]
            assert len(data) == int(np.prod(shape)), f"output '{item.name}': {len(data)} elements for {shape}"
        outputs.append(tensor(item.name, item.datatype, shape, data))
    return {
        "model_name": reply.model_name,
        "model_version": reply.model_version,
        "id": reply.id,
        "outputs": outputs,
    }


def _set_parameters(parameters: Any, values: Document) -> None:
    for key, value in values.items():
        choice = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(parameters[key], choice, value)


def _refusal(error: grpc.RpcError) -> Refusal:
    code = error.code().name  # type: ignore[attr-defined]
    return Refusal(_KIND_OF.get(code, code), code, error.details() or "")  # type: ignore[attr-defined]
