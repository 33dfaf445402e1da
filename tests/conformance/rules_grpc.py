"""What only gRPC has: typed and raw contents, statuses, streams, health, reflection."""

import threading
from typing import Any

import grpc
import numpy as np
from conformance.datatypes import DATATYPES, assert_same, pack, unpack
from conformance.models import LIMITED_BYTES
from conformance.table import GRPC, GRPC_HEALTH, GRPC_REFLECTION, OIP_GRPC, PHOENIX, TRITON_GRPC, rule
from conformance.wire import CALL_DEADLINE_S, Refusal, array_of, data_of, floats, output, tensor, tensor_of
from conformance.wire_grpc import SERVICE, GrpcClient, answer_of, message_type

_CONTENTS = f"{OIP_GRPC}, InferTensorContents"
_RAW = f"{OIP_GRPC}, raw_input_contents"
_STATUS = f"{OIP_GRPC}, Inference Protocol"
_TYPED = [name for name, of in DATATYPES.items() if of.contents]
_NARROW = ("INT8", "INT16", "UINT8", "UINT16")
X = np.array([[1.5, -2.5]], np.float32)


@rule("grpc.typed", _CONTENTS, on=GRPC, each=_TYPED)
def typed(server: GrpcClient, datatype: str) -> None:
    """{each} tensors in their typed field come back in the same field, bit for bit."""
    sample = DATATYPES[datatype].sample
    request = server.request(f"oip-identity-{datatype.lower()}", {"inputs": [tensor_of("x", sample)]})
    reply = server.send(request)
    assert not reply.raw_output_contents
    assert_same(array_of(output(answer_of(reply), "y")), sample)


@rule("grpc.raw", _RAW, on=GRPC, each=DATATYPES)
def raw(server: GrpcClient, datatype: str) -> None:
    """{each} tensors as raw contents come back as raw contents, bit for bit."""
    sample = DATATYPES[datatype].sample
    reply = server.send(server.raw_request(f"oip-identity-{datatype.lower()}", {"x": sample}))
    assert not reply.outputs[0].HasField("contents")
    assert_same(unpack(reply.raw_output_contents[0], datatype, list(reply.outputs[0].shape)), sample)


@rule("grpc.raw-several", _RAW, on=GRPC)
def raw_several(server: GrpcClient) -> None:
    """Raw contents stand in the order of the request's inputs, and come back in the order of the outputs."""
    top, bottom = np.array([3, 1], np.float32), np.array([2, 4], np.float32)
    for inputs in ({"a": top, "b": bottom}, {"b": bottom, "a": top}):
        assert data_of(answer_of(server.send(server.raw_request("oip-divide", inputs))), "ratio") == [1.5, 0.25]
    answer = answer_of(server.send(server.raw_request("oip-many", {"x": X})))
    assert [item["data"] for item in answer["outputs"]] == [[3.0, -5.0], [-1.5, 2.5], [1, -2]]


@rule("grpc.raw-and-typed", _RAW, on=GRPC)
def raw_and_typed(server: GrpcClient) -> None:
    """A request with both raw and typed contents is refused."""
    request = server.request("oip-many", {"inputs": [tensor_of("x", X)]})
    request.raw_input_contents.append(pack(X))
    with server.refused("invalid"):
        server.send(request)


@rule("grpc.raw-not-all", _RAW, on=GRPC)
def raw_not_all(server: GrpcClient) -> None:
    """Raw contents hold every input: fewer or more than inputs are refused."""
    request = server.raw_request("oip-divide", {"a": X[0], "b": X[0]})
    for count in (1, 3):
        del request.raw_input_contents[:]
        request.raw_input_contents.extend([pack(X[0])] * count)
        with server.refused("invalid"):
            server.send(request)


@rule("grpc.raw-size", _RAW, on=GRPC)
def raw_size(server: GrpcClient) -> None:
    """Raw contents that are not exactly the bytes of shape and datatype are refused."""
    request = server.raw_request("oip-many", {"x": X})
    for blob in (pack(X)[:-1], pack(X) + b"\x00", b"", pack(X) * 2):
        request.raw_input_contents[0] = blob
        with server.refused("invalid"):
            server.send(request)


@rule("grpc.raw-text", _RAW, on=GRPC)
def raw_text(server: GrpcClient) -> None:
    """Raw BYTES have a 4-byte length before each element; lengths that overrun, or elements left over, are refused."""
    request = server.raw_request("oip-text", {"x": np.array(["a"], dtype=object)})
    for blob in (b"\x02\x00\x00\x00a", b"\x01\x00\x00", pack(np.array(["a", "b"], dtype=object)), b"", b"a"):
        request.raw_input_contents[0] = blob
        with server.refused("invalid"):
            server.send(request)


@rule("grpc.typed-wrong-field", _CONTENTS, on=GRPC)
def typed_wrong_field(server: GrpcClient) -> None:
    """Data in another datatype's field is refused, also beside data in the right one."""
    request = server.request("oip-many", {"inputs": [tensor_of("x", X)]})
    request.inputs[0].contents.fp64_contents.extend([1.5, -2.5])
    with server.refused("invalid"):
        server.send(request)
    request.inputs[0].contents.ClearField("fp32_contents")
    with server.refused("invalid"):
        server.send(request)


@rule("grpc.typed-range", _CONTENTS, on=GRPC, each=_NARROW)
def typed_range(server: GrpcClient, datatype: str) -> None:
    """{each} travels in a wider field; a number outside its range is refused and does not wrap around."""
    limits = np.iinfo(DATATYPES[datatype].numpy)
    outside = [int(limits.max) + 1] + ([int(limits.min) - 1] if limits.min else [])
    for number in outside:
        with server.refused("invalid"):
            server.infer(f"oip-identity-{datatype.lower()}", tensor("x", datatype, [1, 2], [0, number]))


@rule("grpc.typed-fp16", _CONTENTS, on=GRPC)
def typed_fp16(server: GrpcClient) -> None:
    """FP16 has no typed field: typed contents are refused."""
    with server.refused("invalid"):
        server.infer("oip-identity-fp16", tensor("x", "FP16", [1, 2], [1.0, 2.0]))


@rule("grpc.typed-nothing", _CONTENTS, on=GRPC)
def typed_nothing(server: GrpcClient) -> None:
    """An input with neither typed nor raw contents is refused, unless its shape has no elements."""
    request = server.request("oip-many", {"inputs": [tensor("x", "FP32", [1, 2], [])]})
    with server.refused("invalid"):
        server.send(request)


@rule("grpc.typed-not-a-number", _CONTENTS, on=GRPC)
def typed_not_a_number(server: GrpcClient) -> None:
    """NaN and the infinities are good numbers here, both ways."""
    sample = np.array([[np.nan, np.inf], [-np.inf, -0.0]], np.float32)
    answer = server.infer("oip-identity-fp32", tensor_of("x", sample))
    assert_same(array_of(output(answer, "y")), sample)
    ratio = data_of(server.infer("oip-divide", floats("a", 0.0, 1.0), floats("b", 0.0, 0.0)), "ratio")
    assert np.isnan(ratio[0])
    assert ratio[1] == np.inf


@rule("grpc.text-not-utf-8", PHOENIX, on=GRPC, profile="phoenix")
def text_not_utf_8(server: GrpcClient) -> None:
    """BYTES that are not UTF-8 are refused, because ONNX strings are UTF-8."""
    request = server.request("oip-text", {"inputs": [tensor("x", "BYTES", [1], [""])]})
    request.inputs[0].contents.bytes_contents[0] = b"\xff\xfe"
    with server.refused("invalid"):
        server.send(request)


@rule("grpc.unsigned-parameter", TRITON_GRPC, on=GRPC)
def unsigned_parameter(server: GrpcClient) -> None:
    """Parameters may be of every choice, as stock clients send them: `priority` unsigned, `timeout` signed."""
    request = server.raw_request("oip-many", {"x": X})
    request.parameters["priority"].uint64_param = 1
    request.parameters["timeout"].int64_param = 60_000_000
    request.parameters["fraction"].double_param = 0.5
    request.parameters["text"].string_param = "a"
    request.parameters["flag"].bool_param = True
    assert data_of(answer_of(server.send(request)), "doubled") == [3.0, -5.0]


@rule("grpc.status-invalid", _STATUS, on=GRPC, profile="phoenix")
def status_invalid(server: GrpcClient) -> None:
    """A faulty request is INVALID_ARGUMENT."""
    with server.refused("invalid") as refused:
        server.infer("oip-many")
    assert refused.code == "INVALID_ARGUMENT"


@rule("grpc.status-not-found", _STATUS, on=GRPC, profile="phoenix")
def status_not_found(server: GrpcClient) -> None:
    """An unknown model is NOT_FOUND."""
    with server.refused("not-found") as refused:
        server.infer("oip-nobody-made-this", floats("x", 1.0))
    assert refused.code == "NOT_FOUND"


@rule("grpc.status-unavailable", _STATUS, on=GRPC, profile="phoenix")
def status_unavailable(server: GrpcClient) -> None:
    """A model that is not loaded is UNAVAILABLE, which clients retry."""
    server.unload("oip-spare")
    try:
        with server.refused("unavailable") as refused:
            server.infer("oip-spare", floats("x", 1.0))
    finally:
        server.load("oip-spare")
    assert refused.code == "UNAVAILABLE"


@rule("grpc.status-too-large", PHOENIX, on=GRPC, profile="phoenix")
def status_too_large(server: GrpcClient) -> None:
    """A message over the model's limit is RESOURCE_EXHAUSTED, and the message names the limit."""
    with server.refused("too-large") as refused:
        server.send(server.raw_request("oip-limited", {"x": np.zeros(2 * LIMITED_BYTES, np.uint8)}))
    assert str(LIMITED_BYTES) in refused.message


@rule("grpc.status-failed", PHOENIX, on=GRPC, profile="phoenix")
def status_failed(server: GrpcClient) -> None:
    """A failure of the model is INTERNAL without a stack trace; the next request is answered."""
    with server.refused("failed"):
        server.infer("oip-lookup", tensor("index", "INT64", [1], [7]))
    assert data_of(server.infer("oip-lookup", tensor("index", "INT64", [1], [2])), "value") == [30.0]


@rule("grpc.status-deadline", "gRPC, deadlines", on=GRPC)
def status_deadline(server: GrpcClient) -> None:
    """A call whose deadline passes is DEADLINE_EXCEEDED, and does not harm the next."""
    request = server.request("oip-slow", {"inputs": [floats("x", 1.0)]})
    with server.refused("deadline"):
        server.send(request, timeout=0.01)
    assert data_of(answer_of(server.send(request)), "y") == [1.0]


@rule("grpc.cancel", "gRPC, cancellation", on=GRPC)
def cancel(server: GrpcClient) -> None:
    """A call that its client cancels ends, and does not harm the next."""
    request = server.request("oip-slow", {"inputs": [floats("x", 1.0)]})
    call = server.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(request.SerializeToString())
    call.cancel()
    assert call.cancelled()
    assert data_of(answer_of(server.send(request)), "y") == [1.0]


@rule("grpc.not-a-message", PHOENIX, on=GRPC, profile="phoenix")
def not_a_message(server: GrpcClient) -> None:
    """Bytes that are not the message are INVALID_ARGUMENT."""
    for method in ("ModelInfer", "ModelMetadata", "RepositoryIndex"):
        with server.refused("invalid"):
            server.call_bytes(method, b"\xff\xff\xff\xff")


@rule("grpc.unknown-method", "gRPC, status codes", on=GRPC)
def unknown_method(server: GrpcClient) -> None:
    """A method that the service does not have is UNIMPLEMENTED."""
    with server.refused("unsupported"):
        server.call_bytes("ModelDream", b"")


@rule(
    "grpc.unserved-extension",
    PHOENIX,
    on=GRPC,
    profile="phoenix",
    each=("TraceSetting", "SystemSharedMemoryStatus", "CudaSharedMemoryStatus"),
)
def unserved_extension(server: GrpcClient, method: str) -> None:
    """{each} belongs to an extension that is not advertised and is UNIMPLEMENTED."""
    with server.refused("unsupported"):
        server.call_bytes(method, b"")


@rule("grpc.large-message", TRITON_GRPC, on=GRPC)
def large_message(server: GrpcClient) -> None:
    """Messages over gRPC's own default of 4 MiB are taken and sent."""
    sample = np.random.default_rng(7).integers(0, 2**32, (2**20, 2), dtype=np.uint32)
    reply = server.send(server.raw_request("oip-identity-uint32", {"x": sample}))
    assert reply.raw_output_contents[0] == pack(sample)


@rule("grpc.compressed", "gRPC, compression", on=GRPC)
def compressed(server: GrpcClient) -> None:
    """Messages may be compressed with gzip."""
    request = server.raw_request("oip-many", {"x": np.zeros((4096, 2), np.float32)})
    reply = server.send(request, compression=grpc.Compression.Gzip)
    assert len(reply.raw_output_contents[0]) == 4096 * 2 * 4


@rule("grpc.compressed-otherwise", "gRPC, compression", on=GRPC)
def compressed_otherwise(server: GrpcClient) -> None:
    """Messages compressed with deflate are read, or refused as UNIMPLEMENTED, the status for an unknown algorithm."""
    request = server.raw_request("oip-many", {"x": np.zeros((4096, 2), np.float32)})
    try:
        size = len(server.send(request, compression=grpc.Compression.Deflate).raw_output_contents[0])
    except Refusal as refusal:
        size = 4096 * 2 * 4 if refusal.code == "UNIMPLEMENTED" else 0
    assert size == 4096 * 2 * 4


@rule("grpc.fp16-output", _RAW, on=GRPC)
def fp16_output(server: GrpcClient) -> None:
    """An FP16 tensor without elements needs no contents; the answer's outputs are raw."""
    answer = server.send(server.raw_request("oip-identity-fp16", {"x": np.empty((0, 2), np.float16)}))
    assert list(answer.outputs[0].shape) == [0, 2]
    assert list(answer.raw_output_contents) == [b""]


@rule("grpc.version-0", TRITON_GRPC, on=GRPC)
def any_version(server: GrpcClient) -> None:
    """An empty `model_version` means that the server chooses; the answer tells what it chose."""
    reply = server.send(server.request("oip-version", {"inputs": [floats("x", 0.0)]}))
    assert data_of(answer_of(reply), "y") == [float(reply.model_version)]


@rule("stream.in-order", TRITON_GRPC, on=GRPC)
def stream_in_order(server: GrpcClient) -> None:
    """Each request of a stream is answered by one reply, in order, with its id."""
    requests = [
        server.request("oip-spare", {"inputs": [floats("x", float(number))], "id": str(number)}) for number in range(20)
    ]
    replies = server.stream(requests)
    assert [reply.error_message for reply in replies] == [""] * 20
    assert [reply.infer_response.id for reply in replies] == [str(number) for number in range(20)]
    assert [data_of(answer_of(reply.infer_response), "y") for reply in replies] == [[-float(n)] for n in range(20)]


@rule("stream.error", TRITON_GRPC, on=GRPC)
def stream_error(server: GrpcClient) -> None:
    """A faulty request is told by `error_message` in its place, and the stream goes on."""
    good = server.request("oip-spare", {"inputs": [floats("x", 1.0)]})
    unknown = server.request("oip-nobody-made-this", {"inputs": [floats("x", 1.0)]})
    replies = server.stream([good, unknown, good])
    assert [bool(reply.error_message) for reply in replies] == [False, True, False]
    assert "oip-nobody-made-this" in replies[1].error_message


@rule("stream.error-id", PHOENIX, on=GRPC, profile="phoenix")
def stream_error_id(server: GrpcClient) -> None:
    """The reply to a faulty request carries its id, so that the caller knows which it was."""
    request = server.request("oip-spare", {"inputs": [], "id": "seventeen"})
    (reply,) = server.stream([request])
    assert reply.error_message
    assert reply.infer_response.id == "seventeen"


@rule("stream.several-models", TRITON_GRPC, on=GRPC)
def stream_several_models(server: GrpcClient) -> None:
    """One stream may carry requests for several models, raw or typed."""
    replies = server.stream(
        [
            server.request("oip-spare", {"inputs": [floats("x", 1.0)]}),
            server.raw_request("oip-many", {"x": X}),
            server.request("oip-slow", {"inputs": [floats("x", 1.0)]}),
            server.request("oip-spare", {"inputs": [floats("x", 2.0)]}),
        ]
    )
    assert [reply.infer_response.model_name for reply in replies] == ["oip-spare", "oip-many", "oip-slow", "oip-spare"]


@rule("stream.empty", TRITON_GRPC, on=GRPC)
def stream_empty(server: GrpcClient) -> None:
    """A stream without requests ends without replies."""
    assert server.stream([]) == []


@rule("grpc-health.server", GRPC_HEALTH, on=GRPC, profile="phoenix")
def health_server(server: GrpcClient) -> None:
    """The health service answers SERVING for the server (an empty name) and for the inference service."""
    assert _health(server, "") == "SERVING"
    assert _health(server, SERVICE) == "SERVING"


@rule("grpc-health.unknown", GRPC_HEALTH, on=GRPC, profile="phoenix")
def health_unknown(server: GrpcClient) -> None:
    """The health of an unknown service is NOT_FOUND."""
    with server.refused("not-found"):
        _health(server, "no.such.Service")


@rule("grpc-health.watch", GRPC_HEALTH, on=GRPC, profile="phoenix")
def health_watch(server: GrpcClient) -> None:
    """A watcher is told the status at once, NOT_SERVING while a model loads, and SERVING again when it is there."""
    from grpc_health.v1 import health_pb2

    call = server.channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(), timeout=CALL_DEADLINE_S)
    failures: list[Refusal] = []

    def load() -> None:
        try:
            server.load("oip-slow")
        except Refusal as refusal:
            failures.append(refusal)

    seen = [_status(next(call))]
    server.unload(server.served("oip-slow"))
    loading = threading.Thread(target=load)
    loading.start()
    try:
        seen += [_status(next(call)), _status(next(call))]
    finally:
        loading.join()
        call.cancel()
    assert not failures
    assert seen == ["SERVING", "NOT_SERVING", "SERVING"]


@rule("grpc-reflection.services", GRPC_REFLECTION, on=GRPC, profile="phoenix")
def reflection_services(server: GrpcClient) -> None:
    """Reflection lists the inference, health and reflection services."""
    reply = _reflect(server, list_services="")
    names = {service.name for service in reply.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names


@rule("grpc-reflection.definition", GRPC_REFLECTION, on=GRPC, profile="phoenix")
def reflection_definition(server: GrpcClient) -> None:
    """The definition that reflection gives has the protocol's field numbers: messages made from either read alike."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    reply = _reflect(server, file_containing_symbol=SERVICE)
    files = [FileDescriptorProto.FromString(file) for file in reply.file_descriptor_response.file_descriptor_proto]
    served = {message.name: message for file in files for message in file.message_type}
    for name in ("ModelInferRequest", "ModelInferResponse", "InferTensorContents", "ModelMetadataResponse",
                 "ModelStatistics", "ModelConfig", "ModelStreamInferResponse"):  # fmt: skip
        fields = {field.name: field.number for field in served[name].field}
        theirs = {field.name: field.number for field in message_type(name).DESCRIPTOR.fields}
        shared = fields.keys() & theirs.keys()
        assert shared
        assert {field: fields[field] for field in shared} == {field: theirs[field] for field in shared}


@rule("grpc-reflection.unknown", GRPC_REFLECTION, on=GRPC, profile="phoenix")
def reflection_unknown(server: GrpcClient) -> None:
    """An unknown symbol is answered by an error in the reply, not by the end of the stream."""
    reply = _reflect(server, file_containing_symbol="no.such.Symbol")
    assert reply.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def _health(server: GrpcClient, service: str) -> str:
    from grpc_health.v1 import health_pb2

    request = health_pb2.HealthCheckRequest(service=service)
    reply = server.call_bytes("Check", request.SerializeToString(), service="grpc.health.v1.Health")
    return _status(health_pb2.HealthCheckResponse.FromString(reply))


def _status(reply: Any) -> str:
    from grpc_health.v1 import health_pb2

    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def _reflect(server: GrpcClient, **asked: str) -> Any:
    from grpc_reflection.v1alpha import reflection_pb2

    call = server.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    try:
        return next(call(iter([reflection_pb2.ServerReflectionRequest(**asked)]), timeout=CALL_DEADLINE_S))
    except grpc.RpcError as error:
        raise AssertionError(f"reflection ended with {error.code()}: {error.details()}") from None  # type: ignore[attr-defined]
