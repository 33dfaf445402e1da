"""What the lab asks of the machine: root, a few Debian packages, an address, a kernel that lets containers run."""

import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import LabError
from .state import say

# Debian package -> a program of it: where the program is there, the package does not matter.
_NODE_PACKAGES = {
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "iptables": "iptables",
    "iproute2": "ip",
    "conntrack": "conntrack",
    "openssl": "openssl",
}
_CONTROL_PLANE_PACKAGES = {"openssl": "openssl"}
_CAP_SYS_RESOURCE = 24
# What Debian's packages ask before they start a daemon; without the file, they start it.
_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = "#!/bin/sh\n# written by the Phoenix lab for the time of one installation\nexit 101\n"


def require_root() -> None:
    """A node starts containers: root, and no way around it."""
    if os.geteuid() != 0:
        raise LabError(
            "a node runs containers, which needs root: run this with sudo, put `kind` and a working Docker on "
            "PATH, or name a cluster of yours for tests in PHOENIX_TEST_KUBECONFIG"
        )


def install_packages(*, with_node: bool) -> None:
    """Install what is missing, on Debian and Ubuntu as root; elsewhere say what is missing."""
    wanted = _NODE_PACKAGES if with_node else _CONTROL_PLANE_PACKAGES
    install([package for package, program in wanted.items() if not shutil.which(program)])


def install(missing: Sequence[str]) -> None:
    """Install Debian packages without starting the daemons in them."""
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(f"programs of these Debian packages are missing: {', '.join(missing)}; install them as root")
    say(f"installing the Debian packages {', '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    wait = ("-o", "DPkg::Lock::Timeout=600", "-qq")
    with _no_daemons():
        for arguments in (("update", *wait), ("install", "-y", "--no-install-recommends", *wait, *missing)):
            done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise LabError(f"apt-get {arguments[0]} failed:\n{done.stderr.strip() or done.stdout.strip()}")


@contextmanager
def _no_daemons() -> Iterator[None]:
    """For the block, packages start no daemon. A policy that the machine already has is left as it is."""
    if _POLICY.exists() and _POLICY.read_text() != _POLICY_TEXT:
        yield
        return
    _POLICY.write_text(_POLICY_TEXT)
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)


def cni_folder() -> Path:
    """Where the package put the network plugins."""
    return next(f for f in (Path("/usr/lib/cni"), Path("/opt/cni/bin")) if (f / "ptp").exists())


def host_ip() -> str:
    """This machine's address: the one it would use towards the outside, else the first it has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # a documentation address; connecting a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    if not addresses:
        raise LabError("this machine has no network address but loopback; a node needs one")
    return addresses[0]


def free_port(host: str, *, usual: int | None = None) -> int:
    """A port of `host` that nobody listens on, and that no outgoing connection takes while its server is away.

    `usual` is taken where it is free.
    """
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    lowest = min(15_000, lowest_outgoing - 1_000)
    for port in (*([usual] if usual else []), *random.sample(range(lowest, lowest_outgoing), 100)):
        with socket.socket() as candidate:
            try:
                candidate.bind((host, port))
            except OSError:
                continue
            return port
    raise LabError(f"no free port on {host}")


def may_lower_oom_score() -> bool:
    """Whether runc may make a container less likely to be killed; without the capability it dies trying."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


def architecture() -> str:
    """The machine's processor, as image manifests name it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
