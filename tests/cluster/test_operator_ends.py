"""The operator ends, in every way: the next one takes over, nothing is lost, and nobody is kept waiting."""

import json
import random
import time
from typing import Any

import cluster as tools
import pytest
from phoenix_cluster import OPERATOR, Object, Phoenix, model

from phoenix_operator.desired import desired_objects
from phoenix_operator.difference import is_as_wanted
from phoenix_operator.kinds import CHILDREN, OPTIONAL, kind_of
from phoenix_operator.observed import Observed, Subject
from phoenix_operator.settings import Settings

KILLS, MODELS = 20, 50
WRITES = ("create", "update", "patch", "delete")


def leading_pod(phoenix: Phoenix) -> Object:
    """Return the pod that holds the lease, once there is one and it runs."""

    def found() -> Object | None:
        pods = {pod["metadata"]["name"]: pod for pod in phoenix.operator_pods()}
        return pods.get(phoenix.leader())

    pod: Object = phoenix.wait_for("a leader", found)
    return pod


def test_standby_takes_over_when_the_leader_is_deleted(phoenix: Phoenix, namespace: str) -> None:
    phoenix.wait_for("two operators", lambda: len(phoenix.operator_pods()) == 2)
    leader = leading_pod(phoenix)["metadata"]["name"]
    started = time.monotonic()
    phoenix.delete(tools.OPERATOR_NAMESPACE, f"pod/{leader}", "--wait=false")
    phoenix.wait_for("another leader", lambda: phoenix.leader() not in ("", leader), deadline_s=15)
    print(f"the standby led {time.monotonic() - started:.1f} s after the leader was told to end")
    phoenix.apply(namespace, model(replicas=0))
    phoenix.wait_condition(namespace, "iris", "Available", "False", "ScaledToZero")
    phoenix.kubectl("rollout", "status", "deployment/phoenix-operator", "-n", tools.OPERATOR_NAMESPACE, "--timeout=60s")


def test_model_is_deleted_while_the_operator_is_stopped(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
    with phoenix.operator_stopped():
        phoenix.delete(namespace, "phx/iris", "--timeout=30s")
        phoenix.wait_for("no children", lambda: not children(phoenix, namespace), deadline_s=60)
        # what happens meanwhile is found at the next start
        phoenix.apply(namespace, model("other", replicas=0))
    phoenix.wait_condition(namespace, "other", "Available", "False", "ScaledToZero")


def test_operator_killed_in_the_middle_of_a_rollout_ends_it(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(replicas=2))
    phoenix.wait_ready(namespace)
    phoenix.apply(namespace, model(replicas=2, batching={"maxRows": 8}))
    end_at_once(phoenix, leading_pod(phoenix))
    phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut", deadline_s=120)
    phoenix.wait_ready(namespace)


def test_second_reconcile_writes_nothing(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(replicas=2))
    phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut", deadline_s=90)
    phoenix.wait_ready(namespace)
    log = tools.lab("audit-log")
    settled = phoenix.wait_for("no more writes", lambda: Quiet(log, namespace).holds(), deadline_s=60)
    before = reconciles(phoenix)
    for number in range(5):
        # a change that is nobody's business wakes the operator
        phoenix.kubectl("annotate", "phx/iris", "-n", namespace, f"example.com/touched={number}", "--overwrite")
    phoenix.wait_for("more reconciles", lambda: reconciles(phoenix) >= before + 3)
    writes = writes_of(log, namespace)
    print(f"writes while settling: {settled}; afterwards: {len(writes) - settled}")
    assert len(writes) == settled, writes[settled:]


@pytest.mark.timeout(900)
def test_churn_of_50_models_with_20_kills_ends_as_desired(phoenix: Phoenix, namespace: str) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    churn = Churn(phoenix, namespace, random.Random(seed))
    for _ in range(MODELS):
        churn.create()
    for number in range(KILLS):
        for _ in range(8):
            churn.change()
        pod = leading_pod(phoenix)
        end_at_once(phoenix, pod)
        print(f"kill {number + 1}: {pod['metadata']['name']}")
    phoenix.wait_for("two operators", lambda: len(phoenix.operator_pods()) == 2, deadline_s=60)
    for name in churn.models:
        phoenix.wait_condition(namespace, name, "Accepted", "True", deadline_s=120)
    for name, spec in churn.models.items():
        if spec["spec"]["replicas"]:
            phoenix.wait_ready(namespace, name, deadline_s=120)
    # afterwards: while pods of an earlier revision end, their manifest is kept
    phoenix.wait_for_no("difference from what is desired", churn.faults, deadline_s=120)


def end_at_once(phoenix: Phoenix, pod: Object) -> None:
    """SIGKILL; and the pod is taken away, so that the kubelet's growing pause between restarts is not waited for."""
    phoenix.kill(pod)
    name = pod["metadata"]["name"]
    phoenix.delete(tools.OPERATOR_NAMESPACE, f"pod/{name}", "--force", "--grace-period=0", "--ignore-not-found")


def children(phoenix: Phoenix, namespace: str) -> list[Object]:
    """Return every object in the namespace that the operator made, pods left out."""
    kinds = ",".join(f"{kind.plural}.{kind.group}" if kind.group else kind.plural for kind in _SERVED)
    return phoenix.all(namespace, kinds, "-l", "app.kubernetes.io/managed-by=phoenix-operator")


_SERVED = tuple(kind for kind in CHILDREN if kind not in OPTIONAL or kind.group == "resource.k8s.io")


class Quiet:
    """Whether the operator has stopped writing in a namespace: two looks at the audit log with reconciles between."""

    def __init__(self, log: str, namespace: str) -> None:
        self._log, self._namespace = log, namespace

    def holds(self) -> int:
        """Return the number of writes if it did not grow for two seconds, else 0."""
        first = len(writes_of(self._log, self._namespace))
        end = time.monotonic() + 2
        while time.monotonic() < end:
            if len(writes_of(self._log, self._namespace)) != first:
                return 0
        return first


def writes_of(log: str, namespace: str) -> list[str]:
    """Return the operator's writes in a namespace, from the API server's audit log."""
    found = []
    with open(log) as lines:
        for line in lines:
            if namespace not in line:
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that is being written
            what = entry.get("objectRef", {})
            is_ours = entry["user"]["username"] == OPERATOR and what.get("namespace") == namespace
            if is_ours and entry["verb"] in WRITES and entry["stage"] == "ResponseComplete":
                found.append(f"{entry['verb']} {what.get('resource')}/{what.get('subresource', '')} {what.get('name')}")
    return found


def reconciles(phoenix: Phoenix) -> float:
    """Return how many reconciles the leader has made."""
    lines = phoenix.operator_metrics().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("phoenix_operator_reconcile_seconds_count"))


class Churn:
    """Random wishes about many models, and what should be there in the end."""

    def __init__(self, phoenix: Phoenix, namespace: str, dice: random.Random) -> None:
        self._phoenix, self._namespace, self._dice = phoenix, namespace, dice
        self._count = 0
        self.models: dict[str, Object] = {}

    def create(self) -> None:
        self._count += 1
        name = f"m{self._count}"
        # a few with pods: fifty servers at once would need more than a small machine has
        self._wish(name, replicas=1 if self._count % 10 == 0 else 0)

    def change(self) -> None:
        kind = self._dice.choice(["edit", "edit", "scale", "replace", "vandalize", "vandalize"])
        name = self._dice.choice(list(self.models))
        if kind == "edit":
            self._wish(name, batching={"maxRows": self._dice.randint(2, 64)})
        elif kind == "scale":
            self._wish(name, rollout={"drainSeconds": self._dice.randint(1, 3)})
        elif kind == "replace":
            self._phoenix.delete(self._namespace, f"phx/{name}", "--wait=false")
            del self.models[name]
            self.create()
        else:
            self._vandalize(name)

    def _vandalize(self, name: str) -> None:
        victims = (f"service/{name}", f"configmap/{name}-model", f"networkpolicy/{name}", f"deployment/{name}")
        self._phoenix.delete(self._namespace, self._dice.choice(victims), "--ignore-not-found", "--wait=false")

    def _wish(self, name: str, **spec: Any) -> None:
        before = self.models.get(name, model(name, resources=_SMALL))["spec"]
        self.models[name] = model(name, **(before | spec))
        self._phoenix.apply(self._namespace, self.models[name])

    def faults(self) -> list[str]:
        """Return what differs from what should be there."""
        live = {(kind_of(body), body["metadata"]["name"]): body for body in children(self._phoenix, self._namespace)}
        stored = {body["metadata"]["name"]: body for body in self._phoenix.all(self._namespace, "phoenixmodels")}
        found = [f"model {name} is there or is not" for name in stored.keys() ^ self.models.keys()]
        settings = Settings.model_validate(_settings(self._phoenix), by_alias=True, by_name=False)
        for name in stored.keys() & self.models.keys():
            subject = Subject.read(stored[name])
            around = {place: body for place, body in live.items() if _owner(body) == subject.uid}
            wanted = desired_objects(
                subject, Observed(children=around), settings, operator_namespace=tools.OPERATOR_NAMESPACE
            )
            for manifest in wanted:
                place = kind_of(manifest), manifest["metadata"]["name"]
                body = live.pop(place, None)
                if body is None or not is_as_wanted(manifest, body):
                    found.append(f"{place[0]} {place[1]} of {name} is not as desired")
        return found + [f"{kind} {name} should not be there" for kind, name in live]


_SMALL = {"requests": {"cpu": "10m", "memory": "160Mi"}}


def _settings(phoenix: Phoenix) -> Object:
    import yaml

    found = phoenix.get(tools.OPERATOR_NAMESPACE, "configmap/phoenix-operator-settings")
    assert found is not None
    settings: Object = yaml.safe_load(found["data"]["settings.yaml"])
    return settings


def _owner(body: Object) -> str:
    return next((row["uid"] for row in body["metadata"].get("ownerReferences", [])), "")
