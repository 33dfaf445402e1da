"""The connection to the API server, against a tiny one: what is sent, and what becomes of each kind of answer."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import virtual_time
import yaml
from api_server import Answer, ApiServer, Asked, connected, failure, serving
from virtual_time import now

from phoenix_operator.cluster import ApiError, Cluster, Pace, Page
from phoenix_operator.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    HTTP_ROUTE,
    NODE,
    OPTIONAL,
    PHOENIX_MODEL,
    POD_MONITOR,
    RESOURCE_CLAIM_TEMPLATE,
    SECRET,
)

MANIFEST = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "fraud", "namespace": "ml"}}
FRAUD = "/apis/apps/v1/namespaces/ml/deployments/fraud"
Told = list[tuple[str, int, float]]


def talk(server: ApiServer, do: Callable[[Cluster], Awaitable[Any]], **options: Any) -> tuple[Any, Told]:
    """Return what the call returns, or the error it raises; and what the observer was told."""

    async def main() -> tuple[Any, Told]:
        async with connected(server, **options) as (cluster, told):
            try:
                return await do(cluster), told
            except ApiError as error:
                return error, told

    return virtual_time.run(main())


def ask(answer: Answer, do: Callable[[Cluster], Awaitable[Any]]) -> tuple[Any, Asked]:
    """Return what the call returns, and the one request that it made."""
    server = ApiServer(answer)
    found, _ = talk(server, do)
    (asked,) = server.asked
    return found, asked


# --- reads -----------------------------------------------------------------------------------------------------------


def test_get_returns_the_object_or_none() -> None:
    found, asked = ask(Answer(MANIFEST), lambda cluster: cluster.get(DEPLOYMENT, "ml", "fraud"))
    assert found == MANIFEST
    assert (asked.method, asked.path, asked.query) == ("GET", FRAUD, {})
    assert asked.headers["User-Agent"] == "phoenix-operator"
    found, _ = ask(failure(404, "NotFound"), lambda cluster: cluster.get(DEPLOYMENT, "ml", "fraud"))
    assert found is None


def test_get_of_an_object_without_namespace_asks_the_cluster() -> None:
    _, asked = ask(Answer(), lambda cluster: cluster.get(NODE, None, "a"))
    assert asked.path == "/api/v1/nodes/a"


@pytest.mark.parametrize(("answer", "is_there"), [
    (Answer({"kind": "PartialObjectMetadata"}), True),
    (failure(404, "NotFound"), False),
    (failure(403, "Forbidden"), True),
])  # fmt: skip
def test_existence_is_asked_for_by_metadata_only(answer: Answer, is_there: bool) -> None:
    found, asked = ask(answer, lambda cluster: cluster.exists(SECRET, "ml", "s3-reader"))
    assert found is is_there
    assert asked.path == "/api/v1/namespaces/ml/secrets/s3-reader"
    assert asked.headers["Accept"] == "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


def test_existence_that_cannot_be_asked_for_is_an_error() -> None:
    found, _ = ask(failure(500, message="down"), lambda cluster: cluster.exists(SECRET, "ml", "x"))
    assert isinstance(found, ApiError)


def page(*names: str, token: str = "") -> Answer:
    items = [{"metadata": {"name": name}} for name in names]
    return Answer({"items": items, "metadata": {"resourceVersion": "7", "continue": token}})


def test_list_follows_the_pages() -> None:
    server = ApiServer(page("a", token="one"), page("b", "c", token="two"), page())
    found, _ = talk(server, lambda cluster: cluster.list(CONFIG_MAP, "ml", labels="a=b", fields="c!=d"))
    assert [row["metadata"]["name"] for row in found.items] == ["a", "b", "c"]
    assert found.version == "7"
    common = {"limit": "100", "labelSelector": "a=b", "fieldSelector": "c!=d"}
    assert [asked.query for asked in server.asked] == [
        common, common | {"continue": "one"}, common | {"continue": "two"},
    ]  # fmt: skip


def test_empty_list_without_items_is_empty() -> None:
    answer = Answer({"items": None, "metadata": {"resourceVersion": "7"}})
    found, asked = ask(answer, lambda cluster: cluster.list(CONFIG_MAP, None))
    assert found == Page([], "7")
    assert asked.path == "/api/v1/configmaps"


def test_list_of_metadata_asks_for_no_more() -> None:
    _, asked = ask(page(), lambda cluster: cluster.list(CONFIG_MAP, None, only_metadata=True))
    assert asked.headers["Accept"] == "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


def test_page_that_expired_is_an_error() -> None:
    server = ApiServer(page("a", token="one"), failure(410, "Expired", "the provided continue parameter is too old"))
    found, _ = talk(server, lambda cluster: cluster.list(CONFIG_MAP, "ml"))
    assert (found.code, found.reason) == (410, "Expired")


def test_served_kinds_are_those_of_the_groups_that_answer() -> None:
    class Groups(ApiServer):
        async def reply(self, request: Any) -> Any:
            plurals = {
                "/apis/resource.k8s.io/v1": ["resourceclaims", "resourceclaimtemplates"],
                "/apis/monitoring.coreos.com/v1": ["podmonitors"],
            }.get(request.path)
            found = plurals and Answer({"resources": [{"name": name} for name in plurals]})
            self.answers = [found or failure(404, "NotFound")]
            return await super().reply(request)

    found, _ = talk(Groups(), lambda cluster: cluster.served(tuple(OPTIONAL)))
    assert found == {RESOURCE_CLAIM_TEMPLATE, POD_MONITOR}
    found, _ = talk(ApiServer(failure(403)), lambda cluster: cluster.served((HTTP_ROUTE,)))
    assert found == frozenset()
    found, _ = talk(ApiServer(failure(500)), lambda cluster: cluster.served((HTTP_ROUTE,)))
    assert isinstance(found, ApiError)


# --- writes ----------------------------------------------------------------------------------------------------------


def test_apply_is_server_side_forced_and_strict() -> None:
    found, asked = ask(Answer(MANIFEST), lambda cluster: cluster.apply(DEPLOYMENT, MANIFEST))
    assert found == MANIFEST
    assert (asked.method, asked.path, asked.body) == ("PATCH", FRAUD, MANIFEST)
    assert asked.query == {"fieldManager": "phoenix-operator", "fieldValidation": "Strict", "force": "true"}
    assert asked.headers["Content-Type"] == "application/apply-patch+yaml; charset=utf-8"


def test_first_apply_does_not_take_what_belongs_to_others() -> None:
    _, asked = ask(Answer(MANIFEST), lambda cluster: cluster.apply(DEPLOYMENT, MANIFEST, is_first=True))
    assert "force" not in asked.query
    found, _ = ask(
        failure(409, "Conflict", "conflict with kubectl"),
        lambda cluster: cluster.apply(DEPLOYMENT, MANIFEST, is_first=True),
    )
    assert (found.code, found.reason) == (409, "Conflict")


def test_status_has_a_manager_of_its_own() -> None:
    status = {"readyReplicas": 1}
    _, asked = ask(Answer(), lambda cluster: cluster.apply_status(PHOENIX_MODEL, "ml", "fraud", status))
    assert (asked.method, asked.path) == (
        "PATCH", "/apis/phoenix-ml.io/v1alpha1/namespaces/ml/phoenixmodels/fraud/status",
    )  # fmt: skip
    assert asked.query == {"fieldManager": "phoenix-operator-status", "force": "true"}
    assert asked.headers["Content-Type"] == "application/apply-patch+yaml; charset=utf-8"
    assert asked.body == {
        "apiVersion": "phoenix-ml.io/v1alpha1", "kind": "PhoenixModel",
        "metadata": {"name": "fraud", "namespace": "ml"}, "status": status,
    }  # fmt: skip


def test_delete_is_for_the_object_with_this_uid() -> None:
    _, asked = ask(Answer(), lambda cluster: cluster.delete(DEPLOYMENT, "ml", "fraud", uid="u"))
    assert (asked.method, asked.path) == ("DELETE", FRAUD)
    assert asked.body["preconditions"] == {"uid": "u"}
    assert asked.body["propagationPolicy"] == "Background"


@pytest.mark.parametrize("code", [404, 409])
def test_delete_of_an_object_that_is_gone_or_another_is_done(code: int) -> None:
    found, _ = ask(failure(code), lambda cluster: cluster.delete(DEPLOYMENT, "ml", "fraud", uid="u"))
    assert found is None


def test_refused_delete_is_an_error() -> None:
    found, _ = ask(failure(403, "Forbidden"), lambda cluster: cluster.delete(DEPLOYMENT, "ml", "fraud", uid="u"))
    assert found.code == 403


def test_create_and_replace_send_the_whole_object() -> None:
    _, asked = ask(Answer(MANIFEST), lambda cluster: cluster.create(DEPLOYMENT, MANIFEST))
    assert (asked.method, asked.path, asked.body) == ("POST", FRAUD.rpartition("/")[0], MANIFEST)
    _, asked = ask(Answer(MANIFEST), lambda cluster: cluster.replace(DEPLOYMENT, MANIFEST))
    assert (asked.method, asked.path, asked.body) == ("PUT", FRAUD, MANIFEST)
    found, _ = ask(failure(409, "AlreadyExists"), lambda cluster: cluster.create(DEPLOYMENT, MANIFEST))
    assert (found.code, found.reason) == (409, "AlreadyExists")


# --- answers ---------------------------------------------------------------------------------------------------------


async def get(cluster: Cluster) -> Any:
    return await cluster.get(DEPLOYMENT, "ml", "fraud")


@pytest.mark.parametrize("code", [429, 503])
def test_server_that_says_when_is_asked_again_then(code: int) -> None:
    busy = failure(code, "TooManyRequests", Retry_After="3")
    server = ApiServer(busy, busy, Answer(MANIFEST))

    async def timed(cluster: Cluster) -> tuple[Any, float]:
        started = now()
        return await get(cluster), now() - started

    (found, took_s), told = talk(server, timed)
    assert found == MANIFEST
    assert 6 <= took_s <= 9.1, "3 s and up to half of it more, twice"
    assert [(verb, code) for verb, code, _ in told] == [("GET", code), ("GET", code), ("GET", 200)]


def test_server_that_is_busy_for_ever_is_asked_five_times() -> None:
    server = ApiServer(failure(429, "TooManyRequests", "slow down", Retry_After="1"))
    found, _ = talk(server, get)
    assert (found.code, found.message) == (429, "slow down")
    assert len(server.asked) == 5


def test_wait_that_the_server_asks_for_is_bounded() -> None:
    server = ApiServer(failure(503, Retry_After="86400"), Answer(MANIFEST))

    async def timed(cluster: Cluster) -> float:
        started = now()
        await get(cluster)
        return now() - started

    took_s, _ = talk(server, timed)
    assert took_s <= 45.1


@pytest.mark.parametrize("answer", [
    failure(429, "TooManyRequests"), failure(503, "ServiceUnavailable"), failure(500, Retry_After="1"),
    failure(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
])  # fmt: skip
def test_server_that_does_not_say_when_is_not_asked_again(answer: Answer) -> None:
    server = ApiServer(answer)
    found, _ = talk(server, get)
    assert found.code == answer.status
    assert len(server.asked) == 1


def test_silence_ends_at_the_deadline_with_code_0() -> None:
    server = ApiServer(Answer(silent=True))

    async def timed(cluster: Cluster) -> tuple[ApiError, float]:
        started = now()
        with pytest.raises(ApiError) as caught:
            await get(cluster)
        return caught.value, now() - started

    (error, took_s), told = talk(server, timed, timeout_s=7)
    assert error.code == 0
    assert "no answer from the API server" in error.message
    assert took_s == pytest.approx(7, abs=0.5)
    assert told[0][:2] == ("GET", 0)


def test_server_that_is_not_there_is_code_0() -> None:
    async def main() -> ApiError:
        async with connected(ApiServer()) as (cluster, _):
            cluster._api.configuration.host = "http://127.0.0.1:1"
            with pytest.raises(ApiError) as caught:
                await get(cluster)
            return caught.value

    assert virtual_time.run(main()).code == 0


@pytest.mark.parametrize(
    ("answer", "reason", "message"),
    [
        (
            failure(422, "Invalid", 'Deployment "fraud" is invalid: spec'),
            "Invalid",
            'Deployment "fraud" is invalid: spec',
        ),
        (Answer("<html>bad gateway</html>", 502), "", "<html>bad gateway</html>"),
        (Answer("x" * 1000, 502), "", "x" * 200),
        (Answer([1], 500), "", f"GET {FRAUD}: HTTP 500"),
        (Answer({}, 500), "", f"GET {FRAUD}: HTTP 500"),
        (Answer({"message": None, "details": None}, 500), "", f"GET {FRAUD}: HTTP 500"),
    ],
    ids=["status", "html", "long", "list", "empty", "null"],
)
def test_error_body_becomes_a_sentence(answer: Answer, reason: str, message: str) -> None:
    found, _ = ask(answer, get)
    assert (found.code, found.reason, found.message) == (answer.status, reason, message)
    assert str(found) == message


def test_faults_are_told_in_one_order_however_the_api_server_walked_its_maps() -> None:
    def told(*causes: tuple[str, str]) -> str:
        words = ", ".join(f"{field}: {message}" for field, message in causes)
        answer = failure(422, "Invalid", f'Deployment.apps "fraud" is invalid: [{words}]')
        rows = [{"reason": "FieldValueInvalid", "field": field, "message": message} for field, message in causes]
        answer.body["details"] = {"causes": rows}
        return str(ask(answer, get)[0].message)

    one, other = ("spec.b", "Invalid value: 1"), ("spec.a", "Required value")
    assert told(one, other) == told(other, one)
    assert told(one, other) == 'Deployment.apps "fraud" is invalid: [spec.a: Required value, spec.b: Invalid value: 1]'
    assert told(one) == 'Deployment.apps "fraud" is invalid: [spec.b: Invalid value: 1]'
    head = "failed to create typed patch object (ml/fraud; apps/v1, Kind=Deployment): errors:\n"
    unknown = [f"  .spec.{name}: field not declared in schema" for name in "ba"]
    found, _ = ask(failure(500, "", head + "\n".join(unknown)), get)
    assert found.message == head + "\n".join(unknown[::-1])


def test_success_without_a_body_is_an_empty_object() -> None:
    found, _ = ask(Answer(""), get)
    assert found == {}


@pytest.mark.parametrize("code", [400, 403, 405, 406, 413, 415, 422])
def test_object_at_fault_is_a_refusal(code: int) -> None:
    assert ApiError(code, "", "").is_refusal


@pytest.mark.parametrize("code", [0, 401, 404, 408, 409, 410, 429, 500, 502, 503, 504])
def test_moment_at_fault_is_no_refusal(code: int) -> None:
    assert not ApiError(code, "", "").is_refusal


def test_quota_and_ending_namespace_are_told_by_the_servers_words() -> None:
    quota = 'pods "x" is forbidden: exceeded quota: small, requested: pods=1'
    assert ApiError(403, "Forbidden", quota).is_quota
    assert not ApiError(500, "", quota).is_quota
    ending = "unable to create new content in namespace ml because it is being terminated"
    assert ApiError(403, "Forbidden", ending).is_namespace_ending
    assert ApiError(404, "NotFound", 'namespaces "ml" not found').is_namespace_ending
    assert not ApiError(404, "NotFound", 'services "ml" not found').is_namespace_ending
    assert not ApiError(403, "Forbidden", "no").is_namespace_ending


# --- pace ------------------------------------------------------------------------------------------------------------


def test_pace_lets_a_seconds_worth_through_at_once_and_then_its_rate() -> None:
    async def main() -> list[float]:
        pace, started, times = Pace(10), now(), []
        for _ in range(25):
            await pace.wait()
            times.append(round(now() - started, 6))
        return times

    times = virtual_time.run(main())
    assert times[:10] == [0] * 10
    assert times[10:] == pytest.approx([0.1 * number for number in range(1, 16)])


def test_pace_is_kept_by_callers_side_by_side() -> None:
    async def main() -> float:
        pace, started = Pace(10), now()
        await asyncio.gather(*(pace.wait() for _ in range(40)))
        return now() - started

    assert virtual_time.run(main()) == pytest.approx(3)


def test_pace_saves_no_more_than_a_seconds_worth() -> None:
    async def main() -> list[float]:
        pace = Pace(2)
        await asyncio.sleep(100)
        started, times = now(), []
        for _ in range(4):
            await pace.wait()
            times.append(now() - started)
        return times

    assert virtual_time.run(main()) == pytest.approx([0, 0, 0.5, 1])


def test_requests_wait_for_their_turn() -> None:
    async def timed(cluster: Cluster) -> float:
        started = now()
        await asyncio.gather(*(get(cluster) for _ in range(8)))
        return now() - started

    took_s, _ = talk(ApiServer(Answer(MANIFEST)), timed, per_second=4)
    assert took_s == pytest.approx(1, abs=0.2)


# --- where the API server is -----------------------------------------------------------------------------------------


def test_kubeconfig_names_the_server_and_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> Asked:
        server = ApiServer(Answer(MANIFEST))
        async with serving(server) as address:
            file = tmp_path / "config"
            config = {
                "apiVersion": "v1", "kind": "Config", "current-context": "it",
                "clusters": [{"name": "it", "cluster": {"server": address}}],
                "users": [{"name": "it", "user": {"token": "secret-token"}}],
                "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            }  # fmt: skip
            file.write_text(yaml.safe_dump(config))
            monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
            cluster = await Cluster.connect(per_second=10, timeout_s=5)
            try:
                await get(cluster)
            finally:
                await cluster.close()
        return server.asked[0]

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    asked = virtual_time.run(main())
    assert asked.headers["Authorization"] == "Bearer secret-token"
