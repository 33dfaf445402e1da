"""The node: containerd, kubelet, kube-proxy and CoreDNS, the files they read, and everything they leave behind.

Pods are wired with the `ptp` plugin: each has its own link to the host, which routes and translates addresses, so
neither a bridge nor br_netfilter is needed, and a pod's end leaves no interface.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import LabError, binaries, machine, oci, processes
from .control_plane import NODE_NAME, Command, kubectl
from .state import Facts, Lab, say

POD_CIDR = "10.244.0.0/20"
DNS_IP = "10.96.0.10"
KUBELET_PORT = 10250
KUBELET_HEALTH_PORT = 10248
KUBE_PROXY_HEALTH_PORT = 10256
_PAUSE_IMAGE = "phoenix.lab/pause:1"
_NETWORK = "phoenix-lab"
_CNI_RESULTS = Path("/var/lib/cni/results")  # not configurable in containerd

# What holds a pod's namespaces open: waits, reaps, ends when asked.
_PAUSE = """\
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}
"""

_DNS = """\
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: {ip}
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kube-dns-host, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}
addressType: IPv4
ports: [{{name: dns, port: {port}, protocol: UDP}}, {{name: dns-tcp, port: {port}, protocol: TCP}}]
endpoints: [{{addresses: ["{host}"], conditions: {{ready: true}}}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: "phoenix-lab:coredns"}}
rules:
- {{apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}}
- {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: "phoenix-lab:coredns"}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "phoenix-lab:coredns"}}
subjects: [{{apiGroup: rbac.authorization.k8s.io, kind: User, name: "phoenix-lab:coredns"}}]
"""


def prepare(lab: Lab, facts: Facts) -> None:
    """Write what containerd, kubelet, kube-proxy and CoreDNS read, and let the machine forward for pods."""
    (lab.node / "cni").mkdir(parents=True, exist_ok=True)
    lab.run.mkdir(parents=True, exist_ok=True)
    resolv_conf = _resolv_conf()
    for name, text in (
        ("cni/10-pods.conflist", _cni(lab)),
        ("containerd.toml", _containerd_config(lab)),
        ("kubelet.yaml", _kubelet_config(lab, resolv_conf)),
        ("kube-proxy.yaml", _kube_proxy_config(lab)),
        ("Corefile", _corefile(lab, facts, resolv_conf)),
    ):
        (lab.node / name).write_text(text)
    for rule in _FIREWALL:
        if not _iptables("iptables", "-I", rule):
            raise LabError(f"iptables takes no rule in {rule[1]}; does the kernel have netfilter?")


def containerd(lab: Lab, facts: Facts) -> Command:
    """An engine of the lab's own: other folders, another socket than the machine's."""
    return [binaries.path("containerd"), "--config", lab.node / "containerd.toml"]


def kubelet(lab: Lab, facts: Facts) -> Command:
    """One node, by the name `lab`."""
    return [
        binaries.path("kubelet"),
        f"--config={lab.node / 'kubelet.yaml'}",
        f"--kubeconfig={lab.pki / 'kubelet.conf'}",
        f"--root-dir={lab.node / 'kubelet'}",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={facts.host_ip}",
    ]


def kube_proxy(lab: Lab, facts: Facts) -> Command:
    """Makes Services reachable, from pods and from this machine."""
    return [binaries.path("kube-proxy"), f"--config={lab.node / 'kube-proxy.yaml'}"]


def coredns(lab: Lab, facts: Facts) -> Command:
    """Runs beside the pods rather than in one, so that no image is needed."""
    return [binaries.path("coredns"), "-conf", lab.node / "Corefile"]


def announce_dns(lab: Lab, facts: Facts) -> None:
    """Make CoreDNS the cluster's DNS service."""
    manifests = _DNS.format(ip=DNS_IP, host=facts.host_ip, port=facts.ports["coredns"])
    kubectl(lab, "apply", "--server-side", "-f", "-", stdin=manifests)


def is_ready(lab: Lab) -> bool:
    """Whether the node takes pods."""
    query = "-o=jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    try:
        return kubectl(lab, "get", "node", NODE_NAME, query).strip() == "True"
    except LabError:
        return False  # not registered yet


# Images


def ctr(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run containerd's client on the lab's engine."""
    command = [str(binaries.path("ctr")), "--address", str(_socket(lab)), "--namespace", "k8s.io", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def image_names(lab: Lab) -> set[str]:
    """The names of the images in the node."""
    return set(ctr(lab, "images", "ls", "-q").stdout.split())


def import_archive(lab: Lab, archive: Path) -> None:
    """Copy the images of a `docker save` or OCI archive into the node."""
    done = ctr(lab, "images", "import", "--local", str(archive))
    if done.returncode:
        raise LabError(f"{archive} cannot be imported: {done.stderr.strip()}")


def import_from_docker(lab: Lab, images: Sequence[str]) -> None:
    """Copy images from the Docker engine; those that the node has with the same contents stay as they are."""
    loaded_file = lab.node / "loaded.json"
    loaded: dict[str, str] = json.loads(loaded_file.read_text()) if loaded_file.exists() else {}
    there = image_names(lab)
    wanted = {image: _docker("image", "inspect", "--format={{.Id}}", image).strip() for image in images}
    changed = [image for image, id in wanted.items() if loaded.get(image) != id or full_name(image) not in there]
    if changed:
        with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
            archive = Path(folder) / "images.tar"
            _docker("save", "--output", str(archive), *changed)
            import_archive(lab, archive)
        loaded_file.write_text(json.dumps(loaded | wanted, indent=1))
    for image in images:
        say(f"{image}: {'loaded' if image in changed else 'was loaded already'}")


def full_name(image: str) -> str:
    """How containerd names what Docker calls `image`: with registry, folder and tag."""
    first, slash, _ = image.partition("/")
    if not slash:
        image = f"docker.io/library/{image}"
    elif not ("." in first or ":" in first or first == "localhost"):
        image = f"docker.io/{image}"
    return image if ":" in image.rpartition("/")[2] or "@" in image else f"{image}:latest"


def _docker(*arguments: str) -> str:
    if not shutil.which("docker"):
        raise LabError("images are copied from Docker, and there is no `docker` on PATH; archives (`*.tar`) need none")
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"`docker {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def import_pause_image(lab: Lab) -> None:
    """The image that kubelet needs for every pod, made here."""
    if _PAUSE_IMAGE in image_names(lab):
        return
    with tempfile.TemporaryDirectory() as folder:
        program, archive = Path(folder) / "pause", Path(folder) / "pause.tar"
        binaries.build_program(_PAUSE, program)
        files = {"pause": program.read_bytes()}
        oci.write_archive(archive, _PAUSE_IMAGE, files=files, entrypoint=["/pause"], cpu=machine.architecture())
        import_archive(lab, archive)


# What is left


def remove_pods(lab: Lab) -> bool:
    """End every container of this lab, also those whose engine is gone, and forget them. Whether there were any.

    Their shims outlive containerd; they are known by the lab's own socket in their arguments.
    """
    shims = set(_shims(lab))
    handles = {os.pidfd_open(pid): pid for pid in _descendants(shims) | shims if processes.start_ticks(pid)}
    processes.end(handles, first_signal=signal.SIGKILL)
    containers = ctr(lab, "containers", "ls", "-q").stdout.split() if _socket(lab).exists() else []
    if containers:
        ctr(lab, "tasks", "rm", "--force", *containers)
        ctr(lab, "containers", "rm", *containers)
    return bool(shims or containers)


def clean(lab: Lab) -> None:
    """Remove mounts, folders, addresses, firewall rules and control groups of pods. Images stay."""
    _unmount(lab)
    if lab.run.exists():  # else the machine was booted since, and what rules there are belong to others
        _remove_rules()
    for folder in (lab.run, lab.node / "kubelet", lab.node / "cni"):
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in _CNI_RESULTS.glob(f"{_NETWORK}-*"):
        leftover.unlink(missing_ok=True)
    for hierarchy in {Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()}:
        for group, _, _ in os.walk(hierarchy / "kubepods", topdown=False):
            with contextlib.suppress(OSError):  # only an empty one goes
                os.rmdir(group)


def _remove_rules() -> None:
    for rule in _FIREWALL:
        while _iptables("iptables", "-D", rule):
            pass
    listed = subprocess.run(["iptables", "--wait", "-t", "nat", "-S"], capture_output=True, text=True).stdout
    for *match, chain in host_port_rules(listed):
        _iptables("iptables", "-D", ("nat", *match, chain))
        for action in ("-F", "-X"):
            _iptables("iptables", action, ("nat", chain))
    subprocess.run([binaries.path("kube-proxy"), "--cleanup"], capture_output=True)
    for command in ("iptables", "ip6tables"):  # kubelet removes none of its own
        for chain in ("INPUT", "OUTPUT"):
            _iptables(command, "-D", ("filter", chain, "-j", "KUBE-FIREWALL"))
        for table in ("mangle", "nat", "filter"):
            for chain in ("KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"):
                for action in ("-F", "-X"):
                    _iptables(command, action, (table, chain))


def host_port_rules(listed: str) -> list[list[str]]:
    """Rules for the hostPorts of this lab's pods in the output of `iptables -S`: chain, match, and last the target."""
    rules = [shlex.split(line) for line in listed.splitlines() if f'\\"{_NETWORK}\\"' in line]
    return [rule[1:] for rule in rules if rule[:2] == ["-A", "CNI-HOSTPORT-DNAT"]]


def _unmount(lab: Lab) -> None:
    def mounted() -> list[str]:
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        decoded = [point.encode().decode("unicode_escape") for point in points]
        return [
            p for p in decoded if any(Path(p).is_relative_to(f) for f in (lab.run, lab.node)) and Path(p) != lab.node
        ]

    if points := mounted():
        subprocess.run(["umount", "--lazy", *reversed(points)], capture_output=True)
    if left := mounted():  # deleting below a mount would delete what is mounted
        raise LabError(f"cannot unmount {', '.join(left)}")


def _shims(lab: Lab) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if Path(arguments[0]).name == "containerd-shim-runc-v2" and str(_socket(lab)) in arguments:
                yield int(folder.name)


def _descendants(roots: set[int]) -> set[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in roots | found} - found:
        found |= more
    return found


# Files and rules

_MARK = ("-m", "comment", "--comment", "phoenix-lab")
# A machine with Docker drops what it forwards unless told otherwise.
_FIREWALL = (
    ("filter", "FORWARD", "-s", POD_CIDR, *_MARK, "-j", "ACCEPT"),
    ("filter", "FORWARD", "-d", POD_CIDR, *_MARK, "-j", "ACCEPT"),
    ("nat", "POSTROUTING", "-s", POD_CIDR, "!", "-d", POD_CIDR, *_MARK, "-j", "MASQUERADE"),
)


def _iptables(command: str, action: str, rule: tuple[str, ...]) -> bool:
    table, chain, *match = rule
    return subprocess.run([command, "--wait", "-t", table, action, chain, *match], capture_output=True).returncode == 0


def _socket(lab: Lab) -> Path:
    return lab.run / "containerd.sock"


def _resolv_conf() -> Path:
    """The machine's name servers; where systemd-resolved is the only one named, those behind it."""
    behind = Path("/run/systemd/resolve/resolv.conf")
    return behind if behind.exists() else Path("/etc/resolv.conf")


def _cni(lab: Lab) -> str:
    return f"""\
{{"cniVersion": "1.0.0", "name": "{_NETWORK}", "plugins": [
  {{"type": "ptp", "ipMasq": false,
   "ipam": {{"type": "host-local", "dataDir": "{lab.run / "addresses"}",
            "ranges": [[{{"subnet": "{POD_CIDR}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}]}}
"""


def _containerd_config(lab: Lab) -> str:
    # What is disabled would reach outside the lab's folders, or look for file systems that it does not use.
    return f"""\
version = 3
root = "{lab.node / "containerd"}"
state = "{lab.run / "containerd"}"
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.blockfile"]
[grpc]
  address = "{_socket(lab)}"
[debug]
  level = "warn"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{_PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = {str(not machine.may_lower_oom_score()).lower()}
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    runtime_path = "{binaries.path("containerd-shim-runc-v2")}"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{machine.cni_folder()}"]
    conf_dir = "{lab.node / "cni"}"
    use_internal_loopback = true
"""


def _kubelet_config(lab: Lab, resolv_conf: Path) -> str:
    # Images came from this machine and cannot be pulled again: nothing may collect them.
    return f"""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://{_socket(lab)}
tlsCertFile: {lab.pki / "kubelet.crt"}
tlsPrivateKeyFile: {lab.pki / "kubelet.key"}
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: {lab.pki / "ca.crt"}}}
authorization: {{mode: Webhook}}
clusterDomain: cluster.local
clusterDNS: [{DNS_IP}]
resolvConf: {resolv_conf}
maxPods: 250
serializeImagePulls: false
imageGCHighThresholdPercent: 100
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%}}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
"""


def _kube_proxy_config(lab: Lab) -> str:
    return f"""\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {{kubeconfig: {lab.pki / "kube-proxy.conf"}}}
hostnameOverride: {NODE_NAME}
clusterCIDR: {POD_CIDR}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
"""


def _corefile(lab: Lab, facts: Facts, resolv_conf: Path) -> str:
    has_servers = resolv_conf.exists() and "nameserver" in resolv_conf.read_text()
    return f"""\
.:{facts.ports["coredns"]} {{
  errors
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {lab.pki / "coredns.conf"} phoenix-lab
    fallthrough in-addr.arpa ip6.arpa
  }}
  {f"forward . {resolv_conf}" if has_servers else ""}
}}
"""
