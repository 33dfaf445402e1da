"""`make cluster`: Phoenix on a real Kubernetes, from images built here, with the rights of its own install manifests.

Brings the lab up (or uses the cluster that PHOENIX_TEST_KUBECONFIG names), loads the images, applies
`operator/manifests/cluster`, serves `examples/iris`, infers from another pod, and prints what to type next. With
`--bindings` it starts Redis, PostgreSQL and Kafka beside the cluster, behind TLS and logins, tells the operator of them
and serves `examples/fraud` too. The cluster tests install Phoenix with the same functions. Standard library only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MANIFESTS = ROOT / "operator/manifests/cluster"
OPERATOR_NAMESPACE, EXAMPLE_NAMESPACE = "phoenix-system", "phoenix-demo"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def say(text: str) -> None:
    """Tell what is being done."""
    print(text, file=sys.stderr, flush=True)


def lab(*arguments: str) -> str:
    """Run a command of the lab, its progress passed on; return what it printed, without the last line's end.

    Raises `CalledProcessError` with the end of the progress in `stderr`.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-m", "lab", *arguments]
    said: deque[str] = deque(maxlen=40)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line)
        answer = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, answer, "".join(said))
    return answer.strip()


class Kubectl:
    """kubectl on one cluster, as a user would type it."""

    def __init__(self, kubeconfig: str) -> None:
        self.environment = os.environ | {"KUBECONFIG": kubeconfig}
        if shutil.which("kubectl") is None:  # a bare machine: the lab builds one
            folder = Path(lab("binary", "kubectl")).parent
            self.environment["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"

    def __call__(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        """Run kubectl; return what it printed. Raises `CalledProcessError` with its words in `stderr`."""
        done = subprocess.run(
            ["kubectl", *arguments], env=self.environment, check=True, capture_output=True, text=True, input=stdin,
            timeout=timeout_s,
        )  # fmt: skip
        return done.stdout

    def can(self, *arguments: str) -> bool:
        """Return whether kubectl succeeds."""
        return subprocess.run(["kubectl", *arguments], env=self.environment, capture_output=True).returncode == 0


def version() -> str:
    """Return the version of Phoenix, which is the images' tag."""
    import tomllib

    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def images() -> list[str]:
    """Return the names of the images."""
    return [f"phoenix-ml/phoenix-{part}:{version()}" for part in ("server", "operator")]


def up() -> Kubectl:
    """Bring up cluster and operator; return kubectl for it."""
    kubeconfig = lab("up").splitlines()[-1]
    subprocess.run([sys.executable, str(ROOT / "tools/images.py"), "server", "operator"], check=True)
    say("loading the images into the node")
    lab("load", *images())
    kubectl = Kubectl(kubeconfig)
    install(kubectl)
    return kubectl


def install(kubectl: Kubectl) -> None:
    """Apply the operator's manifests and wait for it; running pods take up an image that was built again."""
    say("installing the operator")
    apply_manifests(kubectl)
    restart("phoenix-operator", kubectl, image_id(images()[1]))


def apply_manifests(kubectl: Kubectl) -> None:
    """Apply the operator's manifests: it may provision nothing then."""
    kubectl("apply", "--server-side", "--force-conflicts", "-k", str(MANIFESTS))


def allow_bindings(kubectl: Kubectl, secrets: Sequence[str]) -> None:
    """Apply the rights that bindings need, as the operator itself prints them."""
    words = f"phoenix-operator manifests /tmp/manifests --bindings {','.join(secrets)} >&2"
    operator = ("exec", "deployment/phoenix-operator", "-n", OPERATOR_NAMESPACE, "--", "sh", "-c")
    text = kubectl(*operator, f"{words} && cat /tmp/manifests/bindings.yaml")
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)


def services(kubectl: Kubectl) -> tuple[Path, dict[str, object]]:
    """Start Redis, PostgreSQL and Kafka beside the cluster, behind TLS and logins, for the operator to use.

    Returns the folder with the same credentials (a SERVICE_BINDING_ROOT), for whoever looks into the services, and the
    part of the operator's settings that names them.
    """
    root = Path(lab("services", "up", "--for-pods").splitlines()[-1])
    # server-side: kubectl would keep a copy of the passwords in an annotation
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(root.parent / "secrets.json"))
    settings = json.loads((root.parent / "settings.json").read_text())
    allow_bindings(kubectl, [backend["adminSecretRef"]["name"] for backend in settings["backends"]])
    return root, settings


def prometheus() -> str:
    """Start Prometheus beside the cluster, with the recording rules; return its URL."""
    return lab("prometheus", "up", "--for-pods", "--interval", "5s").splitlines()[-1]


def metrics_api(kubectl: Kubectl, settings: Mapping[str, object]) -> None:
    """Install the metrics API, which runs with the operator's settings, and wait until it is asked."""
    manifests = ROOT / "operator/manifests/metrics-api.yaml"
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(manifests))
    restart("phoenix-metrics-api", kubectl, f"{image_id(images()[1])} {json.dumps(settings)}")
    for version in ("v1beta1", "v1beta2"):
        kubectl("wait", "--for=condition=Available", f"apiservice/{version}.custom.metrics.k8s.io", "--timeout=60s")


def configure(kubectl: Kubectl, settings: Mapping[str, object]) -> None:
    """Give the operator these settings and wait until it runs with them."""
    text = json.dumps(settings, indent=1)  # which is YAML too
    where = ("-n", OPERATOR_NAMESPACE)
    body = {"data": {"settings.yaml": text}}
    kubectl("patch", "configmap", "phoenix-operator-settings", *where, "--type=merge", "-p", json.dumps(body))
    restart("phoenix-operator", kubectl, f"{image_id(images()[1])} {text}")


def restart(deployment: str, kubectl: Kubectl, why: str) -> None:
    """Roll the pods of a Deployment of ours unless they run for the same reason already; wait for the new ones."""
    annotation = {"spec": {"template": {"metadata": {"annotations": {"phoenix-ml.io/restarted-for": why}}}}}
    where = ("-n", OPERATOR_NAMESPACE)
    kubectl("patch", "deployment", deployment, *where, "--type=merge", "-p", json.dumps(annotation))
    kubectl("rollout", "status", f"deployment/{deployment}", *where, "--timeout=120s")


def image_id(name: str) -> str:
    """Return the id of a local image."""
    done = subprocess.run(
        ["docker", "image", "inspect", "-f", "{{.Id}}", name], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_namespace(kubectl: Kubectl, name: str) -> None:
    """Make a namespace in which only restricted pods run."""
    if not kubectl.can("get", "namespace", name):
        kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, RESTRICTED, "--overwrite")


def client_pod(name: str, image: str) -> dict[str, object]:
    """Return a pod of the server's image that waits, so that requests can be made from inside the cluster."""
    restricted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    wait = "import signal; signal.sigwait({signal.SIGTERM})"
    container = {
        "name": "client",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", wait],
        "securityContext": restricted,
    }
    security = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": security, "automountServiceAccountToken": False}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def demo(kubectl: Kubectl) -> None:
    """Serve the iris example and infer from another pod, through the DNS name and the cluster address."""
    namespace = EXAMPLE_NAMESPACE
    make_namespace(kubectl, namespace)
    say("serving examples/iris")
    started = time.monotonic()
    kubectl("apply", "-n", namespace, "-f", str(ROOT / "examples/iris/model.yaml"))
    kubectl("wait", "--for=condition=Ready", "phx/iris", "-n", namespace, "--timeout=120s")
    say(f"ready after {time.monotonic() - started:.1f} s; asking it from another pod")
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(client_pod("client", images()[0])))
    kubectl("wait", "--for=condition=Ready", "pod/client", "-n", namespace, "--timeout=60s")
    address = kubectl("get", "service", "iris", "-n", namespace, "-o", "jsonpath={.spec.clusterIP}")
    for host in (f"iris.{namespace}.svc", address):
        say(f"http://{host}:8000 answers: {infer(kubectl, namespace, host)}")


def demo_bindings(kubectl: Kubectl) -> None:
    """Serve the fraud example on the services beside the cluster, fill its features in, and infer."""
    namespace = EXAMPLE_NAMESPACE
    root, settings = services(kubectl)
    configure(kubectl, settings)
    say("serving examples/fraud")
    kubectl("apply", "-n", namespace, "-f", str(ROOT / "examples/fraud/model.yaml"))
    kubectl("wait", "--for=condition=Ready", "phx/fraud", "-n", namespace, "--timeout=180s")
    say(import_features(kubectl, namespace))
    host = f"fraud.{namespace}.svc"
    say(f"http://{host}:8000 answers: {infer(kubectl, namespace, host, 'fraud', example='fraud')}")
    say(f"the services' admins' credentials are in {root}")


def import_features(kubectl: Kubectl, namespace: str) -> str:
    """Write the fraud example's features into Redis, from its pod and with its rights; return what was said."""
    features = (ROOT / "examples/fraud/features.csv").read_text()
    file = "/tmp/features.csv"
    program = f"cat > {file} && phoenix-server features import {file} --manifest /etc/phoenix/model"
    words = ("exec", "-i", "deployment/fraud", "-n", namespace, "--", "sh", "-c", program)
    return kubectl(*words, stdin=features).strip()


def infer(kubectl: Kubectl, namespace: str, host: str, model: str = "iris", *, example: str = "iris") -> str:
    """Infer from the client pod with the request of an example; return the answer's text."""
    request = (ROOT / "examples" / example / "request.json").read_text()
    program = (
        "import sys, urllib.request; "
        f"print(urllib.request.urlopen('http://{host}:8000/v2/models/{model}/infer', sys.stdin.buffer.read(), 10)"
        ".read().decode())"
    )
    return kubectl("exec", "-i", "client", "-n", namespace, "--", "python", "-c", program, stdin=request).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring everything up, show that it works, and say what can be typed next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bindings", action="store_true", help="Redis, PostgreSQL and Kafka too, and examples/fraud")
    options = parser.parse_args(arguments)
    try:
        kubectl = up()
        demo(kubectl)
        if options.bindings:
            demo_bindings(kubectl)
    except subprocess.CalledProcessError as error:
        say(f"failed: {' '.join(map(str, error.cmd))}\n{error.stderr or ''}")
        return 1
    print(kubectl("get", "phx", "-n", EXAMPLE_NAMESPACE))
    print("What to type next:")
    print(f"  export KUBECONFIG={kubectl.environment['KUBECONFIG']}")
    print(f"  kubectl get phx -n {EXAMPLE_NAMESPACE} -o wide")
    print(f"  kubectl describe phx iris -n {EXAMPLE_NAMESPACE}")
    print(f"  kubectl scale phx iris -n {EXAMPLE_NAMESPACE} --replicas=2")
    print(f"  kubectl logs -n {OPERATOR_NAMESPACE} deployment/phoenix-operator -f")
    print("  make cluster-down")
    return 0


if __name__ == "__main__":
    sys.exit(main())
