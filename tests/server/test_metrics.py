"""Metrics: what they count, what they do not, and that every label set is there from the start."""

import json
from pathlib import Path

import httpx
import phoenix_process
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from phoenix_process import wait_until
from prometheus_client.parser import text_string_to_metric_families

from phoenix_server.errors import Outcome
from phoenix_server.metrics import PROTOCOLS, Histogram, Metrics, Objective, latency_bounds_s

IRIS = Path(__file__).parents[2] / "examples" / "iris"


def samples(page: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(f"{key}={sample.labels[key]}" for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@given(st.lists(st.floats(0, 20)))
def test_histogram_counts_like_prometheus(values: list[float]) -> None:
    histogram = Histogram((0.1, 1.0, 10.0))
    for value in values:
        histogram.observe(value)
    for bound, count in histogram.buckets():
        assert count == sum(value <= float(bound) for value in values)
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values))


def test_latency_buckets_hold_both_zones_of_the_autoscaling_rule() -> None:
    bounds = latency_bounds_s(0.2)
    assert {0.1, 0.14, 0.17, 0.2, 0.25, 0.3, 0.4, 0.8} <= set(bounds)
    assert list(bounds) == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0.0005, 10.0)


def test_every_label_set_exists_from_the_start() -> None:
    metrics = Metrics()
    metrics.model("m", "1", Objective(0.2, 95))
    page = samples(metrics.exposition()[0].decode())
    for outcome in Outcome:
        assert page["inference_latency_seconds_count", "model=m", f"outcome={outcome}", "version=1"] == 0
        for protocol in PROTOCOLS:
            key = ("inference_requests_total", "model=m", f"outcome={outcome}", f"protocol={protocol}", "version=1")
            assert page[key] == 0


def test_objective_has_the_percentile_as_a_label_and_a_model_without_autoscaling_has_none() -> None:
    metrics = Metrics()
    metrics.model("m", "1", Objective(0.2, 99))
    metrics.model("plain", "1")
    page = samples(metrics.exposition()[0].decode())
    assert {key: value for key, value in page.items() if key[0] == "phoenix_model_slo_seconds"} == {
        ("phoenix_model_slo_seconds", "model=m", "percentile=99", "version=1"): 0.2
    }


def test_counting_goes_on_with_another_percentile_and_starts_again_with_the_buckets_of_another_slo() -> None:
    metrics = Metrics()
    first = metrics.model("m", "1", Objective(0.2, 95))
    assert metrics.model("m", "1", Objective(0.2, 99)) is first
    page = samples(metrics.exposition()[0].decode())
    assert ("phoenix_model_slo_seconds", "model=m", "percentile=99", "version=1") in page
    assert ("phoenix_model_slo_seconds", "model=m", "percentile=95", "version=1") not in page
    second = metrics.model("m", "1", Objective(0.3, 99))
    assert second is not first
    assert 0.21 in second.latency[Outcome.OK].bounds


def test_page_is_openmetrics_where_asked() -> None:
    body, content_type = Metrics().exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_objective_is_that_of_the_manifest(tmp_path: Path) -> None:
    manifest = yaml.safe_load((IRIS / "model.yaml").read_text())
    manifest["spec"]["autoscaling"] = {"maxReplicas": 2, "targetLatency": "150m", "percentile": 90}
    manifest["spec"]["model"]["uri"] = (IRIS / "model.onnx").as_uri()
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(manifest))
    with phoenix_process.start([tmp_path]) as server, httpx.Client(base_url=server.rest_url, timeout=30) as client:
        page = samples(client.get("/metrics").text)
    assert page["phoenix_model_slo_seconds", "model=iris", "percentile=90", "version=1"] == 0.15


def test_counts_agree_with_what_was_asked() -> None:
    with phoenix_process.start([IRIS]) as server, httpx.Client(base_url=server.rest_url, timeout=30) as client:

        def page() -> dict[tuple[str, ...], float]:
            return samples(client.get("/metrics").text)

        labels = ("model=iris", "outcome=ok", "protocol=rest", "version=1")
        # Capacity and warm-up runs are not requests.
        wait_until(lambda: ("phoenix_model_capacity_concurrency", "model=iris", "version=1") in page(), "measured")
        assert page()["inference_requests_total", *labels] == 0
        assert page()["inference_batch_rows_count", "model=iris", "version=1"] == 0
        for outcome in Outcome:
            series = ("model=iris", f"outcome={outcome}", "version=1")
            assert page()["inference_latency_seconds_count", *series] == 0
            assert page()["inference_latency_seconds_sum", *series] == 0
        body = (IRIS / "request.json").read_bytes()
        sizes = []
        for _ in range(5):
            response = client.post("/v2/models/iris/infer", content=body, headers={"accept-encoding": "identity"})
            sizes.append(len(response.content))
        client.post("/v2/models/iris/infer", content=b"{}")
        client.post("/v2/models/none/infer", content=body)
        now = page()
        assert now["inference_requests_total", *labels] == 5
        assert now["inference_rows_total", *labels] == 15
        assert now["inference_request_bytes_total", *labels] == 5 * len(body)
        assert now["inference_response_bytes_total", *labels] == sum(sizes)
        assert now["inference_requests_total", "model=iris", "outcome=client_error", *labels[2:]] == 1
        assert now["phoenix_requests_rejected_total", "code=not_found", "protocol=rest"] == 1
        assert now["inference_latency_seconds_count", "model=iris", "outcome=ok", "version=1"] == 5
        assert now["inference_batch_rows_sum", "model=iris", "version=1"] == 15
        assert now["inference_inflight_requests", "model=iris", "version=1"] == 0
        digest = json.loads(client.get("/v2/models/iris/state").text)["sha256"]
        info = ("phoenix_model_info", f"digest={digest}", "model=iris", "provider=CPUExecutionProvider", "version=1")
        assert now[info] == 1
