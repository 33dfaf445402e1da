"""What the cluster or the operator refuses: quota, limits, names that are taken, specs that cannot be acted on."""

import pytest
from phoenix_cluster import Object, Phoenix, model

CHILDREN = "deployments,services,configmaps,networkpolicies,serviceaccounts,poddisruptionbudgets,ingresses"


def ours(phoenix: Phoenix, namespace: str) -> list[str]:
    """Return what the operator has made in a namespace."""
    found = phoenix.all(namespace, CHILDREN, "-l", "app.kubernetes.io/managed-by=phoenix-operator")
    return [f"{body['kind']} {body['metadata']['name']}" for body in found]


# --- the namespace has no room ---------------------------------------------------------------------------------------


def test_quota_without_pods(phoenix: Phoenix, namespace: str) -> None:
    phoenix.kubectl("create", "quota", "none", "--hard=pods=0", "-n", namespace)
    phoenix.wait_for("the quota", lambda: (phoenix.get(namespace, "quota/none") or {}).get("status", {}).get("hard"))
    phoenix.apply(namespace, model())
    phoenix.wait_fault(namespace, "iris", "Available", "QuotaExceeded", "exceeded quota: none", "pods=0", "raise")
    phoenix.delete(namespace, "quota/none")
    phoenix.wait_ready(namespace)


def test_quota_without_services(phoenix: Phoenix, namespace: str) -> None:
    phoenix.kubectl("create", "quota", "none", "--hard=services=1", "-n", namespace)
    phoenix.wait_for("the quota", lambda: (phoenix.get(namespace, "quota/none") or {}).get("status", {}).get("hard"))
    phoenix.apply(namespace, model())
    words = ('services "iris-headless" is forbidden: exceeded quota: none', "raise the quota")
    row = phoenix.wait_for("the quota's words", lambda: quota_row(phoenix, namespace), deadline_s=15)
    print(row["message"])
    assert all(word in row["message"] for word in words)
    phoenix.delete(namespace, "quota/none")
    phoenix.wait_ready(namespace)
    assert "Service iris-headless" in ours(phoenix, namespace)


def quota_row(phoenix: Phoenix, namespace: str) -> Object | None:
    rows = phoenix.conditions(namespace).values()
    return next((row for row in rows if row["reason"] == "QuotaExceeded"), None)


def test_limit_range_below_the_request(phoenix: Phoenix, namespace: str) -> None:
    limits = {"limits": [{"type": "Container", "max": {"memory": "64Mi"}}]}
    limit = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits}
    phoenix.apply(namespace, limit)
    phoenix.apply(namespace, model())
    words = ("maximum memory usage per Container is 64Mi", "192Mi", "LimitRange")
    phoenix.wait_fault(namespace, "iris", "Available", "PodsRefused", *words)
    phoenix.delete(namespace, "limitrange/small")
    phoenix.wait_ready(namespace)


def test_service_account_that_is_not_there(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(pod={"serviceAccountName": "nobody"}))
    phoenix.wait_fault(
        namespace, "iris", "Available", "PodsRefused", 'serviceaccount "nobody" not found', "mend the spec"
    )
    phoenix.kubectl("create", "serviceaccount", "nobody", "-n", namespace)
    phoenix.wait_ready(namespace)


# --- names that are taken --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": "iris"},
                "spec": {
                    "replicas": 0,
                    "selector": {"matchLabels": {"app": "other"}},
                    "template": {
                        "metadata": {"labels": {"app": "other"}},
                        "spec": {"containers": [{"name": "c", "image": "other"}]},
                    },
                },
            },
            id="Deployment",
        ),
        pytest.param(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "iris"},
                "spec": {"selector": {"app": "other"}, "ports": [{"port": 80}]},
            },
            id="Service",
        ),
        pytest.param(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "iris-model"}, "data": {"a": "b"}},
            id="ConfigMap",
        ),
    ],
)
def test_foreign_object_of_the_same_name(phoenix: Phoenix, namespace: str, foreign: Object) -> None:
    kind, name = foreign["kind"], foreign["metadata"]["name"]
    phoenix.apply(namespace, foreign)
    before = phoenix.wait_for("it has settled", lambda: settled(phoenix, namespace, f"{kind}/{name}"))
    phoenix.apply(namespace, model())
    words = (f"{kind} {namespace}/{name}", "belongs to somebody else and is left alone", "rename")
    phoenix.wait_fault(namespace, "iris", "Accepted", "NameClash", *words, is_known=True)
    assert phoenix.get(namespace, f"{kind}/{name}") == before
    assert ours(phoenix, namespace) == []
    phoenix.delete(namespace, f"{kind}/{name}")
    phoenix.wait_ready(namespace)


def settled(phoenix: Phoenix, namespace: str, what: str) -> Object | None:
    """Return an object once its controller has seen it, so that whatever changes it now is us."""
    found = phoenix.get(namespace, what)
    if found and found["kind"] == "Deployment":
        status = found.get("status", {})
        return found if status.get("observedGeneration") and len(status.get("conditions", [])) == 2 else None
    return found


def test_two_models_with_one_host(phoenix: Phoenix, namespace: str, another_namespace: str) -> None:
    host = {"host": f"{namespace}.example.com"}
    phoenix.apply(namespace, model(networking=host))
    phoenix.wait_ready(namespace)
    phoenix.apply(another_namespace, model(networking=host))
    words = (host["host"], f"the older model {namespace}/iris", "take another host")
    phoenix.wait_fault(another_namespace, "iris", "Accepted", "NameClash", *words, is_known=True)
    assert ours(phoenix, another_namespace) == []
    assert phoenix.conditions(namespace)["Ready"]["status"] == "True"
    phoenix.delete(namespace, "phx/iris")
    phoenix.wait_ready(another_namespace)
    assert "Ingress iris" in ours(phoenix, another_namespace)


def test_two_models_of_one_host_with_paths_of_their_own(phoenix: Phoenix, namespace: str) -> None:
    host = {"host": f"{namespace}.example.com"}
    phoenix.apply(namespace, model(networking=host, replicas=0), model("other", networking=host, replicas=0))
    for name in ("iris", "other"):
        phoenix.wait_condition(namespace, name, "Accepted", "True")


# --- specs that cannot be acted on -----------------------------------------------------------------------------------


def test_affinity_that_the_api_server_refuses(phoenix: Phoenix, namespace: str) -> None:
    nonsense = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": "all"}}}
    phoenix.apply(namespace, model(pod={"affinity": nonsense}))
    words = ("the API server refuses Deployment iris", "nodeSelectorTerms")
    phoenix.wait_fault(namespace, "iris", "Accepted", "ObjectRefused", *words, is_known=True)
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)


def test_webhook_that_does_not_answer(phoenix: Phoenix, namespace: str) -> None:
    name = f"{namespace}.example.com"
    webhook = {
        "name": name,
        "clientConfig": {"service": {"namespace": namespace, "name": "nobody", "path": "/"}},
        "rules": [{"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["*"], "resources": ["deployments"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    configuration = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [webhook],
    }
    phoenix.apply("default", configuration)
    try:
        phoenix.apply(namespace, model())
        words = ("Deployment iris", "failed calling webhook", "nobody")
        phoenix.wait_fault(namespace, "iris", "Accepted", "ObjectRefused", *words, is_known=True)
    finally:
        phoenix.kubectl("delete", "validatingwebhookconfiguration", name)
    # it is tried again every 30 seconds; any change is quicker
    phoenix.kubectl("annotate", "phx/iris", "-n", namespace, "example.com/webhook=gone")
    phoenix.wait_ready(namespace)


def test_refused_change_keeps_the_old_version_serving(phoenix: Phoenix, namespace: str) -> None:
    phoenix.start_client(namespace)
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
    operator = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Near"}]}]}
    nonsense = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": operator}}
    phoenix.apply(namespace, model(pod={"affinity": nonsense}))
    phoenix.wait_fault(namespace, "iris", "Accepted", "ObjectRefused", "Near", is_known=True)
    phoenix.wait_condition(namespace, "iris", "Available", "True")
    assert phoenix.infer(namespace)["model_name"] == "iris"
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)


def test_accelerator_profile_that_nobody_knows(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(runtime={"accelerator": {"profile": "huge"}}))
    words = ("spec.runtime.accelerator.profile", "(small)", "got huge")
    phoenix.wait_fault(namespace, "iris", "Accepted", "InvalidSpec", *words, is_known=True)
    assert ours(phoenix, namespace) == []
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)


def test_device_class_that_no_driver_serves(phoenix: Phoenix, namespace: str) -> None:
    accelerator = {"deviceClassName": "gpu.nobody.example.com", "policy": "Require"}
    phoenix.apply(namespace, model(runtime={"accelerator": accelerator}))
    words = ("asked for 1 of DeviceClass gpu.nobody.example.com", "gpu.nobody.example.com does not exist")
    phoenix.wait_fault(namespace, "iris", "AcceleratorReady", "Unschedulable", *words)
    template = phoenix.get(namespace, "resourceclaimtemplate/iris-accelerator")
    assert template is not None
    asked = template["spec"]["spec"]["devices"]["requests"][0]["exactly"]
    assert (asked["deviceClassName"], asked["count"]) == ("gpu.nobody.example.com", 1)
    # a claim template can never change: another wish is another one
    phoenix.apply(namespace, model(runtime={"accelerator": accelerator | {"count": 2}}))
    phoenix.wait_condition(namespace, "iris", "Accepted", "True")
    phoenix.wait_for("a template that asks for two", lambda: _asked_count(phoenix, namespace) == 2)
    phoenix.delete(namespace, "resourceclaimtemplate/iris-accelerator")
    phoenix.wait_for(
        "another template", lambda: phoenix.get(namespace, "resourceclaimtemplate/iris-accelerator"), deadline_s=15
    )
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
    phoenix.wait_for("no template", lambda: phoenix.get(namespace, "resourceclaimtemplate/iris-accelerator") is None)


def _asked_count(phoenix: Phoenix, namespace: str) -> int:
    template = phoenix.get(namespace, "resourceclaimtemplate/iris-accelerator")
    return template["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"] if template else 0


def test_backend_that_the_settings_do_not_name(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model(bindings={"kafka": {"backend": "main"}}))
    field = "spec.bindings.kafka.backend"
    phoenix.wait_fault(namespace, "iris", "Accepted", "UnknownBackend", field, "got main", is_known=True)
    assert ours(phoenix, namespace) == []


def test_part_that_is_added_to_a_model_that_serves(phoenix: Phoenix, namespace: str) -> None:
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
    phoenix.apply(namespace, model(bindings={"kafka": {"backend": "main"}}))
    phoenix.wait_fault(namespace, "iris", "Accepted", "UnknownBackend", is_known=True)
    phoenix.wait_condition(namespace, "iris", "Available", "True")
    phoenix.apply(namespace, model())
    phoenix.wait_ready(namespace)
