"""The GPU wheel on a machine without a GPU: onnxruntime-gpu falls back to the CPU in silence, Phoenix does not.

The wheel says that it has CUDA, and gives a session on the CPU where CUDA's libraries or the device are missing. It
unpacks into the same folder as the CPU wheel, so it gets an environment of its own, kept in `.cache` until the lock
changes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import phoenix_process
import pytest

from phoenix_server.errors import Reason

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".cache" / "envs" / "server-gpu"
IRIS = ROOT / "examples" / "iris"
INSTALL_DEADLINE_S = 800
CHECK_DEADLINE_S = 120


def find_uv() -> str | None:
    """Return uv from where the Makefile takes it: `$UV`, the path, its own cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = sorted(cache.glob("phoenix/uv-*/bin/uv"))
    return next(filter(None, [shutil.which(os.environ.get("UV", "")), shutil.which("uv"), *map(str, own[-1:])]), None)


@pytest.fixture(scope="module")
def gpu_bin() -> Path:
    """Install the server with the GPU wheel from the lock, once a lock; return the environment's `bin`."""
    uv = find_uv()
    if uv is None:
        reason = "no uv: set UV, put it on the PATH, or let `make test` fetch it into ~/.cache/phoenix"
        print(reason)
        pytest.skip(reason)
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    inputs = (ROOT / "uv.lock").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    wanted, stamp = hashlib.sha256(inputs).hexdigest(), ENVIRONMENT / ".phoenix-stamp"
    with (ENVIRONMENT.parent / "server-gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be about to install the same
        if not stamp.exists() or stamp.read_text() != wanted:
            done = subprocess.run(
                [uv, "sync", "--frozen", "--extra", "server-gpu", "--no-default-groups"],
                cwd=ROOT,
                env=os.environ | {"UV_PROJECT_ENVIRONMENT": str(ENVIRONMENT)},
                capture_output=True,
                text=True,
                timeout=INSTALL_DEADLINE_S,
            )
            assert done.returncode == 0, done.stderr
            stamp.write_text(wanted)
    return ENVIRONMENT / "bin"


def manifest(folder: Path, accelerator: dict[str, str] | None) -> Path:
    """Write iris, on an accelerator where one is given; return the folder."""
    folder.mkdir()
    shutil.copy(IRIS / "model.onnx", folder)
    document: dict[str, Any] = {
        "apiVersion": "phoenix-ml.io/v1alpha1",
        "kind": "PhoenixModel",
        "metadata": {"name": "iris"},
        "spec": {"model": {"uri": "model.onnx"}},
    }
    if accelerator is not None:
        document["spec"]["runtime"] = {"accelerator": accelerator}
    (folder / "model.yaml").write_text(json.dumps(document))
    return folder


def clean_environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PHOENIX_", "PYTHON"))}
    # A machine with a GPU shall show the same: no device is visible.
    return inherited | {"PHOENIX_MEASURE_CAPACITY": "false", "CUDA_VISIBLE_DEVICES": ""}


def check(gpu_bin: Path, path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(gpu_bin / "phoenix-server"), "check", str(path)]
    return subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=CHECK_DEADLINE_S, cwd=path
    )


def warnings(stderr: str) -> list[dict[str, Any]]:
    """Return the log lines of a run; onnxruntime writes its own words between them."""
    return [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]


# Loads iris with the wheel alone, asking for CUDA, as a program does that trusts onnxruntime.
NAIVE = """
import json, sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
label, probabilities = session.run(None, {"x": np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], np.float32)})
print(json.dumps({"available": ort.get_available_providers(), "active": session.get_providers(),
                  "label": label.tolist(), "probabilities": probabilities.tolist()}))
"""


@pytest.fixture(scope="module")
def naive(gpu_bin: Path) -> dict[str, Any]:
    """What onnxruntime itself does with the GPU wheel on this machine."""
    command = [str(gpu_bin / "python"), "-c", NAIVE, str(IRIS / "model.onnx")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=CHECK_DEADLINE_S)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_onnxruntime_itself_falls_back_in_silence(naive: dict[str, Any]) -> None:
    assert "CUDAExecutionProvider" in naive["available"]
    assert naive["active"] == ["CPUExecutionProvider"]


def test_required_accelerator_that_is_missing_fails_with_the_way_out(gpu_bin: Path, tmp_path: Path) -> None:
    done = check(gpu_bin, manifest(tmp_path / "m", {"provider": "CUDA", "policy": "Require"}))
    assert done.returncode == Reason.PROVIDER_UNAVAILABLE.exit_code, done.stdout + done.stderr
    assert "FAILED    ProviderUnavailable: CUDA was asked for" in done.stdout
    assert "runs on CPUExecutionProvider" in done.stdout
    assert "CUDAExecutionProvider" in done.stdout  # what the build has
    assert "use the GPU image on a node with the device" in done.stdout
    assert "runtime.accelerator.policy: Prefer" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_preferred_accelerator_that_is_missing_leaves_the_cpu_and_a_warning(gpu_bin: Path, tmp_path: Path) -> None:
    done = check(gpu_bin, manifest(tmp_path / "m", {"provider": "CUDA", "policy": "Prefer"}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "provider  CPUExecutionProvider" in done.stdout
    (warning,) = warnings(done.stderr)
    assert (warning["level"], warning["message"]) == ("warning", "serving on the CPU")
    assert "CUDA was asked for" in warning["cause"]


def test_model_without_accelerator_is_checked_without_a_warning(gpu_bin: Path, tmp_path: Path) -> None:
    done = check(gpu_bin, manifest(tmp_path / "m", None))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "provider  CPUExecutionProvider" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("accelerator", [None, {"policy": "Prefer"}], ids=["plain", "prefer"])
def test_answers_of_the_gpu_wheel_on_the_cpu_are_those_of_the_cpu_wheel(
    gpu_bin: Path, naive: dict[str, Any], tmp_path: Path, accelerator: dict[str, str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import http.client

    def ask() -> Any:
        with phoenix_process.start([path]) as server:
            connection = http.client.HTTPConnection(server.rest_url.removeprefix("http://"), timeout=30)
            rows = [5.1, 3.5, 1.4, 0.2, 6.7, 3.0, 5.2, 2.3]
            body = {"id": "1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": rows}]}
            connection.request("POST", "/v2/models/iris/infer", json.dumps(body))
            answer = json.loads(connection.getresponse().read())
            connection.request("GET", "/v2/models/iris/state")
            state = json.loads(connection.getresponse().read())
            connection.close()
        assert state["provider"] == "CPUExecutionProvider"
        return answer

    path = manifest(tmp_path / "m", accelerator)
    from_cpu_wheel = ask()
    monkeypatch.setattr("sys.executable", str(gpu_bin / "python"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ask() == from_cpu_wheel
    assert from_cpu_wheel["outputs"][0]["data"] == naive["label"]
