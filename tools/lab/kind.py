"""A cluster made by `kind`, where it and Docker are there: the same commands, other people's packaging."""

import shutil
import subprocess
from collections.abc import Sequence

from . import LabError
from .state import Facts, Lab, say


def is_possible() -> bool:
    """Whether `kind` is on PATH and a Docker engine answers."""
    return bool(shutil.which("kind") and shutil.which("docker")) and _run("docker", "info").returncode == 0


def exists(lab: Lab) -> bool:
    """Whether kind knows the lab's cluster."""
    return _name(lab) in _run("kind", "get", "clusters").stdout.split()


def create(lab: Lab) -> None:
    """Make the cluster and record it."""
    say(f"creating the kind cluster {_name(lab)}")
    lab.folder.mkdir(parents=True, exist_ok=True)
    lab.write(Facts(mode="kind", kubernetes="", host_ip="", ports={}, components=[]))
    _must("kind", "create", "cluster", "--name", _name(lab), "--kubeconfig", str(lab.kubeconfig), "--wait", "3m")


def delete(lab: Lab) -> None:
    """Delete the cluster."""
    _must("kind", "delete", "cluster", "--name", _name(lab), "--kubeconfig", str(lab.kubeconfig))


def load(lab: Lab, images: Sequence[str]) -> None:
    """Copy images from Docker into the cluster's node."""
    _must("kind", "load", "docker-image", "--name", _name(lab), *images)


def node_name(lab: Lab) -> str:
    """The name of the cluster's only node."""
    return f"{_name(lab)}-control-plane"


def _name(lab: Lab) -> str:
    return "phoenix-lab" if lab.name == "default" else f"phoenix-lab-{lab.name}"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _must(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        raise LabError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")
