"""The statistics extension. Every rule compares two moments, so that the server's past does not matter."""

from conformance.table import PHOENIX, REST, STATISTICS, rule
from conformance.wire import Client, Document, floats, tensor
from conformance.wire_rest import RestClient

_OBJECT = f"{STATISTICS}, Statistics Response JSON Object"
_MODEL = "oip-divide"
_STAGES = ("compute_input", "compute_infer", "compute_output")


def _of(server: Client, model: str = _MODEL, version: str = "") -> Document:
    stats = server.statistics(model, version)
    assert len(stats) == 1
    return stats[0]


def _infer(server: Client, rows: int) -> None:
    server.infer(_MODEL, floats("a", *[1.0] * rows), floats("b", *[2.0] * rows))


def _grown(server: Client, *rows: int) -> tuple[Document, Document]:
    """Return the statistics before and after inferences with so many rows each."""
    before = _of(server)
    for count in rows:
        _infer(server, count)
    return before, _of(server)


@rule("statistics.fields", _OBJECT)
def fields(server: Client) -> None:
    """An entry names model and version and has the extension's counters, as integers."""
    stats = _of(server)
    assert (stats["name"], stats["version"]) == (_MODEL, "1")
    assert {type(stats[name]) for name in ("last_inference", "inference_count", "execution_count")} == {int}
    stages = ("success", "fail", "queue", *_STAGES)
    assert {type(stats["inference_stats"][stage][unit]) for stage in stages for unit in ("count", "ns")} == {int}
    assert isinstance(stats["batch_stats"], list)


@rule("statistics.requests", _OBJECT)
def requests(server: Client) -> None:
    """`success` counts requests: n inferences let it, and each stage, grow by exactly n."""
    before, after = _grown(server, 1, 1, 1, 1, 1)
    for stage in ("success", "queue", *_STAGES):
        grown = after["inference_stats"][stage]["count"] - before["inference_stats"][stage]["count"]
        assert grown == 5, stage
    assert after["inference_stats"]["fail"] == before["inference_stats"]["fail"]


@rule("statistics.rows", _OBJECT)
def rows(server: Client) -> None:
    """`inference_count` counts the elements of batches, `execution_count` runs of the model."""
    before, after = _grown(server, 3, 2, 1)
    assert after["inference_count"] - before["inference_count"] == 6
    assert after["execution_count"] - before["execution_count"] == 3


@rule("statistics.failures", _OBJECT)
def failures(server: Client) -> None:
    """A refused inference counts as `fail` and nowhere else."""
    before = _of(server)
    with server.refused("invalid"):
        server.infer(_MODEL, floats("a", 1.0))
    after = _of(server)
    assert after["inference_stats"]["fail"]["count"] - before["inference_stats"]["fail"]["count"] == 1
    assert after["inference_stats"]["success"] == before["inference_stats"]["success"]
    assert after["inference_count"] == before["inference_count"]
    assert after["execution_count"] == before["execution_count"]


@rule("statistics.durations", _OBJECT)
def durations(server: Client) -> None:
    """Durations only grow; the run and the whole request take time, and the request no less than its run."""
    before, after = _grown(server, 1, 1, 1)
    grown = {
        stage: after["inference_stats"][stage]["ns"] - before["inference_stats"][stage]["ns"]
        for stage in ("success", "fail", "queue", *_STAGES)
    }
    assert min(grown.values()) >= 0
    assert grown["compute_infer"] > 0
    assert grown["success"] >= grown["compute_infer"]


@rule("statistics.batches", _OBJECT)
def batches(server: Client) -> None:
    """`batch_stats` sum up: runs of all sizes to `execution_count`, sizes times runs to the elements that were run."""
    before, after = _grown(server, 4, 4, 7)
    for stats, other in ((after, before),):
        runs = {item["batch_size"]: item["compute_infer"]["count"] for item in stats["batch_stats"]}
        runs_before = {item["batch_size"]: item["compute_infer"]["count"] for item in other["batch_stats"]}
        assert sum(runs.values()) == stats["execution_count"]
        grown = {size: count - runs_before.get(size, 0) for size, count in runs.items()}
        assert {size: count for size, count in grown.items() if count} == {4: 2, 7: 1}
    for item in after["batch_stats"]:
        assert len({item[stage]["count"] for stage in _STAGES}) == 1


@rule("statistics.last-inference", _OBJECT)
def last_inference(server: Client) -> None:
    """`last_inference` is in milliseconds since the epoch and moves with each inference."""
    before, after = _grown(server, 1)
    assert after["last_inference"] >= before["last_inference"]
    assert 1.6e12 < after["last_inference"] < 1e13


@rule("statistics.of-version", f"{STATISTICS}, Statistics")
def of_version(server: Client) -> None:
    """Each version has its own counters; without a version all are told."""
    before = {version: _of(server, "oip-version", version)["inference_count"] for version in ("1", "2")}
    server.infer("oip-version", floats("x", 1.0, 2.0), version="1")
    after = {stats["version"]: stats["inference_count"] for stats in server.statistics("oip-version")}
    assert after == {"1": before["1"] + 2, "2": before["2"]}


@rule("statistics.all-models", f"{STATISTICS}, Statistics")
def all_models(server: Client) -> None:
    """Without a model, the statistics of every loaded model are told."""
    told = {(stats["name"], stats["version"]) for stats in server.statistics()}
    assert {(item["name"], item["version"]) for item in server.index(ready_only=True)} == told


@rule("statistics.unknown-model", f"{STATISTICS}, Statistics")
def unknown_model(server: Client) -> None:
    """Statistics of an unknown model or version are refused as not found."""
    with server.refused("not-found"):
        server.statistics("oip-nobody-made-this")
    with server.refused("not-found"):
        server.statistics("oip-version", "3")


@rule("statistics.warm-up", PHOENIX, profile="phoenix")
def warm_up(server: Client) -> None:
    """Warm-up and capacity measurements do not count: a model that nobody asked has done nothing."""
    stats = _of(server, "oip-idle")
    assert (stats["inference_count"], stats["execution_count"], stats["last_inference"]) == (0, 0, 0)
    assert stats["batch_stats"] == []
    assert {stage["count"] for stage in stats["inference_stats"].values()} == {0}


@rule("statistics.over-reload", PHOENIX, profile="phoenix")
def over_reload(server: Client) -> None:
    """Counters go on over a load of the same version."""
    server.infer("oip-spare", floats("x", 1.0))
    before = _of(server, "oip-spare")
    server.load("oip-spare")
    after = _of(server, "oip-spare")
    assert after["inference_count"] == before["inference_count"]
    assert after["inference_count"] > 0


@rule("statistics.unbatched", _OBJECT, profile="phoenix")
def unbatched(server: Client) -> None:
    """A request to a model without a batch dimension counts as one element."""
    before = _of(server, "oip-add")
    server.infer("oip-add", *(tensor(name, "FP32", [2, 3], [0.0] * 6) for name in "ab"))
    after = _of(server, "oip-add")
    assert after["inference_count"] - before["inference_count"] == 1
    assert after["execution_count"] - before["execution_count"] == 1


@rule("statistics.metrics", PHOENIX, on=REST, profile="phoenix")
def metrics(server: RestClient) -> None:
    """GET /metrics is Prometheus text and counts the same requests."""

    def total() -> float:
        page = server.http("GET", "/metrics")
        assert page.status == 200
        assert page.headers["content-type"].startswith("text/plain")
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in page.body.decode().splitlines()
            if line.startswith("inference_requests_total{") and f'model="{_MODEL}"' in line and 'outcome="ok"' in line
        )

    before = total()
    _grown(server, 1, 2)
    assert total() - before == 2
