"""One server for all stock clients: the examples iris, digits and text, and the conformance models."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
NAMES = ("iris", "digits", "text")

sys.path.insert(0, str(HERE.parent))  # for `conformance` and `phoenix_process`
if "conformance" not in sys.modules:  # tests/conformance imports it too
    pytest.register_assert_rewrite("conformance", "phoenix_process")

from conformance import models  # noqa: E402
from phoenix_process import Running, start  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """The server, and the file that tells a client script where it is and what it serves."""
    folder = tmp_path_factory.mktemp("clients-models")
    models.write(folder)
    paths = [folder, *(EXAMPLES / name / "model.yaml" for name in NAMES)]
    with start(paths, {"PHOENIX_MEASURE_CAPACITY": "false", "PHOENIX_WATCH": "false"}) as running:
        setting = tmp_path_factory.mktemp("clients") / "setting.json"
        files = {model.name: str(folder / f"{model.file_name}.onnx") for model in models.MODELS}
        files |= {name: str(EXAMPLES / name / "model.onnx") for name in NAMES}
        setting.write_text(
            json.dumps(
                {
                    "rest": running.rest_url,
                    "grpc": running.grpc_target,
                    "models": files,
                    "requests": {name: str(EXAMPLES / name / "request.json") for name in NAMES},
                }
            )
        )
        yield running, setting


@pytest.fixture
def run_script(server: tuple[Running, Path]) -> Callable[..., str]:
    """Run a script of `scripts/` against the server and return what it printed; fail if one of its checks failed."""
    _, setting = server

    def run(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(HERE / "scripts" / name), str(setting), *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{name} {' '.join(arguments)}:\n{done.stdout}{done.stderr[-3000:]}"
        return done.stdout

    return run
