"""The one table of cross-field rules, each as CEL for the API server and as a Python predicate with the same message.

`fields.ApiObject` enforces the predicates, `crd` writes the CEL into the CRD and `reference` lists both. A rule sits on
the type whose fields it compares, so the place in the schema follows from the types. CEL stays cheap for the API
server's cost estimate: it only walks lists, maps and strings that have a bound. The API server tries the rules of an
object on its default `{}` before the fields' defaults are there, so they ask with `has()` first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.alias_generators import to_snake

MAX_REQUEST_BYTES = 2 * 1024**3  # the largest message of gRPC and protobuf
URI_SCHEMES = ("file", "https", "s3", "gs", "az", "pvc", "oci", "configmap")


@dataclass(frozen=True, slots=True)
class Rule:
    """What `on` (a type of `types`) must fulfil; `field` (camelCase, dotted) is where a fault is reported."""

    on: str
    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool]

    @property
    def location(self) -> tuple[str, ...]:
        """The path of `field` from the object."""
        return tuple(self.field.split(".")) if self.field else ()

    def value_of(self, target: Any) -> Any:
        """Return the value of `field`, for the message; the object itself where no field is named."""
        for name in self.location:
            target = getattr(target, to_snake(name))
        return target


def rules_of(kind: type) -> tuple[Rule, ...]:
    """Return the rules of a type and of the types it extends."""
    return _rules_on(tuple(ancestor.__name__ for ancestor in kind.__mro__))


@cache
def _rules_on(names: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(rule for rule in RULES if rule.on in names)


def _text_rule(on: str, field: str, pattern: str, message: str) -> Rule:
    """The field, a string, must match; `pattern` is RE2 without backslashes, so that CEL and Python agree."""
    return _conditional_text_rule(on, field, "", pattern, message)


def _conditional_text_rule(on: str, field: str, prefix: str, pattern: str, message: str) -> Rule:
    expression, name = re.compile(pattern), to_snake(field)
    guard = f"!self.{field}.startsWith('{prefix}') || " if prefix else ""

    def holds(target: Any) -> bool:
        value = getattr(target, name)
        return not value.startswith(prefix) or expression.search(value) is not None

    return Rule(on, field, message, f"{guard}self.{field}.matches('{pattern}')", holds)


def _positive(on: str, field: str, what: str) -> Rule:
    name = to_snake(field)
    return Rule(
        on,
        field,
        f"expected {what} above 0",
        f"!has(self.{field}) || (type(self.{field}) == int ? self.{field} > 0 "
        f": quantity(self.{field}).isGreaterThan(quantity('0')))",
        lambda target: getattr(target, name).value > 0,
    )


def _at_most_one(*values: object) -> bool:
    return sum(value is not None for value in values) <= 1


def _differ(*topics: str) -> bool:
    named = [topic for topic in topics if topic]
    return len(named) == len(set(named))


_SCHEMES = "|".join(URI_SCHEMES)
_SEGMENT = "[^/?#]+"

RULES: tuple[Rule, ...] = (
    # `crd` moves these to the root, the only place where the API server shows the name to a rule
    Rule(
        "Metadata",
        "name",
        "expected a name of at most 40 characters, so that derived names fit in 63",
        "size(self.name) <= 40",
        lambda metadata: len(metadata.name) <= 40,
    ),
    Rule(
        "Metadata",
        "name",
        "expected a name of a-z, 0-9 and - that begins with a letter, because a Service bears it",
        "self.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        lambda metadata: re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", metadata.name) is not None,
    ),
    Rule(
        "Metadata",
        "name",
        "expected a name that does not end in -headless, which ends the name of another model's second Service",
        "!self.name.endsWith('-headless')",
        lambda metadata: not metadata.name.endswith("-headless"),
    ),
    # --- where the model comes from
    Rule(
        "ModelSource",
        "uri",
        "plain http is refused, because the model could be changed on the way: use https://",
        "!self.uri.startsWith('http://')",
        lambda source: not source.uri.startswith("http://"),
    ),
    _text_rule(
        "ModelSource",
        "uri",
        f"^([^:/][^:]*|({_SCHEMES}|http)://.*)$",
        "expected a relative path or a URI that begins with " + ", ".join(f"{scheme}://" for scheme in URI_SCHEMES),
    ),
    Rule(
        "ModelSource",
        "uri",
        "expected a path without '..'",
        "!self.uri.matches('(^|[/?#])([.]|%2[eE])([.]|%2[eE])($|[/?#])')",
        lambda source: re.search("(^|[/?#])([.]|%2[eE])([.]|%2[eE])($|[/?#])", source.uri) is None,
    ),
    Rule(
        "ModelSource",
        "uri",
        "expected no user or password in the URI: put them into the Secret of credentials.secretRef",
        "!self.uri.matches('^[a-z0-9]+://[^/]*@[^/]*(/|$)') || self.uri.startsWith('oci://')",
        lambda source: (
            source.uri.startswith("oci://") or re.search("^[a-z0-9]+://[^/]*@[^/]*(/|$)", source.uri) is None
        ),
    ),
    _conditional_text_rule("ModelSource", "uri", "file://", "^file:///[^/]", "expected file:///absolute/path"),
    _conditional_text_rule("ModelSource", "uri", "https://", f"^https://{_SEGMENT}/.+$", "expected https://host/path"),
    _conditional_text_rule("ModelSource", "uri", "s3://", f"^s3://{_SEGMENT}/.+$", "expected s3://bucket/key"),
    _conditional_text_rule("ModelSource", "uri", "gs://", f"^gs://{_SEGMENT}/.+$", "expected gs://bucket/key"),
    _conditional_text_rule("ModelSource", "uri", "az://", f"^az://{_SEGMENT}/.+$", "expected az://container/key"),
    _conditional_text_rule(
        "ModelSource", "uri", "pvc://", "^pvc://[a-z0-9][-.a-z0-9]*/.+$", "expected pvc://claim/path"
    ),
    _conditional_text_rule(
        "ModelSource",
        "uri",
        "configmap://",
        "^configmap://[a-z0-9][-.a-z0-9]*/[-._a-zA-Z0-9]+$",
        "expected configmap://name/key",
    ),
    _conditional_text_rule(
        "ModelSource",
        "uri",
        "oci://",
        "^oci://[^@#]+/[^@#]+@sha256:[0-9a-f]{64}#.+$",
        "expected oci://registry/repository@sha256:<64 hex digits>#path/in/image",
    ),
    # --- how it runs
    Rule(
        "Accelerator",
        "",
        "expected at most one of resourceName, deviceClassName and profile",
        "[has(self.resourceName), has(self.deviceClassName), has(self.profile)].filter(given, given).size() <= 1",
        lambda asked: _at_most_one(asked.resource_name, asked.device_class_name, asked.profile),
    ),
    _positive("Limits", "maxRequestBytes", "a size"),
    Rule(
        "Limits",
        "maxRequestBytes",
        "expected at most 2Gi, the largest message of gRPC",
        f"!has(self.maxRequestBytes) || (type(self.maxRequestBytes) == int ? self.maxRequestBytes "
        f"<= {MAX_REQUEST_BYTES} : quantity(self.maxRequestBytes).compareTo(quantity('2Gi')) <= 0)",
        lambda limits: limits.max_request_bytes.value <= MAX_REQUEST_BYTES,
    ),
    Rule(
        "PhoenixModelSpec",
        "limits.maxQueuedRows",
        "expected limits.maxQueuedRows of at least batching.maxRows, or no full batch can queue",
        "self.limits.maxQueuedRows >= self.batching.maxRows",
        lambda spec: spec.limits.max_queued_rows >= spec.batching.max_rows,
    ),
    Rule(
        "PhoenixModelSpec",
        "batching.maxDelayMilliseconds",
        "expected batching.maxDelayMilliseconds below limits.timeoutSeconds",
        "self.batching.maxDelayMilliseconds < self.limits.timeoutSeconds * 1000",
        lambda spec: spec.batching.max_delay_milliseconds < spec.limits.timeout_seconds * 1000,
    ),
    Rule(
        "PhoenixModelSpec",
        "warmup.rows",
        "expected warmup.rows of at most batching.maxRows",
        "self.warmup.rows <= self.batching.maxRows",
        lambda spec: spec.warmup.rows <= spec.batching.max_rows,
    ),
    # --- how many
    Rule(
        "PhoenixModelSpec",
        "replicas",
        "autoscaling excludes replicas: remove replicas, or set it to its default 1",
        "!has(self.autoscaling) || self.replicas == 1",
        lambda spec: spec.autoscaling is None or spec.replicas == 1,
    ),
    Rule(
        "PhoenixModelSpec",
        "autoscaling.minReplicas",
        "autoscaling.minReplicas: 0 needs bindings.kafka.requests, which wakes the model again",
        "!has(self.autoscaling) || self.autoscaling.minReplicas > 0 || "
        "(has(self.bindings) && has(self.bindings.kafka) && has(self.bindings.kafka.requests))",
        lambda spec: (
            spec.autoscaling is None
            or spec.autoscaling.min_replicas > 0
            or bool(spec.bindings and spec.bindings.kafka and spec.bindings.kafka.requests)
        ),
    ),
    Rule(
        "Autoscaling",
        "minReplicas",
        "expected minReplicas of at most maxReplicas",
        "self.minReplicas <= self.maxReplicas",
        lambda scaling: scaling.min_replicas <= scaling.max_replicas,
    ),
    _positive("Autoscaling", "targetLatency", "a time in seconds (200m is 200 ms)"),
    # --- features and bindings
    Rule(
        "PhoenixModelSpec",
        "features",
        "features needs bindings.redis, where they are read from",
        "!has(self.features) || (has(self.bindings) && has(self.bindings.redis))",
        lambda spec: spec.features is None or bool(spec.bindings and spec.bindings.redis),
    ),
    Rule(
        "Features",
        "names",
        "expected every name once",
        "self.names.all(name, self.names.exists_one(other, other == name))",
        lambda features: len(features.names) == len(set(features.names)),
    ),
    Rule(
        "Features",
        "defaults",
        "expected defaults only for fields of names",
        "self.defaults.all(name, name in self.names)",
        lambda features: set(features.defaults) <= set(features.names),
    ),
    Rule(
        "Features",
        "defaults",
        "onMissing: Default needs a default for every field of names",
        "self.onMissing != 'Default' || self.names.all(name, name in self.defaults)",
        lambda features: features.on_missing != "Default" or set(features.names) <= set(features.defaults),
    ),
    Rule(
        "Binding",
        "",
        "expected exactly one of backend and secretRef",
        "has(self.backend) != has(self.secretRef)",
        lambda binding: (binding.backend is None) != (binding.secret_ref is None),
    ),
    Rule(
        "KafkaRequests",
        "",
        "expected different topics in topic, results and deadLetterTopic",
        "(self.topic == '' || (self.topic != self.results && self.topic != self.deadLetterTopic)) && "
        "(self.results == '' || self.results != self.deadLetterTopic)",
        lambda requests: _differ(requests.topic, requests.results, requests.dead_letter_topic),
    ),
    # --- the pod
    Rule(
        "EnvironmentVariable",
        "",
        "expected at most one of value and valueFrom",
        "!has(self.value) || !has(self.valueFrom)",
        lambda variable: _at_most_one(variable.value, variable.value_from),
    ),
    Rule(
        "PodTemplate",
        "labels",
        "labels under phoenix-ml.io/ and app.kubernetes.io/ belong to the operator",
        "!has(self.labels) || "
        "self.labels.all(key, !key.startsWith('phoenix-ml.io/') && !key.startsWith('app.kubernetes.io/'))",
        lambda pod: not any(key.startswith(("phoenix-ml.io/", "app.kubernetes.io/")) for key in pod.labels),
    ),
    Rule(
        "PodTemplate",
        "annotations",
        "annotations under phoenix-ml.io/ belong to the operator",
        "!has(self.annotations) || self.annotations.all(key, !key.startsWith('phoenix-ml.io/'))",
        lambda pod: not any(key.startswith("phoenix-ml.io/") for key in pod.annotations),
    ),
)
