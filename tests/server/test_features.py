"""Online features from a real Redis, over REST, binary and gRPC: found, missing, stale, and a Redis that fails."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import feature_models
import numpy as np
import phoenix_process
import pytest
import redis
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from faulty_proxy import FaultyProxy, proxy_to
from feature_models import ask, binding, counted, get, put, rows_of
from phoenix_process import Running, wait_until
from services import RedisServer

# Short, so that tests of a Redis that does not answer take little time.
TIMEOUT_S = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return feature_models.write(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def served(folder: Path, redis_server: RedisServer) -> Iterator[tuple[Running, FaultyProxy]]:
    """A server that reaches Redis through a proxy."""
    with proxy_to(redis_server.port) as proxy:
        env = {
            "PHOENIX_REDIS_URL": f"redis://127.0.0.1:{proxy.port}",
            "PHOENIX_FEATURE_TIMEOUT_SECONDS": str(TIMEOUT_S),
            "PHOENIX_MEASURE_CAPACITY": "false",
        }
        with phoenix_process.start([folder], env) as running:
            yield running, proxy


@pytest.fixture
def server(served: tuple[Running, FaultyProxy]) -> Iterator[Running]:
    running, proxy = served
    yield running
    proxy.set("pass")
    wait_until(lambda: binding(running, "strict")["up"], "Redis answers again")


@pytest.fixture
def proxy(served: tuple[Running, FaultyProxy]) -> FaultyProxy:
    return served[1]


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        yield client
    redis_server.flush()


# --- found -----------------------------------------------------------------------------------------------------------


def test_features_complete_a_request_and_their_age_is_told(server: Running, store: redis.Redis) -> None:
    put(store, "strict", "alice", 1, "2.5", -3, age_s=100)
    status, body = ask(server, "strict", "alice")
    assert rows_of((status, body)) == [[1.0, 2.5, -3.0]]
    assert 100 <= body["parameters"]["feature_age_seconds"] < 160


def test_a_list_has_an_entity_for_each_of_32_rows(server: Running, store: redis.Redis) -> None:
    for index in range(32):
        put(store, "strict", f"u{index}", index, index * 10, index * 100)
    entities = [f"u{index}" for index in reversed(range(32))]
    expected = [[index, index * 10, index * 100] for index in reversed(range(32))]
    for value in (entities, json.dumps(entities)):
        answer = ask(server, "strict", value, rows=32)
        assert rows_of(answer) == expected
        assert rows_of(answer, "l") == [[float(row)] for row in range(32)]


def test_a_single_entity_serves_every_row(server: Running, store: redis.Redis) -> None:
    put(store, "strict", "alice", 1, 2, 3)
    assert rows_of(ask(server, "strict", "alice", rows=3)) == [[1, 2, 3]] * 3


def test_a_model_whose_only_input_comes_from_features_is_sent_no_inputs(server: Running, store: redis.Redis) -> None:
    put(store, "alone", "7", 1, 2, 3)
    assert rows_of(ask(server, "alone", 7)) == [[-1, -2, -3]]
    assert rows_of(ask(server, "alone", ["7", 7])) == [[-1, -2, -3]] * 2


def test_strings_fill_a_bytes_input(server: Running, store: redis.Redis) -> None:
    put(store, "words", "alice", "Zürich", "", "null")
    assert rows_of(ask(server, "words", "alice")) == [["Zürich", "", "null"]]
    put(store, "words", "bob", b"\xff\xfe", "x", "y")
    status, body = ask(server, "words", "bob")
    assert (status, body["error"]) == (400, "features of 'bob' are not UTF-8: a")


def test_integers_fill_an_integer_input(server: Running, store: redis.Redis) -> None:
    put(store, "whole", "alice", 2**63 - 1, -(2**63), 0)
    assert rows_of(ask(server, "whole", "alice")) == [[2**63 - 1, -(2**63), 0]]
    put(store, "whole", "bob", "1.5", 2**63, 0)
    status, body = ask(server, "whole", "bob")
    assert status == 400
    assert "are not an integer of INT64" in body["error"]
    assert body["error"].endswith(": a, b")


def test_binary_requests_are_completed(server: Running, store: redis.Redis) -> None:
    put(store, "strict", "alice", 1, 2, 3)
    put(store, "strict", "bob", 4, 5, 6)
    client = triton_http.InferenceServerClient(server.rest_url.removeprefix("http://"))
    k = triton_http.InferInput("k", [2, 1], "FP32")
    k.set_data_from_numpy(np.zeros((2, 1), np.float32), binary_data=True)
    for entities in (["alice", "bob"], '["alice", "bob"]'):
        result = client.infer("strict", [k], parameters={"entity_id": entities})
        assert result.as_numpy("y").tolist() == [[1, 2, 3], [4, 5, 6]]
        assert 0 <= result.get_response()["parameters"]["feature_age_seconds"] < 60
    client.close()


def test_grpc_requests_are_completed(server: Running, store: redis.Redis) -> None:
    put(store, "strict", "alice", 1, 2, 3)
    put(store, "strict", "bob", 4, 5, 6, age_s=50)
    with triton_grpc.InferenceServerClient(server.grpc_target) as client:
        k = triton_grpc.InferInput("k", [2, 1], "FP32")
        k.set_data_from_numpy(np.zeros((2, 1), np.float32))
        result = client.infer("strict", [k], parameters={"entity_id": '["alice", "bob"]'})
        assert result.as_numpy("y").tolist() == [[1, 2, 3], [4, 5, 6]]
        assert 50 <= result.get_response().parameters["feature_age_seconds"].double_param < 110
        with pytest.raises(triton_grpc.InferenceServerException, match="features of 'nobody' are missing") as error:
            client.infer("strict", [k], parameters={"entity_id": '["alice", "nobody"]'})
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_every_series_is_there_from_the_start(server: Running) -> None:
    page = get(server, "/metrics")[1]
    for model in (*feature_models.MODELS, "alone"):
        for reason in ("missing", "unparsable", "stale", "unavailable"):
            assert f'phoenix_features_missing_total{{model="{model}",reason="{reason}",version="1"}}' in page
        assert f'phoenix_binding_up{{kind="redis",model="{model}"}} 1.0' in page
        assert f'feature_lookup_seconds_count{{model="{model}",version="1"}}' in page


# --- what the caller sent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entity", "others", "fault"),
    [
        (None, {}, "parameter 'entity_id' is missing"),
        ("", {}, "1 to 256 characters"),
        ("x" * 300, {}, "1 to 256 characters"),
        ("a\r\nFLUSHALL", {}, "no control characters"),
        (1.5, {}, "must be a string or a JSON list of strings"),
        (["a", "b"], {}, "lists 2 entities for 1 rows"),
        (["a", ["b"]], {}, "must be a string or an integer"),
        ("alice", {"inputs": []}, "input 'k' is missing"),
        ("alice", {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]},
         "input 'x' is filled with the features of parameter 'entity_id' and cannot be sent beside it"),
        (None, {"parameters": {"entity_id": "alice", "other": ["x"]}}, "wrong: other"),
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_names_its_entities_wrongly_is_refused(
    server: Running, store: redis.Redis, entity: Any, others: dict[str, Any], fault: str
) -> None:
    put(store, "strict", "alice", 1, 2, 3)
    status, body = ask(server, "strict", entity, **others)
    assert status == 400, body
    assert fault in body["error"]


def test_patterns_and_other_keys_are_out_of_an_entitys_reach(server: Running, store: redis.Redis) -> None:
    put(store, "strict", "alice", 1, 2, 3)
    put(store, "other", "bob", 1, 2, 3)
    for entity in ("*", "alic?", "{alice}", "alice\\", "..:other:user:bob", "../../phx:ml:other:user:bob", "ali%63e"):
        status, body = ask(server, "strict", entity)
        assert status == 400
        assert "are missing: a, b, c" in body["error"]


# --- missing, unparsable, stale --------------------------------------------------------------------------------------


def test_reject_answers_400_with_entity_and_fields(server: Running, store: redis.Redis) -> None:
    before = counted(server, "strict", "missing"), counted(server, "strict", "unparsable")
    status, body = ask(server, "strict", "nobody")
    assert (status, body["error"]) == (400, "features of 'nobody' are missing: a, b, c")
    put(store, "strict", "alice", "abc", None, None)
    status, body = ask(server, "strict", "alice")
    assert status == 400
    assert body["error"] == (
        "features of 'alice' are missing: b; features of 'alice' are not a finite number of FP32: a"
    )
    assert counted(server, "strict", "missing") == before[0] + 2
    assert counted(server, "strict", "unparsable") == before[1] + 1


def test_default_serves_defaults_for_what_is_missing(server: Running, store: redis.Redis) -> None:
    before = counted(server, "lenient", "missing"), counted(server, "lenient", "unparsable")
    put(store, "lenient", "alice", 1, "nan", None)
    store.set("phx:ml:lenient:user:text", "no hash")
    answer = ask(server, "lenient", ["alice", "nobody", "text"], rows=3)
    assert rows_of(answer) == [[1, 20, 30], [10, 20, 30], [10, 20, 30]]
    assert counted(server, "lenient", "missing") == before[0] + 2
    assert counted(server, "lenient", "unparsable") == before[1] + 2


def test_stale_features_are_used_or_rejected_as_declared(server: Running, store: redis.Redis) -> None:
    before = counted(server, "strict", "stale")
    put(store, "strict", "alice", 1, 2, 3, age_s=100_000)
    status, body = ask(server, "strict", "alice")
    assert rows_of((status, body)) == [[1, 2, 3]]
    assert body["parameters"]["feature_age_seconds"] >= 100_000
    assert counted(server, "strict", "stale") == before + 1
    put(store, "fresh", "alice", 1, 2, 3, age_s=100)
    status, body = ask(server, "fresh", "alice")
    assert status == 400
    assert "features of 'alice' are 100 s old, at most 60 s are allowed" in body["error"]
    put(store, "fresh", "alice", 1, 2, 3, age_s=None)
    assert "of unknown age" in ask(server, "fresh", "alice")[1]["error"]
    put(store, "fresh", "alice", 1, 2, 3, age_s=5)
    assert rows_of(ask(server, "fresh", "alice")) == [[1, 2, 3]]


# --- Redis in trouble ------------------------------------------------------------------------------------------------


def check_degraded(server: Running) -> None:
    """While Redis is of no use: defaults or 503, ready all the same, told by state and metrics."""
    status, body = ask(server, "strict", "alice")
    assert status == 503, body
    assert "features are not available at the moment" in body["error"]
    assert rows_of(ask(server, "lenient", "alice", rows=2)) == [[10, 20, 30]] * 2
    assert "parameters" not in ask(server, "lenient", "alice")[1]
    assert get(server, "/v2/health/ready")[0] == 200
    wait_until(lambda: binding(server, "strict")["up"] is False, "the state says that Redis is down")
    assert 'phoenix_binding_up{kind="redis",model="strict"} 0.0' in get(server, "/metrics")[1]


def check_recovers(server: Running) -> None:
    wait_until(lambda: ask(server, "strict", "alice")[0] == 200, "features are served again")
    # a lookup that takes too long, as one may on a busy machine, is answered with defaults
    wait_until(lambda: rows_of(ask(server, "lenient", "alice")) == [[4, 5, 6]], "they are for everybody")
    wait_until(lambda: binding(server, "strict")["up"] is True, "the state says that Redis is up")


@pytest.fixture
def alice(store: redis.Redis) -> None:
    put(store, "strict", "alice", 1, 2, 3)
    put(store, "lenient", "alice", 4, 5, 6)


@pytest.mark.parametrize("mode", ["refuse", "reset", "hang"])
@pytest.mark.usefixtures("alice")
def test_a_redis_that_fails_degrades_as_declared_and_recovers(server: Running, proxy: FaultyProxy, mode: Any) -> None:
    before = counted(server, "lenient", "unavailable"), counted(server, "strict", "unavailable")
    proxy.set(mode)
    check_degraded(server)
    assert counted(server, "lenient", "unavailable") >= before[0] + 3
    assert counted(server, "strict", "unavailable") >= before[1] + 1
    proxy.set("pass")
    check_recovers(server)


@pytest.mark.usefixtures("alice")
def test_a_slow_redis_costs_a_request_no_more_than_its_bound(server: Running, proxy: FaultyProxy) -> None:
    proxy.set("delay", delay_s=0.5)
    check_degraded(server)
    # once it is known to be down, nobody waits
    assert binding(server, "strict")["error"]
    proxy.set("pass")
    check_recovers(server)


@pytest.mark.usefixtures("alice")
def test_a_requests_own_deadline_ends_its_wait(server: Running, proxy: FaultyProxy) -> None:
    assert ask(server, "strict", "alice", timeout_s=20)[0] == 200
    proxy.set("hang")
    status, body = ask(server, "lenient", "alice", timeout_s=0.05)
    assert status == 504, body
    assert "the deadline passed after 0.050 s of looking up features" in body["error"]


@pytest.mark.usefixtures("alice")
def test_slower_than_a_request_may_take_is_still_fast_enough_for_others(server: Running, proxy: FaultyProxy) -> None:
    proxy.set("delay", delay_s=0.1)
    assert ask(server, "strict", "alice", timeout_s=0.05)[0] == 504
    assert rows_of(ask(server, "strict", "alice")) == [[1, 2, 3]]
    assert binding(server, "strict")["up"] is True


@pytest.mark.usefixtures("alice")
def test_grpc_says_unavailable(server: Running, proxy: FaultyProxy) -> None:
    proxy.set("refuse")
    with triton_grpc.InferenceServerClient(server.grpc_target) as client:
        k = triton_grpc.InferInput("k", [1, 1], "FP32")
        k.set_data_from_numpy(np.zeros((1, 1), np.float32))
        with pytest.raises(triton_grpc.InferenceServerException) as error:
            client.infer("strict", [k], parameters={"entity_id": "alice"})
        assert error.value.status() == "StatusCode.UNAVAILABLE"


def test_redis_killed_under_load_and_back_gives_every_request_its_own_answer(folder: Path, redis_factory: Any) -> None:
    own: RedisServer = redis_factory()
    with own.client() as store:
        for index in range(64):
            put(store, "strict", f"u{index}", index, index, index)
            put(store, "lenient", f"u{index}", index, index, index)
    env = {"PHOENIX_REDIS_URL": own.url, "PHOENIX_FEATURE_TIMEOUT_SECONDS": "0.3", "PHOENIX_MEASURE_CAPACITY": "false"}
    with phoenix_process.start([folder], env) as server:
        is_over = False
        seen: set[str] = set()

        def drive(first: int) -> None:
            turn = first
            while not is_over:
                index = turn % 64
                status, body = ask(server, "strict", f"u{index}")
                if status == 200:
                    assert rows_of((status, body)) == [[index] * 3]
                    seen.add("found")
                else:
                    assert status == 503, body
                    seen.add("unavailable")
                (row,) = rows_of(ask(server, "lenient", f"u{index}"))
                assert row in ([index] * 3, [10, 20, 30])
                turn += 7

        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(drive, first) for first in range(4)]
            try:
                for _ in range(2):
                    wait_until(lambda: "found" in seen or any(load.done() for load in loads), "answers")
                    own.kill()
                    wait_until(lambda: "unavailable" in seen or any(load.done() for load in loads), "refusals")
                    assert get(server, "/v2/health/ready")[0] == 200
                    own.start()
                    seen.clear()
                wait_until(lambda: "found" in seen or any(load.done() for load in loads), "answers again")
            finally:
                is_over = True
            for load in loads:
                load.result()


def test_a_redis_that_is_down_at_start_is_used_when_it_comes(folder: Path, redis_factory: Any) -> None:
    own: RedisServer = redis_factory()
    with own.client() as store:
        put(store, "strict", "alice", 1, 2, 3)
        put(store, "lenient", "alice", 4, 5, 6)
    own.kill()
    with phoenix_process.start([folder], {"PHOENIX_REDIS_URL": own.url}) as server:
        check_degraded(server)
        assert binding(server, "strict")["error"] == "no connection to Redis: Connection refused"
        own.start()
        check_recovers(server)


def test_a_paused_redis_is_left_and_found_again(folder: Path, redis_factory: Any) -> None:
    own: RedisServer = redis_factory()
    with own.client() as store:
        put(store, "strict", "alice", 1, 2, 3)
        put(store, "lenient", "alice", 4, 5, 6)
    with phoenix_process.start([folder], {"PHOENIX_REDIS_URL": own.url}) as server:
        assert ask(server, "strict", "alice")[0] == 200
        own.pause()
        try:
            check_degraded(server)
            assert binding(server, "lenient")["error"]
        finally:
            own.resume()
        check_recovers(server)
