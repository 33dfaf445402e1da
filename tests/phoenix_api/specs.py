"""The table of good and bad specs. It runs through the Python types here, and through a real API server elsewhere.

`field` and `message` are what a fault must contain; `caught_by` says which half of the API server finds it.
"""

from dataclasses import dataclass
from typing import Any, Literal

DIGEST = "0123456789abcdef" * 4
OCI = f"oci://registry.example.com/models/fraud@sha256:{DIGEST}#fraud/model.onnx"
SOURCE: dict[str, Any] = {"uri": "iris/model.onnx"}
FEATURES: dict[str, Any] = {"keyTemplate": "user:{entity}", "input": "x", "names": ["a", "b"]}
REDIS: dict[str, Any] = {"redis": {"backend": "default"}}
SCALING: dict[str, Any] = {"maxReplicas": 8, "targetLatency": "200m"}


@dataclass(frozen=True)
class Case:
    """One spec; `name` is the metadata.name it goes with."""

    id: str
    spec: dict[str, Any]
    valid: bool = True
    field: str = ""
    message: str = ""
    caught_by: Literal["schema", "cel", "pruning"] = "schema"
    name: str = "model"

    def manifest(self) -> dict[str, Any]:
        """Return the whole object."""
        return {
            "apiVersion": "phoenix-ml.io/v1alpha1",
            "kind": "PhoenixModel",
            "metadata": {"name": self.name},
            "spec": self.spec,
        }


def good(id: str, *, name: str = "model", **spec: Any) -> Case:
    return Case(id, {"model": SOURCE} | spec, name=name)


def bad(id: str, field: str, message: str, **spec: Any) -> Case:
    """A spec that the structural schema refuses."""
    return Case(id, {"model": SOURCE} | spec, False, f"spec.{field}", message)


def broken(id: str, field: str, message: str, **spec: Any) -> Case:
    """A spec that only a rule refuses."""
    return Case(id, {"model": SOURCE} | spec, False, f"spec.{field}".rstrip("."), message, "cel")


def uri(value: str) -> dict[str, Any]:
    return {"model": {"uri": value}}


COMPLETE: dict[str, Any] = {
    "model": {
        "uri": "s3://models/fraud/3/model.onnx",
        "sha256": DIGEST,
        "version": "3",
        "credentials": {"secretRef": {"name": "s3-reader"}},
        "cache": {"persistentVolumeClaim": "model-cache"},
    },
    "runtime": {
        "accelerator": {
            "policy": "Prefer",
            "resourceName": "nvidia.com/mig-1g.10gb",
            "count": 2,
            "provider": "TensorRT",
            "providerOptions": {"trt_fp16_enable": "1"},
        },
        "threads": 4,
        "instances": 2,
        "image": "registry.example.com/phoenix-server:1.0",
    },
    "batching": {"maxRows": 64, "maxDelayMilliseconds": 2},
    "warmup": {"iterations": 5, "rows": 8},
    "limits": {"maxRequestBytes": "16Mi", "maxQueuedRows": 512, "timeoutSeconds": 10},
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
    "autoscaling": {
        "minReplicas": 0,
        "maxReplicas": 8,
        "targetLatency": "200m",
        "percentile": 99,
        "concurrencyPerReplica": 8,
        "metric": "Latency",
        "scaleDownStabilizationSeconds": 60,
        "behavior": {"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}},
    },
    "features": {
        "entityParameter": "customer",
        "keyTemplate": "user:{entity}",
        "input": "x",
        "names": ["amount_24h", "count_24h"],
        "defaults": {"amount_24h": 0, "count_24h": 1.5},
        "onMissing": "Default",
        "maxAgeSeconds": 3600,
        "onStale": "Reject",
    },
    "bindings": {
        "redis": {"secretRef": {"name": "my-redis"}},
        "kafka": {
            "backend": "default",
            "events": {"topic": "fraud.events", "samplePercent": 10, "includeTensors": False},
            "requests": {"topic": "in", "deadLetterTopic": "dead", "results": "out"},
            "partitions": 6,
            "retentionHours": 24,
        },
        "postgres": {"backend": "default", "audit": {"mode": "BestEffort", "includeTensors": False}},
        "deletionPolicy": "Delete",
    },
    "networking": {
        "host": "models.example.com",
        "rateLimit": {"requestsPerSecond": 100, "burst": 200, "per": "Model"},
        "allowFrom": [{"namespaceSelector": {"matchLabels": {"team": "risk"}}}],
    },
    "rollout": {"strategy": "InPlace", "progressDeadlineSeconds": 600, "drainSeconds": 5},
    "pod": {
        "labels": {"example.com/team": "risk"},
        "annotations": {"example.com/note": "any text: at all"},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
        "priorityClassName": "high",
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccountName": "fraud",
        "runtimeClassName": "nvidia",
        "env": [
            {"name": "LEVEL", "value": "debug"},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
    },
}

GOOD = [
    good("smallest"),
    Case("complete", COMPLETE),
    good("every-parent-empty", runtime={}, batching={}, warmup={}, limits={}, resources={}, rollout={}, pod={}),
    good("name-of-40-characters", name="a" * 40),
    good("uri-relative-with-dots-in-name", model={"uri": "a..b/model.v1..onnx"}),
    good("uri-file", **uri("file:///srv/models/iris.onnx")),
    good("uri-https", **uri("https://example.com/models/iris.onnx?version=3")),
    good("uri-gs", **uri("gs://bucket/model.onnx")),
    good("uri-az", **uri("az://container/model.onnx")),
    good("uri-pvc", **uri("pvc://claim/deep/model.onnx")),
    good("uri-oci", **uri(OCI)),
    good("uri-configmap", **uri("configmap://iris-model/model.onnx")),
    good("null-is-absent", batching=None, model=SOURCE | {"sha256": None}),
    good("null-in-a-map-is-absent", pod={key: {"a": None} for key in ("labels", "annotations", "nodeSelector")},
         resources={"requests": {"cpu": None}}, runtime={"accelerator": {"providerOptions": {"a": None}}},
         features=FEATURES | {"defaults": {"a": None, "c": None}}, bindings=REDIS),
    good("quantity-as-integer", limits={"maxRequestBytes": 1048576}, resources={"requests": {"cpu": 2}}),
    good("quantity-as-largest-integer", resources={"requests": {"cpu": 2**53}}),
    good("quantity-decimal", autoscaling=SCALING | {"targetLatency": "0.25"}),
    good("quantity-exponent", limits={"maxRequestBytes": "1e6"}),
    good("request-of-exactly-2Gi", limits={"maxRequestBytes": "2Gi"}),
    good("accelerator-empty", runtime={"accelerator": {}}),
    good("accelerator-dra", runtime={"accelerator": {"deviceClassName": "gpu.nvidia.com"}}),
    good("accelerator-profile", runtime={"accelerator": {"profile": "nvidia-l4"}}),
    good("autoscaling-with-default-replicas", autoscaling=SCALING, replicas=1),
    good("stopped", replicas=0),
    good("from-zero-with-kafka", autoscaling=SCALING | {"minReplicas": 0},
         bindings={"kafka": {"backend": "default", "requests": {}}}),
    good("features", features=FEATURES, bindings=REDIS),
    good("default-topics", bindings={"kafka": {"backend": "default", "requests": {}}}),
    good("queue-of-one-batch", batching={"maxRows": 8}, limits={"maxQueuedRows": 8}),
    good("label-empty", pod={"labels": {"example.com/flag": ""}}),
]  # fmt: skip

BAD_STRUCTURE = [
    Case("no-model", {}, False, "spec.model", "expected an object, got nothing"),
    bad("no-uri", "model.uri", "got nothing", model={}),
    bad("uri-empty", "model.uri", "got ''", **uri("")),
    bad("uri-with-space", "model.uri", "without spaces", **uri("my model.onnx")),
    bad("uri-with-backslash", "model.uri", "backslashes", **uri("..\\model.onnx")),
    bad("uri-too-long", "model.uri", "at most 1024 characters", **uri("a" * 1025)),
    bad("sha256-short", "model.sha256", "expected 64 hex digits", model=SOURCE | {"sha256": "abc"}),
    bad("sha256-upper-case", "model.sha256", "64 hex digits", model=SOURCE | {"sha256": DIGEST.upper()}),
    bad("version-is-a-number", "model.version", 'got 3; quote it: "3"', model=SOURCE | {"version": 3}),
    bad("version-with-slash", "model.version", "expected a version", model=SOURCE | {"version": "a/b"}),
    bad("secret-name", "model.credentials.secretRef.name", "expected a DNS name",
        model=SOURCE | {"credentials": {"secretRef": {"name": "Not_A_Name"}}}),
    bad("model-is-a-string", "model", "expected an object, got 'iris'", model="iris"),
    bad("policy-unknown", "runtime.accelerator.policy", "expected one of Require or Prefer, got 'Maybe'",
        runtime={"accelerator": {"policy": "Maybe"}}),
    bad("provider-unknown", "runtime.accelerator.provider", "got 'Metal'",
        runtime={"accelerator": {"provider": "Metal"}}),
    bad("count-zero", "runtime.accelerator.count", "from 1 to 16, got 0", runtime={"accelerator": {"count": 0}}),
    bad("resource-name", "runtime.accelerator.resourceName", "an extended resource",
        runtime={"accelerator": {"resourceName": "gpu"}}),
    bad("provider-option-is-a-number", "runtime.accelerator.providerOptions.trt_fp16_enable", 'quote it: "1"',
        runtime={"accelerator": {"providerOptions": {"trt_fp16_enable": 1}}}),
    bad("threads-negative", "runtime.threads", "got -1", runtime={"threads": -1}),
    bad("instances-zero", "runtime.instances", "from 1 to 64", runtime={"instances": 0}),
    bad("image-with-space", "runtime.image", "without spaces", runtime={"image": "a b"}),
    bad("image-with-unicode-space", "runtime.image", "in ASCII without spaces", runtime={"image": "a\u00a0b"}),
    bad("max-rows-zero", "batching.maxRows", "from 1 to 65536, got 0", batching={"maxRows": 0}),
    bad("max-rows-is-a-fraction", "batching.maxRows", "an integer", batching={"maxRows": 1.5}),
    bad("max-rows-is-true", "batching.maxRows", "got true", batching={"maxRows": True}),
    bad("timeout-is-a-string", "limits.timeoutSeconds", "expected an integer from 1 to 3600, got 'abc'",
        limits={"timeoutSeconds": "abc"}),
    bad("timeout-zero", "limits.timeoutSeconds", "got 0", limits={"timeoutSeconds": 0}),
    bad("bytes-without-number", "limits.maxRequestBytes", "a quantity such as", limits={"maxRequestBytes": "Mi"}),
    bad("bytes-unknown-suffix", "limits.maxRequestBytes", "got '64MB'", limits={"maxRequestBytes": "64MB"}),
    bad("bytes-negative", "limits.maxRequestBytes", "a quantity", limits={"maxRequestBytes": "-1"}),
    bad("bytes-is-a-fraction", "limits.maxRequestBytes", 'quote it: "0.5"', limits={"maxRequestBytes": 0.5}),
    bad("cpu-is-true", "resources.requests.cpu", "a quantity", resources={"requests": {"cpu": True}}),
    bad("cpu-is-a-larger-integer", "resources.requests.cpu", "a quantity", resources={"requests": {"cpu": 2**53 + 1}}),
    bad("affinity-too-large", "pod.affinity", "of at most 64 entries",
        pod={"affinity": {str(number): {} for number in range(65)}}),
    bad("replicas-negative", "replicas", "got -1", replicas=-1),
    bad("no-max-replicas", "autoscaling.maxReplicas", "got nothing", autoscaling={"targetLatency": "1"}),
    bad("no-target-latency", "autoscaling.targetLatency", "got nothing", autoscaling={"maxReplicas": 2}),
    bad("percentile-100", "autoscaling.percentile", "to 99, got 100", autoscaling=SCALING | {"percentile": 100}),
    bad("scaling-metric", "autoscaling.metric", "SLO or Latency, got 'CPU'", autoscaling=SCALING | {"metric": "CPU"}),
    bad("behavior-is-a-list", "autoscaling.behavior", "expected an object", autoscaling=SCALING | {"behavior": []}),
    bad("key-without-entity", "features.keyTemplate", "contains {entity}", bindings=REDIS,
        features=FEATURES | {"keyTemplate": "user"}),
    bad("no-feature-names", "features.names", "of 1 to 256 items", bindings=REDIS, features=FEATURES | {"names": []}),
    bad("feature-default-is-a-string", "features.defaults.a", "a number", bindings=REDIS,
        features=FEATURES | {"defaults": {"a": "0"}}),
    bad("on-missing-unknown", "features.onMissing", "Reject or Default", bindings=REDIS,
        features=FEATURES | {"onMissing": "Ignore"}),
    bad("topic-with-space", "bindings.kafka.events.topic", "a Kafka topic name",
        bindings={"kafka": {"backend": "default", "events": {"topic": "a b"}}}),
    bad("sample-percent-101", "bindings.kafka.events.samplePercent", "got 101",
        bindings={"kafka": {"backend": "default", "events": {"samplePercent": 101}}}),
    bad("include-tensors-is-a-string", "bindings.kafka.events.includeTensors", "true or false, got 'yes'",
        bindings={"kafka": {"backend": "default", "events": {"includeTensors": "yes"}}}),
    bad("audit-mode-unknown", "bindings.postgres.audit.mode", "got 'Sometimes'",
        bindings={"postgres": {"backend": "default", "audit": {"mode": "Sometimes"}}}),
    bad("deletion-policy-unknown", "bindings.deletionPolicy", "got 'Keep'", bindings={"deletionPolicy": "Keep"}),
    bad("host-upper-case", "networking.host", "a DNS name", networking={"host": "Models.example.com"}),
    bad("no-rate", "networking.rateLimit.requestsPerSecond", "got nothing", networking={"rateLimit": {}}),
    bad("strategy-unknown", "rollout.strategy", "Auto, Surge or InPlace", rollout={"strategy": "BlueGreen"}),
    bad("drain-too-long", "rollout.drainSeconds", "from 0 to 600", rollout={"drainSeconds": 601}),
    bad("env-name", "pod.env[0].name", "name of an environment variable", pod={"env": [{"name": "1X"}]}),
    bad("label-value", "pod.labels[example.com/team]", "label value", pod={"labels": {"example.com/team": "a b"}}),
    bad("tolerations-is-an-object", "pod.tolerations", "expected a list", pod={"tolerations": {}}),
]  # fmt: skip

BAD_UNKNOWN = [
    Case("unknown-field", {"model": SOURCE, "modell": {}}, False, "spec.modell", "did you mean model?", "pruning"),
    Case("unknown-field-below", {"model": SOURCE, "limits": {"timeoutSecond": 1}}, False,
         "spec.limits.timeoutSecond", "did you mean timeoutSeconds?", "pruning"),
    Case("snake-case", {"model": SOURCE, "batching": {"max_rows": 1}}, False,
         "spec.batching.max_rows", "did you mean maxRows?", "pruning"),
]  # fmt: skip

BAD_RULES = [
    Case("name-of-41-characters", {"model": SOURCE}, False, "metadata.name", "at most 40", "cel", name="a" * 41),
    Case("name-with-dot", {"model": SOURCE}, False, "metadata.name", "a-z, 0-9 and -", "cel", name="a.b"),
    Case("name-begins-with-digit", {"model": SOURCE}, False, "metadata.name", "a letter", "cel", name="1a"),
    Case("name-of-a-headless-service", {"model": SOURCE}, False, "metadata.name", "does not end in -headless", "cel",
         name="fraud-headless"),
    broken("uri-http", "model.uri", "use https://", **uri("http://example.com/model.onnx")),
    broken("uri-unknown-scheme", "model.uri", "begins with file://", **uri("ftp://example.com/model.onnx")),
    broken("uri-absolute-path", "model.uri", "expected a relative path", **uri("/srv/model.onnx")),
    broken("uri-parent", "model.uri", "without '..'", **uri("../model.onnx")),
    broken("uri-parent-within", "model.uri", "without '..'", **uri("s3://bucket/a/../b")),
    broken("uri-parent-encoded", "model.uri", "without '..'", **uri("file:///srv/%2E%2e/model.onnx")),
    broken("uri-with-password", "model.uri", "no user or password", **uri("https://me:secret@example.com/m.onnx")),
    broken("uri-file-relative", "model.uri", "file:///absolute", **uri("file://model.onnx")),
    broken("uri-https-without-path", "model.uri", "https://host/path", **uri("https://example.com")),
    broken("uri-s3-without-key", "model.uri", "s3://bucket/key", **uri("s3://bucket/")),
    broken("uri-gs-without-bucket", "model.uri", "gs://bucket/key", **uri("gs:///model.onnx")),
    broken("uri-az-without-key", "model.uri", "az://container/key", **uri("az://container")),
    broken("uri-pvc-without-path", "model.uri", "pvc://claim/path", **uri("pvc://claim")),
    broken("uri-configmap-folder", "model.uri", "configmap://name/key", **uri("configmap://name/a/b")),
    broken("uri-oci-tag", "model.uri", "@sha256:", **uri("oci://registry/repo:latest#model.onnx")),
    broken("accelerator-two-ways", "runtime.accelerator", "at most one of",
           runtime={"accelerator": {"resourceName": "nvidia.com/gpu", "deviceClassName": "gpu.nvidia.com"}}),
    broken("accelerator-profile-and-resource", "runtime.accelerator", "at most one of",
           runtime={"accelerator": {"resourceName": "nvidia.com/gpu", "profile": "nvidia-l4"}}),
    broken("bytes-zero", "limits.maxRequestBytes", "above 0", limits={"maxRequestBytes": "0"}),
    broken("bytes-integer-zero", "limits.maxRequestBytes", "above 0", limits={"maxRequestBytes": 0}),
    broken("bytes-above-2Gi", "limits.maxRequestBytes", "at most 2Gi", limits={"maxRequestBytes": "3Gi"}),
    broken("bytes-integer-above-2Gi", "limits.maxRequestBytes", "at most 2Gi", limits={"maxRequestBytes": 2**31 + 1}),
    broken("queue-below-batch", "limits.maxQueuedRows", "at least batching.maxRows", limits={"maxQueuedRows": 31}),
    broken("delay-above-timeout", "batching.maxDelayMilliseconds", "below limits.timeoutSeconds",
           batching={"maxDelayMilliseconds": 1000}, limits={"timeoutSeconds": 1}),
    broken("warmup-above-batch", "warmup.rows", "at most batching.maxRows", warmup={"rows": 33}),
    broken("autoscaling-and-replicas", "replicas", "autoscaling excludes replicas", replicas=3, autoscaling=SCALING),
    broken("min-above-max", "autoscaling.minReplicas", "at most maxReplicas",
           autoscaling=SCALING | {"minReplicas": 9}),
    broken("from-zero-without-kafka", "autoscaling.minReplicas", "needs bindings.kafka.requests",
           autoscaling=SCALING | {"minReplicas": 0}),
    broken("latency-zero", "autoscaling.targetLatency", "above 0", autoscaling=SCALING | {"targetLatency": "0m"}),
    broken("features-without-redis", "features", "needs bindings.redis", features=FEATURES),
    broken("feature-name-twice", "features.names", "every name once", bindings=REDIS,
           features=FEATURES | {"names": ["a", "a"]}),
    broken("default-of-unknown-feature", "features.defaults", "only for fields of names", bindings=REDIS,
           features=FEATURES | {"defaults": {"c": 0}}),
    broken("default-missing", "features.defaults", "needs a default for every field", bindings=REDIS,
           features=FEATURES | {"defaults": {"a": 0}, "onMissing": "Default"}),
    broken("redis-without-backend", "bindings.redis", "exactly one of backend and secretRef", bindings={"redis": {}}),
    broken("kafka-two-backends", "bindings.kafka", "exactly one of",
           bindings={"kafka": {"backend": "default", "secretRef": {"name": "mine"}}}),
    broken("postgres-without-backend", "bindings.postgres", "exactly one of", bindings={"postgres": {}}),
    broken("results-into-requests", "bindings.kafka.requests", "different topics",
           bindings={"kafka": {"backend": "default", "requests": {"topic": "t", "results": "t"}}}),
    broken("dead-letters-into-results", "bindings.kafka.requests", "different topics",
           bindings={"kafka": {"backend": "default", "requests": {"deadLetterTopic": "t", "results": "t"}}}),
    broken("env-value-twice", "pod.env[0]", "at most one of value and valueFrom",
           pod={"env": [{"name": "A", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}),
    broken("label-of-operator", "pod.labels", "belong to the operator",
           pod={"labels": {"app.kubernetes.io/name": "mine"}}),
    broken("annotation-of-operator", "pod.annotations", "belong to the operator",
           pod={"annotations": {"phoenix-ml.io/config-hash": "x"}}),
]  # fmt: skip

CASES = [*GOOD, *BAD_STRUCTURE, *BAD_UNKNOWN, *BAD_RULES]
