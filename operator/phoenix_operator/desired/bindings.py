"""What bindings put into a model's objects: Secrets in the Service Binding layout, and how pods get them.

A pod finds one folder for each binding under `SERVICE_BINDING_ROOT`. Which Secret it has been given, with which
content, stands on its template, so that another content is another template and rolls the pods. Where a Secret has
gone or cannot be read, what the live objects say still holds: running pods are left as they are.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from phoenix_operator.desired.naming import digest, owned, sealed
from phoenix_operator.kinds import NETWORK_POLICY, SECRET
from phoenix_operator.observed import BINDINGS, PORTS, Object, Observed, Subject

ROOT, ROOT_VARIABLE = "/bindings", "SERVICE_BINDING_ROOT"
TYPE_PREFIX = "servicebinding.io/"
_USUAL_PORT = {"redis": 6379, "kafka": 9092, "postgresql": 5432}
KINDS = tuple(_USUAL_PORT)
# What a Secret of ours holds besides `type`, `provider` and, with TLS, `certificates`.
KEYS = {
    "redis": ("host", "port", "username", "password", "ssl", "key-prefix", "uri"),
    "kafka": ("bootstrap-servers", "security-protocol", "sasl-mechanism", "username", "password", "group-id"),
    "postgresql": ("host", "port", "database", "username", "password", "schema", "sslmode", "uri"),
}
# Those of them that anybody may know.
_OPEN_KEYS = {"kafka": ("bootstrap-servers", "security-protocol", "sasl-mechanism", "group-id")}
_ENDS_OF_TOPICS = ("predictions", "requests", "results", "dead-letters")


@dataclass(frozen=True, slots=True)
class Asked:
    """A binding of the spec. `backend` is None where the model brings its own Secret."""

    kind: str  # redis, kafka or postgresql
    field: str
    backend: str | None
    secret: str  # name of the Secret that pods mount


def secret_name(model: str, kind: str) -> str:
    """Return the name of the Secret that the operator keeps for a binding."""
    return f"{model}-{kind}"


def asked(subject: Subject) -> list[Asked]:
    """Return the bindings that the spec asks for."""
    bindings = subject.spec.bindings
    if bindings is None:
        return []
    rows = {"redis": bindings.redis, "kafka": bindings.kafka, "postgres": bindings.postgres}
    found = []
    for field, binding in rows.items():
        if binding is not None:
            kind = "postgresql" if field == "postgres" else field
            own = binding.secret_ref.name if binding.secret_ref else secret_name(subject.name, kind)
            found.append(Asked(kind, f"spec.bindings.{field}", binding.backend, own))
    return found


def topic_prefix(subject: Subject) -> str:
    """Return how the names of a model's own topics begin. Neither part can have a dot, so no two models share one."""
    return f"phoenix.{subject.namespace}.{subject.name}."


def group(subject: Subject) -> str:
    """Return the consumer group of a model's own."""
    return topic_prefix(subject).removesuffix(".")


def topics(subject: Subject) -> dict[str, str]:
    """Return the Kafka topics that the spec asks for, by the field that names each."""
    kafka = subject.spec.bindings.kafka if subject.spec.bindings else None
    if kafka is None:
        return {}
    prefix, field = topic_prefix(subject), "spec.bindings.kafka"
    found = {f"{field}.events.topic": kafka.events.topic or f"{prefix}predictions"}
    if kafka.requests is not None:
        found[f"{field}.requests.topic"] = kafka.requests.topic or f"{prefix}requests"
        found[f"{field}.requests.results"] = kafka.requests.results or f"{prefix}results"
        found[f"{field}.requests.deadLetterTopic"] = kafka.requests.dead_letter_topic or f"{prefix}dead-letters"
    return found


def usual_topics(subject: Subject) -> list[str]:
    """Return every topic that a model may have under its usual name, whatever the spec asks for now."""
    return [f"{topic_prefix(subject)}{end}" for end in _ENDS_OF_TOPICS]


# --- Secrets ---------------------------------------------------------------------------------------------------------


def secret(subject: Subject, kind: str, values: Mapping[str, str], annotations: Mapping[str, str]) -> Object:
    """Return the Secret of a binding."""
    data = {key: base64.b64encode(value.encode()).decode() for key, value in sorted(values.items())}
    body = {"type": f"{TYPE_PREFIX}{kind}", "data": data}
    name = secret_name(subject.name, kind)
    return sealed(owned(subject, SECRET, name, body, annotations=dict(annotations)))


def values_of(secret: Object) -> dict[str, str]:
    """Return the content of a Secret as text; what is no text is left out."""
    found = {}
    for key, encoded in (secret.get("data") or {}).items():
        try:
            found[key] = base64.b64decode(encoded).decode()
        except ValueError:
            continue
    return found


def content_hash(secret: Object) -> str:
    """Return a hash of a Secret's content that tells those who may read pods nothing, even of a weak password.

    The Secret's uid, which they do not see, goes into it.
    """
    return digest([secret["metadata"]["uid"], secret.get("data") or {}])


def faults_of(kind: str, values: Mapping[str, str]) -> list[str]:
    """Return what keeps the content of a Secret from being a binding of this kind: names of keys, never a value."""
    told = values.get("type", kind).strip()
    found = [] if told == kind else [f"its key type should be {kind}"]
    needed = ("bootstrap-servers",) if kind == "kafka" else ("uri", "host")
    if not any(values.get(key) for key in needed):
        found.append(f"it has no key {' or '.join(needed)}")
    return found


def access_of(kind: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return what somebody needs besides the login: addresses and protocol, and that there is an authority's PEM."""
    found = {key: values[key] for key in _OPEN_KEYS.get(kind, ()) if values.get(key)}
    return found | ({"certificates": ""} if found and values.get("certificates") else {})


def ports_of(kind: str, values: Mapping[str, str]) -> tuple[int, ...]:
    """Return the TCP ports that a binding's address names."""
    addresses = [f"//{each.strip()}" for each in values.get("bootstrap-servers", "").split(",") if each.strip()]
    if not addresses and "uri" in values:
        addresses = [values["uri"].strip()]
    if not addresses:
        addresses = [f"//{values.get('host', '')}:{values.get('port', '')}".removesuffix(":")]
    return tuple(sorted({_port(address) or _USUAL_PORT[kind] for address in addresses}))


def _port(address: str) -> int | None:
    try:
        return urlsplit(address).port
    except ValueError:
        return None


# --- pods ------------------------------------------------------------------------------------------------------------


def given(subject: Subject, observed: Observed) -> str:
    """Return which Secrets with which content the pods are given, for their template; empty without bindings."""
    return as_text({kind: (text,) for kind, text in _given(subject, observed).items()})


def is_held(subject: Subject, observed: Observed) -> bool:
    """Whether pods of this spec have to wait for a Secret that they would mount."""
    return len(_given(subject, observed)) < len(asked(subject))


def _given(subject: Subject, observed: Observed) -> dict[str, str]:
    live = observed.deployment
    template = live["spec"]["template"]["metadata"] if live else {}
    before = read((template.get("annotations") or {}).get(BINDINGS, ""))
    found = {}
    for each in asked(subject):
        seen = observed.bindings.get(each.kind)
        if seen is not None and seen.digest:
            found[each.kind] = f"{each.secret}/{seen.digest}"
        elif before.get(each.kind, ("",))[0].rpartition("/")[0] == each.secret:
            found[each.kind] = before[each.kind][0]
    return found


def volumes(subject: Subject) -> list[Object]:
    """Return one volume for each binding."""
    return [
        {
            "name": f"binding-{each.kind}",
            "projected": {"sources": [{"secret": {"name": each.secret}}], "defaultMode": 0o440},
        }
        for each in asked(subject)
    ]


def mounts(subject: Subject) -> list[Object]:
    """Return where they are mounted."""
    return [
        {"name": f"binding-{each.kind}", "mountPath": f"{ROOT}/{each.kind}", "readOnly": True}
        for each in asked(subject)
    ]


def ports(subject: Subject, observed: Observed) -> dict[str, tuple[int, ...]]:
    """Return the ports of the backends by kind."""
    policy = next((body for (kind, _), body in observed.children.items() if kind is NETWORK_POLICY), None)
    before = read((policy["metadata"].get("annotations") or {}).get(PORTS, "")) if policy else {}
    found: dict[str, tuple[int, ...]] = {}
    for each in asked(subject):
        seen = observed.bindings.get(each.kind)
        if seen is not None and seen.ports:
            found[each.kind] = seen.ports
        elif each.kind in before:
            found[each.kind] = tuple(int(text) for text in before[each.kind] if text.isdecimal())
    return found


def as_text(rows: Mapping[str, tuple[object, ...]]) -> str:
    """Write `kind=value+value,kind=value`, as annotations hold it."""
    return ",".join(f"{kind}={'+'.join(map(str, values))}" for kind, values in sorted(rows.items()))


def read(text: str) -> dict[str, tuple[str, ...]]:
    """Read what `as_text` wrote; whatever somebody else wrote there is no row."""
    pairs = (row.partition("=") for row in text.split(",") if "=" in row)
    return {kind: tuple(values.split("+")) for kind, _, values in pairs}
