"""etcd, the API server, the controller manager and the scheduler: their certificates, files and command lines."""

import os
import subprocess
from pathlib import Path

from . import LabError, binaries, certificates
from .state import Facts, Lab

SERVICE_CIDR = "10.96.0.0/16"
SERVICE_IP = "10.96.0.1"
NODE_NAME = "lab"
Command = list[str | Path]

# Who did what, for tests that count. The operator's reads count too; from everybody else only what changes something,
# without the heartbeats.
_AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  users: ["system:serviceaccount:phoenix-system:phoenix-operator"]
- level: None
  resources: [{group: coordination.k8s.io, resources: [leases]}, {group: "", resources: [events]},
              {group: events.k8s.io, resources: [events]}]
- level: Metadata
  verbs: [create, update, patch, delete, deletecollection]
- level: None
"""


def prepare(lab: Lab, facts: Facts) -> None:
    """Write certificates, kubeconfig files and the audit policy into the lab's folder."""
    lab.pki.mkdir(parents=True, mode=0o700)
    for authority in ("ca", "front-proxy-ca"):
        certificates.make_authority(lab.pki, authority)
    host = f"IP:{facts.host_ip}"
    service = ("DNS:kubernetes", "DNS:kubernetes.default", "DNS:kubernetes.default.svc", f"IP:{SERVICE_IP}")
    for name, subject, names in (
        ("server", "/CN=kube-apiserver", ("IP:127.0.0.1", "DNS:localhost", host, *service)),
        ("admin", "/O=system:masters/CN=admin", ()),
        ("apiserver-kubelet", "/O=system:masters/CN=apiserver-kubelet", ()),
        ("controller-manager", "/CN=system:kube-controller-manager", ()),
        ("scheduler", "/CN=system:kube-scheduler", ()),
        ("kube-proxy", "/CN=system:kube-proxy", ()),
        ("coredns", "/CN=phoenix-lab:coredns", ()),
        ("kubelet", f"/O=system:nodes/CN=system:node:{NODE_NAME}", ("IP:127.0.0.1", f"DNS:{NODE_NAME}", host)),
    ):
        certificates.make_certificate(lab.pki, name, subject=subject, authority="ca", names=names)
    certificates.make_certificate(lab.pki, "front-proxy", subject="/CN=front-proxy-client", authority="front-proxy-ca")
    certificates.make_key_pair(lab.pki, "service-accounts")
    server = f"https://127.0.0.1:{facts.ports['apiserver']}"
    certificates.write_kubeconfig(lab.kubeconfig, pki=lab.pki, user="admin", server=server)
    for user in ("controller-manager", "scheduler", "kube-proxy", "coredns", "kubelet"):
        certificates.write_kubeconfig(lab.pki / f"{user}.conf", pki=lab.pki, user=user, server=server)
    (lab.folder / "audit-policy.yaml").write_text(_AUDIT_POLICY)


def etcd(lab: Lab, facts: Facts) -> Command:
    """What is stored need not survive a power cut: no fsync."""
    clients, peers = (f"http://127.0.0.1:{facts.ports[port]}" for port in ("etcd", "etcd-peer"))
    return [
        binaries.path("etcd"),
        f"--data-dir={lab.folder / 'etcd'}",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        "--unsafe-no-fsync",
        "--log-level=error",
    ]


def apiserver(lab: Lab, facts: Facts) -> Command:
    """With the aggregation layer, Pod Security admission (on by default) and an audit log."""
    pki = lab.pki
    return [
        binaries.path("kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{facts.ports['etcd']}",
        # pods reach it on the machine's address; without a node nobody but this machine does
        f"--bind-address={'0.0.0.0' if facts.mode == 'full' else '127.0.0.1'}",
        f"--advertise-address={facts.host_ip}",
        f"--secure-port={facts.ports['apiserver']}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--profiling=false",
        "--shutdown-send-retry-after=true",
        f"--tls-cert-file={pki / 'server.crt'}",
        f"--tls-private-key-file={pki / 'server.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--kubelet-client-certificate={pki / 'apiserver-kubelet.crt'}",
        f"--kubelet-client-key={pki / 'apiserver-kubelet.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki / 'service-accounts.pub'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        f"--requestheader-client-ca-file={pki / 'front-proxy-ca.crt'}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki / 'front-proxy.crt'}",
        f"--proxy-client-key-file={pki / 'front-proxy.key'}",
        f"--audit-policy-file={lab.folder / 'audit-policy.yaml'}",
        f"--audit-log-path={lab.audit_log}",
        "--audit-log-maxsize=200",
        "--audit-log-maxbackup=1",
    ]


def controller_manager(lab: Lab, facts: Facts) -> Command:
    """LAB_HPA_SYNC and LAB_HPA_DOWNSCALE set how fast the autoscaler looks and how long it waits before it shrinks."""
    return [
        binaries.path("kube-controller-manager"),
        *_as_user(lab, facts, "controller-manager"),
        f"--root-ca-file={lab.pki / 'ca.crt'}",
        f"--service-account-private-key-file={lab.pki / 'service-accounts.key'}",
        "--use-service-account-credentials=true",
        f"--horizontal-pod-autoscaler-sync-period={os.environ.get('LAB_HPA_SYNC', '15s')}",
        f"--horizontal-pod-autoscaler-downscale-stabilization={os.environ.get('LAB_HPA_DOWNSCALE', '5m')}",
    ]


def scheduler(lab: Lab, facts: Facts) -> Command:
    """The stock scheduler."""
    return [binaries.path("kube-scheduler"), *_as_user(lab, facts, "scheduler")]


def _as_user(lab: Lab, facts: Facts, user: str) -> Command:
    config = lab.pki / f"{user}.conf"
    return [
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        f"--secure-port={facts.ports[user]}",
        "--leader-elect=false",
        "--profiling=false",
    ]


def is_ready(lab: Lab) -> bool:
    """Whether the API server answers that it is ready."""
    return _kubectl(lab, "get", "--raw", "/readyz").returncode == 0


def kubectl(lab: Lab, *arguments: str, stdin: str | None = None) -> str:
    """Run kubectl as the lab's administrator; its stdout."""
    done = _kubectl(lab, *arguments, stdin=stdin)
    if done.returncode:
        raise LabError(f"kubectl {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _kubectl(lab: Lab, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [binaries.kubectl(), f"--kubeconfig={lab.kubeconfig}", "--request-timeout=10s", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True)
