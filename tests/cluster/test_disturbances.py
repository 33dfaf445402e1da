"""What happens around the operator: namespaces go, the API server ends, refuses or changes, and everything recovers."""

import contextlib
import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import cluster as tools
import pytest
import yaml
from lab import state
from phoenix_cluster import Object, Phoenix, model

STORM_MODELS = 20


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def operator_is_well(phoenix: Phoenix) -> bool:
    """Whether two operators are ready and one of them leads."""
    pods = {pod["metadata"]["name"]: pod for pod in phoenix.operator_pods()}
    ready = [pod for pod in pods.values() if all(row["ready"] for row in pod["status"].get("containerStatuses", []))]
    return len(ready) == 2 and phoenix.leader() in pods


def restarts(phoenix: Phoenix) -> int:
    return sum(row["restartCount"] for pod in phoenix.operator_pods() for row in pod["status"]["containerStatuses"])


def test_deleted_namespace_goes_away_without_a_complaint(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(networking={"host": f"{namespace}.example.com"}), model("bad", replicas=0))
    phoenix.wait_ready(namespace)
    started = now()
    phoenix.kubectl("delete", "namespace", namespace, "--wait=false")
    phoenix.wait_for("no namespace", lambda: not phoenix.kubectl.can("get", "namespace", namespace), deadline_s=90)
    # another model is a sign that the operator has worked off what came before
    phoenix.kubectl("create", "namespace", namespace)
    phoenix.apply(namespace, model("after", replicas=0))
    phoenix.wait_condition(namespace, "after", "Accepted", "True")
    rows = [row for row in phoenix.operator_log(started) if row["level"] not in ("INFO", "DEBUG")]
    assert rows == []


def test_api_server_restarts_during_a_rollout(phoenix: Phoenix, namespace: str) -> None:
    own = state.Lab(os.environ.get("LAB_NAME", "default")).facts()
    if os.environ.get("PHOENIX_TEST_KUBECONFIG") or own is None or own.mode != "full":
        pytest.skip("the API server of this cluster cannot be restarted from here")
    drain = {"drainSeconds": 10}
    phoenix.start_client(namespace)
    phoenix.apply(namespace, model(replicas=2, rollout=drain))
    phoenix.wait_ready(namespace)
    phoenix.infer(namespace)  # kube-proxy knows of the pods now
    service = phoenix.get(namespace, "service/iris")
    assert service is not None
    before = restarts(phoenix)
    asking = (sys.executable, "-c", "PROGRAM", service["spec"]["clusterIP"], "iris", "1")
    with phoenix.load(*asking, least=200) as result:
        phoenix.apply(namespace, model(replicas=2, rollout=drain, batching={"maxRows": 8}))
        phoenix.wait_for("the rollout", lambda: len(phoenix.pods(namespace)) > 2)
        tools.lab("restart-component", "apiserver")
        phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut", deadline_s=120)
        phoenix.wait_ready(namespace)
        phoenix.wait_for("the operators", lambda: operator_is_well(phoenix))
    print(f"requests meanwhile: {result}; restarts of operators: {restarts(phoenix) - before}")
    assert result["failed"] == 0, result["failures"]
    phoenix.apply(namespace, model("after", replicas=0))
    phoenix.wait_condition(namespace, "after", "Accepted", "True")


@contextmanager
def storm(phoenix: Phoenix, name: str) -> Iterator[None]:
    """The API server has next to no room for the operator, and turns it away with 429."""
    api = "flowcontrol.apiserver.k8s.io/v1"
    limited = {
        "nominalConcurrencyShares": 1,
        "lendablePercent": 0,
        "borrowingLimitPercent": 0,
        "limitResponse": {"type": "Reject"},
    }
    level = {"apiVersion": api, "kind": "PriorityLevelConfiguration", "metadata": {"name": name}}
    account = {"namespace": tools.OPERATOR_NAMESPACE, "name": "phoenix-operator"}
    everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}
    rule = {"subjects": [{"kind": "ServiceAccount", "serviceAccount": account}], "resourceRules": [everything]}
    schema = {
        "priorityLevelConfiguration": {"name": name},
        "matchingPrecedence": 50,
        "distinguisherMethod": {"type": "ByUser"},
        "rules": [rule],
    }
    try:
        phoenix.apply("default", level | {"spec": {"type": "Limited", "limited": limited}})
        phoenix.apply("default", level | {"kind": "FlowSchema", "spec": schema})
        yield
    finally:
        phoenix.kubectl("delete", f"flowschema/{name}", f"prioritylevelconfiguration/{name}", "--ignore-not-found")


def turned_away(phoenix: Phoenix, name: str) -> int:
    """Return how many requests the API server has refused at a priority level."""
    lines = phoenix.kubectl("get", "--raw", "/metrics").splitlines()
    wanted = [
        line for line in lines if line.startswith("apiserver_flowcontrol_rejected_requests_total") and name in line
    ]
    return sum(int(float(line.split()[-1])) for line in wanted)


def scaled_to_zero(phoenix: Phoenix, namespace: str) -> int:
    """Return how many models the operator has accepted, and found without pods as asked."""
    found = [body.get("status", {}).get("conditions", []) for body in phoenix.all(namespace, "phoenixmodels")]
    reasons = [{(row["type"], row["reason"]) for row in rows} for rows in found]
    return sum({("Accepted", "SpecUnderstood"), ("Ready", "ScaledToZero")} <= rows for rows in reasons)


def test_api_server_that_turns_the_operator_away(phoenix: Phoenix, namespace: str) -> None:
    before = restarts(phoenix)
    models = [model(f"m{number}", replicas=0) for number in range(STORM_MODELS)]
    with storm(phoenix, namespace):
        phoenix.apply(namespace, *models)
        phoenix.wait_for("every model", lambda: scaled_to_zero(phoenix, namespace) == STORM_MODELS, deadline_s=90)
        refused = turned_away(phoenix, namespace)
        phoenix.wait_for("the operators", lambda: operator_is_well(phoenix))
    print(f"{refused} requests were turned away; restarts of operators: {restarts(phoenix) - before}")
    assert refused > 0, "this was no storm"
    phoenix.patch(namespace, "phx/m0", {"spec": {"replicas": 1}})
    phoenix.wait_ready(namespace, "m0")


@contextmanager
def scribblers(phoenix: Phoenix, *paths: str) -> Iterator[list[int]]:
    """Write an annotation on objects of the API server, again and again; counts the writes."""
    stop, counts, lock = threading.Event(), [0], threading.Lock()
    command = ["kubectl", "proxy", "--port=0"]
    proxy = subprocess.Popen(command, env=phoenix.kubectl.environment, stdout=subprocess.PIPE, text=True)
    assert proxy.stdout is not None
    port = int(proxy.stdout.readline().rpartition(":")[2])

    def scribble(path: str) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            for number in itertools.count():
                body = json.dumps({"metadata": {"annotations": {"example.com/scribble": str(number)}}})
                connection.request("PATCH", path, body, {"Content-Type": "application/merge-patch+json"})
                is_written = connection.getresponse().read() != b""
                with lock:
                    counts[0] += is_written
                if stop.wait(0.1):  # controllers of the cluster have to get a write in between, too
                    return

    threads = [threading.Thread(target=scribble, args=(path,)) for path in paths]
    try:
        for thread in threads:
            thread.start()
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        proxy.terminate()
        proxy.communicate()


def test_objects_that_others_write_all_the_time(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
    leader, before = phoenix.leader(), restarts(phoenix)
    paths = (
        f"/apis/coordination.k8s.io/v1/namespaces/{tools.OPERATOR_NAMESPACE}/leases/phoenix-operator",
        f"/apis/phoenix-ml.io/v1alpha1/namespaces/{namespace}/phoenixmodels/iris",
        f"/apis/apps/v1/namespaces/{namespace}/deployments/iris",
        f"/api/v1/namespaces/{namespace}/services/iris",
    )
    try:
        with scribblers(phoenix, *paths) as writes:
            for rows in (2, 3):
                phoenix.apply(namespace, model(batching={"maxRows": rows}))
                phoenix.wait_ready(namespace)
    finally:
        where = ("-n", tools.OPERATOR_NAMESPACE)
        phoenix.kubectl("annotate", "lease/phoenix-operator", "example.com/scribble-", *where)
    # an annotation makes a new generation of a Deployment: its controller catches up when nobody writes any more
    phoenix.wait_condition(namespace, "iris", "Progressing", "True", "RolledOut")
    conflicts = [line for line in phoenix.operator_metrics().splitlines() if 'code="409"' in line]
    print(f"{writes[0]} writes of others; conflicts of the operator: {conflicts}")
    assert (phoenix.leader(), restarts(phoenix)) == (leader, before), "nobody took the lease"


def custom_resource_definition() -> Object:
    found: Object = yaml.safe_load((tools.MANIFESTS / "phoenixmodels.yaml").read_text())
    return found


def apply_definition(phoenix: Phoenix, definition: Object) -> None:
    phoenix.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(definition))


def test_definition_is_upgraded_under_load(phoenix: Phoenix, namespace: str) -> None:
    newer = custom_resource_definition()
    spec: Any = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["properties"]["note"] = {"type": "string", "description": "A field of the next release."}
    spec["description"] = "What the next release says of it."
    phoenix.start_client(namespace)
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
    phoenix.infer(namespace)  # kube-proxy knows of the pod now: what fails from here on is no late start
    before = phoenix.pods(namespace)[0]["metadata"]["uid"]
    started = now()
    asking = ("kubectl", "exec", "-i", "client", "-n", namespace, "--", "python", "-c", "PROGRAM")
    with phoenix.load(*asking, f"iris.{namespace}.svc", "iris", "2", least=2000) as result:
        try:
            apply_definition(phoenix, newer)
            phoenix.wait_for("the new field", lambda: knows_note(phoenix))
            # a field that this operator does not know yet changes nothing
            phoenix.apply(namespace, model(note="kept"))
            phoenix.wait_ready(namespace)
            phoenix.apply(namespace, model("second", replicas=0))
            phoenix.wait_condition(namespace, "second", "Accepted", "True")
        finally:
            apply_definition(phoenix, custom_resource_definition())
        phoenix.wait_for("the old fields", lambda: not knows_note(phoenix))
        phoenix.apply(namespace, model("third", replicas=0))
        phoenix.wait_condition(namespace, "third", "Accepted", "True")
        phoenix.wait_ready(namespace)
    print(f"requests meanwhile: {result}")
    assert result["failed"] == 0, result["failures"]
    assert phoenix.pods(namespace)[0]["metadata"]["uid"] == before
    # kopf tells of each watch that it has to begin again
    rows = [row for row in phoenix.operator_log(started) if row["logger"].startswith("phoenix_operator")]
    assert [row for row in rows if row["level"] == "ERROR"] == []


def knows_note(phoenix: Phoenix) -> bool:
    return phoenix.kubectl.can("explain", "phx.spec.note")
