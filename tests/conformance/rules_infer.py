"""Inference whatever the transport: which tensors go in, which come out, and what is refused."""

import concurrent.futures

from conformance.table import OIP_GRPC, OIP_REST, PARAMETERS, PHOENIX, rule
from conformance.wire import Client, data_of, floats, output, tensor

_SIX = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
A = tensor("a", "FP32", [2, 3], _SIX)
B = tensor("b", "FP32", [2, 3], [10.0] * 6)
MANY = tensor("x", "FP32", [1, 2], [1.5, -2.5])


@rule("infer.two-inputs", f"{OIP_REST}, Inference")
def two_inputs(server: Client) -> None:
    """Inputs are matched by name, in whatever order they come."""
    expected = [11.0, 12.0, 13.0, 14.0, 15.0, 16.0]
    assert data_of(server.infer("oip-add", A, B), "sum") == expected
    assert data_of(server.infer("oip-add", B, A), "sum") == expected


@rule("infer.output-tensor", f"{OIP_REST}, Inference Response JSON")
def output_tensor(server: Client) -> None:
    """An output has its name, datatype, actual shape and row-major data."""
    answer = server.infer("oip-cube", tensor("x", "INT32", [1, 2, 3], [1, 2, 3, 4, 5, 6]))
    assert output(answer, "y") == tensor("y", "INT32", [1, 3, 2], [1, 4, 2, 5, 3, 6])


@rule("infer.model-name", f"{OIP_REST}, Inference Response JSON")
def model_name(server: Client) -> None:
    """The answer tells the model and the version that gave it."""
    answer = server.infer("oip-version", floats("x", 0.0), version="1")
    assert (answer["model_name"], answer["model_version"]) == ("oip-version", "1")


@rule("infer.id-echo", f"{OIP_REST}, Inference Response JSON")
def id_echo(server: Client) -> None:
    """The request's id comes back."""
    assert server.infer("oip-add", A, B, id="zażółć-42")["id"] == "zażółć-42"


@rule("infer.id-generated", PHOENIX, profile="phoenix")
def id_generated(server: Client) -> None:
    """A request without an id gets one of its own, which KServe's client needs."""
    first, second = server.infer("oip-add", A, B)["id"], server.infer("oip-add", A, B)["id"]
    assert first
    assert second
    assert first != second


@rule("infer.all-outputs", f"{OIP_REST}, Inference Request JSON")
def all_outputs(server: Client) -> None:
    """A request that names no outputs gets all of them, in the model's order."""
    answer = server.infer("oip-many", MANY)
    assert [item["name"] for item in answer["outputs"]] == ["doubled", "negated", "integer"]
    assert data_of(answer, "doubled") == [3.0, -5.0]
    assert data_of(answer, "negated") == [-1.5, 2.5]
    assert data_of(answer, "integer") == [1, -2]


@rule("infer.empty-outputs", f"{OIP_REST}, Inference Request JSON")
def empty_outputs(server: Client) -> None:
    """An empty list of outputs means all of them."""
    assert len(server.infer("oip-many", MANY, outputs=[])["outputs"]) == 3


@rule("infer.output-subset", f"{OIP_REST}, Inference Request JSON")
def output_subset(server: Client) -> None:
    """A request gets only the outputs that it names."""
    answer = server.infer("oip-many", MANY, outputs=[{"name": "integer"}])
    assert [item["name"] for item in answer["outputs"]] == ["integer"]


@rule("infer.output-order", f"{OIP_REST}, Inference Request JSON", profile="phoenix")
def output_order(server: Client) -> None:
    """Outputs come in the order in which the request names them."""
    answer = server.infer("oip-many", MANY, outputs=[{"name": "integer"}, {"name": "doubled"}])
    assert [item["name"] for item in answer["outputs"]] == ["integer", "doubled"]


@rule("infer.unknown-output", f"{OIP_REST}, Inference Request JSON")
def unknown_output(server: Client) -> None:
    """An output that the model does not have is refused, and the message names it."""
    with server.refused("invalid") as refused:
        server.infer("oip-many", MANY, outputs=[{"name": "tripled"}])
    assert "tripled" in refused.message


@rule("infer.output-twice", PHOENIX, profile="phoenix")
def output_twice(server: Client) -> None:
    """An output that is asked for twice is refused."""
    with server.refused("invalid"):
        server.infer("oip-many", MANY, outputs=[{"name": "doubled"}, {"name": "doubled"}])


@rule("infer.missing-input", f"{OIP_REST}, Inference Request JSON")
def missing_input(server: Client) -> None:
    """A request without one of the model's inputs is refused, and the message names it."""
    with server.refused("invalid") as refused:
        server.infer("oip-add", A)
    assert "'b'" in refused.message or "b" in refused.message.split()


@rule("infer.no-inputs", f"{OIP_REST}, Inference Request JSON")
def no_inputs(server: Client) -> None:
    """A request without inputs is refused."""
    with server.refused("invalid"):
        server.infer("oip-add")


@rule("infer.extra-input", f"{OIP_REST}, Inference Request JSON")
def extra_input(server: Client) -> None:
    """An input that the model does not have is refused, and the message names it."""
    with server.refused("invalid") as refused:
        server.infer("oip-add", A, B, {**A, "name": "surplus"})
    assert "surplus" in refused.message


@rule("infer.input-twice", PHOENIX, profile="phoenix")
def input_twice(server: Client) -> None:
    """An input that is given twice is refused."""
    with server.refused("invalid"):
        server.infer("oip-add", A, B, A)


@rule("infer.wrong-datatype", f"{OIP_REST}, Request Input")
def wrong_datatype(server: Client) -> None:
    """An input of another datatype than the model's is refused; nothing is converted in silence."""
    with server.refused("invalid") as refused:
        server.infer("oip-many", tensor("x", "FP64", [1, 2], [1.0, 2.0]))
    if server.is_strict:
        assert "FP64" in refused.message
        assert "FP32" in refused.message


@rule("infer.unknown-datatype", f"{OIP_REST}, Tensor Data Types")
def unknown_datatype(server: Client) -> None:
    """A datatype that the protocol does not have is refused."""
    with server.refused("invalid"):
        server.infer("oip-many", tensor("x", "FLOAT", [1, 2], [1.0, 2.0]))


@rule("infer.wrong-rank", f"{OIP_REST}, Request Input")
def wrong_rank(server: Client) -> None:
    """An input with too few or too many dimensions is refused."""
    for shape in ([2], [1, 1, 2]):
        with server.refused("invalid"):
            server.infer("oip-many", tensor("x", "FP32", shape, [1.0, 2.0]))


@rule("infer.wrong-dimension", f"{OIP_REST}, Request Input")
def wrong_dimension(server: Client) -> None:
    """An input whose fixed dimension has another size is refused."""
    with server.refused("invalid"):
        server.infer("oip-many", tensor("x", "FP32", [1, 3], [1.0, 2.0, 3.0]))
    with server.refused("invalid"):
        server.infer("oip-add", tensor("a", "FP32", [3, 2], _SIX), B)


@rule("infer.negative-dimension", f"{OIP_REST}, Request Input")
def negative_dimension(server: Client) -> None:
    """A dimension of -1 is for metadata; in a request it is refused."""
    with server.refused("invalid"):
        server.infer("oip-many", tensor("x", "FP32", [-1, 2], [1.0, 2.0]))


@rule("infer.huge-dimension", f"{OIP_REST}, Request Input")
def huge_dimension(server: Client) -> None:
    """A shape whose product overflows is refused, and no memory is taken for it."""
    for shape in ([2**40, 2], [2**62, 2], [2**32, 2**32]):
        with server.refused("invalid"):
            server.infer("oip-many", tensor("x", "FP32", shape, [1.0, 2.0]))


@rule("infer.too-few-elements", f"{OIP_REST}, Tensor Data")
def too_few_elements(server: Client) -> None:
    """Less data than the shape needs is refused."""
    with server.refused("invalid"):
        server.infer("oip-many", tensor("x", "FP32", [1, 2], [1.0]))


@rule("infer.too-many-elements", f"{OIP_REST}, Tensor Data")
def too_many_elements(server: Client) -> None:
    """More data than the shape needs is refused."""
    with server.refused("invalid"):
        server.infer("oip-many", tensor("x", "FP32", [1, 2], [1.0, 2.0, 3.0]))


@rule("infer.empty-batch", f"{OIP_REST}, Tensor Data", profile="phoenix")
def empty_batch(server: Client) -> None:
    """A batch of no rows gives outputs of no rows."""
    answer = server.infer("oip-many", tensor("x", "FP32", [0, 2], []))
    assert output(answer, "doubled") == tensor("doubled", "FP32", [0, 2], [])
    assert output(answer, "integer") == tensor("integer", "INT64", [0, 2], [])


@rule("infer.scalar", f"{OIP_REST}, Tensor Data")
def scalar(server: Client) -> None:
    """A scalar has shape [] and one element."""
    answer = server.infer("oip-scalar", tensor("x", "FP32", [], [21.0]))
    assert output(answer, "y") == tensor("y", "FP32", [], [42.0])


@rule("infer.scalar-output", f"{OIP_REST}, Tensor Data")
def scalar_output(server: Client) -> None:
    """A model may turn rows into a scalar."""
    answer = server.infer("oip-total", floats("x", 1.0, 2.0, 3.5))
    assert output(answer, "total") == tensor("total", "FP32", [], [6.5])


@rule("infer.large-batch", PHOENIX, profile="phoenix")
def large_batch(server: Client) -> None:
    """A request with more rows than a batch takes is answered whole."""
    values = [float(number) for number in range(1000)]
    assert data_of(server.infer("oip-spare", floats("x", *values)), "y") == [-value for value in values]


@rule("infer.own-rows", PHOENIX, profile="phoenix")
def own_rows(server: Client) -> None:
    """Requests that are answered together each get exactly their own rows, in their own shape."""

    def ask(number: int) -> bool:
        values = [float(number * 100 + index) for index in range(number % 5 + 1)]
        answer = server.infer("oip-slow" if number % 8 == 0 else "oip-spare", floats("x", *values), id=str(number))
        sign = 1 if number % 8 == 0 else -1
        return data_of(answer, "y") == [sign * value for value in values] and answer["id"] == str(number)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(48))) == [True] * 48


@rule("infer.poisoned-row", PHOENIX, profile="phoenix")
def poisoned_row(server: Client) -> None:
    """A request on which the model fails is refused alone (500 / INTERNAL); those that shared its run are answered."""

    def ask(index: int) -> list[float] | str:
        if index < 3:
            return data_of(server.infer("oip-lookup", tensor("index", "INT64", [1], [index])), "value")
        with server.refused("failed") as refused:
            server.infer("oip-lookup", tensor("index", "INT64", [1], [index]))
        return refused.kind

    asked = [0, 7, 1, 2, 7, 2, 1, 0] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, asked)) == [[10.0 * (index + 1)] if index < 3 else "failed" for index in asked]


@rule("infer.version", f"{OIP_REST}, Inference")
def version(server: Client) -> None:
    """A request that names a version is answered by it."""
    assert data_of(server.infer("oip-version", floats("x", 0.0), version="1"), "y") == [1.0]
    assert data_of(server.infer("oip-version", floats("x", 0.0), version="2"), "y") == [2.0]


@rule("infer.default-version", PHOENIX, profile="phoenix")
def default_version(server: Client) -> None:
    """A request that names no version is answered by the newest."""
    answer = server.infer("oip-version", floats("x", 0.0))
    assert data_of(answer, "y") == [2.0]
    assert answer["model_version"] == "2"


@rule("infer.unknown-model", f"{OIP_REST}, Inference")
def unknown_model(server: Client) -> None:
    """An inference with an unknown model is refused as not found, and the message names it."""
    with server.refused("not-found") as refused:
        server.infer("oip-nobody-made-this", floats("x", 0.0))
    assert "oip-nobody-made-this" in refused.message


@rule("infer.unknown-version", f"{OIP_REST}, Inference")
def unknown_version(server: Client) -> None:
    """An inference with an unknown version is refused as not found."""
    with server.refused("not-found"):
        server.infer("oip-version", floats("x", 0.0), version="3")


@rule("infer.unknown-parameters", PARAMETERS)
def unknown_parameters(server: Client) -> None:
    """Parameters that the server does not know are ignored, whatever their type."""
    parameters = {"text": "a", "number": 7, "fraction": 0.5, "flag": True}
    named = {**A, "parameters": {"text": "a"}}
    assert len(data_of(server.infer("oip-add", named, B, parameters=parameters), "sum")) == 6


@rule("infer.scheduling-parameters", PARAMETERS)
def scheduling_parameters(server: Client) -> None:
    """The reserved parameters `priority` and `timeout` (µs) are accepted."""
    parameters = {"priority": 1, "timeout": 60_000_000}
    assert len(data_of(server.infer("oip-add", A, B, parameters=parameters), "sum")) == 6


@rule("infer.timeout", PHOENIX, profile="phoenix")
def timeout(server: Client) -> None:
    """A request that cannot be answered within its own `timeout` (µs) is refused: 504 / DEADLINE_EXCEEDED."""
    with server.refused("deadline"):
        server.infer("oip-slow", floats("x", 1.0), parameters={"timeout": 1000})


@rule("infer.timeout-type", PHOENIX, profile="phoenix")
def timeout_type(server: Client) -> None:
    """A `timeout` that is not a number of microseconds is refused."""
    for wrong in ("soon", 0.5, -1, True):
        with server.refused("invalid") as refused:
            server.infer("oip-add", A, B, parameters={"timeout": wrong})
        assert "timeout" in refused.message


@rule("infer.all-faults", PHOENIX, profile="phoenix")
def all_faults(server: Client) -> None:
    """Several faults of one request are told in one message."""
    with server.refused("invalid") as refused:
        server.infer("oip-add", tensor("a", "FP32", [1], [1.0]), {**B, "name": "c"}, outputs=[{"name": "product"}])
    for named in ("'a'", "'b'", "'c'", "'product'"):
        assert named in refused.message


@rule("infer.utf-8", f"{OIP_GRPC}, Tensor Data Types")
def utf_8(server: Client) -> None:
    """BYTES carry any text: empty, with zero bytes, beyond ASCII."""
    texts = ["", "plain", "\u0000", "zażółć gęślą", "🎉", 'quote " and \\ back']
    assert data_of(server.infer("oip-text", tensor("x", "BYTES", [6], texts)), "y") == texts


@rule("infer.shared-memory", PHOENIX, profile="phoenix")
def shared_memory(server: Client) -> None:
    """A tensor that names a shared memory region is refused, as input and as output: nobody would read or write it."""
    region = {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}}
    with server.refused("invalid") as refused:
        server.infer("oip-many", MANY, outputs=[{"name": "doubled", **region}])
    assert "shared_memory_region" in refused.message
    with server.refused("invalid") as refused:
        server.infer("oip-many", {**MANY, **region})
    assert "shared_memory_region" in refused.message


@rule("infer.classification", PHOENIX, profile="phoenix")
def classification(server: Client) -> None:
    """A parameter that asks for an extension that is not served is refused, since to ignore it gives a wrong answer."""
    with server.refused("invalid") as refused:
        server.infer("oip-many", MANY, outputs=[{"name": "doubled", "parameters": {"classification": 1}}])
    assert "classification" in refused.message
