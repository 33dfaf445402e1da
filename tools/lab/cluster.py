"""The lab as a whole: which way to a cluster is taken, in which order things start, when they count as started."""

import os
import shutil
import socket
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from . import LabError, binaries, control_plane, fakes, kind, machine, node, processes
from .control_plane import Command
from .state import Facts, Lab, choose_ports, say

GIVEN = "PHOENIX_TEST_KUBECONFIG"
_CONTROL_PLANE = ("etcd", "apiserver")
_CONTROLLERS = ("controller-manager",)
_FULL = ("etcd", "apiserver", "controller-manager", "scheduler", "containerd", "kubelet", "kube-proxy", "coredns")
_COMMANDS: dict[str, Callable[[Lab, Facts], Command]] = {
    "etcd": control_plane.etcd,
    "apiserver": control_plane.apiserver,
    "controller-manager": control_plane.controller_manager,
    "scheduler": control_plane.scheduler,
    "containerd": node.containerd,
    "kubelet": node.kubelet,
    "kube-proxy": node.kube_proxy,
    "coredns": node.coredns,
    "kwok": fakes.kwok,
}
COMPONENTS = tuple(_COMMANDS)
_PROGRAMS = {
    "apiserver": ("kube-apiserver",),
    "controller-manager": ("kube-controller-manager",),
    "scheduler": ("kube-scheduler",),
    "containerd": ("containerd", "containerd-shim-runc-v2", "ctr"),
}
_START_DEADLINE_S = 120.0


def given_kubeconfig() -> Path | None:
    """The cluster that the environment names; it is used and never changed or stopped by the lab."""
    named = os.environ.get(GIVEN)
    if not named:
        return None
    if not Path(named).is_file():
        raise LabError(f"{GIVEN} names {named}, and there is no such file")
    return Path(named).resolve()


def up(lab: Lab) -> Path:
    """Have a cluster with a node; the path of its kubeconfig."""
    if given := given_kubeconfig():
        say(f"using the cluster that {GIVEN} names")
        return given
    facts = lab.facts()
    if facts and facts.mode == "kind" and kind.exists(lab):
        say(f"the lab {lab.name!r} is up (kind)")
    elif not (facts and facts.mode != "kind") and kind.is_possible():
        kind.create(lab)
    else:
        _up(lab, "full", _FULL)
    return lab.kubeconfig


def up_control_plane(lab: Lab, *, controllers: bool) -> Path:
    """Have etcd and an API server, without a node; needs no root."""
    _up(lab, "control-plane", _CONTROL_PLANE + (_CONTROLLERS if controllers else ()))
    return lab.kubeconfig


def _up(lab: Lab, mode: str, components: Sequence[str]) -> None:
    facts = lab.facts()
    if facts and facts.mode != mode:
        raise LabError(f"the lab {lab.name!r} is up as {facts.mode!r}; take it down first, or use another --name")
    if facts and facts.kubernetes != binaries.KUBERNETES:
        say(f"the lab {lab.name!r} runs Kubernetes {facts.kubernetes}; starting anew with {binaries.KUBERNETES}")
        facts = None
    elif facts and (ports := lost_ports(lab, facts)):
        say(f"the lab {lab.name!r} has ended, and others took its ports ({ports}); starting anew")
        facts = None
    with_node = mode == "full"
    if with_node:
        machine.require_root()
    machine.install_packages(with_node=with_node)
    programs = [program for each in components for program in _PROGRAMS.get(each, (each,))]
    binaries.build(programs if shutil.which("kubectl") else [*programs, "kubectl"])
    if is_new := facts is None:
        facts = _prepare(lab, mode, components)
    elif added := [each for each in components if each not in facts.components]:
        facts.components += added
        lab.write(facts)
    missing = [each for each in facts.components if not _is_running(lab, each)]
    if not missing and _all_ready(lab, facts):
        say(f"the lab {lab.name!r} is up")
        return
    _start_all(lab, facts, missing, is_new=is_new)
    say(f"the lab {lab.name!r} is up: Kubernetes {facts.kubernetes}")


def lost_ports(lab: Lab, facts: Facts) -> str:
    """The ports of parts that do not run, on which somebody else answers: such a part cannot start again."""
    ended = [name for name in facts.ports if not _is_running(lab, name.removesuffix("-peer"))]
    return ", ".join(f"{name} {facts.ports[name]}" for name in ended if _answers(facts.ports[name]))


def _prepare(lab: Lab, mode: str, components: Sequence[str]) -> Facts:
    """From whatever an earlier lab left, also one that crashed or that a reboot ended, to one that can start."""
    down(lab)
    if mode == "full" and _answers(node.KUBELET_PORT):
        raise LabError(f"port {node.KUBELET_PORT} is taken: another Kubernetes node runs on this machine")
    shutil.rmtree(lab.logs, ignore_errors=True)  # kept until now to be read; a new cluster counts from nothing
    lab.logs.mkdir(parents=True)
    facts = Facts(
        mode=mode,
        kubernetes=binaries.KUBERNETES,
        host_ip=machine.host_ip(),
        ports=choose_ports(),
        components=list(components),
    )
    control_plane.prepare(lab, facts)
    if mode == "full":
        node.prepare(lab, facts)
    lab.write(facts)
    return facts


def _start_all(lab: Lab, facts: Facts, missing: Sequence[str], *, is_new: bool) -> None:
    for each in missing:
        if each in ("controller-manager", "scheduler", "kubelet", "kube-proxy", "coredns"):
            continue
        _start(lab, facts, each)
    if "containerd" in missing:
        wait_ready(lab, facts, "containerd")
        if is_new and node.remove_pods(lab):  # those of an earlier lab; containerd read of them when it started
            processes.stop([_record(lab, "containerd")])
            _start(lab, facts, "containerd")
            wait_ready(lab, facts, "containerd")
        node.import_pause_image(lab)
    wait_ready(lab, facts, "apiserver")
    for each in missing:
        if not _is_running(lab, each):
            _start(lab, facts, each)
    if facts.mode == "full":
        processes.wait_until("the DNS service", lambda: _succeeds(node.announce_dns, lab, facts), deadline_s=30)
    for each in facts.components:
        wait_ready(lab, facts, each)


def down(lab: Lab, *, purge: bool = False) -> None:
    """Stop what `up` started and remove what pods left. With `purge`, images and logs go too."""
    facts = lab.facts()
    if facts and facts.mode == "kind":
        kind.delete(lab)
    lab.forget()
    if has_node := lab.run.exists() or (lab.node / "kubelet").exists():
        machine.require_root()
        processes.stop([_record(lab, "kubelet")])  # first, or it starts again what is ended
        node.remove_pods(lab)
    needed_last = {_record(lab, "etcd"), _record(lab, "containerd")}
    processes.stop(set(lab.records.glob("*.json")) - needed_last)
    processes.stop(needed_last)
    if has_node:
        node.clean(lab)
    for leftover in (lab.folder,) if purge else (lab.pki, lab.records, lab.folder / "etcd"):
        shutil.rmtree(leftover, ignore_errors=True)
    lab.kubeconfig.unlink(missing_ok=True)


def start_component(lab: Lab, name: str) -> None:
    """Start one part again and wait until it answers."""
    facts = _part_of(lab, name)
    if not _is_running(lab, name):
        _start(lab, facts, name)
    wait_ready(lab, facts, name)


def stop_component(lab: Lab, name: str) -> None:
    """Stop one part; the rest goes on."""
    _part_of(lab, name)
    processes.stop([_record(lab, name)])


def _own(lab: Lab) -> Facts:
    if given_kubeconfig():
        raise LabError(f"the cluster that {GIVEN} names is not the lab's, and the lab changes nothing about it")
    return lab.require()


def _part_of(lab: Lab, name: str) -> Facts:
    facts = _own(lab)
    if name not in facts.components:
        raise LabError(f"the lab {lab.name!r} has no part {name!r}; it has: {', '.join(facts.components) or 'none'}")
    return facts


def load(lab: Lab, images: Sequence[str]) -> None:
    """Copy images into the node: names known to Docker, or paths of archives (`*.tar`)."""
    facts = _own(lab)
    if facts.mode == "kind":
        kind.load(lab, images)
        return
    names = [image for image in images if not image.endswith(".tar")]
    for archive in set(images) - set(names):
        node.import_archive(lab, Path(archive))
    node.import_from_docker(lab, names)


def set_gpus(lab: Lab, *, count: int, resource: str) -> None:
    """Advertise devices on the real node."""
    facts = _own(lab)
    if facts.mode == "control-plane":
        raise LabError(f"the lab {lab.name!r} has no real node; `nodes` makes fake ones, with --gpus")
    name = kind.node_name(lab) if facts.mode == "kind" else control_plane.NODE_NAME
    fakes.set_gpus(lab, name, count=count, resource=resource)
    say(f"the node {name} advertises {count} {resource}")


def set_nodes(lab: Lab, *, count: int, gpus: int, is_schedulable: bool) -> None:
    """Have exactly `count` fake nodes beside the real one, and kwok only while there are any."""
    facts = _own(lab)
    if count:
        binaries.build(["kwok"])
        if "kwok" not in facts.components:
            facts.components.append("kwok")
            lab.write(facts)
        start_component(lab, "kwok")
    fakes.set_nodes(lab, count=count, gpus=gpus, is_schedulable=is_schedulable)
    if not count and "kwok" in facts.components:
        stop_component(lab, "kwok")
        facts.components.remove("kwok")
        lab.write(facts)
    if count:
        fakes.wait_ready(lab, count)
    say(f"{count} fake nodes")


def status(lab: Lab) -> tuple[list[str], bool]:
    """Lines for people, and whether all is well."""
    if given := given_kubeconfig():
        return [f"the cluster of {GIVEN}: {given}"], True
    facts = lab.facts()
    if facts is None:
        return [f"the lab {lab.name!r} is not up"], False
    if facts.mode == "kind":
        return [f"the lab {lab.name!r} is a kind cluster; kubeconfig {lab.kubeconfig}"], kind.exists(lab)
    lines = [f"the lab {lab.name!r}, Kubernetes {facts.kubernetes} ({facts.mode}); kubeconfig {lab.kubeconfig}"]
    well = True
    for each in facts.components:
        found = processes.read(_record(lab, each))
        state = f"runs as {found.pid}" if found and found.is_running() else "does not run"
        if found and found.is_running() and not _is_ready(lab, facts, each):
            state += ", is not ready"
        well = well and state.endswith(tuple("0123456789"))
        lines.append(f"  {each:<20}{state}")
    return lines, well


def _record(lab: Lab, name: str) -> Path:
    return lab.records / f"{name}.json"


def _is_running(lab: Lab, name: str) -> bool:
    return processes.is_running(_record(lab, name))


def _start(lab: Lab, facts: Facts, name: str) -> None:
    say(f"starting {name}")
    processes.start(_COMMANDS[name](lab, facts), record=_record(lab, name), log=lab.logs / f"{name}.log")


def wait_ready(lab: Lab, facts: Facts, name: str) -> None:
    """Wait until a part answers; an error with the end of its log if it does not or has ended."""
    log = lab.logs / f"{name}.log"

    def ready() -> bool:
        if not _is_running(lab, name):
            raise LabError(f"{name} has ended; the end of {log}:\n{processes.tail(log)}")
        return _is_ready(lab, facts, name)

    processes.wait_until(f"{name} is ready", ready, deadline_s=_START_DEADLINE_S, log=log)


def _all_ready(lab: Lab, facts: Facts) -> bool:
    return all(_is_ready(lab, facts, each) for each in facts.components)


def _is_ready(lab: Lab, facts: Facts, name: str) -> bool:
    match name:
        case "apiserver":
            return control_plane.is_ready(lab)
        case "containerd":
            return node.ctr(lab, "version").returncode == 0
        case "kubelet":
            return _is_healthy(f"http://127.0.0.1:{node.KUBELET_HEALTH_PORT}/healthz") and node.is_ready(lab)
        case "kube-proxy":
            return _is_healthy(f"http://127.0.0.1:{node.KUBE_PROXY_HEALTH_PORT}/healthz")
        case "kwok":
            return True  # the nodes that it keeps alive show whether it works
    return _answers(facts.ports[name])


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2):
            return True
    except OSError:
        return False


def _succeeds(action: Callable[[Lab, Facts], None], lab: Lab, facts: Facts) -> bool:
    try:
        action(lab, facts)
    except LabError:
        return False
    return True
