"""Starting, refusing to start, reloading: each fault has its own reason, message and exit code, and nothing that serves
is harmed by it."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import phoenix_process
import pytest
from onnx import TensorProto, helper
from phoenix_process import Running, wait_until

import phoenix_api
from phoenix_api import read_manifests
from phoenix_server.artifacts import ArtifactStore
from phoenix_server.errors import Reason
from phoenix_server.metrics import Metrics
from phoenix_server.repository import Repository
from phoenix_server.settings import Settings

IRIS = Path(__file__).parents[2] / "examples" / "iris"
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [2]}]}).encode()


def times(factor: float, *, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """A model that multiplies its input."""
    nodes = [helper.make_node("Mul", ["x", "k"], ["y"])]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in "xy"]
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])
    graph = helper.make_graph(nodes, "times", io[:1], io[1:], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def write_model(folder: Path, model: onnx.ModelProto | bytes, name: str = "model.onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    partial = folder / f".{name}.partial"
    partial.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    partial.rename(path)
    return path


def write_manifest(folder: Path, name: str = "times", file: str = "model.yaml", **model: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": name},
        "spec": {"model": {"uri": "model.onnx"} | model},
    }
    partial = folder / f".{file}.partial"
    partial.write_text(json.dumps(document))
    partial.rename(folder / file)
    return folder / file


def run_cli(command: str, *paths: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PHOENIX_")}
    settings = {"PHOENIX_HTTP_PORT": "0", "PHOENIX_GRPC_PORT": "0", "PHOENIX_HOST": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "phoenix_server", command, *map(str, paths)],
        env=inherited | settings | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


def request(server: Running, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def answer(server: Running, path: str = "/v2/models/times/infer") -> float:
    status, body = request(server, "POST", path, BODY)
    assert status == 200, body
    return float(body["outputs"][0]["data"][0])


def broken_yaml(folder: Path) -> None:
    (folder / "model.yaml").write_text("kind: PhoenixModel\n  bad: [")


def bad_field(folder: Path) -> None:
    write_model(folder, times(2))
    write_manifest(folder, sha256="xyz")


def missing_model(folder: Path) -> None:
    write_manifest(folder)


def truncated(folder: Path) -> None:
    write_model(folder, times(2).SerializeToString()[:-20])
    write_manifest(folder)


def not_onnx(folder: Path) -> None:
    write_model(folder, b"<!DOCTYPE html><html><body>Not Found</body></html>")
    write_manifest(folder)


def empty(folder: Path) -> None:
    write_model(folder, b"")
    write_manifest(folder)


def wrong_digest(folder: Path) -> None:
    write_model(folder, times(2))
    write_manifest(folder, sha256="0" * 64)


def opset_too_new(folder: Path) -> None:
    write_model(folder, times(2, opset=999))
    write_manifest(folder)


def ir_too_new(folder: Path) -> None:
    write_model(folder, times(2, ir_version=999))
    write_manifest(folder)


def external_data_missing(folder: Path) -> None:
    model = times(2)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.arange(1024, dtype=np.float32), "k"))
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (folder / "weights.bin").unlink()
    write_manifest(folder)


def unknown_operator(folder: Path) -> None:
    model = times(2)
    model.graph.node[0].op_type = "Multiplicate"
    write_model(folder, model)
    write_manifest(folder)


def sequence_output(folder: Path) -> None:
    io = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])
    out = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("SequenceConstruct", ["x"], ["y"])], "g", [io], [out])
    write_model(folder, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    write_manifest(folder)


def name_used_twice(folder: Path) -> None:
    write_model(folder, times(2))
    write_manifest(folder, file="a.yaml")
    write_manifest(folder, file="b.yaml")


def accelerator_missing(folder: Path) -> None:
    write_model(folder, times(2))
    path = write_manifest(folder)
    document = json.loads(path.read_text())
    document["spec"]["runtime"] = {"accelerator": {"policy": "Require", "provider": "CUDA"}}
    path.write_text(json.dumps(document))


def features_of_no_input(folder: Path) -> None:
    write_model(folder, times(2))
    path = write_manifest(folder)
    document = json.loads(path.read_text())
    document["spec"]["features"] = {"keyTemplate": "user:{entity}", "input": "nothing", "names": ["age"]}
    document["spec"]["bindings"] = {"redis": {"backend": "default"}}
    path.write_text(json.dumps(document))


FAULTS: list[tuple[Callable[[Path], None], Reason, str]] = [
    (broken_yaml, Reason.INVALID_SPEC, "model.yaml"),
    (bad_field, Reason.INVALID_SPEC, "spec.model.sha256"),
    (missing_model, Reason.NOT_FOUND, "model.onnx"),
    (truncated, Reason.INVALID_MODEL, "truncated"),
    (not_onnx, Reason.INVALID_MODEL, "HTML"),
    (empty, Reason.INVALID_MODEL, "empty"),
    (wrong_digest, Reason.DIGEST_MISMATCH, "0000"),
    (opset_too_new, Reason.UNSUPPORTED_OPSET, "999"),
    (ir_too_new, Reason.UNSUPPORTED_OPSET, "999"),
    (external_data_missing, Reason.EXTERNAL_DATA_MISSING, "weights.bin"),
    (unknown_operator, Reason.INVALID_MODEL, "Multiplicate"),
    (sequence_output, Reason.INVALID_MODEL, "output 'y'"),
    (name_used_twice, Reason.INVALID_SPEC, "b.yaml"),
    (accelerator_missing, Reason.PROVIDER_UNAVAILABLE, "policy: Prefer"),
    (features_of_no_input, Reason.INVALID_SPEC, "spec.features.input"),
]


@pytest.mark.parametrize(("make", "reason", "message"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_fault_has_its_own_reason_message_and_exit_code(
    tmp_path: Path, make: Callable[[Path], None], reason: Reason, message: str
) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    make(folder)
    termination = tmp_path / "termination-log"
    termination.touch()
    env = {"PHOENIX_STATE_DIR": str(tmp_path / "state"), "PHOENIX_TERMINATION_LOG": str(termination)}
    served = run_cli("serve", folder, env=env)
    assert served.returncode == reason.exit_code, served.stderr
    left = json.loads(termination.read_text())
    assert left["reason"] == reason
    assert message in left["message"]
    assert "Traceback" not in served.stderr
    checked = run_cli("check", folder, env=env)
    assert checked.returncode == reason.exit_code, checked.stdout
    assert f"FAILED {reason}" in " ".join(checked.stdout.split())
    assert message in checked.stdout


def test_reasons_are_those_of_the_api() -> None:
    assert {reason.value for reason in Reason} <= {reason.value for reason in phoenix_api.Reason}


def test_exit_codes_differ() -> None:
    assert len({reason.exit_code for reason in Reason}) == len(Reason)


@pytest.mark.parametrize("variable", ["PHOENIX_HTTP_PORT", "PHOENIX_GRPC_PORT"])
def test_port_in_use_is_told(tmp_path: Path, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = {variable: str(taken.getsockname()[1]), "PHOENIX_STATE_DIR": str(tmp_path)}
        served = run_cli("serve", IRIS, env=env)
    assert served.returncode == Reason.PORT_IN_USE.exit_code
    assert variable in served.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PHOENIX_HTTP_PROT", "1", "did you mean PHOENIX_HTTP_PORT"),
        ("PHOENIX_HTTP_PORT", "http", "valid integer"),
        ("PHOENIX_DRAIN_SECONDS", "-1", "greater than or equal to 0"),
        ("PHOENIX_GRPC_ENGINE", "fast", "'auto', 'native' or 'grpcio'"),
        ("PHOENIX_API_KEYS_FILE", "/does/not/exist", "cannot read"),
    ],
)
def test_wrong_setting_is_named(variable: str, value: str, message: str) -> None:
    served = run_cli("serve", IRIS, env={variable: value})
    assert served.returncode == Reason.INVALID_SETTING.exit_code
    assert variable in served.stderr
    assert message in served.stderr


def test_state_folder_that_is_read_only_does_not_stop_local_models(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with phoenix_process.start([IRIS], {"PHOENIX_STATE_DIR": str(tmp_path / "file" / "state")}) as server:
        assert request(server, "GET", "/v2/health/ready")[0] == 200


def test_check_takes_what_a_shell_makes_of_a_star(tmp_path: Path) -> None:
    shutil.copytree(IRIS, tmp_path / "iris")
    (tmp_path / "README.md").write_text("# not: a manifest")
    done = run_cli("check", *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stdout
    for fact in ("input     x FP32 [-1, 4]", "digest    sha256:", "provider  CPUExecutionProvider", "capacity "):
        assert fact in done.stdout
    assert run_cli("check", tmp_path / "README.md").returncode == Reason.INVALID_SPEC.exit_code


def test_two_versions_are_served_and_the_newest_answers(tmp_path: Path) -> None:
    for version, factor in (("9", 9.0), ("10", 10.0)):
        write_model(tmp_path / version, times(factor))
        write_manifest(tmp_path / version, version=version)
    with phoenix_process.start([tmp_path]) as server:
        assert answer(server) == 20
        assert answer(server, "/v2/models/times/versions/9/infer") == 18
        assert request(server, "GET", "/v2/models/times")[1]["versions"] == ["9", "10"]
        assert request(server, "POST", "/v2/models/times/versions/11/infer", BODY)[0] == 404


def index(server: Running) -> dict[tuple[str, str], dict[str, str]]:
    entries = request(server, "POST", "/v2/repository/index", b"{}")[1]
    return {(entry["name"], entry["version"]): entry for entry in entries}


def test_manifests_and_models_are_loaded_again_when_they_change(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_model(folder, times(2))
    write_manifest(folder)
    with phoenix_process.start([folder]) as server:
        assert answer(server) == 4
        write_model(folder, times(3))  # the model file alone
        wait_until(lambda: answer(server) == 6, "the new model answers")
        write_model(folder, times(5), "other.onnx")
        write_manifest(folder, uri="other.onnx", version="2")
        wait_until(lambda: answer(server) == 10, "the new version answers")
        wait_until(lambda: ("times", "1") not in index(server), "the old version is gone")
        write_manifest(folder, "second", "second.yaml")
        wait_until(lambda: ("second", "1") in index(server), "the second model is known")
        wait_until(lambda: index(server)["second", "1"]["state"] == "READY", "the second model answers")
        (folder / "second.yaml").unlink()
        wait_until(lambda: ("second", "1") not in index(server), "the second model is gone")
        assert answer(server) == 10
        assert request(server, "GET", "/v2/health/ready")[0] == 200


def test_reload_to_a_broken_version_keeps_the_old_one_serving(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_model(folder, times(2))
    write_manifest(folder)
    with phoenix_process.start([folder]) as server:
        write_manifest(folder, sha256="0" * 64)
        wait_until(lambda: "DigestMismatch" in index(server)["times", "1"]["reason"], "the reason is shown")
        assert answer(server) == 4
        assert request(server, "GET", "/v2/health/ready")[0] == 200
        write_manifest(folder, version="2", uri="missing.onnx")
        wait_until(lambda: ("times", "2") in index(server), "the new version is known")
        wait_until(lambda: "NotFound" in index(server)["times", "2"]["reason"], "its reason is shown")
        assert answer(server) == 4
        (folder / "model.yaml").write_text("]")
        wait_until(lambda: any("manifests not reloaded" in line for line in server.stderr), "the fault is logged")
        assert answer(server) == 4
        write_model(folder, times(7))
        write_manifest(folder, version="3")
        wait_until(lambda: answer(server) == 14, "the repaired version answers")
        assert request(server, "GET", "/v2/health/ready")[0] == 200


def test_request_whose_body_comes_after_its_version_has_gone_is_answered_by_it(tmp_path: Path) -> None:
    write_model(tmp_path, times(2))
    write_manifest(tmp_path)
    with phoenix_process.start([tmp_path]) as server:
        connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
        connection.putrequest("POST", "/v2/models/times/infer")
        connection.putheader("Content-Length", str(len(BODY)))
        connection.endheaders(BODY[:10])
        assert answer(server) == 4  # and so the other's head has been read
        write_model(tmp_path, times(7))
        write_manifest(tmp_path, version="2")
        wait_until(lambda: answer(server) == 14, "the new version answers")
        wait_until(lambda: ("times", "1") not in index(server), "the old one has gone")
        connection.send(BODY[10:])
        response = connection.getresponse()
        said = json.loads(response.read())
        assert (response.status, said["model_version"]) == (200, "1"), said
        assert said["outputs"][0]["data"] == [4.0]
        connection.close()


def test_version_that_nobody_holds_any_more_is_freed(tmp_path: Path) -> None:
    write_model(tmp_path, times(2))
    [manifest] = read_manifests([write_manifest(tmp_path)])

    async def main() -> None:
        settings = Settings(measure_capacity=False)
        store = ArtifactStore(model_store=tmp_path, cache_dir=tmp_path / "cache")
        repository = Repository(settings, Metrics(), store)
        await repository.start([manifest])
        held = repository.get("times")
        sessions, gone = held.engine._sessions, weakref.ref(held)
        await repository.unload("times")
        assert sessions
        del held
        for _ in range(100):
            if gone() is None:
                break
            await asyncio.sleep(0.01)
        assert gone() is None
        assert not sessions
        await repository.close()

    asyncio.run(main())


def test_failed_load_by_request_keeps_the_old_one_serving(tmp_path: Path) -> None:
    write_model(tmp_path, times(2))
    write_manifest(tmp_path)
    with phoenix_process.start([tmp_path], {"PHOENIX_WATCH": "false"}) as server:
        (tmp_path / "model.onnx").write_bytes(b"")
        status, body = request(server, "POST", "/v2/repository/models/times/load", b"{}")
        assert (status, "empty" in body["error"]) == (400, True)
        assert answer(server) == 4
        write_model(tmp_path, times(3))
        assert request(server, "POST", "/v2/repository/models/times/load", b"")[0] == 200
        assert answer(server) == 6
        assert request(server, "POST", "/v2/repository/models/times/unload", b"")[0] == 200
        assert request(server, "POST", "/v2/models/times/infer", BODY)[0] == 503
        assert request(server, "GET", "/v2/models/times/ready")[0] == 503
        assert request(server, "POST", "/v2/repository/models/none/unload", b"")[0] == 404


def test_server_that_may_keep_going_is_live_but_not_ready(tmp_path: Path) -> None:
    write_model(tmp_path / "good", times(2))
    write_manifest(tmp_path / "good")
    write_manifest(tmp_path / "bad", "missing")
    with phoenix_process.start([tmp_path], {"PHOENIX_EXIT_ON_ERROR": "false"}) as server:
        assert answer(server) == 4
        assert request(server, "GET", "/v2/health/live")[0] == 200
        assert request(server, "GET", "/v2/health/ready")[0] == 503
        status, body = request(server, "POST", "/v2/models/missing/infer", BODY)
        assert (status, "NotFound" in body["error"]) == (503, True)
        write_model(tmp_path / "bad", times(3))
        wait_until(lambda: request(server, "GET", "/v2/health/ready")[0] == 200, "ready once the model is there")


def test_model_unloaded_by_request_stays_so_when_other_files_change(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_model(folder, times(2))
    write_manifest(folder)
    with phoenix_process.start([folder]) as server:
        assert request(server, "POST", "/v2/repository/models/times/unload", b"")[0] == 200
        write_manifest(folder, "second", "second.yaml")
        wait_until(lambda: index(server).get(("second", "1"), {}).get("state") == "READY", "the second model answers")
        assert index(server)["times", "1"]["reason"] == "unloaded by request"
        assert request(server, "POST", "/v2/models/times/infer", BODY)[0] == 503


def interrupt_twice() -> None:
    with phoenix_process.start([IRIS], {"PHOENIX_DRAIN_SECONDS": "60"}) as server:
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: any('"stopping"' in line for line in server.stderr), "the first signal is taken")
        server.process.send_signal(signal.SIGINT)
        server.process.wait(30)


def test_second_signal_ends_the_process_at_once() -> None:
    with pytest.raises(AssertionError, match="ended with 130"):
        interrupt_twice()


def test_sigint_ends_cleanly(tmp_path: Path) -> None:
    shutil.copytree(IRIS, tmp_path / "iris")
    with phoenix_process.start([tmp_path / "iris"]) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert json.loads(server.stderr[-1])["message"] == "stopped"


def test_optimized_graph_is_cached_and_a_damaged_one_dropped(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 600]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], [onnx.numpy_helper.from_array(weights, "w")])
    write_model(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    write_manifest(tmp_path)
    state = tmp_path / "state"
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 600], "datatype": "FP32", "data": [1.5] * 600}]}).encode()
    answers = []
    for damage in (False, False, True):
        cached = sorted(state.glob("optimized/*.onnx"))
        if damage:
            cached[0].write_bytes(cached[0].read_bytes()[:-100])
        with phoenix_process.start([tmp_path], {"PHOENIX_STATE_DIR": str(state)}) as server:
            answers.append(request(server, "POST", "/v2/models/times/infer", body)[1]["outputs"])
            assert any("damaged" in line for line in server.stderr) == damage
        assert len(list(state.glob("optimized/*.onnx"))) == 1
        assert not list(state.glob("optimized/*.partial"))
    assert answers[0] == answers[1] == answers[2]


def test_api_keys_guard_everything_but_health_and_metrics(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# team a\nalpha\n\nbeta\n")
    with phoenix_process.start([IRIS], {"PHOENIX_API_KEYS_FILE": str(keys)}) as server:

        def status(path: str, key: str | None, method: str = "GET") -> int:
            connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            body = (IRIS / "request.json").read_bytes() if method == "POST" else None
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if response.status >= 400:
                assert "error" in json.loads(content)
                assert b"alpha" not in content
            return response.status

        for path, method in (("/v2/models/iris/infer", "POST"), ("/v2", "GET"), ("/v2/models/iris/state", "GET")):
            assert status(path, None, method) == 401
            assert status(path, "wrong", method) == 403
            assert status(path, "alpha", method) == 200
        for path in ("/v2/health/live", "/v2/health/ready", "/metrics"):
            assert status(path, None) == 200 if path != "/metrics" else True
        keys.write_text("gamma\n")  # rotated without a restart
        assert status("/v2", "gamma") == 200
        assert status("/v2", "alpha") == 403
        assert not any("alpha" in line or "gamma" in line for line in server.stderr)
