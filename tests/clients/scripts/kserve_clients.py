"""KServe's `InferenceRESTClient` or `InferenceGRPCClient`, unmodified, as the last argument says: `rest`, `grpc`."""

import asyncio
import logging
import sys
from collections.abc import Coroutine
from typing import Any

import numpy as np
from client_script import GRPC, OIP, REST, Array, Case, assert_same, case, cases, check, example, main, refused
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

KIND = sys.argv[2]
_loop = asyncio.new_event_loop()
logging.getLogger("kserve").setLevel(logging.CRITICAL)  # it logs every refusal with its stack


def wait(work: Coroutine[Any, Any, Any]) -> Any:
    return _loop.run_until_complete(work)


async def _new_client() -> Any:
    return InferenceRESTClient(RESTConfig(protocol="v2")) if KIND == "rest" else InferenceGRPCClient(url=GRPC)


client = wait(_new_client())


def ask(given: Case, *, binary: bool = True, **options: Any) -> Any:
    """Infer; `options` go into the request."""
    inputs = []
    for name, array in given.inputs.items():
        item = InferInput(name, list(array.shape), OIP[array.dtype])
        item.set_data_from_numpy(array, binary_data=binary)
        inputs.append(item)
    request = InferRequest(model_name=given.model, infer_inputs=inputs, **options)
    if KIND == "rest":
        return wait(client.infer(REST, request, model_name=given.model))
    return wait(client.infer(request))


def arrays_of(response: Any) -> dict[str, Array]:
    return {item.name: item.as_numpy() for item in response.outputs}


@check
def is_live_and_ready() -> None:
    if KIND == "rest":
        assert wait(client.is_server_live(REST)) is True
        assert wait(client.is_server_ready(REST)) is True
        assert wait(client.is_model_ready(REST, "iris")) is True
        assert wait(client.is_model_ready(REST, "nobody")) is False
    else:
        assert wait(client.is_server_live()) is True
        assert wait(client.is_server_ready()) is True
        assert wait(client.is_model_ready("iris")) is True
        refused(lambda: wait(client.is_model_ready("nobody")), "model 'nobody' is not found")


@check
def infer_binary() -> None:
    for given in cases():
        if KIND == "rest" and "FP16" in given.datatypes:  # the client asks for JSON outputs
            continue
        assert_same(arrays_of(ask(given)), given.outputs)


@check
def infer_plain() -> None:
    for given in cases():
        if "FP16" in given.datatypes:  # neither JSON nor typed contents have a form for it
            continue
        assert_same(arrays_of(ask(given, binary=False)), given.outputs)


@check
def infer_id() -> None:
    given = example("iris")
    response = ask(given, request_id="zażółć-42")
    assert response.id == "zażółć-42"
    assert response.model_name == "iris"
    assert ask(given).id


@check
def infer_parameters() -> None:
    given = example("iris")
    response = ask(given, parameters={"text": "a", "number": 7, "flag": True})
    assert_same(arrays_of(response), given.outputs)


@check
def infer_output_subset() -> None:
    given = case("oip-many", {"x": np.ones((1, 2), np.float32)})
    response = ask(given, request_outputs=[RequestedOutput("integer")])
    assert {name: array.tolist() for name, array in arrays_of(response).items()} == {"integer": [[1, 1]]}


@check
def errors_carry_the_servers_message() -> None:
    given = example("iris")
    refused(lambda: ask(given._replace(model="nobody")), "model 'nobody' is not found")
    refused(lambda: ask(given._replace(model="oip-add")), "input 'a' is missing")


@check
def many_at_once() -> None:
    given = example("iris")
    name, array = next(iter(given.inputs.items()))

    async def one() -> Any:
        item = InferInput(name, list(array.shape), OIP[array.dtype])
        item.set_data_from_numpy(array)
        request = InferRequest(model_name="iris", infer_inputs=[item])
        return await (client.infer(REST, request, model_name="iris") if KIND == "rest" else client.infer(request))

    async def every() -> list[Any]:
        return await asyncio.gather(*(one() for _ in range(32)))

    for response in wait(every()):
        assert_same(arrays_of(response), given.outputs)


if KIND == "rest":

    @check
    def infer_dictionary() -> None:
        given = example("iris")
        name, array = next(iter(given.inputs.items()))
        document = {"inputs": [{"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.tolist()}]}
        assert_same(arrays_of(wait(client.infer(REST, document, model_name="iris"))), given.outputs)

    @check
    def infer_binary_outputs() -> None:
        for given in cases():
            assert_same(arrays_of(ask(given, parameters={"binary_data_output": True})), given.outputs)


@check
def close() -> None:
    wait(client.close())


main()
