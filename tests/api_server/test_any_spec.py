"""Thousands of models that the API server accepts, hostile ones among them: none harms the operator, none goes untold.

The operator is a real process, with a token of its own ServiceAccount. PHOENIX_ANY_MODELS and PHOENIX_ANY_SEED ask for
more models or for others; a failure prints seed, number and spec.
"""

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from any_spec import NAMESPACES, document
from api_client import Answer, Api, ApiServer, in_turn, models_path
from operator_process import Metrics, OperatorProcess, audited, write_kubeconfig, writes
from pydantic import ValidationError
from test_verdicts import stored_differs_from_types

from phoenix_api import CONDITIONS, ConditionType, PhoenixModel, Reason, parse_manifests
from phoenix_api.faults import explain, path_of
from phoenix_operator.kinds import CHILDREN, PHOENIX_MODEL

Object = dict[str, Any]
SEED = int(os.environ.get("PHOENIX_ANY_SEED", "20261124"))
ACCEPTED = int(os.environ.get("PHOENIX_ANY_MODELS", "2000"))
_AT_ONCE = 200
_ROUNDS, _RESYNC_S = 4, 10
_WRITES = ("APPLY", "STATUS", "DELETE", "RESET")  # those of leases have other verbs
SETTINGS: Object = {
    "routes": {"kind": "Ingress", "ingressClassName": "nginx", "tlsSecretName": "models-tls"},
    "acceleratorProfiles": {
        "nvidia-l4": {
            "resourceName": "nvidia.com/gpu",
            "nodeSelector": {"gpu": "l4"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "runtimeClassName": "nvidia",
        },
        "dra": {"deviceClassName": "gpu.nvidia.com"},
    },
    "autoscaling": {"provider": "builtin"},
    "apiRequestsPerSecond": 2000,
    "leaseSeconds": 15,
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _deep_json() -> Iterator[None]:
    """Some specs nest more deeply than Python's JSON usually goes."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(12_000)
    yield
    sys.setrecursionlimit(before)


@dataclass(frozen=True)
class Try:
    """A manifest, and what the API server and the Python types said to it."""

    number: int
    manifest: Object
    answer: Answer
    faults: list[str]

    def shown(self, *words: object) -> str:
        said = "\n  ".join(str(word)[:2000] for word in words)
        return f"seed {SEED}, number {self.number}:\n  {said}\n  {json.dumps(self.manifest)[:3000]}"


def some(found: list[str]) -> str:
    return "\n".join([f"{len(found)} of them", *found[:5]])


def faults_of(manifest: Object) -> list[str]:
    try:
        PhoenixModel.read(manifest, strict=True)
    except ValidationError as error:
        return [f"{path_of(location)}: {message}" for location, message in explain(error)]
    return []


@pytest.fixture(scope="module")
def tries(server: ApiServer) -> list[Try]:
    """As many models as are wanted, stored by the API server, and those that it refused meanwhile."""
    found: list[Try] = []

    async def make(api: Api, number: int) -> Try:
        manifest = document(SEED, number)
        path = models_path(manifest["metadata"]["namespace"])
        answer = await api("POST", path, manifest, fieldValidation="Strict")
        return Try(number, manifest, answer, faults_of(manifest))

    async def make_all(api: Api) -> None:
        for name in NAMESPACES:
            await prepare(api, name)
        while sum(each.answer.is_success for each in found) < ACCEPTED:
            found.extend(await in_turn(make(api, number) for number in range(len(found), len(found) + _AT_ONCE)))

    server.run(make_all)
    refused = [each.answer for each in found if not each.answer.is_success]
    print(f"seed {SEED}: {len(found)} specs, {len(found) - len(refused)} accepted, {len(refused)} refused")
    for where, count in Counter(map(why_refused, refused)).most_common(25):
        print(f"  {count:4} {where}")
    return found


async def prepare(api: Api, namespace: str) -> None:
    """Make the namespace with what models refer to, and with what is in their way."""
    await api.make_namespace(namespace)
    core = f"/api/v1/namespaces/{namespace}"
    # a binding of any kind, and credentials
    keys = {"host": "10.1.2.3", "bootstrap-servers": "10.1.2.3:9092"}
    await api.must("POST", f"{core}/secrets", {"metadata": {"name": "present"}, "stringData": keys})
    await api.must("POST", f"{core}/configmaps", {"metadata": {"name": "iris-model"}, "data": {"model.onnx": ""}})
    await api.must("POST", f"{core}/serviceaccounts", {"metadata": {"name": "default"}})
    labels = {"app": "taken"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    taken = {"metadata": {"name": "taken"}, "spec": {"selector": {"matchLabels": labels}, "template": template}}
    await api.must("POST", f"/apis/apps/v1/namespaces/{namespace}/deployments", taken)


def why_refused(answer: Answer) -> str:
    words = answer.causes[0][0] if answer.causes else answer.message.rpartition(": ")[2]
    return f"{answer.code} {re.sub(r'[0-9]+', '#', words)[:100]!a}"


def test_types_and_api_server_agree_on_every_spec(tries: list[Try]) -> None:
    wrong = [
        each.shown(f"API server: {each.answer.code} {each.answer.message}", f"types: {each.faults}")
        for each in tries
        if each.answer.is_success is bool(each.faults) and not is_only_nested(each)
    ]
    assert not wrong, some(wrong)


def is_only_nested(each: Try) -> bool:
    """How deep an object nests is what the API server cannot be told to bound: the operator tells of it."""
    return bool(each.faults) and all("a nesting of at most" in fault for fault in each.faults)


def test_types_and_api_server_write_the_same_defaults(tries: list[Try]) -> None:
    wrong = [
        each.shown(found)
        for each in tries
        if each.answer.is_success and not each.faults
        and (found := stored_differs_from_types(each.manifest["spec"], each.answer.body["spec"]))
    ]  # fmt: skip
    assert not wrong, some(wrong)


# --- the operator ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What is stored in the models' namespaces at one moment."""

    models: list[Object]
    children: dict[tuple[str, str, str], Object]  # by kind, namespace and name

    @staticmethod
    def conditions(model: Object) -> dict[str, Object]:
        return {row["type"]: row for row in model.get("status", {}).get("conditions", ())}

    @cached_property
    def owned(self) -> dict[str, set[tuple[str, str]]]:
        """Kind and name of what each model owns, by its uid."""
        found: dict[str, set[tuple[str, str]]] = {}
        for (kind, _, name), body in self.children.items():
            for owner in body["metadata"].get("ownerReferences", ()):
                found.setdefault(owner["uid"], set()).add((kind, name))
        return found

    @property
    def accepted(self) -> list[Object]:
        return [model for model in self.models if self.conditions(model)["Accepted"]["status"] == "True"]


async def look(api: Api) -> World:
    served = [kind for kind in CHILDREN if (await api("GET", kind.path(None), limit="1")).is_success]
    print(f"kinds that this API server does not serve: {', '.join(str(k) for k in CHILDREN if k not in served)}")
    models = await api.items(PHOENIX_MODEL.path(None))
    children = {
        (kind.kind, body["metadata"]["namespace"], body["metadata"]["name"]): body
        for kind in served
        for body in await api.items(kind.path(None))
    }
    return World([model for model in models if model["metadata"]["namespace"] in NAMESPACES], children)


@pytest.fixture(scope="module")
def kubeconfig(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a token that has the rights of the operator's install manifests."""
    file = tmp_path_factory.mktemp("rights") / "kubeconfig"
    write_kubeconfig(server, file)
    return file


@dataclass(frozen=True)
class Run:
    """A run of the operator over all models."""

    operator: OperatorProcess
    pid: int
    failing: float
    world: World


@pytest.fixture(scope="module")
def run(
    server: ApiServer, tries: list[Try], kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """The operator has worked off everything; it still runs."""
    accepted = sum(each.answer.is_success for each in tries)
    started = time.monotonic()
    operator = OperatorProcess(tmp_path_factory.mktemp("first"), kubeconfig, SETTINGS)
    pid = operator.process.pid
    try:
        seen = operator.wait_until(
            "all models reconciled",
            lambda now: (
                now.value("phoenix_operator_models") >= accepted
                and now.value("phoenix_operator_reconcile_seconds_count") >= accepted
                and now.value("phoenix_operator_queue_oldest_seconds") < 2
            ),
            deadline_s=400,
        )
        print(f"{accepted} models reconciled within {time.monotonic() - started:.0f} s; requests: {seen.requests()}")
        yield Run(operator, pid, seen.value("phoenix_operator_failing_models"), server.run(look))
    finally:
        operator.stop()


def number_of(tries: list[Try], model: Object) -> Try:
    metadata = model["metadata"]
    place = (metadata["namespace"], metadata["name"])
    return next(
        each for each in tries
        if each.answer.is_success
        and (each.manifest["metadata"]["namespace"], each.manifest["metadata"]["name"]) == place
    )  # fmt: skip


def test_operator_survives_every_spec(run: Run) -> None:
    assert run.operator.process.poll() is None
    assert run.operator.process.pid == run.pid
    assert run.operator.complaints() == []
    assert run.failing == 0


def test_every_model_has_a_status_of_its_generation(run: Run, tries: list[Try]) -> None:
    wrong = []
    for model in run.world.models:
        status = model.get("status", {})
        rows = run.world.conditions(model)
        if status.get("observedGeneration") != model["metadata"]["generation"] or not rows.keys() >= {
            "Accepted",
            "Ready",
        }:
            wrong.append(number_of(tries, model).shown(status))
    assert not wrong, some(wrong)


def test_model_that_is_not_accepted_says_why(run: Run, tries: list[Try]) -> None:
    """And owns nothing, unless the API server refused an object of it."""
    wrong, reasons = [], Counter()
    allowed = {str(reason) for reason in CONDITIONS[ConditionType.ACCEPTED].otherwise}
    accepted = {model["metadata"]["uid"] for model in run.world.accepted}
    for model in run.world.models:
        if model["metadata"]["uid"] in accepted:
            continue
        row = run.world.conditions(model)["Accepted"]
        reasons[row["reason"]] += 1
        owned = run.world.owned.get(model["metadata"]["uid"], set())
        is_told = row["reason"] in allowed and row["message"].strip() and row["status"] == "False"
        if not is_told or (owned and row["reason"] != Reason.OBJECT_REFUSED):
            wrong.append(number_of(tries, model).shown(row, owned))
    print(f"{len(accepted)} models are accepted; of the others: {dict(reasons)}")
    assert not wrong, some(wrong)
    assert len(accepted) > len(run.world.models) / 4, "most were refused: the generator tries little"
    assert set(reasons) >= {"InvalidSpec", "NameClash", "ObjectRefused"}


def has_pods(model: Object) -> bool:
    """Whether it need not wait for the Secret of a binding."""
    return bool(World.conditions(model).get("BindingsReady", {}).get("reason") != "SecretMissing")


def wanted(model: Object) -> set[tuple[str, str]]:
    """Kind and name of what an accepted model becomes, told again and not computed by the operator's code."""
    name, spec = model["metadata"]["name"], model["spec"]
    found = {("Service", name), ("Service", f"{name}-headless"), ("ConfigMap", f"{name}-model"),
             ("NetworkPolicy", name)}  # fmt: skip
    if has_pods(model):
        found.add(("Deployment", name))
    if "serviceAccountName" not in spec["pod"]:
        found.add(("ServiceAccount", name))
    scaling = spec.get("autoscaling")
    if (scaling["maxReplicas"] if scaling else spec["replicas"]) > 1:
        found.add(("PodDisruptionBudget", name))
    if scaling:
        found.add(("HorizontalPodAutoscaler", name))
    if "host" in spec["networking"]:
        found.add(("Ingress", name))
    accelerator = spec["runtime"].get("accelerator", {})
    if "deviceClassName" in accelerator or accelerator.get("profile") == "dra":
        found.add(("ResourceClaimTemplate", f"{name}-accelerator"))
    return found


def test_accepted_model_owns_all_it_should(run: Run, tries: list[Try]) -> None:
    wrong = []
    for model in run.world.accepted:
        owned = run.world.owned.get(model["metadata"]["uid"], set())
        if owned != wanted(model):
            wrong.append(number_of(tries, model).shown(f"owns {owned}", f"should own {wanted(model)}"))
    assert not wrong, some(wrong)


def test_pods_get_what_was_asked_word_for_word(run: Run, tries: list[Try]) -> None:
    wrong = []
    for model in filter(has_pods, run.world.accepted):
        namespace, name, spec = model["metadata"]["namespace"], model["metadata"]["name"], model["spec"]
        template = run.world.children["Deployment", namespace, name]["spec"]["template"]
        (container,) = template["spec"]["containers"]
        given = {row["name"]: row.get("value", "") for row in container["env"]}
        lost = {
            "env": {row["name"]: row["value"] for row in spec["pod"]["env"]
                    if "value" in row and given[row["name"]] != row["value"]},
            "annotations": spec["pod"]["annotations"].items() - template["metadata"].get("annotations", {}).items(),
            "labels": spec["pod"]["labels"].items() - template["metadata"]["labels"].items(),
        }  # fmt: skip
        (text,) = run.world.children["ConfigMap", namespace, f"{name}-model"]["data"].values()
        (served,) = parse_manifests(text, file="model.yaml", strict=True)
        asked = PhoenixModel.read({"metadata": {"name": name, "namespace": namespace}, "spec": spec}, strict=True)
        differing = [
            part for part in ("batching", "warmup", "limits")
            if getattr(served.model.spec, part) != getattr(asked.spec, part)
        ]  # fmt: skip
        ours, theirs = asked.spec.runtime.accelerator, served.model.spec.runtime.accelerator
        if served.model.spec.model.uri != asked.spec.model.uri:
            differing.append("uri")
        if (ours and ours.provider_options) != (theirs and theirs.provider_options):
            differing.append("providerOptions")
        if any(lost.values()) or differing:
            wrong.append(number_of(tries, model).shown(lost, differing))
    assert not wrong, some(wrong)


def test_rights_of_the_install_manifests_are_enough(run: Run, server: ApiServer) -> None:
    forbidden = Counter(
        f"{event['verb']} {event['objectRef']['resource']}"
        for event in audited(server.audit_log)
        if event["responseStatus"]["code"] == 403
    )
    assert not forbidden


# --- at rest ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rest:
    """An operator that was started anew, with nothing to do: its writes in its first round, and in those after."""

    first: list[Object]
    later: list[Object]
    requests: Counter[tuple[str, str]]  # in the later rounds, by verb and code, as it counts them itself


@pytest.fixture(scope="module")
def rest(server: ApiServer, run: Run, kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Rest:
    """Every key is touched again and again, by a resync of ten seconds."""
    assert run.operator.stop() == 0, run.operator.tail()
    assert run.operator.complaints() == []
    models, offsets = len(run.world.models), [server.audit_log.stat().st_size]
    operator = OperatorProcess(tmp_path_factory.mktemp("second"), kubeconfig, SETTINGS | {"resyncSeconds": _RESYNC_S})

    def rounds(count: int, *, seconds: float) -> Metrics:
        end = time.monotonic() + seconds
        return operator.wait_until(
            f"{count} rounds over all models",
            lambda now: (
                now.value("phoenix_operator_reconcile_seconds_count") >= count * models
                and now.value("phoenix_operator_queue_oldest_seconds") < 2
                and time.monotonic() > end
            ),
            deadline_s=400,
        )

    try:
        before = rounds(1, seconds=0)
        offsets.append(server.audit_log.stat().st_size)
        # some models are looked at more often, so that the count alone does not tell of rounds
        after = rounds(_ROUNDS, seconds=(_ROUNDS - 1) * (_RESYNC_S + 1))
        assert after.value("phoenix_operator_failing_models") == 0
    finally:
        code = operator.stop()
    assert code == 0, operator.tail()
    assert operator.complaints() == []
    events = audited(server.audit_log, offsets[1])
    assert len(events) > len(writes(events)), "the audit log knows the operator"
    later = writes(events)
    first = writes(audited(server.audit_log, offsets[0]))
    return Rest(first[: len(first) - len(later)], later, after.requests() - before.requests())


def effective(events: list[Object]) -> list[str]:
    return [
        f"{event['verb']} {event['objectRef']['resource']} {event['objectRef'].get('subresource', '')} "
        f"{event['objectRef'].get('namespace')}/{event['objectRef'].get('name')}"
        for event in events
        if event["responseStatus"]["code"] < 400
    ]


def test_operator_that_starts_anew_writes_nothing(rest: Rest, run: Run, server: ApiServer, tries: list[Try]) -> None:
    """But what it cannot know: which of several unknown fields the API server had named by chance."""
    before = {model["metadata"]["uid"]: model.get("status") for model in run.world.models}
    differing = {
        f"{model['metadata']['namespace']}/{model['metadata']['name']}": model
        for model in server.run(look).models
        if model["status"] != before[model["metadata"]["uid"]]
    }
    unfit = {
        name for name, model in differing.items()
        if "failed to create typed patch object" in World.conditions(model)["Accepted"]["message"]
    }  # fmt: skip
    wrong = [
        number_of(tries, model).shown(f"before: {before[model['metadata']['uid']]}", f"now: {model['status']}")
        for name, model in differing.items() if name not in unfit
    ]  # fmt: skip
    assert not wrong, some(wrong)
    told = [event for event in effective(rest.first) if not event.rpartition(" ")[2].startswith(tuple(unfit))]
    assert not told, some(told)


def test_operator_at_rest_writes_nothing(rest: Rest) -> None:
    """By the API server's audit log, and by its own metrics. Refused objects are tried again, to no effect."""
    in_vain = Counter(f"{event['verb']} {event['objectRef']['resource']}" for event in rest.later)
    print(f"at rest, in {_ROUNDS - 1} rounds: requests {dict(rest.requests)}; tried in vain: {dict(in_vain)}")
    assert not effective(rest.later), some(effective(rest.later))
    own = {verb: count for (verb, code), count in rest.requests.items() if verb in _WRITES and "200" <= code < "300"}
    assert not own
