"""What restarts pods and what does not: the hash of the pod template follows what the pods serve, and nothing else."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_scenarios import COMPLETE_CPU, SCENARIOS
from objects import SETTINGS, by_place, deployment, document, ended, loaded, ready, rendered, seen, subject, unplaced

from phoenix_api import parse_manifests
from phoenix_operator.desired import config
from phoenix_operator.desired.deployment import PATIENCE_S, is_withheld, pod_template, template_hash
from phoenix_operator.kinds import CONFIG_MAP, DEPLOYMENT
from phoenix_operator.observed import REVISION, TEMPLATE, Object, Observed, Subject
from phoenix_operator.render import as_yaml
from phoenix_operator.settings import Settings


def hash_of(model: Subject, settings: Settings = SETTINGS) -> str:
    return template_hash(model, Observed(), settings)


def changed(spec: Object, path: str, value: Any) -> Object:
    """Return a copy of the spec with one field set."""
    copy: Object = json.loads(json.dumps(spec))
    *parents, name = path.split(".")
    node = copy
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value
    return copy


@pytest.mark.parametrize("name", SCENARIOS)
def test_rendering_twice_gives_the_same_objects(name: str) -> None:
    assert SCENARIOS[name].objects() == SCENARIOS[name].objects()


@pytest.mark.parametrize("name", SCENARIOS)
def test_template_has_nothing_volatile(name: str) -> None:
    scenario = SCENARIOS[name]
    settings = scenario.read_settings()
    later = {"uid": "another", "generation": 77, "created": "2030-01-01T00:00:00Z", "status": {"readyReplicas": 3}}
    templates = [
        pod_template(model, scenario.seen(model, settings), settings)
        for model in (scenario.subject(), scenario.subject(**later))
    ]
    assert templates[0] == templates[1]
    text = json.dumps(templates[1])
    assert "another" not in text
    assert "2030" not in text


def test_what_happens_to_pods_does_not_change_their_template() -> None:
    model = subject(**COMPLETE_CPU)
    calm = hash_of(model)
    pods = [ready(model, "a"), ended(model, "b"), ready(model, "c", template="old")]
    live = deployment(model, is_rolled_out=True)
    busy = seen(model, pods, deployment=live, loaded={"uid-a": loaded()}, shortfall="x", host_owner="y")
    assert template_hash(model, busy, SETTINGS) == calm


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("replicas", 7), ("replicas", 0),
        ("networking.host", "models.example.com"), ("networking.allowFrom", [{"podSelector": {}}]),
        ("rollout.strategy", "InPlace"),
    ],
)  # fmt: skip
def test_change_that_pods_need_not_know_leaves_them_alone(path: str, value: Any) -> None:
    before, after = subject(**COMPLETE_CPU), subject(**changed(COMPLETE_CPU, path, value))
    assert hash_of(before) == hash_of(after)
    assert config.revision(before) == config.revision(after)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.uri", "s3://models/fraud/4/model.onnx"), ("model.sha256", "f" * 64), ("model.version", "4"),
        ("batching.maxRows", 65), ("batching.maxDelayMilliseconds", 3), ("warmup.iterations", 6), ("warmup.rows", 9),
        ("limits.maxRequestBytes", "17Mi"), ("limits.timeoutSeconds", 11), ("runtime.threads", 5),
        ("runtime.instances", 3), ("runtime.accelerator", {}), ("runtime.accelerator", {"policy": "Prefer"}),
        ("networking.rateLimit", {"requestsPerSecond": 5}),
        ("networking.rateLimit", {"requestsPerSecond": 5, "per": "Model"}),
    ],
)  # fmt: skip
def test_change_of_what_is_served_makes_a_new_revision_and_new_pods(path: str, value: Any) -> None:
    before, after = subject(**COMPLETE_CPU), subject(**changed(COMPLETE_CPU, path, value))
    assert config.revision(before) != config.revision(after)
    assert hash_of(before) != hash_of(after)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("runtime.image", "example.com/phoenix-server:2.0"), ("resources.requests.memory", "2Gi"),
        ("resources.limits.memory", "3Gi"), ("model.cache", {"persistentVolumeClaim": "c"}),
        ("rollout.drainSeconds", 6), ("rollout.progressDeadlineSeconds", 601), ("pod.labels", {"a": "b"}),
        ("pod.annotations", {"a": "b"}), ("pod.env", []), ("pod.nodeSelector", {}), ("pod.serviceAccountName", "x"),
        ("pod.priorityClassName", "low"), ("pod.runtimeClassName", "kata"),
    ],
)  # fmt: skip
def test_change_of_the_pod_alone_makes_new_pods_of_the_same_revision(path: str, value: Any) -> None:
    before, after = subject(**COMPLETE_CPU), subject(**changed(COMPLETE_CPU, path, value))
    assert config.revision(before) == config.revision(after)
    assert hash_of(before) != hash_of(after)


def test_setting_of_the_operator_changes_only_the_pods_that_it_concerns() -> None:
    other = Settings(server_image="phoenix/server:2", server_gpu_image="phoenix/server:2-gpu")
    assert hash_of(subject()) != hash_of(subject(), other)
    assert hash_of(subject(**COMPLETE_CPU)) == hash_of(subject(**COMPLETE_CPU), other), "it names its own image"
    gpu = subject(runtime={"accelerator": {}})
    only_cpu = Settings(server_image="phoenix/server:2")
    assert hash_of(gpu) == hash_of(gpu, only_cpu)


def test_field_set_to_its_default_changes_nothing() -> None:
    explicit = subject(
        batching={"maxRows": 32}, limits={"maxRequestBytes": "64Mi"}, replicas=1, rollout={"strategy": "Auto"}, pod={}
    )
    assert rendered(explicit) == rendered(subject())


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.permutations(list(COMPLETE_CPU)), st.integers(1, 10**6))
def test_order_of_fields_and_generation_change_nothing(order: list[str], generation: int) -> None:
    shuffled = {name: COMPLETE_CPU[name] for name in order}
    assert hash_of(subject(generation=generation, **shuffled)) == hash_of(subject(**COMPLETE_CPU))


def test_unknown_field_of_a_newer_api_changes_nothing() -> None:
    newer = document(fromTheFuture={"a": 1})
    newer["spec"]["model"]["alsoNew"] = True
    assert hash_of(Subject.read(newer)) == hash_of(subject())


# --- the manifests that pods of several versions serve ---------------------------------------------------------------


def keys(model: Subject, observed: Observed) -> list[str]:
    data: Object = config.config_map(model, observed)["data"]
    return list(data)


def test_manifest_of_the_old_version_stays_until_its_pods_are_gone() -> None:
    old, new = subject(model={"uri": "a", "version": "1"}), subject(model={"uri": "b", "version": "2"})
    both = [config.key_of(config.revision(model)) for model in (old, new)]
    children = by_place(rendered(old))
    children[DEPLOYMENT, "fraud"] = deployment(new)
    assert keys(new, Observed(children=children)) == both
    children[DEPLOYMENT, "fraud"] = deployment(new, is_rolled_out=True)
    assert keys(new, Observed(children=children)) == both[1:]
    last = ready(old)
    last.body["metadata"]["annotations"][REVISION] = config.revision(old)
    assert keys(new, Observed(children=children, pods=[last])) == both, "a pod of it is still there"


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=10), st.text(max_size=200), max_size=3))
@example({"\x85": "\x85", "a": "b\x85\n\u2028", "\ufeff": "\U0001f600"})
def test_text_reaches_the_server_and_whoever_renders_as_it_was_written(options: dict[str, str]) -> None:
    model = subject(runtime={"accelerator": {"providerOptions": options}})
    (manifest,) = parse_manifests(next(iter(config.config_map(model, Observed())["data"].values())), file="model.yaml")
    accelerator = manifest.model.spec.runtime.accelerator
    assert accelerator is not None
    assert accelerator.provider_options == options
    objects = rendered(subject(pod={"annotations": options}))
    assert list(yaml.safe_load_all(as_yaml(objects))) == objects


def test_manifests_of_a_rollout_that_never_ends_are_bounded() -> None:
    data = {f"{number:016x}.yaml": "" for number in range(40)}
    model = subject()
    children = {(CONFIG_MAP, "fraud-model"): {"data": data}, (DEPLOYMENT, "fraud"): deployment(model)}
    kept = keys(model, Observed(children=children))
    assert len(kept) == 8
    assert kept[-1] == config.key_of(config.revision(model))
    assert kept[:-1] == list(data)[-7:]


def test_deployment_that_was_not_looked_at_since_is_not_rolled_out() -> None:
    model = subject()
    live = deployment(model, is_rolled_out=True)
    assert config.is_rolled_out(seen(model, deployment=live))
    live["metadata"]["generation"] = 2
    assert not config.is_rolled_out(seen(model, deployment=live))
    assert not config.is_rolled_out(seen(model))


# --- without the accelerator that is only preferred ------------------------------------------------------------------

PREFERS = {"runtime": {"accelerator": {"policy": "Prefer"}}}
NO_GPU = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


def unplaced_of(model: Subject, words: str = NO_GPU, name: str = "fraud-1", template: str | None = None) -> Any:
    return unplaced(model, words, name, template=template or hash_of(model))


def withheld(model: Subject, *pods: Any, live: Object | None = None) -> bool:
    live = live if live is not None else deployment(model)
    return is_withheld(model, seen(model, pods, deployment=live), SETTINGS)


def test_device_is_withheld_once_the_scheduler_says_that_none_is_left() -> None:
    model = subject(**PREFERS)
    assert withheld(model, unplaced_of(model))


def test_device_is_waited_for_a_moment() -> None:
    model = subject(**PREFERS)
    assert not withheld(model, unplaced(model, NO_GPU, for_s=PATIENCE_S - 1, template=hash_of(model)))
    assert withheld(model, unplaced(model, NO_GPU, for_s=PATIENCE_S, template=hash_of(model)))


def test_device_is_never_withheld_from_a_model_that_requires_it() -> None:
    model = subject(runtime={"accelerator": {}})
    assert not withheld(model, unplaced_of(model))


@pytest.mark.parametrize("words", ["0/1 nodes are available: 1 Insufficient cpu.", "1 node(s) had untolerated taint"])
def test_other_shortfall_is_no_reason_to_go_without(words: str) -> None:
    model = subject(**PREFERS)
    assert not withheld(model, unplaced_of(model, words))


def test_device_that_an_old_pod_is_about_to_give_back_is_waited_for() -> None:
    model = subject(**PREFERS)
    old = ready(model, "old", template="before")
    old.body["spec"] = {"containers": [{"name": "server", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]}
    assert not withheld(model, unplaced_of(model), old)


def test_old_pod_without_a_device_is_not_waited_for() -> None:
    model = subject(**PREFERS)
    old = ready(model, "old", template="before")
    old.body["spec"] = {"containers": [{"name": "server", "resources": {"limits": {"memory": "1Gi"}}}]}
    assert withheld(model, unplaced_of(model), old)


def test_device_that_a_sister_has_keeps_the_model_on_it() -> None:
    model = subject(**PREFERS, replicas=2)
    assert not withheld(model, unplaced_of(model), ready(model, "sister", template=hash_of(model)))


def test_device_class_is_withheld_by_the_schedulers_words_about_claims() -> None:
    model = subject(runtime={"accelerator": {"policy": "Prefer", "deviceClassName": "gpu.nvidia.com"}})
    assert withheld(model, unplaced_of(model, "0/1 nodes are available: 1 cannot allocate all claims."))


def test_decision_stands_until_the_spec_changes() -> None:
    model = subject(**PREFERS)
    first = seen(model, [unplaced_of(model)], deployment=deployment(model))
    applied = by_place(rendered(model, first))[DEPLOYMENT, "fraud"]
    without = applied["spec"]["template"]["metadata"]["annotations"][TEMPLATE]
    assert without != hash_of(model)
    assert withheld(model, ready(model, template=without), live=applied)
    assert withheld(model, live=applied)
    again = subject(**PREFERS, batching={"maxRows": 16}, generation=2)
    assert not withheld(again, ready(model, template=without), live=applied)


def test_deployment_of_another_revision_decides_nothing() -> None:
    model = subject(**PREFERS)
    other = subject(**PREFERS, model={"uri": "other.onnx"})
    assert not withheld(model, unplaced_of(other), live=deployment(other))
    assert not is_withheld(model, seen(model, [unplaced_of(model)]), SETTINGS)
