"""What bindings put into objects: Secrets, hashes, ports, and what holds where a Secret has gone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from objects import by_place, rendered, subject

from phoenix_operator.desired import bindings
from phoenix_operator.desired.deployment import template_hash
from phoenix_operator.kinds import DEPLOYMENT, NETWORK_POLICY
from phoenix_operator.observed import BINDINGS, BindingSeen, Object, Observed
from phoenix_operator.settings import Settings

OWN: Object = {"bindings": {"redis": {"secretRef": {"name": "mine"}}}}


@pytest.mark.parametrize(
    ("kind", "values", "ports"),
    [
        ("redis", {}, (6379,)),
        ("redis", {"host": "h", "port": "6380"}, (6380,)),
        ("redis", {"uri": "rediss://u:p%40x@h:6381/0", "port": "1"}, (6381,)),
        ("redis", {"uri": "redis://h"}, (6379,)),
        ("redis", {"uri": "redis://[::1]:7000/0"}, (7000,)),
        ("redis", {"uri": "redis://h:no"}, (6379,)),
        ("postgresql", {"uri": "postgresql://u:p@h/db"}, (5432,)),
        ("kafka", {"bootstrap-servers": "a:9092, b:9093,c"}, (9092, 9093)),
        ("kafka", {"bootstrap-servers": "[::1]:19092"}, (19092,)),
    ],
)
def test_ports_are_those_of_the_address(kind: str, values: dict[str, str], ports: tuple[int, ...]) -> None:
    assert bindings.ports_of(kind, values) == ports


@given(st.text(max_size=40), st.text(max_size=10), st.text(max_size=40))
def test_any_content_of_a_secret_has_a_port(uri: str, port: str, servers: str) -> None:
    values = {"uri": uri, "port": port, "bootstrap-servers": servers}
    for kind in bindings.KINDS:
        for found in bindings.ports_of(kind, values):
            assert 0 <= found <= 65535


def secret(uid: str, **data: str) -> Object:
    return {"metadata": {"uid": uid, "labels": {"x": "y"}}, "data": data}


def test_hash_is_of_the_content_and_tells_nothing_without_the_uid() -> None:
    first = bindings.content_hash(secret("1", password="cGFzcw=="))
    relabelled = secret("1", password="cGFzcw==")
    relabelled["metadata"]["labels"] = {}
    assert bindings.content_hash(relabelled) == first
    assert bindings.content_hash(secret("1", password="b3RoZXI=")) != first
    assert bindings.content_hash(secret("2", password="cGFzcw==")) != first


@given(st.dictionaries(st.sampled_from(bindings.KINDS), st.lists(st.integers(1, 65535), min_size=1, max_size=3)))
def test_annotation_reads_back_what_was_written(rows: dict[str, list[int]]) -> None:
    text = bindings.as_text({kind: tuple(values) for kind, values in rows.items()})
    assert bindings.read(text) == {kind: tuple(map(str, values)) for kind, values in rows.items()}


@given(st.text(max_size=60))
def test_annotation_that_somebody_else_wrote_is_no_error(text: str) -> None:
    model = subject(**OWN)
    live = by_place(rendered(model))
    live[DEPLOYMENT, "fraud"]["spec"]["template"]["metadata"]["annotations"][BINDINGS] = text
    live[NETWORK_POLICY, "fraud"]["metadata"]["annotations"]["phoenix-ml.io/binding-ports"] = text
    template_hash(model, Observed(children=live), Settings())
    bindings.ports(model, Observed(children=live))


def test_deployment_waits_for_secrets_and_a_live_one_says_what_its_pods_were_given() -> None:
    model = subject(**OWN)
    assert bindings.is_held(model, Observed())
    live = by_place(rendered(model))
    assert not bindings.is_held(model, Observed(children=live))
    again = by_place(rendered(model, Observed(children=live)))
    assert again[DEPLOYMENT, "fraud"] == live[DEPLOYMENT, "fraud"]
    assert again[NETWORK_POLICY, "fraud"] == live[NETWORK_POLICY, "fraud"]
    renamed = subject(bindings={"redis": {"secretRef": {"name": "another"}}})
    assert bindings.is_held(renamed, Observed(children=live)), "another Secret is not known to be there"
    there = BindingSeen("redis", digest="d", ports=(6379,))
    assert not bindings.is_held(renamed, Observed(children=live, bindings={"redis": there}))


def test_deletion_policy_and_sizes_of_topics_restart_no_pods() -> None:
    def hashed(**more: Any) -> str:
        kafka = {"secretRef": {"name": "mine"}} | more.pop("kafka", {})
        return template_hash(subject(bindings={"kafka": kafka} | more), Observed(), Settings())

    assert hashed() == hashed(deletionPolicy="Delete") == hashed(kafka={"partitions": 12, "retentionHours": 1})
    assert hashed() != hashed(kafka={"events": {"samplePercent": 1}})


def test_topics_are_those_of_the_spec_and_have_usual_names() -> None:
    model = subject(bindings={"kafka": {"backend": "default", "requests": {"results": "phoenix.ml.fraud.answers"}}})
    assert list(bindings.topics(model).values()) == [
        "phoenix.ml.fraud.predictions", "phoenix.ml.fraud.requests", "phoenix.ml.fraud.answers",
        "phoenix.ml.fraud.dead-letters",
    ]  # fmt: skip
    assert bindings.topics(subject()) == {}
