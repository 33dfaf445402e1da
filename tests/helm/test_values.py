"""The values: what is wrong is refused by name, what is said has an effect, and the files tell the same."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import chart
import charts
import jsonschema
import pytest
import yaml
from charts import Object

from phoenix_operator.settings import BackendSettings, Settings, SettingsError, read_settings

SCHEMA: Object = json.loads((charts.CHART / "values.schema.json").read_text())
ALL: Object = charts.read(charts.CHART / "ci" / "all-values.yaml")
DEFAULTS: Object = yaml.safe_load((charts.CHART / "values.yaml").read_text())
REDIS: Object = {"name": "shared", "kind": "redis", "existingSecret": "redis-admin"}
# Objects of Kubernetes, which the API server checks, and Helm's own.
OPEN = {
    *("global", "operator.affinity.nodeAffinity", "operator.affinity.podAffinity", "operator.affinity.podAntiAffinity"),
    *("metricsApi.affinity.nodeAffinity", "metricsApi.affinity.podAffinity", "metricsApi.affinity.podAntiAffinity"),
    *("standalone.affinity.nodeAffinity", "standalone.affinity.podAffinity", "standalone.affinity.podAntiAffinity"),
    "settings.extraEgress[]",
}


# --- wrong values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "field", "words"), [
    ({"image": {}}, "''", "'image' not allowed"),
    ({"images": {"operator": {"tagg": "1"}}}, "/images/operator", "'tagg' not allowed"),
    ({"images": {"operator": {"tag": 1}}}, "/images/operator/tag", "want string"),
    ({"images": {"server": {"digest": "sha256:12"}}}, "/images/server/digest", "does not match"),
    ({"images": {"server": {"repository": "Registry/x"}}}, "/images/server/repository", "does not match"),
    ({"images": {"pullPolicy": "always"}}, "/images/pullPolicy", "'Always'"),
    ({"images": {"pullSecrets": ["registry"]}}, "/images/pullSecrets/0", "want object"),
    ({"namespaces": "team-a"}, "/namespaces", "want array"),
    ({"namespaces": ["Team_A"]}, "/namespaces/0", "does not match"),
    ({"operator": {"replicas": "2"}}, "/operator/replicas", "want integer"),
    ({"operator": {"replicas": -1}}, "/operator/replicas", "minimum"),
    ({"operator": {"resources": {"limit": {}}}}, "/operator/resources", "'limit' not allowed"),
    ({"operator": {"resources": {"limits": {"memory": "much"}}}}, "/operator/resources/limits/memory", "match"),
    ({"operator": {"logLevel": "trace"}}, "/operator/logLevel", "'debug'"),
    ({"operator": {"tolerations": [{"keys": "a"}]}}, "/operator/tolerations/0", "'keys' not allowed"),
    ({"operator": {"affinity": {"podAntiaffinity": {}}}}, "/operator/affinity", "'podAntiaffinity' not allowed"),
    ({"operator": {"serviceAccount": {"annotations": {"a": 1}}}}, "/operator/serviceAccount/annotations/a", "string"),
    ({"operator": {"secretMounts": [{"name": "a", "path": "etc"}]}}, "/operator/secretMounts/0/path", "match"),
    ({"metricsApi": {"enabled": "yes"}}, "/metricsApi/enabled", "want boolean"),
    ({"autoscaling": {"provider": "built-in"}}, "/autoscaling/provider", "'builtin'"),
    ({"autoscaling": {"httpsPort": 1}}, "/autoscaling", "'httpsPort' not allowed"),
    ({"autoscaling": {"prometheus": {"url": "prometheus:9090"}}}, "/autoscaling/prometheus/url", "does not match"),
    ({"autoscaling": {"certificate": {"lifetimeDays": 1000}}}, "/autoscaling/certificate/lifetimeDays", "maximum"),
    ({"monitoring": {"kind": "podMonitor"}}, "/monitoring/kind", "'PodMonitor'"),
    ({"monitoring": {"interval": "15"}}, "/monitoring/interval", "does not match"),
    ({"monitoring": {"rules": {"enabled": True}}}, "/monitoring/rules", "'enabled' not allowed"),
    ({"backends": [{"name": "a", "kind": "redis"}]}, "/backends/0", "'existingSecret'"),
    ({"backends": [REDIS | {"adminSecretRef": {"name": "a"}}]}, "/backends/0", "'adminSecretRef' not allowed"),
    ({"backends": [REDIS | {"kind": "mysql"}]}, "/backends/0/kind", "'redis'"),
    ({"settings": {"serverImage": "a"}}, "/settings", "'serverImage' not allowed"),
    ({"settings": {"require_digest": True}}, "/settings", "'require_digest' not allowed"),
    ({"settings": {"workers": 0}}, "/settings/workers", "minimum"),
    ({"settings": {"acceleratorProfiles": {"A": {}}}}, "/settings/acceleratorProfiles", "'A'"),
    ({"settings": {"routes": {"gateway": {"name": "a"}}}}, "/settings/routes/gateway", "'namespace'"),
    ({"standalone": {"models": {"Iris": {"model": {"uri": "a"}}}}}, "/standalone/models", "'Iris'"),
    ({"standalone": {"models": {"a": {"model": {"url": "a"}}}}}, "/standalone/models/a/model", "'url' not allowed"),
    ({"standalone": {"models": {"a": {"replicas": 2}}}}, "/standalone/models/a", "'replicas' not allowed"),
    ({"standalone": {"models": {"a": {}}}}, "/standalone/models/a", "missing property 'model'"),
    ({"standalone": {"environment": {"PHOENIX_HTTP_PORT": "1"}}}, "/standalone/environment", "'PHOENIX_HTTP_PORT'"),
    ({"standalone": {"enabled": True}}, "standalone.models:", "expected a model"),
    ({"standalone": {"enabled": True, "models": {"a": {"model": {"uri": "pvc://a/b"}}}}},
     "standalone.models.a.model.uri:", "got pvc://a/b"),
    ({"standalone": {"enabled": True, "models": {name: {"model": {
        "uri": "s3://a/b", "credentials": {"secretRef": {"name": name}}}} for name in ("a", "b")}}},
     "standalone.models:", "got a, b"),
    ({"backends": [REDIS], "operator": {"enabled": False}}, "backends:", "expected none without operator.enabled"),
    ({"networkPolicies": {"prometheusPorts": [0]}}, "/networkPolicies/prometheusPorts/0", "minimum"),
    ({"podSecurity": {"runAsUser": 0}}, "/podSecurity/runAsUser", "minimum"),
    ({"crds": {"keep": True}}, "/crds", "'keep' not allowed"),
    ({"rbac": True}, "/rbac", "want object"),
    ({"metricsApi": {"enabled": True}}, "autoscaling.prometheus.url:", "expected the address of Prometheus"),
    ({"autoscaling": {"provider": "keda"}}, "autoscaling.prometheus.url:", "which KEDA is to ask"),
    ({"secrets": ["s3"]}, "secrets:", "expected none without namespaces"),
    ({"backends": [REDIS, REDIS]}, "backends.1:", "got redis shared twice"),
    ({"namespaces": ["a", "b", "a"]}, "namespaces:", "expected each once, got a, b, a"),
    ({"metricsApi": {"enabled": True}, "autoscaling": {"provider": "prometheus-adapter"}}, "metricsApi.enabled:",
     "expected false"),
])  # fmt: skip
def test_wrong_value_is_refused_by_its_name(values: Object, field: str, words: str) -> None:
    (line,) = (line for line in charts.refusal(values).splitlines() if field in line and words in line)
    assert line


def test_every_fault_is_told_at_once() -> None:
    message = charts.refusal({"operator": {"replicas": "2"}, "settings": {"wrkers": 1}, "crds": {"install": 1}})
    assert sorted(re.findall(r"at '(/[^']*)'", message)) == ["/crds/install", "/operator/replicas", "/settings"]
    message = charts.refusal({"secrets": ["s3"], "metricsApi": {"enabled": True}, "backends": [REDIS, REDIS]})
    assert re.findall(r"^  ([\w.]+): expected", message, re.MULTILINE) == [
        *("autoscaling.prometheus.url", "secrets", "backends.1")
    ]


@pytest.mark.parametrize("values", [
    {"autoscaling": {"provider": "keda"}},
    {"backends": [REDIS, REDIS]},
    *({"autoscaling": {"prometheus": {"url": url}}}
      for url in ("ftp://a", "prometheus:9090", "http://", "http://u:p@a", "http://a?b=c", "http://a#b", "http://a b")),
])  # fmt: skip
def test_chart_refuses_what_the_operator_refuses(values: Object, tmp_path: Any) -> None:
    """Else the new pods of an upgrade would not start."""
    told = json.loads(json.dumps(values))
    for backend in told.get("backends", []):
        backend["adminSecretRef"] = {"name": backend.pop("existingSecret")}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(told))
    with pytest.raises(SettingsError):
        read_settings(file)
    assert charts.refusal(values)


@pytest.mark.parametrize("url", ["http://a", "https://a.b:9090/", "http://[::1]:9090/prefix/x", "http://10.0.0.1:80"])
def test_chart_takes_addresses_that_the_operator_takes(url: str) -> None:
    assert Settings.model_validate({"autoscaling": {"prometheus": {"url": url}}}).autoscaling.prometheus.url
    assert url in charts.template({"autoscaling": {"prometheus": {"url": url}}})


def nodes(node: Object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each value and of each object of values."""
    for name, child in node.items():
        yield (*path, name)
        if isinstance(child, dict):
            yield from nodes(child, (*path, name))


@pytest.mark.parametrize("path", list(nodes(DEFAULTS)), ids=".".join)
def test_null_is_refused_by_name_unless_it_means_absent(path: tuple[str, ...]) -> None:
    values: Object = {
        "metricsApi": {"enabled": True},
        "autoscaling": {"prometheus": {"url": "http://prometheus"}},
        "standalone": {"enabled": True, "models": {"iris": {"model": {"uri": "iris/model.onnx"}}}},
    }
    rendered, node = charts.template(values), values
    for name in path[:-1]:
        node = node.setdefault(name, {})
    node[path[-1]] = None
    if "resources" in path[:-1] or path[:-1] == ("podSecurity",):
        assert charts.template(values) != rendered
    else:
        assert f"missing property '{path[-1]}'" in charts.refusal(values)


# --- the schema ------------------------------------------------------------------------------------------------------


def objects_of(node: Object, path: str) -> Iterator[tuple[str, Object]]:
    """Yield path and schema of each object, with references followed."""
    if "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
    if node.get("type") == "object":
        yield path, node
    named = list(node.get("properties", {}).items())
    named += [("<name>", each) for each in node.get("patternProperties", {}).values()]
    if isinstance(node.get("additionalProperties"), dict):
        named.append(("<name>", node["additionalProperties"]))
    for name, child in named:
        yield from objects_of(child, f"{path}.{name}".lstrip("."))
    if "items" in node:
        yield from objects_of(node["items"], f"{path}[]")


def test_every_object_refuses_names_that_it_does_not_know() -> None:
    found = dict(objects_of(SCHEMA, ""))
    assert len(found) > 40
    assert {path for path, node in found.items() if "additionalProperties" not in node} == OPEN
    maps = {path for path, node in found.items() if isinstance(node.get("additionalProperties"), dict)}
    assert {path.rpartition(".")[2] for path in maps} == {
        *("labels", "nodeSelector", "annotations", "podAnnotations", "apiServiceAnnotations", "requests", "limits"),
        *("providerOptions", "defaults"),  # of ONNX Runtime; by the name of a feature
    }


def test_schema_is_one_and_takes_the_defaults() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(DEFAULTS)
    jsonschema.Draft202012Validator(SCHEMA).validate(DEFAULTS | {"global": {"anything": 1}})


def test_values_of_a_chart_around_this_one_are_let_through() -> None:
    assert charts.template({"global": {"registry": "example.com"}}) == charts.template({})


def test_every_setting_has_a_value_and_one_only() -> None:
    known = dict(objects_of(SCHEMA, ""))
    settings = {field.alias for field in Settings.model_fields.values()}
    assert known["settings"]["properties"].keys() == settings - set(chart.OF_THE_CHART)
    backend = {field.alias for field in BackendSettings.model_fields.values()}
    assert known["backends[]"]["properties"].keys() == backend - {"adminSecretRef"} | {"existingSecret"}


def test_every_value_stands_in_the_files_that_tell_of_it() -> None:
    readme, values = (charts.CHART / "README.md").read_text(), (charts.CHART / "values.yaml").read_text()
    for path, node in objects_of(SCHEMA, ""):
        if path.partition(".")[0] in ("settings", "global") or "<name>" in path:
            continue
        for name in node.get("properties", {}):
            if f"{path}.{name}" not in OPEN and (path or name != "global"):
                assert f"| `{name}` |" in readme or f"`{path}.{name}`".replace("`.", "`") in readme, f"{path}.{name}"
            if "[]" not in path and "resources" not in path and name != "global":
                assert re.search(rf"^ *(# )?{name}:", values, re.MULTILINE), f"{path}.{name}"


# --- effects ---------------------------------------------------------------------------------------------------------


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each value of a values file, maps of free names as one value."""
    free = {
        "annotations",
        "podAnnotations",
        "apiServiceAnnotations",
        "labels",
        "nodeSelector",
        "resources",
        "affinity",
        "gateway",
        "models",
        "environment",
    }
    if isinstance(node, dict) and node and (not path or path[-1] not in free):
        for name, child in node.items():
            yield from leaves(child, (*path, name))
    else:
        yield path


def without(values: Object, path: tuple[str, ...]) -> Object:
    """Return the values without one of them."""
    found = copy.deepcopy(values)
    node = found
    for name in path[:-1]:
        node = node[name]
    del node[path[-1]]
    return found


def test_file_with_all_values_says_every_value() -> None:
    said = {".".join(path) for path in leaves(ALL)}
    for path, node in objects_of(SCHEMA, ""):
        top = path.partition(".")[0]
        if "[]" in path or "<name>" in path or top in ("settings", "global") or path in OPEN:
            continue
        for name, child in node.get("properties", {}).items():
            inner = f"{path}.{name}".lstrip(".")
            is_object = "$ref" in child and "enum" not in SCHEMA["$defs"][child["$ref"].rpartition("/")[2]]
            if is_object or inner in OPEN or path.endswith((".resources", ".affinity")):
                continue
            alone = inner.startswith("images.") and inner.rpartition(".")[2] in ("tag", "digest")
            assert inner in said or inner == "global" or alone, inner


# Said as the default is, so that the file says every value.
AS_DEFAULT = {
    *(("settings", "networkPolicies"), ("networkPolicies", "enabled"), ("crds", "install"), ("operator", "enabled")),
    ("rbac", "aggregate"),  # without effect in a namespaced install
}


@pytest.mark.parametrize("path", sorted(set(leaves(ALL)) - AS_DEFAULT), ids=".".join)
def test_each_value_has_an_effect(path: tuple[str, ...]) -> None:
    if path == ("namespaces",):
        less = without(without(ALL, path), ("secrets",))
    elif path == ("autoscaling", "prometheus", "url"):
        less = copy.deepcopy(ALL)
        less["autoscaling"]["prometheus"]["url"] = "http://other:9090"
    elif path == ("standalone", "models"):
        less = copy.deepcopy(ALL)
        less["standalone"]["models"] = {"iris": {"model": {"uri": "iris/model.onnx"}}}
    else:
        less = without(ALL, path)
    assert charts.template(less) != charts.template(ALL)


@pytest.mark.parametrize("path", sorted(AS_DEFAULT), ids=".".join)
def test_each_switch_has_an_effect(path: tuple[str, ...]) -> None:
    changed: Object = {path[0]: {path[1]: False}}
    assert charts.template(changed) != charts.template({})


# --- what the documentation says -------------------------------------------------------------------------------------

PAGE = (charts.ROOT / "docs" / "install.md").read_text()
SHOWN = re.findall(r"```yaml\n(# values.yaml\n.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", SHOWN, ids=lambda text: text.splitlines()[1])
def test_values_on_the_page_are_taken_and_have_an_effect(text: str) -> None:
    assert charts.template(yaml.safe_load(text)) != charts.template({})


def test_page_shows_values_and_the_message_of_a_wrong_one() -> None:
    assert len(SHOWN) == 5
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert charts.refusal({"operator": {"replica": 3}}).strip() == shown.strip()


def test_commands_of_the_page_have_arguments_that_helm_takes() -> None:
    for command in re.findall(r"^helm (\w+) (.*)$", PAGE, re.MULTILINE):
        known = charts.run(command[0], "--help").stdout
        for option in re.findall(r"--[a-z-]+", command[1]):
            assert f" {option} " in known or f" {option}[" in known, f"helm {command[0]} {option}"
