"""Runs the lab's Helm on the chart: renders it, and says what it makes of wrong values. Needs no cluster."""

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import services
import yaml
from lab import LabError, binaries

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "phoenix"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
NAMESPACE = "phoenix-system"
_TIMEOUT_S = 60
Object = dict[str, Any]


@functools.cache
def binary() -> Path:
    """Build Helm where it is missing, or skip with the reason; fail where PHOENIX_REQUIRE forbids to skip."""
    try:
        binaries.build(["helm"])
    except LabError as error:
        services.skip_or_fail(f"no helm: {error}")
    return binaries.path("helm")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run Helm; it reads no configuration of this machine's user and knows no cluster."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "KUBECONFIG": "/dev/null"}
    return subprocess.run(
        [binary(), *arguments],
        input=stdin,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def template(values: Object, *, namespace: str = NAMESPACE) -> str:
    """Return what the chart makes of values."""
    return _template(yaml.safe_dump(values), namespace)


@functools.cache
def _template(values: str, namespace: str) -> str:
    done = run("template", "phoenix", str(CHART), "--namespace", namespace, "--values", "-", stdin=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(
    values: Object, *, namespace: str = NAMESPACE, release: str = "phoenix", hooks: bool = False
) -> list[Object]:
    """Return the objects of the chart, with hooks or without."""
    found = yaml.load_all(template(values, namespace=namespace), Loader=yaml.CSafeLoader)
    return [body for body in found if body and (hooks or not _is_hook(body))]


def _is_hook(body: Object) -> bool:
    return "helm.sh/hook" in body["metadata"].get("annotations", {})


def refusal(values: Object) -> str:
    """Return the message with which values are refused."""
    done = run("template", "phoenix", str(CHART), "--values", "-", stdin=yaml.safe_dump(values))
    assert done.returncode != 0, "the values were taken"
    assert done.stdout == ""
    return done.stderr


def read(file: Path) -> Object:
    """Return the values of a file."""
    found: Object = yaml.safe_load(file.read_text()) or {}
    return found


def pods(bodies: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield name and spec of each pod."""
    for body in bodies:
        if body["kind"] == "Deployment":
            yield body["metadata"]["name"], body["spec"]["template"]["spec"]
        elif body["kind"] == "Pod":
            yield body["metadata"]["name"], body["spec"]


def one(bodies: list[Object], kind: str, name: str) -> Object:
    """Return the one object of a kind and a name."""
    (found,) = (body for body in bodies if (body["kind"], body["metadata"]["name"]) == (kind, name))
    return found
