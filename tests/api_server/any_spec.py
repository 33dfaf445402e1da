"""PhoenixModels made at random from the schema of the CRD: most are valid, many hostile, each comes back by its number.

Strings follow the patterns and bounds of the schema, so that a new field is covered without a word here. What the
schema cannot say stands below: URIs, quantities, keys of maps, and objects that are handed on to Kubernetes as they
are, from useful ones to nonsense. The first models are written out. `document(seed, number)` is the same on every
machine.
"""

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from re import _constants as sre
from re import _parser
from typing import Any

import yaml
from specs import COMPLETE, DIGEST, GOOD, SOURCE

Object = dict[str, Any]
NAMESPACES = [f"any-{index}" for index in range(10)]
PROFILES = ("nvidia-l4", "dra")  # of the operator's settings
_CRD = yaml.safe_load((Path(__file__).parents[2] / "crds/phoenixmodels.yaml").read_text())
SPEC: Object = _CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
# Most of these are refused, for want of backends in the settings, which would leave the rest of the spec untried.
_WITH_BACKENDS = {"features", "bindings"}

NASTY = [
    *(
        "",
        " ",
        " lead",
        "trail ",
        "null",
        "~",
        "yes",
        "0x10",
        "1e3",
        ".inf",
        "2024-01-01",
        "- a",
        "{a: b}",
        "[",
        "%TAG",
    ),
    *("---", "...", "# no comment", "a: b", "? x", "'", '"', "\\", "\\u0041", "!!python/object:os.system", "*alias"),
    *("$(HOME)", "${HOME}", "$$", "{{ template }}", "%s%n", "<script>", "a\tb", "\t", "\n", "\r\n", "a\n\n  b\n"),
    *("\x00", "\x1b[31m", "\x7f", "\x85", "\xa0", "\u2028", "\u202egnp", "\ufeffbom", "\ufffe", "e\u0301", "ß", "İ"),
    *("\U0001f600", "👩\u200d👩\u200d👧", "\U0010ffff", "漢字", "١٢٣", "\\ud83d\\ude00"),
]
QUANTITIES: list[str | int] = [
    *("0", "1", "1.", "0.5", ".5Gi", "1e3", "1E3", "1e+3", "1e-3", "100n", "1u", "250m", "64Mi", "1Gi", "2Gi", "1k"),
    *("1E", "1Ei", "999999999999999999", "999999999999999999Ei", "1e99", "1e-99", "0e5", "0.000000001", "000001"),
    *("0.1n", "1.5Gi", ".000000001n", "0.1m", "1e9", "2147483648", "2147483649", "9223372036854775808"),
    *(0, 1, 2, 1000, 2**31, 2**31 + 1, 2**53, 2**53 + 1, 10**18, 2**63 - 1),
]
_USEFUL = ["1", "500m", "64Mi", "128Mi", "1Gi", "0.25", 1, "1e3", "100M"]
_KEYS = [
    *("team", "example.com/team", "kubernetes.io/arch", "a.b-c_d", "A", "9", "x" * 63, f"{'d' * 63}.com/{'k' * 63}"),
    *("app", "pod-template-hash", "phoenix-ml.io/model", "app.kubernetes.io/name", "phoenix.ml.io/x"),
    *("", "a b", "/", "a/b/c", "-", "ключ", "a\nb", "x" * 64, "x" * 2000),
]  # fmt: skip
_HOSTS = ["models.example.com", "a.b", "x", "1.2.3.4", "127.0.0.1", "xn--bcher-kva.example", f"{'l' * 63}.example.com"]
_BEHAVIORS: list[Any] = [
    {"scaleDown": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}]}},
    {"scaleUp": {"selectPolicy": "Disabled"}, "scaleDown": None},
    {},
    {"scaleUp": {"tolerance": "50m", "policies": [{"type": "Percent", "value": 0, "periodSeconds": 1}]}},
    {"scaleUp": {"stabilizationWindowSeconds": 3601}},
    {"scaleUp": {"policies": []}},
    {"scaleSideways": {}},
]
_AFFINITIES: list[Any] = [
    {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a", "b"]}]}]}}},
    {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "preference": {"matchExpressions": [{"key": "x", "operator": "Exists"}]}}]}},
    {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": "kubernetes.io/hostname"}]}},
    {"nodeAffinity": {}}, {"nodeAffinity": None, "podAffinity": {}}, {"podAntiAffinity": None},
    {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    {"nodeAffinity": []}, {"nodeAffinity": "x"}, {"nodeaffinity": {}}, {"podAffinity": {"": None}},
    {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1000}, None, 3]}},
]  # fmt: skip
_VALUE_FROM: list[Any] = [
    {"fieldRef": {"fieldPath": "metadata.name"}}, {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}},
    {"fieldRef": {"fieldPath": "metadata.labels['phoenix-ml.io/model']"}}, {"fieldRef": {"fieldPath": "spec.nonsense"}},
    {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}, {"secretKeyRef": {"key": "k"}},
    {"configMapKeyRef": {"name": "c", "key": "a/b"}}, {"resourceFieldRef": {"resource": "limits.memory"}},
    {"resourceFieldRef": {"resource": "requests.cpu", "divisor": "1m", "containerName": "server"}},
    {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1e3"}},
    {"resourceFieldRef": {"resource": "requests.nonsense"}}, {"fieldref": {"fieldPath": "metadata.name"}},
    {"fieldRef": {"fieldPath": "metadata.name"}, "secretKeyRef": {"name": "s", "key": "k"}}, {"fieldRef": None},
    {"secretKeyRef": {"name": "s", "key": "k", "optional": None}}, {"secretKeyRef": "x"},
]  # fmt: skip
_PEERS: list[Any] = [
    {"podSelector": {}}, {"namespaceSelector": {"matchLabels": {"team": "risk"}}},
    {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}, "namespaceSelector": {}},
    {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}, {"ipBlock": {"cidr": "::/0"}},
    {"ipBlock": {"cidr": "nonsense"}}, {"ipBlock": {"cidr": "10.0.0.1/8"}}, {"ipBlock": {}}, {"ipblock": {}},
    {"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}, {"podSelector": None}, {"namespaceSelector": []},
    {"podSelector": {"matchLabels": {"a b": "c d", "e f": "g h", "i j": "k l"}}},
]  # fmt: skip
_URIS = [case.spec["model"]["uri"] for case in GOOD if case.id.startswith("uri-")] + [
    "iris/model.onnx", "s3://bucket/ключ/😀.onnx", "gs://b/\xa0\u2028x", "https://example.com:8443/m.onnx?a=b#c",
    "https://example.com:99999/m.onnx", "https://example.com:0/m", "https://[::1]/m", "https://[/m", "a%2fb.onnx",
    "https://example.com:nonsense/m", "pvc://claim.with.dots/a//b", "configmap://iris-model/..data",
    f"oci://r/{'x' * 60}@sha256:{DIGEST}#{'d/' * 100}m.onnx", "😀" * 1024, "{a:b}", "'quoted'", "&anchor", "*x", "?x",
]  # fmt: skip


def nested(levels: int) -> Object:
    found: Object = {}
    for _ in range(levels - 1):
        found = {"a": found}
    return found


def _variables(count: int, value: str) -> Object:
    return {"env": [{"name": f"V{index}", "value": value} for index in range(count)]}


_EVERYTHING = "".join(chr(code) for code in [*range(0xD800), *range(0xE000, 0x10000, 7), 0x1F600, 0x1FFFE, 0x10FFFF])
_EVERY_CHARACTER = _variables(2, _EVERYTHING[:32768]) | {"annotations": {"a": _EVERYTHING[:4096]}}
# by name
WRITTEN_OUT: dict[str, Object] = {
    "smallest": {},
    "complete": COMPLETE,
    "complete-without-backends": {key: value for key, value in COMPLETE.items() if key not in _WITH_BACKENDS},
    **{f"nested-{levels}": {"pod": {"affinity": nested(levels)}} for levels in (31, 33, 1000, 5000)},
    "nested-value-from": {"pod": {"env": [{"name": "A", "valueFrom": nested(2000)}]}},
    "nested-peer": {"networking": {"allowFrom": [{"podSelector": nested(2000)}]}},
    "every-character": {"pod": _EVERY_CHARACTER, "runtime": {"accelerator": {"providerOptions": {
        text: text for text in NASTY[-32:]}}}},
    "environment-of-200-kilobytes": {"pod": _variables(50, "漢" * 1365)},
    "environment-of-a-megabyte": {"pod": _variables(32, "x" * 32768)},
    "annotations-of-256-kilobytes": {"pod": {"annotations": {f"a{index}": "x" * 4096 for index in range(64)}}},
    "many-wrong-labels": {"pod": {"labels": {f"{index} wrong": "x" for index in range(64)}}},
    "wrong-everywhere": {
        "pod": {"nodeSelector": {f"{index} wrong": "x" for index in range(9)},
                "annotations": {f"{index} wrong": "x" for index in range(9)}},
        "resources": {"requests": {f"{index} wrong": "1" for index in range(9)}},
        "networking": {"host": "1.2.3.4", "allowFrom": [{}]},
    },
    "amounts-beyond-all-bounds": {"resources": {"requests": {"cpu": "1e-99", "memory": "1e99"}}},
    "amounts-of-nothing": {"resources": {"requests": {"cpu": ".000000001n", "memory": "0.1m"}}},
    "default": {},  # there is a ServiceAccount of this name
    "taken": {},  # and a Deployment of this one
    "a" * 40: {"replicas": 1000, "networking": {"host": "models.example.com"}},
}  # fmt: skip


def document(seed: int, number: int) -> Object:
    """Return the manifest of this number."""
    if number >= len(WRITTEN_OUT):
        return Maker(seed, number).document()
    name, spec = list(WRITTEN_OUT.items())[number]
    return _manifest({"name": name, "namespace": NAMESPACES[0]}, {"model": SOURCE} | spec)


def _manifest(metadata: Object, spec: Object) -> Object:
    return {"apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel", "metadata": metadata, "spec": spec}


class Maker:
    """One PhoenixModel in the making."""

    def __init__(self, seed: int, number: int) -> None:
        self._random = random.Random(f"{seed}/{number}")
        self._number = number
        # how many of the optional fields are there: none, few, most, all
        self._density = self._random.choice([0, 0.1, 0.25, 0.5, 1])
        self._is_tame = self._chance(0.6)
        self._has_backends = self._chance(0.2)

    def document(self) -> Object:
        """Return the manifest."""
        spec = self._object(SPEC, "")
        if self._chance(0.9):
            _obey(spec)
        if self._chance(0.12):
            self._spoil(spec)
        metadata: Object = {"name": self._name(), "namespace": NAMESPACES[self._number % len(NAMESPACES)]}
        if self._chance(0.2):
            metadata["labels"] = {"example.com/team": "risk"}
            metadata["annotations"] = {"note": self._text(4096)}
        return _manifest(metadata, spec)

    def _name(self) -> str:
        number, index = self._number, self._number // len(NAMESPACES)
        match self._random.randrange(8):
            case 0:
                return f"m{number}-".ljust(40, "x")
            case 1:
                # each of these lies in the way of another model of the namespace, or would
                return f"clash-{index // 4}" + ("", "-model", "-headless", "-accelerator")[index % 4]
            case 2:
                # one name in all namespaces: routes of one host clash
                return f"shared-{index}"
            case 3:
                return f"m{number}-model"
        return f"m{number}"

    # --- by the schema -----------------------------------------------------------------------------------------------

    def _value(self, node: Object, path: str) -> Any:
        if path in _SPECIAL:
            return _SPECIAL[path](self)
        if "enum" in node:
            return self._random.choice(node["enum"])
        if "anyOf" in node:
            return self._quantity()
        match node["type"]:
            case "object" if "properties" in node:
                return self._object(node, path)
            case "object" if "additionalProperties" in node:
                return self._map(node, path)
            case "array":
                return [self._value(node["items"], f"{path}[]") for _ in range(self._size(node, "Items"))]
            case "integer":
                return self._integer(node["minimum"], node["maximum"])
            case "number":
                return self._random.choice([0, -1, 0.1, 1e308, -1e-308, 2**53 + 1, 123456.789])
            case "boolean":
                return self._chance(0.5)
            case "string" if "pattern" in node:
                return self._matching(node["pattern"], node["maxLength"])
            case "string":
                return self._text(node["maxLength"], node.get("minLength", 0))
        raise AssertionError(f"{path}: nothing makes {node}")

    def _object(self, node: Object, path: str) -> Object:
        made = {}
        for name, child in node["properties"].items():
            odds = self._density if self._has_backends or name not in _WITH_BACKENDS else 0
            if name in node.get("required", ()) or self._chance(odds):
                made[name] = self._value(child, f"{path}.{name}".lstrip("."))
        return made

    def _map(self, node: Object, path: str) -> Object:
        usual = _USUAL_KEYS.get(path, _KEYS[:6])
        made = {}
        for _ in range(self._size(node, "Properties")):
            key = self._random.choice(usual if self._is_tame or self._chance(0.8) else _KEYS)
            made[key] = self._value(node["additionalProperties"], f"{path}.*")
        return made

    def _size(self, node: Object, what: str) -> int:
        least, most = node.get(f"min{what}", 0), node[f"max{what}"]
        return most if self._chance(0.01) else min(most, least + self._random.choice([0, 1, 1, 2, 5]))

    def _integer(self, least: int, most: int) -> int:
        return self._random.choice([least, most, min(least + 1, most), self._random.randint(least, most)])

    def _quantity(self) -> str | int:
        return self._random.choice(_USEFUL if self._is_tame or self._chance(0.5) else QUANTITIES)

    def _text(self, most: int, least: int = 0) -> str:
        length = most if self._chance(0.02) else self._random.randint(least, min(most, 40))
        if self._chance(0.5):
            fitting = [text for text in NASTY if least <= len(text) <= most]
            return self._random.choice(fitting or ["x" * least])
        alphabet = self._random.choice(
            ["ab ", "äß漢😀", "\x00\x01\t\n\r\x7f\x85", "'\"\\{}[]:,#&*!|>%@`", "é\u0301\u202e\ufeff"]
        )
        return "".join(self._random.choices(alphabet, k=length))

    def _matching(self, pattern: str, most: int) -> str:
        """A text that the pattern accepts, at times as long as it may be."""
        longest = "a" * most
        if self._chance(0.03) and re.search(pattern, longest):
            return longest
        size = 12
        while True:
            text = self._sample(_parser.parse(pattern), size)
            if len(text) <= most:
                return text
            size //= 2

    def _sample(self, parsed: Any, size: int) -> str:
        return "".join(self._sample_one(operation, argument, size) for operation, argument in parsed)

    def _sample_one(self, operation: Any, argument: Any, size: int) -> str:
        if operation is sre.AT:
            return ""
        if operation is sre.LITERAL:
            return chr(argument)
        if operation is sre.IN:
            return self._random.choice(_members(argument))
        if operation is sre.BRANCH:
            return self._sample(self._random.choice(argument[1]), size)
        if operation is sre.SUBPATTERN:
            return self._sample(argument[3], size)
        if operation is sre.MAX_REPEAT:
            least, most, inner = argument
            count = self._random.randint(least, min(most, max(least, self._random.choice([0, 1, 2, size]))))
            return "".join(self._sample(inner, size) for _ in range(count))
        raise AssertionError(f"nothing makes {operation} of a pattern")

    def _chance(self, odds: float) -> bool:
        return self._random.random() < odds

    # --- what the schema does not say --------------------------------------------------------------------------------

    def _uri(self) -> str:
        if not self._is_tame and self._chance(0.1):
            return self._matching(SPEC["properties"]["model"]["properties"]["uri"]["pattern"], 1024)
        return str(self._random.choice(_URIS))

    def _host(self) -> str:
        return str(self._random.choice(_HOSTS[:1] if self._is_tame else _HOSTS))

    def _secret(self) -> str:
        # few: the operator looks after such a model every other second
        return "absent" if self._chance(0.02) else "present"

    def _profile(self) -> str:
        return str(self._random.choice([*PROFILES, "unknown"]))

    def _resource_name(self) -> str:
        return str(
            self._random.choice(["nvidia.com/gpu", "amd.com/gpu", "a/B", "kubernetes.io/x", "requests.x/y", "a..b/c"])
        )

    def _variable(self) -> str:
        usual = [f"V{self._random.randrange(1000)}", "HOME", "TMPDIR", "PHOENIX_CPUS", "PHOENIX_LOG_LEVEL", "_"]
        return str(self._random.choice([*usual, "PHOENIX_WATCH", "A" * 128] if not self._is_tame else usual))

    def _effect(self) -> str:
        return self._one_of(["NoSchedule", "PreferNoSchedule", "NoExecute", ""], 32)

    def _operator(self) -> str:
        return self._one_of(["Exists", "Equal", "", "Gt", "Lt"], 16)

    def _one_of(self, useful: list[str], most: int) -> str:
        return str(self._random.choice(useful)) if self._is_tame or self._chance(0.8) else self._text(most)

    def _passed_on(self, useful: list[Any]) -> Object:
        if self._is_tame:
            return copy.deepcopy(useful[self._random.randrange(3)])
        return copy.deepcopy(self._random.choice(useful)) if self._chance(0.8) else self._nonsense()

    def _nonsense(self) -> Object:
        return {self._text(20): self._anything(3) for _ in range(self._random.randrange(4))}

    def _anything(self, depth: int) -> Any:
        match self._random.randrange(9 if depth else 6):
            case 0:
                return self._text(100)
            case 1:
                return self._random.choice([0, -1, 2**53, 1.5, 1e300])
            case 2:
                return None
            case 3:
                return self._chance(0.5)
            case 4:
                return []
            case 5:
                return {}
            case 6:
                return [self._anything(depth - 1) for _ in range(3)]
        return {self._text(20): self._anything(depth - 1) for _ in range(3)}

    def _spoil(self, spec: Object) -> None:
        """Replace or add something anywhere that is hardly right."""
        places: list[tuple[Any, Any]] = []
        open_ones: list[Any] = [spec]
        while open_ones:
            node = open_ones.pop()
            inside = node.items() if isinstance(node, dict) else enumerate(node)
            for key, value in list(inside):
                places.append((node, key))
                if isinstance(value, dict | list):
                    open_ones.append(value)
        node, key = self._random.choice(places)
        node[key] = self._random.choice(
            [
                None,
                True,
                -1,
                0,
                2**31,
                2**63,
                2**64,
                1.5,
                "",
                "x" * 2000,
                [],
                {},
                {"a": 1},
                [None],
                "0",
                "-1",
                "Mi",
                "😀",
            ]
        )
        if isinstance(node, dict) and self._chance(0.1):
            node[self._random.choice(["unknown", "", "max_rows", "URI"])] = 1


def _members(parts: Any) -> list[str]:
    """What a character class holds; of what a negated one leaves out, some that are hostile."""
    negated = parts[0][0] is sre.NEGATE
    held: list[str] = []
    for operation, argument in parts[1:] if negated else parts:
        if operation is sre.LITERAL:
            held.append(chr(argument))
        elif operation is sre.RANGE:
            held += [chr(code) for code in range(argument[0], argument[1] + 1)]
        elif operation is sre.CATEGORY:
            held += list(" \t\n\r\f\v")
        else:
            raise AssertionError(f"nothing makes {operation} of a pattern")
    if not negated:
        return held
    return [
        char for char in "abz019-._~/?#@:=&%+,;!'\"(){}[]<>|^`$*é漢😀\xa0\x85\u2028\ufeff\n\x00" if char not in held
    ]


_SPECIAL: dict[str, Callable[[Maker], Any]] = {
    "model.uri": Maker._uri,
    "model.credentials.secretRef.name": Maker._secret,
    "networking.host": Maker._host,
    "networking.allowFrom[]": lambda maker: maker._passed_on(_PEERS),
    "runtime.accelerator.profile": Maker._profile,
    "runtime.accelerator.resourceName": Maker._resource_name,
    "autoscaling.behavior": lambda maker: maker._passed_on(_BEHAVIORS),
    "pod.affinity": lambda maker: maker._passed_on(_AFFINITIES),
    "pod.env[].name": Maker._variable,
    "pod.env[].valueFrom": lambda maker: maker._passed_on(_VALUE_FROM),
    "pod.tolerations[].effect": Maker._effect,
    "pod.tolerations[].operator": Maker._operator,
}
_USUAL_KEYS = {
    "resources.requests": ["cpu", "memory", "cpu", "memory", "ephemeral-storage", "example.com/fpga"],
    "resources.limits": ["cpu", "memory", "cpu", "memory", "ephemeral-storage", "hugepages-2Mi"],
    "runtime.accelerator.providerOptions": ["trt_fp16_enable", "device_id", *NASTY],
    "features.defaults": ["a", "b", "漢"],
    "pod.annotations": ["example.com/note", "note", "prometheus.io/scrape"],
}


def _obey(spec: Object) -> None:
    """Make a spec obey the rules that compare fields."""
    for name, fields in (("limits", ("maxQueuedRows", "timeoutSeconds")), ("batching", ("maxDelayMilliseconds",)),
                         ("warmup", ("rows",))):  # fmt: skip
        for field in fields:
            spec.get(name, {}).pop(field, None)
    if "limits" in spec:
        spec["limits"].update(maxQueuedRows=10_000_000)
        spec["limits"].pop("maxRequestBytes", None)
    else:
        spec.get("batching", {}).pop("maxRows", None)
    bindings = spec.get("bindings", {})
    for binding in (bindings[kind] for kind in ("redis", "kafka", "postgres") if kind in bindings):
        binding.pop("secretRef" if "backend" in binding else "backend", None)
        if "secretRef" not in binding:
            binding["backend"] = "default"
        for topic in ("topic", "results"):
            binding.get("requests", {}).pop(topic, None)
    if features := spec.get("features"):
        bindings = spec.setdefault("bindings", {})
        bindings.setdefault("redis", {"backend": "default"})
        features["names"] = sorted(set(features["names"]))
        features["defaults"] = dict.fromkeys(features["names"], 0.5)
    if scaling := spec.get("autoscaling"):
        spec.pop("replicas", None)
        scaling["minReplicas"] = min(max(scaling.get("minReplicas", 1), 1), scaling["maxReplicas"])
        scaling["targetLatency"] = "200m"
    if accelerator := spec.get("runtime", {}).get("accelerator"):
        asked = [name for name in ("profile", "deviceClassName", "resourceName") if name in accelerator]
        for name in asked[1:]:
            del accelerator[name]
    for variable in spec.get("pod", {}).get("env", ()):
        if "value" in variable:
            variable.pop("valueFrom", None)
    for field in ("labels", "annotations"):
        keys = spec.get("pod", {}).get(field, {})
        for key in [key for key in keys if key.startswith(("phoenix-ml.io/", "app.kubernetes.io/"))]:
            del keys[key]
