"""tritonclient, unmodified: `http`, `http.aio`, `grpc` or `grpc.aio`, as the last argument says.

The four clients have the same calls. An asyncio client is awaited call by call, so that the same checks run over it.
"""

import asyncio
import importlib
import inspect
import queue
import sys
from typing import Any

import numpy as np
from client_script import GRPC, OIP, REST, Array, Case, assert_same, case, cases, check, example, main, refused

KIND = sys.argv[2]
IS_HTTP = KIND.startswith("http")
IS_AIO = KIND.endswith("aio")
library = importlib.import_module(f"tritonclient.{KIND}")
_loop = asyncio.new_event_loop()


class Client:
    """The client; its coroutines are run to their end. gRPC answers are asked for as JSON, which HTTP's are."""

    def __init__(self) -> None:
        address = REST.removeprefix("http://") if IS_HTTP else GRPC
        options = {"concurrency": 8} if KIND == "http" else {}

        async def create() -> Any:
            return library.InferenceServerClient(address, **options)

        self._client = _loop.run_until_complete(create())

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if not IS_HTTP and "as_json" in inspect.signature(method).parameters:
                options["as_json"] = True
            result = method(*arguments, **options)
            return _loop.run_until_complete(result) if inspect.isawaitable(result) else result

        return call


client = Client()


def inputs_of(given: Case, *, binary: bool = True) -> list[Any]:
    inputs = []
    for name, array in given.inputs.items():
        item = library.InferInput(name, list(array.shape), OIP[array.dtype])
        item.set_data_from_numpy(array, **({"binary_data": binary} if IS_HTTP else {}))
        inputs.append(item)
    return inputs


def outputs_of(given: Case, *, binary: bool = True) -> list[Any]:
    options = {"binary_data": binary} if IS_HTTP else {}
    return [library.InferRequestedOutput(name, **options) for name in given.outputs]


def arrays_of(result: Any, given: Case) -> dict[str, Array]:
    return {name: result.as_numpy(name) for name in given.outputs}


def response_of(result: Any) -> dict[str, Any]:
    return dict(result.get_response() if IS_HTTP else result.get_response(as_json=True))


@check
def is_live_and_ready() -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("iris")
    assert client.is_model_ready("oip-version", "1")


@check
def is_model_ready_of_unknown_model() -> None:
    # The HTTP client only looks at the status; the gRPC client raises what the server said.
    if IS_HTTP:
        assert not client.is_model_ready("nobody")
    else:
        refused(lambda: client.is_model_ready("nobody"), "model 'nobody' is not found")


@check
def server_metadata() -> None:
    metadata = client.get_server_metadata()
    assert metadata["name"] == "phoenix"
    assert "binary_tensor_data" in metadata["extensions"]
    assert "trace" not in metadata["extensions"]


@check
def model_metadata() -> None:
    metadata = client.get_model_metadata("oip-add")
    assert [item["name"] for item in metadata["inputs"]] == ["a", "b"]
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [2, 3]
    assert client.get_model_metadata("oip-version", "2")["name"] == "oip-version"


@check
def model_config() -> None:
    config = client.get_model_config("iris")
    config = config if IS_HTTP else config["config"]
    assert config["name"] == "iris"
    assert config["input"][0]["data_type"] == "TYPE_FP32"


@check
def repository_index() -> None:
    index = client.get_model_repository_index()
    entries = index if IS_HTTP else index["models"]
    assert {"name": "iris", "version": "1", "state": "READY"}.items() <= next(
        entry for entry in entries if entry["name"] == "iris"
    ).items()


@check
def load_and_unload() -> None:
    client.unload_model("oip-spare", unload_dependents=True)
    try:
        given = case("oip-spare", {"x": np.ones(1, np.float32)})
        refused(lambda: client.infer("oip-spare", inputs_of(given)), "model 'oip-spare' is not ready")
    finally:
        client.load_model("oip-spare")
    assert_same(arrays_of(client.infer("oip-spare", inputs_of(given)), given), given.outputs)


@check
def load_with_override() -> None:
    refused(lambda: client.load_model("oip-spare", config="{}"), "load parameters are not supported")
    refused(
        lambda: client.load_model("oip-spare", config="{}", files={"file:1/model.onnx": b"0"}),
        "load parameters are not supported",
    )
    refused(lambda: client.load_model("nobody"), "model 'nobody' is not found")


@check
def statistics() -> None:
    given = example("iris")

    def count() -> int:
        stats = client.get_inference_statistics("iris")["model_stats"][0]
        return int(stats["inference_stats"]["success"].get("count", 0))

    before = count()
    for _ in range(3):
        client.infer("iris", inputs_of(given))
    assert count() - before == 3
    assert len(client.get_inference_statistics()["model_stats"]) > 20


@check
def log_settings() -> None:
    before = client.get_log_settings()
    level = _value(before, "log_verbose_level")
    try:
        assert _value(client.update_log_settings({"log_verbose_level": 1}), "log_verbose_level") == 1
    finally:
        client.update_log_settings({"log_verbose_level": level})
    assert client.get_log_settings() == before
    refused(lambda: client.update_log_settings({"log_poetry": True}), "unknown setting 'log_poetry'")


@check
def trace_settings_are_refused_clearly() -> None:
    expected = "trace|not found" if IS_HTTP else "UNIMPLEMENTED"
    for call in (client.get_trace_settings, lambda: client.update_trace_settings(settings={"trace_rate": "1"})):
        error = refused(call, expected)
        assert "while decoding the response" not in str(error), f"the client could not read the error: {error}"


@check
def shared_memory_is_refused_clearly() -> None:
    for call in (client.get_system_shared_memory_status, client.get_cuda_shared_memory_status):
        error = refused(call, "not found" if IS_HTTP else "UNIMPLEMENTED")
        assert "while decoding the response" not in str(error), f"the client could not read the error: {error}"


@check
def infer() -> None:
    for given in cases():
        result = client.infer(given.model, inputs_of(given), outputs=outputs_of(given))
        assert_same(arrays_of(result, given), given.outputs)


@check
def infer_without_outputs_named() -> None:
    for given in cases():
        result = client.infer(given.model, inputs_of(given))
        assert_same(arrays_of(result, given), given.outputs)
        assert [item["name"] for item in response_of(result)["outputs"]] == list(given.outputs)


@check
def infer_output_subset() -> None:
    given = case("oip-many", {"x": np.ones((1, 2), np.float32)})
    result = client.infer("oip-many", inputs_of(given), outputs=outputs_of(given)[2:])
    assert result.as_numpy("integer").tolist() == [[1, 1]]
    assert result.as_numpy("doubled") is None


@check
def infer_of_version() -> None:
    given = case("oip-spare", {"x": np.zeros(1, np.float32)})
    for version in ("1", "2"):
        result = client.infer("oip-version", inputs_of(given), model_version=version)
        assert result.as_numpy("y").tolist() == [float(version)]
        assert response_of(result)["model_version"] == version


@check
def infer_with_everything() -> None:
    given = example("iris")
    result = client.infer(
        "iris",
        inputs_of(given),
        request_id="zażółć-42",
        priority=1,
        timeout=60_000_000,
        parameters={"text": "a", "number": 7, "flag": True},
        headers={"x-team": "tests"},
        **({"query_params": {"tenant": "a"}} if IS_HTTP else {"client_timeout": 30.0}),
    )
    assert_same(arrays_of(result, given), given.outputs)
    assert response_of(result)["id"] == "zażółć-42"


@check
def infer_text_bytes() -> None:
    given = example("text")
    item = next(iter(inputs_of(given)))
    name, array = next(iter(given.inputs.items()))
    encoded = np.array([text.encode() for text in array.flat], dtype=object).reshape(array.shape)
    item.set_data_from_numpy(encoded)
    assert_same(arrays_of(client.infer("text", [item]), given), given.outputs)
    assert name == item.name()


@check
def errors_carry_the_servers_message() -> None:
    given = example("iris")
    error = refused(lambda: client.infer("nobody", inputs_of(given)), "model 'nobody' is not found")
    assert error.status() in ("404", "StatusCode.NOT_FOUND")
    refused(lambda: client.infer("oip-add", inputs_of(given)), "input 'a' is missing")
    refused(lambda: client.get_model_metadata("nobody"), "model 'nobody' is not found")
    refused(lambda: client.get_model_config("nobody"), "model 'nobody' is not found")
    refused(lambda: client.get_inference_statistics("nobody"), "model 'nobody' is not found")
    refused(lambda: client.infer("iris", inputs_of(given), model_version="9"), "has no version '9'")


@check
def classification_is_refused_clearly() -> None:
    given = example("iris")
    outputs = [library.InferRequestedOutput("probabilities", class_count=2)]
    refused(lambda: client.infer("iris", inputs_of(given), outputs=outputs), "classification")


def _value(settings: Any, name: str) -> Any:
    """Return a log setting: plain over HTTP, a oneof over gRPC."""
    value = settings[name] if IS_HTTP else settings["settings"][name]
    return value if IS_HTTP else next(iter(value.values()))


if IS_HTTP:

    @check
    def infer_json() -> None:
        for given in cases():
            if "FP16" in given.datatypes:  # has no JSON form; the client itself refuses to send it
                continue
            result = client.infer(given.model, inputs_of(given, binary=False), outputs=outputs_of(given, binary=False))
            assert_same(arrays_of(result, given), given.outputs)

    @check
    def infer_json_in_binary_out_and_the_reverse() -> None:
        given = example("iris")
        for forms in ((False, True), (True, False)):
            result = client.infer("iris", inputs_of(given, binary=forms[0]), outputs=outputs_of(given, binary=forms[1]))
            assert_same(arrays_of(result, given), given.outputs)

    @check
    def infer_mixed() -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        given = case("oip-add", {"a": array, "b": array})
        inputs = [inputs_of(given, binary=False)[0], inputs_of(given, binary=True)[1]]
        assert_same(arrays_of(client.infer("oip-add", inputs), given), given.outputs)
        assert_same(arrays_of(client.infer("oip-add", inputs[::-1]), given), given.outputs)

    @check
    def infer_compressed() -> None:
        array = np.tile(np.array([[0.5, -2.5]], np.float32), (2048, 1))
        large = case("oip-many", {"x": array})
        for given in (large, example("iris"), example("text")):
            for request in (None, "gzip", "deflate"):
                for response in (None, "gzip", "deflate"):
                    for binary in (True, False):
                        result = client.infer(
                            given.model,
                            inputs_of(given, binary=binary),
                            outputs=outputs_of(given, binary=binary),
                            request_compression_algorithm=request,
                            response_compression_algorithm=response,
                        )
                        assert_same(arrays_of(result, given), given.outputs)

    @check
    def body_made_and_read_apart() -> None:
        import urllib.request

        given = example("digits")
        body, length = library.InferenceServerClient.generate_request_body(inputs_of(given))
        request = urllib.request.Request(f"{REST}/v2/models/digits/infer", body)
        request.add_header("Inference-Header-Content-Length", str(length))
        with urllib.request.urlopen(request) as reply:
            header = int(reply.headers["Inference-Header-Content-Length"])
            result = library.InferenceServerClient.parse_response_body(reply.read(), header_length=header)
        assert_same(arrays_of(result, given), given.outputs)

else:

    @check
    def infer_compressed() -> None:
        given = case("oip-many", {"x": np.zeros((2048, 2), np.float32)})
        result = client.infer("oip-many", inputs_of(given), compression_algorithm="gzip")
        assert_same(arrays_of(result, given), given.outputs)

    @check
    def client_deadline() -> None:
        given = case("oip-slow", {"x": np.zeros(1, np.float32)})
        refused(lambda: client.infer("oip-slow", inputs_of(given), client_timeout=0.01), "DEADLINE_EXCEEDED")


if KIND == "http":

    @check
    def async_infer() -> None:
        given = example("iris")
        requests = [client.async_infer("iris", inputs_of(given), request_id=str(number)) for number in range(32)]
        for number, request in enumerate(requests):
            result = request.get_result()
            assert_same(arrays_of(result, given), given.outputs)
            assert response_of(result)["id"] == str(number)

    @check
    def async_infer_error() -> None:
        given = example("iris")
        refused(lambda: client.async_infer("nobody", inputs_of(given)).get_result(), "model 'nobody' is not found")


if KIND == "grpc":

    @check
    def async_infer() -> None:
        given = example("iris")
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        for _ in range(32):
            client.async_infer("iris", inputs_of(given), callback=lambda result, error: answers.put((result, error)))
        for _ in range(32):
            result, error = answers.get(timeout=30)
            assert error is None
            assert_same(arrays_of(result, given), given.outputs)

    @check
    def stream() -> None:
        given = example("iris")
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            for model in ("iris", "nobody", "iris"):
                client.async_stream_infer(model, inputs_of(given), request_id=model)
            found = [answers.get(timeout=30) for _ in range(3)]
        finally:
            client.stop_stream()
        assert "model 'nobody' is not found" in str(found[1][1])
        for result, error in (found[0], found[2]):
            assert error is None
            assert_same(arrays_of(result, given), given.outputs)


if IS_AIO:

    @check
    def many_at_once() -> None:
        given = example("iris")

        async def ask() -> list[Any]:
            return await asyncio.gather(*(client._client.infer("iris", inputs_of(given)) for _ in range(32)))

        for result in _loop.run_until_complete(ask()):
            assert_same(arrays_of(result, given), given.outputs)


if KIND == "grpc.aio":

    @check
    def stream() -> None:
        given = example("iris")

        async def requests() -> Any:
            for model in ("iris", "nobody", "iris"):
                yield {"model_name": model, "inputs": inputs_of(given)}

        async def ask() -> list[Any]:
            return [answer async for answer in client._client.stream_infer(requests())]

        found = _loop.run_until_complete(ask())
        assert "model 'nobody' is not found" in str(found[1][1])
        for result, error in (found[0], found[2]):
            assert error is None
            assert_same(arrays_of(result, given), given.outputs)


@check
def close() -> None:
    client.close()


main()
