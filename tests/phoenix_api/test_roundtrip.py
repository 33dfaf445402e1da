"""Whatever the schema of the CRD allows is read, dumped and read again as the same model."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specs import GOOD, Case

from phoenix_api import PhoenixModel, parse_manifests
from phoenix_api.structure import model_schema

SPEC = model_schema()["properties"]["spec"]
URIS = st.sampled_from([case.spec["model"]["uri"] for case in GOOD])


def values(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Anything that the schema allows, kept small."""
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if "anyOf" in node:
        return st.integers(1, 2**20) | st.sampled_from(["64Mi", "200m", "0.25", "1e3", "1"])
    match node["type"]:
        case "integer":
            return st.integers(node["minimum"], node["maximum"])
        case "number":
            return st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
        case "boolean":
            return st.booleans()
        case "string" if "pattern" in node:
            return st.from_regex(node["pattern"], fullmatch=True).filter(lambda text: len(text) <= node["maxLength"])
        case "string":
            return st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=8)
        case "array":
            return st.lists(values(node["items"]), min_size=node.get("minItems", 0), max_size=2)
        case _ if "additionalProperties" in node:
            return st.dictionaries(
                st.from_regex(r"[a-z]{1,4}", fullmatch=True), values(node["additionalProperties"]), max_size=2
            )
        case _ if "properties" not in node:
            return st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.none(), max_size=2)
    required = {name: values(node["properties"][name]) for name in node.get("required", ())}
    optional = {name: values(child) for name, child in node["properties"].items() if name not in required}
    return st.fixed_dictionaries(required, optional=optional)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec of the schema, made to obey the cross-field rules."""
    spec: dict[str, Any] = draw(values(SPEC))
    spec["model"]["uri"] = draw(URIS)
    spec.get("limits", {}).pop("maxQueuedRows", None)
    spec.get("batching", {}).update(maxRows=32, maxDelayMilliseconds=0)
    spec.get("warmup", {}).update(rows=1)
    bindings = spec.get("bindings", {})
    for binding in (bindings[kind] for kind in ("redis", "kafka", "postgres") if kind in bindings):
        binding.pop("secretRef" if "backend" in binding else "backend", None)
        if "secretRef" not in binding:
            binding["backend"] = "default"
        binding.get("requests", {}).pop("results", None)
        binding.get("requests", {}).pop("topic", None)
    if "redis" not in bindings:
        spec.pop("features", None)
    if features := spec.get("features"):
        features["names"] = sorted(set(features["names"]))
        features["defaults"] = dict.fromkeys(features["names"], 0.5)
    if scaling := spec.get("autoscaling"):
        spec.pop("replicas", None)
        scaling["minReplicas"] = min(max(scaling.get("minReplicas", 1), 1), scaling["maxReplicas"])
    if accelerator := spec.get("runtime", {}).get("accelerator"):
        accelerator.pop("profile", None)
        accelerator.pop("deviceClassName" if "resourceName" in accelerator else "resourceName", None)
    for variable in spec.get("pod", {}).get("env", ()):
        if "value" in variable:
            variable.pop("valueFrom", None)
    return spec


def document(spec: dict[str, Any]) -> dict[str, Any]:
    return Case("", spec).manifest()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_any_spec_survives_a_round_trip(spec: dict[str, Any]) -> None:
    (first,) = parse_manifests(json.dumps(document(spec)), file="a.json")
    dumped = first.model.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert PhoenixModel.read(dumped, strict=True) == first.model
    as_yaml = yaml.safe_dump(dumped)
    assert parse_manifests(as_yaml, file="a.yaml")[0].model == first.model
    short = first.model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert PhoenixModel.read(short, strict=True) == first.model


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_lenient_and_strict_reading_agree_where_no_field_is_unknown(spec: dict[str, Any]) -> None:
    strict = PhoenixModel.read(document(spec), strict=True)
    spec["addedLater"] = {"a": 1}
    assert PhoenixModel.read(document(spec), strict=False) == strict


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.id)
def test_good_specs_survive_a_round_trip(case: Case) -> None:
    model = PhoenixModel.read(case.manifest(), strict=True)
    assert PhoenixModel.read(model.model_dump(mode="json", by_alias=True, exclude_none=True), strict=True) == model
