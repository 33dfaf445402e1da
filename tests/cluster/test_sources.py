"""Where models come from: claims, ConfigMaps, HTTPS with a Secret. Each is missing first, says so, then is served."""

import base64
import contextlib
import datetime
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster as tools
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from phoenix_cluster import Object, Phoenix, model

ROOT = Path(__file__).parents[2]
IRIS = (ROOT / "examples/iris/model.onnx").read_bytes()
DIGEST = hashlib.sha256(IRIS).hexdigest()
SERVER_USER = 10001
WEB_PORT = 8443
# Gives /files over TLS to those who know the word.
WEB = f"""
import functools, http.server, ssl
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer open-sesame":
            return self.send_error(401)
        super().do_GET()
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
server = http.server.ThreadingHTTPServer(("", {WEB_PORT}), functools.partial(Handler, directory="/files"))
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def encoded(content: bytes | str) -> str:
    return base64.b64encode(content.encode() if isinstance(content, str) else content).decode()


def made(kind: str, name: str, version: str = "v1", **body: Any) -> Object:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **body}


def claim(name: str, volume: str) -> Object:
    spec = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "volumeName": volume,
        "resources": {"requests": {"storage": "1Mi"}},
    }
    return made("PersistentVolumeClaim", name, spec=spec)


@contextlib.contextmanager
def volume(phoenix: Phoenix, name: str, folder: Path) -> Iterator[None]:
    """A PersistentVolume that is a folder of this machine."""
    spec = {
        "accessModes": ["ReadWriteMany"],
        "capacity": {"storage": "1Mi"},
        "persistentVolumeReclaimPolicy": "Retain",
        "storageClassName": "",
        "hostPath": {"path": str(folder), "type": "Directory"},
    }
    phoenix.apply("default", made("PersistentVolume", name, spec=spec))
    try:
        yield
    finally:
        phoenix.kubectl("delete", "persistentvolume", name, "--wait=false")


@pytest.fixture
def folder(phoenix: Phoenix, tmp_path: Path) -> Path:
    """A folder that the node sees under the same path, and in which the server may write."""
    nodes = [node["status"]["nodeInfo"]["machineID"] for node in phoenix.all("default", "nodes")]
    if Path("/etc/machine-id").read_text().strip() not in nodes:
        pytest.skip("the node is another machine, so that its folders cannot be filled from here")
    os.chown(tmp_path, SERVER_USER, SERVER_USER)
    return tmp_path


def test_claim_is_missing_then_pending_then_bound(phoenix: Phoenix, namespace: str, folder: Path) -> None:
    (folder / "iris").mkdir()
    (folder / "iris/model.onnx").write_bytes(IRIS)
    phoenix.start_client(namespace)
    phoenix.apply(namespace, model(model={"uri": "pvc://models/iris/model.onnx", "sha256": DIGEST}))
    words = ('persistentvolumeclaim "models" not found', "create the claim")
    phoenix.wait_fault(namespace, "iris", "Available", "Unschedulable", *words)
    phoenix.apply(namespace, claim("models", f"{namespace}-models"))
    pending = phoenix.wait_for("the scheduler's words", lambda: words_with(phoenix, namespace, "unbound immediate"))
    print(pending)
    with volume(phoenix, f"{namespace}-models", folder):
        phoenix.wait_ready(namespace)
        assert phoenix.infer(namespace)["model_name"] == "iris"
        # the model's files are read only, by the mount and not by the user alone
        pod = phoenix.pods(namespace)[0]["metadata"]["name"]
        where = ("-n", namespace, "--", "python", "-c", "open('/models/iris/model.onnx', 'a')")
        assert not phoenix.kubectl.can("exec", pod, *where)


def words_with(phoenix: Phoenix, namespace: str, words: str) -> str | None:
    row = phoenix.conditions(namespace).get("Available", {})
    return row["message"] if words in row.get("message", "") and row["reason"] == "Unschedulable" else None


def test_config_map_is_missing_then_there(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(model={"uri": "configmap://files/model.onnx", "sha256": DIGEST}))
    words = ("spec.model.uri", "ConfigMap files does not exist", "create it")
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "NotFound", *words, is_known=True)
    phoenix.apply(namespace, made("ConfigMap", "files", binaryData={"model.onnx": encoded(IRIS)}))
    phoenix.wait_ready(namespace)


def test_config_map_lacks_the_file(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, made("ConfigMap", "files", binaryData={"other.onnx": encoded(IRIS)}))
    phoenix.apply(namespace, model(model={"uri": "configmap://files/model.onnx", "sha256": DIGEST}))
    phoenix.wait_fault(namespace, "iris", "ModelVerified", "NotFound", "files", "model.onnx")
    phoenix.apply(namespace, model(model={"uri": "configmap://files/other.onnx", "sha256": DIGEST}))
    phoenix.wait_ready(namespace)


def test_https_with_a_secret_and_a_cache(phoenix: Phoenix, namespace: str, folder: Path) -> None:
    host = f"web.{namespace}.svc"
    certificate, key = self_signed(host)
    source = {
        "uri": f"https://{host}:{WEB_PORT}/model.onnx",
        "sha256": DIGEST,
        "credentials": {"secretRef": {"name": "store"}},
        "cache": {"persistentVolumeClaim": "cache"},
    }
    phoenix.start_client(namespace)
    with volume(phoenix, f"{namespace}-cache", folder):
        phoenix.apply(namespace, claim("cache", f"{namespace}-cache"), model(model=source))
        words = ("spec.model.credentials.secretRef", "Secret store does not exist", "create it")
        phoenix.wait_fault(namespace, "iris", "ModelVerified", "SecretMissing", *words, is_known=True)

        store = {"ca.crt": certificate, "HTTP_AUTHORIZATION": "Bearer open-sesame"}
        phoenix.apply(namespace, made("Secret", "store", stringData=store))
        phoenix.wait_fault(namespace, "iris", "ModelVerified", "FetchFailed", "does not resolve", host)

        phoenix.apply(namespace, *web(phoenix.server_image, certificate, key))
        phoenix.kubectl("wait", "--for=condition=Ready", "pod/web", "-n", namespace, "--timeout=60s")
        phoenix.wait_ready(namespace)
        assert phoenix.infer(namespace)["model_name"] == "iris"

        # what one pod has fetched serves the next one too, without the store
        phoenix.delete(namespace, "pod/web", "--force", "--grace-period=0")
        phoenix.apply(namespace, model(model=source, batching={"maxRows": 8}))
        phoenix.wait_ready(namespace)
        phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut")
        assert phoenix.infer(namespace)["model_name"] == "iris"


def web(image: str, certificate: str, key: str) -> list[Object]:
    """Return a server of HTTPS with its files, certificate and Service."""
    pod: Any = tools.client_pod("web", image)
    container = pod["spec"]["containers"][0]
    container |= {
        "command": ["python", "-c", WEB],
        "readinessProbe": {"tcpSocket": {"port": WEB_PORT}, "periodSeconds": 1},
        "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in ("files", "tls")],
    }
    volumes = [{"name": "files", "configMap": {"name": "files"}}, {"name": "tls", "secret": {"secretName": "tls"}}]
    pod["spec"]["volumes"] = volumes
    pod["metadata"]["labels"] = {"app": "web"}
    service = {"selector": {"app": "web"}, "ports": [{"port": WEB_PORT}]}
    return [
        made("ConfigMap", "files", binaryData={"model.onnx": encoded(IRIS)}),
        made("Secret", "tls", type="kubernetes.io/tls", stringData={"tls.crt": certificate, "tls.key": key}),
        made("Service", "web", spec=service),
        pod,
    ]


def self_signed(host: str) -> tuple[str, str]:
    """Return certificate and key of a host, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - day).not_valid_after(now + day)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.decode(), secret.decode()
