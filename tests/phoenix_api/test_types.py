"""The Python side of the API: defaults, quantities, strict and lenient reading, and a light import."""

import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError
from specs import COMPLETE, SOURCE

from phoenix_api import API_VERSION, KIND, AcceleratorPolicy, PhoenixModel, Provider, Quantity
from phoenix_api.quantity import amount
from phoenix_api.types import Batching, ModelSource


def manifest(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "iris"}, "spec": {"model": SOURCE} | spec}


def test_smallest_manifest_has_every_default() -> None:
    model = PhoenixModel.read(manifest(), strict=True)
    spec = model.spec
    assert model.metadata.namespace == "default"
    assert (spec.model.version, spec.model.sha256, spec.replicas) == ("1", None, 1)
    assert (spec.batching.max_rows, spec.batching.max_delay_milliseconds) == (32, 0)
    assert (spec.warmup.iterations, spec.warmup.rows) == (3, 1)
    assert int(spec.limits.max_request_bytes.value) == 64 * 1024**2
    assert (spec.limits.max_queued_rows, spec.limits.timeout_seconds) == (1024, 30)
    assert (spec.runtime.accelerator, spec.runtime.threads, spec.runtime.instances) == (None, 0, 1)
    assert (spec.rollout.strategy, spec.rollout.progress_deadline_seconds, spec.rollout.drain_seconds) == (
        *("Auto", 1200, 10),
    )
    assert (spec.autoscaling, spec.features, spec.bindings, spec.networking.host) == (None, None, None, None)


def test_complete_manifest_is_read_into_types() -> None:
    spec = PhoenixModel.read(manifest(**COMPLETE), strict=True).spec
    assert spec.runtime.accelerator
    assert spec.runtime.accelerator.policy is AcceleratorPolicy.PREFER
    assert spec.runtime.accelerator.provider is Provider.TENSORRT
    assert spec.autoscaling
    assert float(spec.autoscaling.target_latency.value) == 0.2
    assert spec.bindings
    assert spec.bindings.kafka
    assert spec.bindings.kafka.requests
    assert spec.bindings.kafka.requests.dead_letter_topic == "dead"


def test_manifest_from_a_cluster_is_read_with_its_metadata_and_status() -> None:
    document = manifest()
    document["metadata"] |= {"uid": "x", "generation": 3, "managedFields": [{}], "annotations": {"a": "b"}}
    document["status"] = {
        "observedGeneration": 3,
        "readyReplicas": 2,
        "replicas": {"desired": 2, "ready": 2, "updated": 2, "summary": "2/2"},
        "autoscaling": {"concurrency": "3.2", "latencyP95": "140m", "pressure": "0", "desiredReplicas": 2},
        "conditions": [
            {
                "type": "Ready", "status": "True", "reason": "Ready", "message": "",
                "lastTransitionTime": "2026-11-23T20:00:00Z", "observedGeneration": 3,
            }
        ],
    }  # fmt: skip
    model = PhoenixModel.read(document, strict=True)
    assert model.metadata.annotations == {"a": "b"}
    assert model.status
    assert model.status.conditions[0].status == "True"
    assert model.status.autoscaling
    assert model.status.autoscaling.latency_p95 == "140m"


@pytest.mark.parametrize("where", ["", "model", "limits", "pod"])
def test_unknown_field_is_refused_strictly_and_ignored_leniently(where: str) -> None:
    document = manifest(limits={"timeoutSeconds": 5}, pod={})
    (document["spec"][where] if where else document["spec"])["fromTheFuture"] = {"a": 1}
    document["alsoNew"] = 1
    with pytest.raises(ValidationError):
        PhoenixModel.read(document, strict=True)
    assert PhoenixModel.read(document, strict=False).spec.limits.timeout_seconds == 5


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for level in range(levels - 1):
        found = {"a": found} if level % 3 else {"a": [found], "b": 1}
    return found


def test_object_that_is_passed_on_may_nest_but_not_without_end() -> None:
    PhoenixModel.read(manifest(pod={"affinity": nested(20)}), strict=False)
    with pytest.raises(ValidationError, match="expected a nesting of at most 32 levels"):
        PhoenixModel.read(manifest(pod={"affinity": nested(40)}), strict=False)
    with pytest.raises(ValidationError, match="expected a nesting of at most 32 levels"):
        PhoenixModel.read(manifest(networking={"allowFrom": [nested(9000)]}), strict=False)


def test_lenient_reading_still_refuses_wrong_values() -> None:
    with pytest.raises(ValidationError):
        PhoenixModel.read(manifest(limits={"timeoutSeconds": 0}), strict=False)


def test_python_code_uses_python_names_and_cannot_change_a_model() -> None:
    assert Batching(max_rows=4).max_rows == 4
    with pytest.raises(ValidationError):
        Batching(max_row=4)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        ModelSource(uri="a").uri = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("64Mi", 64 * 1024**2), ("1Gi", 1024**3), ("2Ki", 2048), ("200m", "0.2"), ("1", 1), (3, 3), ("0.25", "0.25"),
        ("5u", "0.000005"), ("7n", "0.000000007"), ("1k", 1000), ("1.5G", 1_500_000_000), ("1e3", 1000),
        ("2E-2", "0.02"), ("1E", 10**18), ("1Ei", 1024**6), (".5", "0.5"), ("1.", 1),
    ],
)  # fmt: skip
def test_quantity_has_the_value_that_kubernetes_gives_it(written: str | int, value: str | int) -> None:
    quantity = Quantity(written)
    assert quantity.value == Decimal(value)
    assert quantity == str(written)
    assert float(quantity) == float(Decimal(value))
    assert int(quantity) == int(Decimal(value))


@pytest.mark.parametrize(
    "written", ["", "Mi", "-1", "+1", "1 Mi", "64MB", "1e", "1mi", "0x10", "\u0661", "1\n", "9" * 40]
)
def test_quantity_refuses_other_notations(written: str) -> None:
    with pytest.raises(ValueError, match="expected a quantity"):
        Quantity(written)


@pytest.mark.parametrize(
    ("written", "value"),
    [("1125901032742530843m", "1125901032742530.843"), ("-1", -1), ("+2Ki", 2048), ("1e99", "1e99")],
)
def test_amount_of_what_kubernetes_stores_may_have_more_digits(written: str, value: Any) -> None:
    assert amount(written) == Decimal(value)


@pytest.mark.parametrize("written", ["", "Mi", "1.2.3", "1e999999999999", "much", "1 "])
def test_amount_of_what_is_no_quantity_is_an_error(written: str) -> None:
    with pytest.raises(ValueError, match="expected a quantity of Kubernetes"):
        amount(written)


def test_importing_the_api_does_not_import_the_generators() -> None:
    generators = ["crd", "schema", "reference", "structure", "__main__"]
    code = (
        "import sys, phoenix_api as api\n"
        "api.parse_manifests(sys.stdin.read(), file='model.yaml')\n"
        f"print([name for name in {generators} if 'phoenix_api.' + name in sys.modules])"
    )
    text = f"apiVersion: {API_VERSION}\nkind: {KIND}\nmetadata: {{name: iris}}\nspec: {{model: {{uri: x}}}}\n"
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
