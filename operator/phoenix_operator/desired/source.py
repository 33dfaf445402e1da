"""Where a model comes from, as volumes: what the operator mounts so that the server finds it in its model store.

`https://`, `s3://` and the like are the server's own business; they only need credentials, a cache and a way out.
"""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from phoenix_operator.observed import Object, Subject

STORE = "/models"
CREDENTIALS = "/var/run/phoenix/credentials"
STATE = "/var/lib/phoenix"
_HTTPS_PORT = 443


@dataclass(frozen=True, slots=True)
class Source:
    """What a pod needs for its model. `remote_port` is the port that the fetch connects to, if there is one."""

    volumes: list[Object] = field(default_factory=list)
    mounts: list[Object] = field(default_factory=list)
    store: str | None = None
    remote_port: int | None = None


def source(subject: Subject) -> Source:
    """Return volumes, mounts and model store of `spec.model`."""
    model = subject.spec.model
    scheme, is_url, rest = model.uri.partition("://")
    found = Source()
    if is_url and scheme in ("pvc", "configmap", "oci"):
        found = Source(
            [{"name": "model-source", **_volume(scheme, rest)}],
            [{"name": "model-source", "mountPath": STORE, "readOnly": True}],
            store=STORE,
        )
    elif is_url and scheme != "file":
        found = Source(remote_port=_port(model.uri))
    if model.credentials is not None:
        name = model.credentials.secret_ref.name
        found.volumes.append({"name": "credentials", "secret": {"secretName": name, "defaultMode": 0o440}})
        found.mounts.append({"name": "credentials", "mountPath": CREDENTIALS, "readOnly": True})
    if model.cache is not None:
        claim = {"claimName": model.cache.persistent_volume_claim}
        found.volumes.append({"name": "model-cache", "persistentVolumeClaim": claim})
        found.mounts.append({"name": "model-cache", "mountPath": f"{STATE}/models"})
    return found


def config_map_source(uri: str) -> tuple[str, str] | None:
    """Return name and key of `configmap://name/key`, or None for any other address."""
    scheme, _, rest = uri.partition("://")
    if scheme != "configmap":
        return None
    name, _, key = rest.partition("/")
    return name, key


def _volume(scheme: str, rest: str) -> Object:
    if scheme == "pvc":
        return {"persistentVolumeClaim": {"claimName": rest.partition("/")[0], "readOnly": True}}
    if scheme == "configmap":
        return {"configMap": {"name": rest.partition("/")[0]}}
    return {"image": {"reference": rest.partition("#")[0], "pullPolicy": "IfNotPresent"}}


def _port(uri: str) -> int:
    try:
        return urlsplit(uri).port or _HTTPS_PORT
    except ValueError:
        return _HTTPS_PORT
