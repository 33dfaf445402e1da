"""Stock clients, unmodified, against a real server; what they get is compared with onnxruntime bit for bit."""

import gzip
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from phoenix_process import Running

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


@pytest.mark.parametrize("kind", ["http", "http.aio", "grpc", "grpc.aio"])
def test_tritonclient_makes_every_call(kind: str, run_script: Callable[..., str]) -> None:
    printed = run_script("triton.py", kind)
    assert printed.count("\nok ") > 15


@pytest.mark.parametrize("kind", ["rest", "grpc"])
def test_kserve_client_makes_every_call(kind: str, run_script: Callable[..., str]) -> None:
    printed = run_script("kserve_clients.py", kind)
    assert printed.count("\nok ") > 5


@pytest.mark.parametrize("name", ["iris", "digits", "text"])
@pytest.mark.parametrize("options", [[], ["--compressed"], ["--http1.0"], ["-H", "Content-Encoding: gzip"]])
def test_curl_gets_the_examples_answer(
    name: str, options: list[str], server: tuple[Running, Path], tmp_path: Path
) -> None:
    running, _ = server
    request = (EXAMPLES / name / "request.json").read_bytes()
    body = tmp_path / "body"
    body.write_bytes(gzip.compress(request) if "Content-Encoding: gzip" in options else request)
    answer = _curl("--data-binary", f"@{body}", *options, f"{running.rest_url}/v2/models/{name}/infer")
    inputs = {
        item["name"]: np.array(item["data"], {"FP32": np.float32, "BYTES": object}[item["datatype"]]).reshape(
            item["shape"]
        )
        for item in json.loads(request)["inputs"]
    }
    session = onnxruntime.InferenceSession(EXAMPLES / name / "model.onnx")
    expected = session.run([item["name"] for item in answer["outputs"]], inputs)
    for item, array in zip(answer["outputs"], expected, strict=True):
        got = np.array(item["data"], array.dtype).reshape(item["shape"])
        assert got.tolist() == array.tolist()  # repr of a float gives its bits back


def test_curl_shows_the_servers_error(server: tuple[Running, Path]) -> None:
    running, _ = server
    answer = _curl("-d", "{", f"{running.rest_url}/v2/models/iris/infer")
    assert "not valid JSON" in answer["error"]


def test_perf_analyzer_finds_what_it_reads(server: tuple[Running, Path]) -> None:
    """Play perf_analyzer's requests in its order and find each field that its code reads.

    `perf_analyzer.json` was written after its sources (src/client_backend/triton/triton_client_backend.cc at 14d6225,
    src/model_parser.cc at 069e403), because no registry that is reached here has the program.
    """
    running, _ = server
    replies: dict[str, Any] = {}
    for step in json.loads((HERE / "perf_analyzer.json").read_text()):
        body, headers = None, {}
        if step["method"] == "POST":
            header = json.dumps(step["json"]).encode()
            body = header + bytes.fromhex(step["binary_hex"])
            headers = {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(running.rest_url + step["path"], body, headers, method=step["method"])
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert reply.status == 200
            length = reply.headers.get("Inference-Header-Content-Length")
            document = json.loads(reply.read()[: int(length) if length else None])
        for path, kind in step["reads"].items():
            value = document
            for part in path.split("/"):
                value = value[int(part) if part.isdigit() else part]
            assert type(value).__name__ == kind, f"{step['path']}: {path} is {value!r}"
        replies[step["name"]] = document
    assert "statistics" in replies["server"]["extensions"]
    batches = replies["config"]["max_batch_size"] > 0
    shape = replies["metadata"]["inputs"][0]["shape"]
    assert list(replies["config"]["input"][0]["dims"]) == shape[1 if batches else 0 :]
    grown = [replies[name]["model_stats"][0]["inference_stats"]["success"]["count"] for name in ("before", "after")]
    assert grown[1] - grown[0] == 1


def _curl(*arguments: str) -> Any:
    assert shutil.which("curl"), "curl is not installed"
    done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
