"""The metrics API over TLS: requests and what is answered."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from metrics_api_world import HPA, FrontProxy, World, model, path
from yarl import URL

from phoenix_operator.metrics_api import authorization, models
from phoenix_operator.metrics_api.answers import quantity

CONCURRENCY, PRESSURE = "inference_latency_seconds_concurrency", "inference_latency_seconds_pressure"
SERIES = "phoenix:inference_concurrency"
Scenario = Callable[[World], Awaitable[Any]]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> FrontProxy:
    return FrontProxy(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def world(proxy: FrontProxy) -> World:
    world = World(proxy)
    world.kubernetes.models["ml"] = [model("fraud", team="risk"), model("churn", team="sales")]
    world.prometheus.put(SERIES, "2.5")
    world.prometheus.put(SERIES, "0", model="churn")
    return world


@pytest.fixture(autouse=True)
def _what_is_known_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, nothing is asked again for its age."""
    monkeypatch.setattr(models, "_STANDS_S", 3600)
    monkeypatch.setattr(authorization, "_ALLOWED_S", 3600)


def through(world: World, scenario: Scenario) -> Any:
    async def main() -> Any:
        async with world.running_api():
            return await scenario(world)

    return asyncio.run(main())


# --- values ----------------------------------------------------------------------------------------------------------


def test_metric_of_a_model_is_a_list_of_one(world: World) -> None:
    answer = through(world, lambda world: world.ask(path()))
    assert answer.code == 200
    assert answer.body == {
        "kind": "MetricValueList",
        "apiVersion": "custom.metrics.k8s.io/v1beta2",
        "metadata": {},
        "items": [
            {
                "describedObject": {
                    "kind": "PhoenixModel",
                    "namespace": "ml",
                    "name": "fraud",
                    "apiVersion": "phoenix-ml.io/v1alpha1",
                },
                "metric": {"name": CONCURRENCY, "selector": None},
                "timestamp": "2026-11-28T03:00:00Z",
                "value": "2500m",
            }
        ],
    }


def test_older_version_names_the_metric_in_its_own_way(world: World) -> None:
    body = through(world, lambda world: world.ask(path(version="v1beta1"))).body
    assert body["apiVersion"] == "custom.metrics.k8s.io/v1beta1"
    (item,) = body["items"]
    assert (item["metricName"], item["value"], item["selector"]) == (CONCURRENCY, "2500m", None)
    assert "metric" not in item


def test_idle_model_has_the_value_zero(world: World) -> None:
    (item,) = through(world, lambda world: world.ask(path(name="churn"))).body["items"]
    assert item["value"] == "0"


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["churn", "fraud"]),
        ("?labelSelector=team%3Drisk", ["fraud"]),
        ("?labelSelector=team+in+(risk,sales),!owner", ["churn", "fraud"]),
        ("?labelSelector=team%21%3Drisk", ["churn"]),
        ("?labelSelector=team%3Dnobody", []),
        ("?metricLabelSelector=model%3Dchurn", ["churn"]),
    ],
)
def test_all_models_are_those_that_the_selectors_choose(world: World, query: str, names: list[str]) -> None:
    answer = through(world, lambda world: world.ask(path(name="*") + query))
    assert answer.code == 200
    assert [item["describedObject"]["name"] for item in answer.body["items"]] == names


def test_all_models_leave_out_those_without_a_reading(world: World) -> None:
    world.kubernetes.models["ml"] += [model("new"), model("broken")]
    world.prometheus.put(SERIES, "NaN", model="broken")
    world.prometheus.put(SERIES, "1", model="deleted")
    body = through(world, lambda world: world.ask(path(name="*"))).body
    assert [item["describedObject"]["name"] for item in body["items"]] == ["churn", "fraud"]


def test_selector_of_the_metric_is_told_in_the_answer(world: World) -> None:
    (item,) = through(world, lambda world: world.ask(path() + "?metricLabelSelector=model%3Dfraud")).body["items"]
    assert item["metric"]["selector"] == {"matchExpressions": [{"key": "model", "operator": "In", "values": ["fraud"]}]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (1, "1"), (1.0, "1"), (2.5, "2500m"), (0.001, "1m"), (0.0004, "400u"), (0.1875, "187500u"),
        (1e-9, "1u"), (5e-324, "1u"), (0.0052, "5200u"), (3.0000000000000004, "3"), (0.1 + 0.2, "300m"),
        (1_000_000, "1000000"), (9e15, "9000000000000000"), (0.9999999, "1"), (1.0000004, "1"),
    ],
)  # fmt: skip
def test_quantity_is_exact_to_a_millionth_and_never_zero_for_more_than_zero(value: float, shown: str) -> None:
    assert quantity(value) == shown


# --- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (path("requests"), 404, "the metric requests of phoenixmodels.phoenix-ml.io ml/fraud is not there: known for"),
        (path(resource="pods"), 404, "known for phoenixmodels.phoenix-ml.io: inference_latency_seconds_concurrency"),
        (path(name="nobody"), 404, "there is no such model"),
        (path(namespace="other"), 404, "there is no such model"),
        (path(PRESSURE), 404, "phoenix:inference_slo_pressure has no recent sample"),
        (path() + "?metricLabelSelector=a%3Db", 404, "has no recent sample"),
        (path() + "?metricLabelSelector=(", 400, "expected a label selector, got '('; see its character 1"),
        (path(name="*") + "?labelSelector=a,,b", 400, "expected a label selector"),
        (path(name="*", namespace="other") , 200, None),
        ("/apis/custom.metrics.k8s.io/v1/namespaces/ml/pods/x/y", 404, "could not find the requested resource"),
        ("/apis/custom.metrics.k8s.io/v1beta2/phoenixmodels.phoenix-ml.io/fraud/x", 404, "could not find"),
        ("/openapi/v2", 404, "could not find"), ("/openapi/v3", 404, "could not find"),
        ("/", 404, "could not find"), ("/metrics", 404, "could not find"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_or_is_not_there_is_told(world: World, asked: str, code: int, words: str | None) -> None:
    answer = through(world, lambda world: world.ask(asked))
    assert answer.code == code
    if words is not None:
        assert (answer.body["kind"], answer.body["status"], answer.body["code"]) == ("Status", "Failure", code)
        assert answer.body["reason"] == {404: "NotFound", 400: "BadRequest"}[code]
        assert words in answer.body["message"]


@pytest.mark.parametrize(
    "names",
    [
        {"namespace": "ml%2F..%2Fother"}, {"namespace": ".."}, {"namespace": "ML"}, {"namespace": "x" * 64},
        {"namespace": "a%22b"}, {"name": "..%2Fx"}, {"name": "a%0Ab"}, {"name": "**"}, {"name": "x" * 254},
        {"resource": "a%2Fb"}, {"metric": "x" * 300}, {"metric": "a%20b"},
    ],
)  # fmt: skip
def test_name_that_no_object_can_have_goes_nowhere(world: World, names: dict[str, str]) -> None:
    answer = through(world, lambda world: world.ask(URL(path(**names), encoded=True)))
    assert (answer.code, answer.body["reason"]) == (404, "NotFound")
    assert not world.kubernetes.reviews
    assert not world.kubernetes.lists


def test_method_other_than_get_is_refused(world: World) -> None:
    answer = through(world, lambda world: world.ask(path(), method="DELETE"))
    assert (answer.code, answer.body["reason"]) == (405, "MethodNotAllowed")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["NaN"], "not_finite"), (["+Inf"], "not_finite"), (["-Inf"], "not_finite"), (["-0.5"], "negative"),
        (["1e300"], "too_large"), (["1", "2"], "several_series"), (["1", "1"], "several_series"),
    ],
)  # fmt: skip
def test_value_that_is_none_is_absent_and_counted(world: World, values: list[str], reason: str) -> None:
    world.prometheus.put(SERIES, *values)
    answer = through(world, lambda world: world.ask(path()))
    assert (answer.code, answer.body["reason"]) == (404, "NotFound")
    assert SERIES in answer.body["message"]
    assert world.counted("phoenix_metrics_api_absent_total", reason=reason) == 1


def test_model_that_is_new_is_found_though_the_models_are_known(world: World) -> None:
    async def scenario(world: World) -> list[int]:
        before = await world.ask(path(name="late"))
        world.kubernetes.models["ml"].append(model("late"))
        world.prometheus.put(SERIES, "1", model="late")
        codes = [before.code]
        async with asyncio.timeout(20):
            while codes[-1] != 200:
                codes.append((await world.ask(path(name="late"))).code)
        return codes

    codes = through(world, scenario)
    assert codes[0] == 404
    assert codes[-1] == 200


# --- who may ---------------------------------------------------------------------------------------------------------


def test_caller_is_reviewed_with_everything_that_the_api_server_says_of_it(world: World) -> None:
    world.kubernetes.allows = lambda spec: "name" in spec["resourceAttributes"]
    answer = through(
        world,
        lambda world: world.ask(
            path(), X_Remote_Group="system:authenticated", X_Remote_Uid="17", **{"X-Remote-Extra-Acme.com%2Fteam": "a"}
        ),
    )
    assert answer.code == 200
    broad, exact = world.kubernetes.reviews
    assert exact == {
        "user": HPA,
        "uid": "17",
        "groups": ["system:authenticated"],
        "extra": {"acme.com/team": ["a"]},
        "resourceAttributes": {
            "group": "custom.metrics.k8s.io",
            "version": "v1beta2",
            "namespace": "ml",
            "resource": "phoenixmodels.phoenix-ml.io",
            "subresource": CONCURRENCY,
            "name": "fraud",
            "verb": "get",
        },
    }
    assert "namespace" not in broad["resourceAttributes"]
    assert broad["resourceAttributes"]["subresource"] == "*"


def test_caller_without_rights_is_told_so_whatever_is_there(world: World) -> None:
    world.kubernetes.allows = lambda spec: False
    for asked in (path(), path("unknown"), path(name="nobody"), path(name="*"), path(resource="pods")):
        answer = through(world, lambda world, asked=asked: world.ask(asked, X_Remote_User="eve"))
        assert (answer.code, answer.body["reason"]) == (403, "Forbidden")
        assert 'User "eve" cannot get' in answer.body["message"]
    assert not world.prometheus.queries


def test_rights_in_one_namespace_are_no_rights_in_another(world: World) -> None:
    world.kubernetes.models["other"] = [model("fraud")]
    world.kubernetes.allows = lambda spec: spec["resourceAttributes"].get("namespace") == "ml"

    async def scenario(world: World) -> list[int]:
        return [(await world.ask(path(namespace=namespace))).code for namespace in ("ml", "other")]

    assert through(world, scenario) == [200, 403]


def test_one_review_serves_many_requests_of_the_autoscaler(world: World) -> None:
    async def scenario(world: World) -> set[int]:
        return {(await world.ask(asked)).code for asked in (path(), path(name="churn"), path(name="*")) * 3}

    assert through(world, scenario) == {200}
    assert len(world.kubernetes.reviews) == 1


def test_discovery_asks_for_no_review(world: World) -> None:
    assert through(world, lambda world: world.ask("/apis/custom.metrics.k8s.io/v1beta2")).code == 200
    assert not world.kubernetes.reviews


@pytest.mark.parametrize("kind", ["subjectaccessreviews", "phoenixmodels"])
def test_api_server_that_fails_is_no_answer(world: World, kind: str) -> None:
    def fail(request: web.Request) -> None:
        if request.path.endswith(kind):
            raise web.HTTPInternalServerError(text="etcd is away")

    world.kubernetes.before = fail
    for name in ("fraud", "*"):
        answer = through(world, lambda world, name=name: world.ask(path(name=name)))
        assert (answer.code, answer.body["reason"]) == (503, "ServiceUnavailable")
        assert "etcd is away" in answer.body["message"]


# --- discovery -------------------------------------------------------------------------------------------------------


def test_discovery_names_group_versions_and_metrics(world: World) -> None:
    async def scenario(world: World) -> list[Any]:
        roots = ("/apis", "/apis/custom.metrics.k8s.io", *(f"/apis/custom.metrics.k8s.io/v1beta{n}" for n in (2, 1)))
        return [(await world.ask(root)).body for root in roots]

    groups, group, newer, older = through(world, scenario)
    preferred = {"groupVersion": "custom.metrics.k8s.io/v1beta2", "version": "v1beta2"}
    assert group["kind"] == "APIGroup"
    assert group["preferredVersion"] == preferred
    assert [row["version"] for row in group["versions"]] == ["v1beta2", "v1beta1"]
    (listed,) = groups["groups"]
    assert (groups["kind"], listed["name"], listed["versions"]) == (
        "APIGroupList", "custom.metrics.k8s.io", group["versions"]
    )  # fmt: skip
    assert (newer["groupVersion"], older["groupVersion"]) == (
        "custom.metrics.k8s.io/v1beta2", "custom.metrics.k8s.io/v1beta1"
    )  # fmt: skip
    assert newer["resources"] == older["resources"]
    assert newer["resources"][0] == {
        "name": "phoenixmodels.phoenix-ml.io/inference_latency_seconds_concurrency",
        "singularName": "",
        "namespaced": True,
        "kind": "MetricValueList",
        "verbs": ["get"],
    }
    assert [row["name"].partition("/")[2] for row in newer["resources"]] == [
        CONCURRENCY, PRESSURE, "inference_latency_seconds"
    ]  # fmt: skip


# --- load ------------------------------------------------------------------------------------------------------------


def test_two_hundred_models_are_one_query_a_metric_and_one_list(world: World) -> None:
    names = [f"model-{number}" for number in range(200)]
    world.settings["cacheSeconds"] = 60
    world.kubernetes.models["ml"] = [model(name) for name in names]
    for name in names:
        world.prometheus.put(SERIES, "1.5", model=name)
        world.prometheus.put("phoenix:inference_slo_pressure", "0", model=name)

    async def scenario(world: World) -> list[int]:
        asked = [path(metric, name=name) for name in names for metric in (CONCURRENCY, PRESSURE)]
        gate = asyncio.Semaphore(20)

        async def ask(one: str) -> int:
            async with gate:
                return (await world.ask(one)).code

        return await asyncio.gather(*(ask(one) for one in asked))

    assert set(through(world, scenario)) == {200}
    assert len(world.prometheus.queries) == 2
    assert world.kubernetes.lists == 1
    assert world.counted("phoenix_metrics_api_requests_total", code="200") == 400


def test_probes_and_metrics_need_no_certificate(world: World) -> None:
    async def scenario(world: World) -> list[tuple[int, str]]:
        await world.ask(path())
        return [await world.probe(name) for name in ("livez", "readyz", "metrics")]

    live, ready, metrics = through(world, scenario)
    assert (live, ready) == ((200, "ok"), (200, "ok"))
    assert 'phoenix_metrics_api_requests_total{code="200"} 1.0' in metrics[1]
    assert 'phoenix_metrics_api_query_seconds_count{result="ok"} 1.0' in metrics[1]
