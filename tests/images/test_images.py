"""The images of this checkout, built and run by a real Docker engine: what they hold, lack, and do."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = {"server": ROOT / "inference_server/Dockerfile", "operator": ROOT / "operator/Dockerfile"}
NAMES = list(DOCKERFILES)
DEADLINE_S = 60
# How a careful cluster runs them.
RESTRICTED = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
STATE = "--tmpfs=/var/lib/phoenix:uid=10001"

Images = dict[str, str]


def test_dockerfiles_use_the_uv_of_the_makefile() -> None:
    [wanted] = re.findall(r"^UV_VERSION := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in DOCKERFILES.values():
        assert re.findall(r"^ARG UV_VERSION=(\S+)", path.read_text(), re.MULTILINE) == [wanted], path


def test_images_share_the_layers_below_the_dependencies() -> None:
    texts = [path.read_text() for path in DOCKERFILES.values()]
    assert len({text.split("\n# The same lines")[1].split("\nFROM runtime\n")[0] for text in texts}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_last_stages_install_nothing(name: str) -> None:
    last = DOCKERFILES[name].read_text().split("AS runtime\n")[1]
    assert not re.search(r"\b(uv|install|apt-get)\b(?!all)", re.sub(r"#.*", "", last))


# --- with an engine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> Images:
    """Name of each image, built from this checkout unless it is up to date."""
    has_engine = shutil.which("docker") and subprocess.run(["docker", "version"], capture_output=True).returncode == 0
    if not has_engine and "cluster" not in os.environ.get("PHOENIX_REQUIRE", "").split(","):
        pytest.skip("no Docker engine runs; `make images` starts one on Debian with root")
    done = subprocess.run([sys.executable, ROOT / "tools/images.py", *NAMES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(NAMES, done.stdout.split(), strict=True))


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def inside(image: str, *command: str) -> str:
    """Run a program of an image instead of its own, and return what it printed."""
    return docker("run", "--rm", *RESTRICTED, f"--entrypoint={command[0]}", image, *command[1:])


def config(image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("image", "inspect", "--format={{json .Config}}", image))
    return found


def wait_for(what: str, check: Callable[[], Any]) -> Any:
    """Call `check` until it gives something; what it raises for a connection counts as nothing."""
    end = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(OSError):
            if (found := check()) is not None:
                return found
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"


@contextlib.contextmanager
def running(image: str, *options: str) -> Iterator[str]:
    """Run an image as its own command says until the block ends; yields the container's id."""
    container = docker("run", "--detach", *RESTRICTED, *options, image)
    try:
        yield container
    except BaseException:
        logs = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
        sys.stderr.write(logs.stdout + logs.stderr)
        raise
    finally:
        docker("rm", "--force", container)


def state(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("container", "inspect", "--format={{json .State}}", container))
    return found


@pytest.mark.images
@pytest.mark.parametrize("name", NAMES)
def test_image_says_what_it_is(name: str, images: Images) -> None:
    [version] = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    found = config(images[name])
    assert images[name] == f"phoenix-ml/phoenix-{name}:{version}"
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in found["Labels"].items()}
    assert labels["title"] == f"phoenix-{name}"
    assert labels["version"] == version
    assert labels["licenses"] == "Apache-2.0"
    assert labels["description"]
    assert found["Healthcheck"]["Test"][0] == "CMD"
    assert found["Entrypoint"] == [f"phoenix-{name}"]
    assert inside(images[name], f"phoenix-{name}", "--version") == f"phoenix-{name} {version}"
    size_bytes = int(docker("image", "inspect", "--format={{.Size}}", images[name]))
    print(f"{images[name]}: {size_bytes / 1e6:.0f} MB")


@pytest.mark.images
@pytest.mark.parametrize("name", NAMES)
def test_image_runs_as_a_user_without_rights(name: str, images: Images) -> None:
    assert config(images[name])["User"] == "10001:10001"
    assert inside(images[name], "id", "-u") == "10001"
    assert inside(images[name], "id", "-g") == "10001"
    assert inside(images[name], "sh", "-c", "find / -xdev -type f -perm /6000 2>/dev/null; true") == ""


@pytest.mark.images
@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("server", ["phoenix_server", "phoenix_api", "onnxruntime"], ["kopf", "kubernetes", "phoenix_operator"]),
        ("operator", ["phoenix_operator", "phoenix_api", "kopf"], ["onnxruntime", "numpy", "phoenix_server"]),
    ],
)
def test_image_holds_what_its_program_needs_and_no_more(
    name: str, present: list[str], absent: list[str], images: Images
) -> None:
    absent = [*absent, "pip", "ensurepip", "setuptools", "pytest"]
    code = f"""if True:
        import importlib
        from importlib.util import find_spec
        for module in {present}:
            importlib.import_module(module)
        print([module for module in {absent} if find_spec(module)])
    """
    assert inside(images[name], "python", "-c", code) == "[]"
    tools = ["pip", "pip3", "uv", "apt", "apt-get", "dpkg", "gcc", "cc", "make", "curl"]
    assert inside(images[name], "sh", "-c", f"for tool in {' '.join(tools)}; do command -v $tool; done; true") == ""


@pytest.mark.images
def test_settings_of_the_building_machine_stay_behind(images: Images) -> None:
    for image in images.values():
        names = {variable.partition("=")[0] for variable in config(image)["Env"]}
        assert not {name for name in names if name.startswith(("PIP_", "UV_", "SSL_")) or "PROXY" in name.upper()}


@pytest.mark.images
def test_server_answers_on_a_read_only_root_and_ends_cleanly(images: Images) -> None:
    with running(images["server"], STATE, "--publish=127.0.0.1::8000") as container:
        address = docker("port", container, "8000").splitlines()[0]
        request = (ROOT / "examples/iris/request.json").read_bytes()
        expected = json.loads((ROOT / "examples/iris/response.json").read_text())

        def infer() -> Any:
            assert state(container)["Running"], "it has ended"
            with urllib.request.urlopen(f"http://{address}/v2/models/iris/infer", request, timeout=5) as answer:
                return json.load(answer)

        answer = wait_for("an answer", infer)
        [label, probabilities] = [output["data"] for output in answer["outputs"]]
        assert label == expected["outputs"][0]["data"]
        assert probabilities == pytest.approx(expected["outputs"][1]["data"], rel=1e-3, abs=1e-6)
        wait_for("a healthy container", lambda: state(container)["Health"]["Status"] == "healthy" or None)
        docker("stop", "--time=30", container)
        assert state(container)["ExitCode"] == 0


@pytest.mark.images
def test_server_writes_nowhere_but_where_it_may(images: Images) -> None:
    with running(images["server"], "--read-only=false", "--tmpfs=/var/lib/phoenix:uid=10001") as container:
        wait_for("readiness", lambda: '"message": "ready"' in logs_of(container) or None)
        assert docker("diff", container) == ""


@pytest.mark.images
@pytest.mark.parametrize(("name", "module"), [("server", "phoenix_server.app"), ("operator", "kopf")])
def test_what_is_imported_is_compiled_in_the_image(name: str, module: str, images: Images) -> None:
    code = f"""if True:
        import importlib, os, sys
        importlib.import_module({module!r})
        files = {{m.__spec__.cached for m in list(sys.modules.values()) if getattr(m, "__spec__", None)}}
        print(len(files), sorted(file for file in files if file and not os.path.exists(file)))
    """
    count, missing = inside(images[name], "python", "-c", code).split(" ", 1)
    assert int(count) > 100
    assert missing == "[]"


@pytest.mark.images
def test_examples_are_served_from_the_model_store_wherever_their_manifests_lie(images: Images) -> None:
    manifests = ["--volume", f"{ROOT}/examples/iris/model.yaml:/etc/phoenix/manifests/iris.yaml:ro"]
    docker("run", "--rm", *RESTRICTED, STATE, *manifests, images["server"], "check", "/etc/phoenix/manifests")


@pytest.mark.images
def test_second_build_builds_nothing(images: Images) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/images.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(images.values())
    assert done.stderr.splitlines() == [f"{image} is up to date" for image in images.values()]


def logs_of(container: str) -> str:
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    return done.stdout + done.stderr
