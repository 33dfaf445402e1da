"""The store: what the watches told, by model."""

from typing import Any

from phoenix_operator.kinds import DEPLOYMENT, PHOENIX_MODEL, POD, SERVICE, Kind
from phoenix_operator.observed import Object
from phoenix_operator.store import Store

KEY = ("ml", "fraud")


def body(
    name: str = "fraud", *, version: int = 1, uid: str = "u", model: str | None = "fraud", **others: Any
) -> Object:
    labels = {"phoenix-ml.io/model": model} if model else {}
    metadata = {"name": name, "namespace": "ml", "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"metadata": metadata, **others}


def names(store: Store, *kinds: Kind, key: tuple[str, str] = KEY) -> list[str]:
    return [found["metadata"]["name"] for _, found in store.of_model(key, kinds)]


def test_model_and_its_objects_are_found_by_its_key() -> None:
    store = Store()
    assert store.put(PHOENIX_MODEL, body(model=None)) == {KEY}
    assert store.put(DEPLOYMENT, body()) == {KEY}
    assert store.put(SERVICE, body()) == {KEY}
    assert store.put(SERVICE, body("fraud-headless")) == {KEY}
    assert store.put(POD, body("fraud-1")) == {KEY}
    assert store.models() == [KEY]
    assert names(store, DEPLOYMENT, SERVICE) == ["fraud", "fraud", "fraud-headless"]
    assert names(store, POD) == ["fraud-1"]
    assert names(store, POD, key=("other", "fraud")) == []


def test_object_without_a_models_label_concerns_nobody() -> None:
    store = Store()
    assert store.put(DEPLOYMENT, body(model=None)) == set()
    assert store.put(DEPLOYMENT, {"metadata": {"name": "x", "namespace": "ml", "uid": "u"}}) == set()
    assert store.versions(DEPLOYMENT) == {}


def test_stale_event_is_ignored() -> None:
    store = Store()
    store.put(DEPLOYMENT, body(version=5, spec={"replicas": 5}))
    assert store.put(DEPLOYMENT, body(version=4, spec={"replicas": 4})) == set()
    assert store.put(DEPLOYMENT, body(version=5, spec={"replicas": 4})) == set()
    ((_, kept),) = store.of_model(KEY, [DEPLOYMENT])
    assert kept["spec"]["replicas"] == 5


def test_late_event_of_a_predecessor_does_not_replace_its_successor() -> None:
    store = Store()
    store.put(DEPLOYMENT, body(version=9, uid="new"))
    assert store.put(DEPLOYMENT, body(version=7, uid="old")) == set()
    assert store.discard(DEPLOYMENT, body(version=8, uid="old")) == set()
    assert store.versions(DEPLOYMENT) == {KEY: 9}


def test_successor_replaces_an_object_whose_deletion_was_not_seen() -> None:
    store = Store()
    store.put(DEPLOYMENT, body(version=7, uid="old"))
    assert store.put(DEPLOYMENT, body(version=9, uid="new")) == {KEY}
    assert store.versions(DEPLOYMENT) == {KEY: 9}


def test_deletion_of_the_known_object_concerns_its_model() -> None:
    store = Store()
    store.put(DEPLOYMENT, body(version=7))
    assert store.discard(DEPLOYMENT, body(version=8)) == {KEY}
    assert names(store, DEPLOYMENT) == []
    assert store.discard(DEPLOYMENT, body(version=8)) == {KEY}, "a reconcile then finds it gone"


def test_deleted_model_is_no_longer_listed() -> None:
    store = Store()
    store.put(PHOENIX_MODEL, body(model=None))
    assert store.discard(PHOENIX_MODEL, body(version=2, model=None)) == {KEY}
    assert store.model(KEY) is None
    assert store.models() == []


def test_object_that_changes_its_label_concerns_both_models() -> None:
    store = Store()
    store.put(POD, body("fraud-1"))
    assert store.put(POD, body("fraud-1", version=2, model="other")) == {KEY, ("ml", "other")}
    assert names(store, POD) == []
    assert names(store, POD, key=("ml", "other")) == ["fraud-1"]
    assert store.discard(POD, body("fraud-1", version=3, model="other")) == {("ml", "other")}


def test_object_that_loses_its_label_concerns_its_model_once_more() -> None:
    store = Store()
    store.put(DEPLOYMENT, body())
    assert store.put(DEPLOYMENT, body(version=2, model=None)) == {KEY}
    assert names(store, DEPLOYMENT) == []
    assert store.put(DEPLOYMENT, body(version=3, model=None)) == set()


def test_stale_loss_of_a_label_is_ignored() -> None:
    store = Store()
    store.put(DEPLOYMENT, body(version=5))
    assert store.put(DEPLOYMENT, body(version=4, model=None)) == set()
    assert names(store, DEPLOYMENT) == ["fraud"]


def test_whole_list_shows_what_was_missed() -> None:
    store = Store()
    for name, version in (("same", 1), ("changed", 2), ("gone", 3), ("later", 90)):
        store.put(DEPLOYMENT, body(name, version=version, model=name))
    listed = [
        body("same", version=1, model="same"),
        body("changed", version=7, model="changed"),
        body("new", version=8, model="new"),
    ]
    missed = store.replace(DEPLOYMENT, listed, listed_at=10)
    assert missed == {("ml", "changed"), ("ml", "new"), ("ml", "gone")}
    assert {name for _, name in store.versions(DEPLOYMENT)} == {"same", "changed", "new", "later"}
    assert store.replace(DEPLOYMENT, listed, listed_at=10) == set()


def test_members_of_a_list_get_the_kind_that_lists_leave_out() -> None:
    store = Store()
    store.put(DEPLOYMENT, body())
    store.put(PHOENIX_MODEL, body(model=None))
    ((_, found),) = store.of_model(KEY, [DEPLOYMENT])
    assert (found["apiVersion"], found["kind"]) == ("apps/v1", "Deployment")
    model = store.model(KEY)
    assert model is not None
    assert model["kind"] == "PhoenixModel"


def test_managed_fields_are_not_kept_and_callers_get_copies() -> None:
    store = Store()
    original = body(version=3)
    original["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    store.put(DEPLOYMENT, original)
    ((_, found),) = store.of_model(KEY, [DEPLOYMENT])
    assert "managedFields" not in found["metadata"]
    assert "managedFields" in original["metadata"]
    found["metadata"]["labels"].clear()
    ((_, again),) = store.of_model(KEY, [DEPLOYMENT])
    assert again["metadata"]["labels"]
