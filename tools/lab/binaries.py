"""The programs of a cluster, compiled from their Go modules once and kept by version.

No image and no release archive is fetched: only the Go module proxy is needed. Each group of programs has a module of
its own, because one module would drag the dependencies of all of them to common versions.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import LabError
from .state import HOME, only_one, say

KUBERNETES = "1.36.3"
_OLDEST_GO = (1, 24)  # the first that runs tools of a module; it fetches a newer one if a module asks for it


@dataclass(frozen=True)
class Module:
    """Programs that are built from one Go module. `packages` maps a program's name to its package."""

    name: str
    path: str
    version: str
    packages: dict[str, str]
    minutes: float  # per program, on two cores, with nothing compiled before
    stamp: str = ""  # a variable that holds the version; some programs refuse to work without one

    @property
    def folder(self) -> Path:
        return HOME / "bin" / f"{self.name}-{self.version}"


_VERSION = "k8s.io/component-base/version"
_KUBERNETES = Module(
    name="kubernetes",
    path="k8s.io/kubernetes",
    version=KUBERNETES,
    packages={
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
    },
    minutes=1.5,
    stamp=f"-X {_VERSION}.gitVersion=v{KUBERNETES} -X {_VERSION}.gitMajor=1 "
    f"-X {_VERSION}.gitMinor={KUBERNETES.split('.')[1]} -X {_VERSION}.gitTreeState=clean",
)
_CONTAINERD = "github.com/containerd/containerd/v2"
_HELM = "helm.sh/helm/v4"
_MODULES = (
    _KUBERNETES,
    Module("etcd", "go.etcd.io/etcd/server/v3", "3.6.8", {"etcd": "go.etcd.io/etcd/server/v3"}, 1),
    Module(
        name="containerd",
        path=_CONTAINERD,
        version="2.2.1",
        packages={name: f"{_CONTAINERD}/cmd/{name}" for name in ("containerd", "containerd-shim-runc-v2", "ctr")},
        minutes=0.5,
        stamp=f"-X {_CONTAINERD}/version.Version=2.2.1",
    ),
    Module("coredns", "github.com/coredns/coredns", "1.12.4", {"coredns": "github.com/coredns/coredns"}, 1.5),
    Module("kwok", "sigs.k8s.io/kwok", "0.7.0", {"kwok": "sigs.k8s.io/kwok/cmd/kwok"}, 1),
    Module(
        name="helm",
        path=_HELM,
        version="4.2.4",
        packages={"helm": f"{_HELM}/cmd/helm"},
        minutes=1,
        stamp=f"-X {_HELM}/internal/version.version=v4.2.4",
    ),
)
_OF_PROGRAM = {program: module for module in _MODULES for program in module.packages}
PROGRAMS = tuple(_OF_PROGRAM)


def path(program: str) -> Path:
    """Where a program is, or will be once it is built."""
    return _OF_PROGRAM[program].folder / program


def kubectl() -> str:
    """The kubectl on PATH, else the one built here."""
    return shutil.which("kubectl") or str(path("kubectl"))


def build(programs: Iterable[str]) -> None:
    """Compile those of the programs that are not there yet. Where nothing is missing this takes no time."""
    if not _missing(programs):
        return
    with only_one("bin"):
        missing = _missing(programs)  # again: another command may have built them while we waited
        _require_go()
        for count, program in enumerate(missing, start=1):
            minutes = _OF_PROGRAM[program].minutes
            say(f"building {program} ({count} of {len(missing)}), about {minutes:g} min on two cores, once …")
            begun = time.monotonic()
            _build(_OF_PROGRAM[program], program)
            say(f"  built in {time.monotonic() - begun:.0f} s")


def _missing(programs: Iterable[str]) -> list[str]:
    return [program for program in programs if not path(program).exists()]


def _require_go() -> None:
    if not shutil.which("go"):
        raise LabError(
            "the lab compiles Kubernetes, and there is no `go` on PATH: install Go from https://go.dev/dl "
            f"({_OLDEST_GO[0]}.{_OLDEST_GO[1]} or newer; Debian's golang is too old)"
        )
    version = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, cwd="/").stdout.strip()
    found = re.match(r"go(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < _OLDEST_GO:
        raise LabError(f"the lab needs Go {_OLDEST_GO[0]}.{_OLDEST_GO[1]} or newer, `go` on PATH is {version}")


def _build(module: Module, program: str) -> None:
    workspace = HOME / "modules" / f"{module.name}-{module.version}"
    if not (workspace / "go.sum").exists():
        _prepare(module, workspace)
    module.folder.mkdir(parents=True, exist_ok=True)
    draft = module.folder / f".{program}.new"
    flags = f"-s -w {module.stamp}".strip()
    _go(workspace, "build", "-trimpath", "-ldflags", flags, "-o", str(draft), module.packages[program])
    draft.replace(path(program))


def _prepare(module: Module, workspace: Path) -> None:
    """A module whose tools are the programs; `go get` finds the version of everything they need."""
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    _go(workspace, "mod", "init", f"phoenix/lab/{module.name}")
    if module is _KUBERNETES:
        fetched = json.loads(_go(workspace, "mod", "download", "-json", f"{module.path}@v{module.version}"))
        for line in replacements(Path(fetched["GoMod"]).read_text(), module.version):
            _go(workspace, "mod", "edit", "-replace", line)
    _go(workspace, "get", "-tool", *(f"{package}@v{module.version}" for package in module.packages.values()))


def replacements(go_mod: str, version: str) -> list[str]:
    """`-replace` arguments for what k8s.io/kubernetes requires at v0.0.0: its staging modules, released as 0.x.y.

    A `replace` in its own go.mod, to a folder beside it, counts only where it is the main module.
    """
    staging = re.findall(r"^\s*(?:require\s+)?(k8s\.io/[a-z0-9-]+) v0\.0\.0(?:\s|$)", go_mod, flags=re.MULTILINE)
    released = "v0." + version.partition(".")[2]
    return [f"{name}={name}@{released}" for name in sorted(set(staging))]


def build_program(source: str, out: Path) -> None:
    """Compile one file of Go without dependencies to a static program."""
    _require_go()
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".go")
    file.write_text(source)
    _go(out.parent, "build", "-trimpath", "-ldflags", "-s -w", "-o", str(out), str(file))


def _go(folder: Path, *arguments: str) -> str:
    environment = {"GOTOOLCHAIN": "auto", **os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
    done = subprocess.run(["go", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"`go {' '.join(arguments)}` in {folder} failed:\n{done.stderr.strip()}")
    return done.stdout
