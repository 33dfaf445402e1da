"""A real API server with etcd behind it and no node: what it accepts, and what the operator makes of it.

The lab `tests` is this session's own, with the CRD of this checkout; it is stopped at the end. No controllers run, so
that a Deployment of a thousand replicas costs nothing.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests/operator"), str(ROOT / "tests/phoenix_api")]

import foreign_crds  # noqa: E402
from api_client import ApiServer  # noqa: E402
from lab import LabError, cluster, control_plane, processes  # noqa: E402
from lab.state import Lab, only_one  # noqa: E402

from phoenix_operator.kinds import CHILDREN, Kind  # noqa: E402

_NAME = "tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[ApiServer]:
    """The API server with the CRD, for this session alone."""
    lab = Lab(_NAME)
    with ExitStack() as stack:
        # who waits, for another session or for Kubernetes to be compiled, should see why
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            stack.enter_context(only_one(lab.name))
            cluster.down(lab)  # what a session that was killed has left
            stack.callback(cluster.down, lab)
            try:
                kubeconfig = cluster.up_control_plane(lab, controllers=False)
                crds = [ROOT / "crds/phoenixmodels.yaml", *foreign_crds.files()]
            except (LabError, OSError, subprocess.CalledProcessError) as error:
                reason = f"no API server: {error}"
                if "cluster" in os.environ.get("PHOENIX_REQUIRE", "").split(","):
                    pytest.fail(reason)
                pytest.skip(reason)
        control_plane.kubectl(lab, "apply", "--server-side", *(f"--filename={file}" for file in crds))
        control_plane.kubectl(lab, "wait", "--for=condition=Established", "crd", "--all")
        for kind in CHILDREN:
            # until its cache is there a watch of a kind that is new is told to come back, which kopf logs as an error
            processes.wait_until(f"{kind} can be watched", functools.partial(_can_be_watched, lab, kind), deadline_s=60)
        yield ApiServer(kubeconfig, lab.audit_log)


def _can_be_watched(lab: Lab, kind: Kind) -> bool:
    try:
        control_plane.kubectl(lab, "get", "--raw", f"{kind.path(None)}?watch=1&timeoutSeconds=1&resourceVersion=0")
    except LabError:
        return False
    return True
