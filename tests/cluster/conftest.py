"""Phoenix on a real Kubernetes: images of this checkout, the operator with the rights of its install manifests.

One cluster serves all tests (`tools/cluster.py` brings it up, and leaves it up: the next run starts in seconds); each
test has a namespace of its own in which Pod Security `restricted` is enforced. Tests speak kubectl, as users do.
"""

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tools")]

import cluster as tools  # noqa: E402
from lab import state  # noqa: E402
from phoenix_cluster import Phoenix  # noqa: E402

SETTINGS = {
    "routes": {"kind": "Ingress", "ingressClassName": "none"},
    "acceleratorProfiles": {"small": {"resourceName": "nvidia.com/gpu", "nodeSelector": {"gpu": "small"}}},
    "resyncSeconds": 60,
    "leaseSeconds": 5,
    # the GPU variant cannot be built everywhere; the same server tells truthfully that it finds no device
    "serverGpuImage": tools.images()[0],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))


def _why_not() -> str | None:
    """Return why there can be no cluster here."""
    if os.environ.get("PHOENIX_TEST_KUBECONFIG"):
        return None
    if os.geteuid() != 0:
        return "a cluster of its own needs root (or PHOENIX_TEST_KUBECONFIG)"
    if shutil.which("go") is None and shutil.which("kind") is None:
        return "neither go nor kind is there to make a cluster with"
    return None


@contextmanager
def _alone(config: pytest.Config) -> Iterator[None]:
    """Keep other sessions away: tests stop the operator, restart the API server and change what the node has."""
    state.HOME.mkdir(parents=True, exist_ok=True)
    with (state.HOME / "tests.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(f"\nwaiting for the session of cluster tests that runs as {lock.read()}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        yield


@pytest.fixture(scope="session")
def phoenix(pytestconfig: pytest.Config) -> Iterator[Phoenix]:
    """The cluster with the operator, set up for tests, for this session alone."""
    if reason := _why_not():
        if "cluster" in os.environ.get("PHOENIX_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    with _alone(pytestconfig):
        try:
            kubectl = tools.up()
        except subprocess.CalledProcessError as error:
            pytest.fail(f"no cluster: {error}\n{error.stderr or ''}")
        found = Phoenix(kubectl, tools.images()[0])
        found.set_settings(SETTINGS)
        yield found


@pytest.fixture(scope="session")
def usual_settings() -> dict[str, Any]:
    """The operator's settings that tests find, and leave behind."""
    return dict(SETTINGS)


@pytest.fixture(scope="module")
def admin(
    phoenix: Phoenix, usual_settings: dict[str, Any], request: pytest.FixtureRequest
) -> Iterator[dict[str, dict[str, str]]]:
    """New services, and the operator told of them; their admins' bindings by kind. SETTINGS of the module hold too."""
    tools.lab("services", "down")
    root, backends = tools.services(phoenix.kubectl)
    phoenix.set_settings({**usual_settings, **backends, **getattr(request.module, "SETTINGS", {})})
    yield {folder.name: {key.name: key.read_text() for key in folder.iterdir()} for folder in root.iterdir()}
    phoenix.wait_for_no("model of these tests", lambda: _models(phoenix), deadline_s=120)
    tools.apply_manifests(phoenix.kubectl)
    phoenix.set_settings(usual_settings)


def _models(phoenix: Phoenix) -> list[str]:
    """The models in this session's namespaces, which are on their way out."""
    models = json.loads(phoenix.kubectl("get", "phx", "--all-namespaces", "-o", "json"))["items"]
    names = [model["metadata"]["namespace"] for model in models]
    return [name for name in names if name.startswith(f"t{os.getpid()}-")]


_numbers = itertools.count(1)


@contextmanager
def _namespace(phoenix: Phoenix, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"t{os.getpid()}-{next(_numbers)}"
    tools.make_namespace(phoenix.kubectl, name)
    yield name
    if request.node.stash.get(_FAILED, False):
        sys.stderr.write(phoenix.report(name))
    phoenix.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture
def namespace(phoenix: Phoenix, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace in which only restricted pods run; it is deleted afterwards."""
    with _namespace(phoenix, request) as name:
        yield name


@pytest.fixture
def another_namespace(phoenix: Phoenix, request: pytest.FixtureRequest) -> Iterator[str]:
    """A second one."""
    with _namespace(phoenix, request) as name:
        yield name


_FAILED: pytest.StashKey[bool] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[_FAILED] = report.failed
    return report
