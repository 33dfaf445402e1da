"""Measures MLServer and KServe's ModelServer beside Phoenix: same models, requests, cores and load as `run.py`.

    python benchmarks/peers.py [the options of run.py]

Each peer gets an environment of its own under `.cache/peers`, made by uv (`uv` on the path, or named by `$UV`) with the
versions below and Phoenix's version of ONNX Runtime. Both run the model through a few lines of our own
(`peer_servers/`), because neither brings an ONNX runtime; both are given one worker process, for one core, and no
access log. Triton Inference Server is left out: it comes as a container image only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from processes import BenchError, Process, free_port
from run import finish, read_options
from subjects import ROOT, SUBJECTS, Running, Subject, started
from workloads import Workload

VERSIONS = {"mlserver": "1.7.1", "kserve": "0.21.0"}
_ENVIRONMENTS = ROOT / ".cache" / "peers"
_SERVERS = Path(__file__).with_name("peer_servers")
_INSTALL_S = 900
# Batches help a big model and only cost a small one time.
_MLSERVER_BATCHING = {"mlp": {"max_batch_size": 32, "max_batch_time": 0.001}}


def install(name: str) -> Path:
    """Make the environment of a peer unless it is there; return its Python."""
    wanted = [f"{name}=={VERSIONS[name]}", f"onnxruntime=={version('onnxruntime')}"]
    folder = _ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise BenchError("uv is not on the path; install it (https://docs.astral.sh/uv) or name it in $UV")
    print(f"installing {', '.join(wanted)}", flush=True)
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", python_version, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *wanted],
    ):
        try:
            subprocess.run(command, check=True, timeout=_INSTALL_S)
        except (subprocess.SubprocessError, OSError) as error:
            raise BenchError(f"{name} cannot be installed: {error}") from error
    stamp.write_text(json.dumps(wanted))
    return python


def _mlserver(workload: Workload, folder: Path, core: int) -> Running:
    http_port, grpc_port = free_port(), free_port()
    settings = {
        "name": workload.name,
        "implementation": "mlserver_onnx.OnnxModel",
        "parameters": {"uri": str(workload.model)},
        **_MLSERVER_BATCHING.get(workload.name, {}),
    }
    (folder / "model-settings.json").write_text(json.dumps(settings))
    env = {
        "MLSERVER_HOST": "127.0.0.1", "MLSERVER_HTTP_PORT": str(http_port), "MLSERVER_GRPC_PORT": str(grpc_port),
        "MLSERVER_METRICS_PORT": str(free_port()), "MLSERVER_PARALLEL_WORKERS": "0", "MLSERVER_DEBUG": "false",
        "PYTHONPATH": str(_SERVERS),
    }  # fmt: skip
    command = [str(_ENVIRONMENTS / "mlserver" / "bin" / "mlserver"), "start", str(folder)]
    process = Process(command, core=core, log=folder / "log", env=env, cwd=folder)
    return started(process, http_port, grpc_port, f"http://127.0.0.1:{http_port}/v2/models/{workload.name}/ready")


def _kserve(workload: Workload, folder: Path, core: int) -> Running:
    http_port, grpc_port = free_port(), free_port()
    command = [str(_ENVIRONMENTS / "kserve" / "bin" / "python"), str(_SERVERS / "kserve_onnx.py"), str(workload.model),
               workload.name, str(http_port), str(grpc_port)]  # fmt: skip
    process = Process(command, core=core, log=folder / "log", cwd=folder)
    return started(process, http_port, grpc_port, f"http://127.0.0.1:{http_port}/v2/models/{workload.name}/ready")


# MLServer has no binary tensor data over REST.
PEERS = [
    Subject("mlserver", "MLServer", frozenset({"json", "grpc"}), _mlserver),
    Subject("kserve", "KServe", frozenset({"json", "binary", "grpc"}), _kserve),
]


def main() -> int:
    """Install, measure, print, write."""
    options = read_options("Measure MLServer and KServe beside Phoenix.")
    try:
        for name in VERSIONS:
            install(name)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    return finish(options, [*SUBJECTS, *PEERS], about=VERSIONS)


if __name__ == "__main__":
    sys.exit(main())
