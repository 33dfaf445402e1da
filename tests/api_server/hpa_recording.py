"""The real HPA controller, looked at step by step: what it was told, what was there, and what it made of it.

Kubernetes' own controller-manager runs beside an API server of its own, without nodes: a test plays the kubelet. The
metrics are served by a server behind an APIService; the controller asks it once for each metric whenever it looks, so
that each question begins a step.
"""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from api_client import APPLY, MERGE, Api, ApiServer, Object
from lab import certificates, cluster, control_plane
from lab.state import Lab, only_one
from metrics_api_world import on_socket

ROOT = Path(__file__).parents[2]
NAMESPACE, NAME = "scaled", "target"
DEPLOYMENT = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAME}"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
HPA = f"/apis/autoscaling/v2/namespaces/{NAMESPACE}/horizontalpodautoscalers/{NAME}"
GROUP = "custom.metrics.k8s.io"
SYNC = "750ms"  # so that no window of whole seconds ends just when the controller looks
Values = Mapping[str, int | None]  # in milli-units; None: there is no such metric


@dataclass
class Step:
    """What the controller was told at one look, and what there was; `at_s` by one clock."""

    at_s: float
    values: Values
    spec_replicas: int
    status_replicas: int
    ready: Sequence[str]
    pods: Sequence[str]


@dataclass
class Scene:
    """The metrics to serve and how many pods are to be ready; `steps` are the looks so far."""

    api: Api
    metrics: Sequence[str]
    values: Values = field(default_factory=dict)
    unready: int = 0
    steps: list[Step] = field(default_factory=list)
    looked: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.Response:
        """Serve discovery, and a metric of the object that the HPA describes."""
        parts = request.path.strip("/").split("/")
        if parts == ["apis", GROUP, "v1beta2"]:
            rows = [
                {
                    "name": f"phoenixmodels.phoenix-ml.io/{name}",
                    "singularName": "",
                    "namespaced": True,
                    "kind": "MetricValueList",
                    "verbs": ["get"],
                }
                for name in self.metrics
            ]
            return web.json_response(
                {
                    "kind": "APIResourceList",
                    "apiVersion": "v1",
                    "groupVersion": f"{GROUP}/v1beta2",
                    "resources": rows,
                }
            )
        if "namespaces" not in parts:
            return web.json_response(_status("no such path"), status=404)
        metric = parts[-1]
        if metric == self.metrics[0]:
            await self._look()
        value = self.steps[-1].values.get(metric)
        if value is None:
            return web.json_response(_status("no such metric"), status=404)
        item = {
            "describedObject": {"kind": "PhoenixModel", "namespace": NAMESPACE, "name": parts[-2]},
            "metric": {"name": metric},
            "timestamp": "2026-01-01T00:00:00Z",
            "value": f"{value}m",
        }
        return web.json_response(
            {"kind": "MetricValueList", "apiVersion": f"{GROUP}/v1beta2", "metadata": {}, "items": [item]}
        )

    async def _look(self) -> None:
        scale = await self.api.must("GET", f"{DEPLOYMENT}/scale")
        pods = await self.api.items(PODS)
        ready = [pod["metadata"]["name"] for pod in pods if _is_ready(pod)]
        names = [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        self.steps.append(
            Step(
                time.monotonic(),
                dict(self.values),
                scale["spec"]["replicas"],
                scale["status"]["replicas"],
                ready,
                names,
            )
        )
        self.looked.set()

    async def next_look(self) -> None:
        """Return a moment after the controller has looked once more, when what it decided is done."""
        self.looked.clear()
        async with asyncio.timeout(60):
            await self.looked.wait()
        await asyncio.sleep(0.15)

    async def run_pods(self) -> None:
        """Play the kubelet: every pod runs at once, and all but `unready` of them are ready."""
        pods = sorted(await self.api.items(PODS), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
        for index, pod in enumerate(pods):
            path = f"{PODS}/{pod['metadata']['name']}"
            if "deletionTimestamp" in pod["metadata"]:
                await self.api("DELETE", path, {"gracePeriodSeconds": 0})
                continue
            told = "True" if index < len(pods) - self.unready else "False"
            if pod.get("status", {}).get("phase") == "Running" and _is_ready(pod) is (told == "True"):
                continue
            conditions = [{"type": "Ready", "status": told, "lastTransitionTime": "2026-01-01T00:00:00Z"}]
            status = {"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "conditions": conditions}
            await self.api("PATCH", f"{path}/status", {"status": status}, kind=MERGE)


def _is_ready(pod: Object) -> bool:
    rows = pod.get("status", {}).get("conditions", [])
    is_ready = any(row["type"] == "Ready" and row["status"] == "True" for row in rows)
    return is_ready and "deletionTimestamp" not in pod["metadata"]


def _status(message: str) -> Object:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": 404}


@asynccontextmanager
async def controller(spec: Object, metrics: Sequence[str]) -> AsyncIterator[Scene]:
    """Have the controller scale a Deployment by this HPA; the scene in which it does."""
    lab = Lab("hpa")
    with only_one(lab.name):
        before = os.environ.get("LAB_HPA_SYNC")
        os.environ["LAB_HPA_SYNC"] = SYNC
        try:
            cluster.down(lab)
            kubeconfig = await asyncio.to_thread(cluster.up_control_plane, lab, controllers=True)
            server = ApiServer(kubeconfig, lab.audit_log)
            # the kind of what an HPA describes has to be served
            control_plane.kubectl(lab, "apply", "--server-side", "-f", str(ROOT / "crds/phoenixmodels.yaml"))
            control_plane.kubectl(lab, "wait", "--for=condition=Established", "crd", "--all")
            async with server.connected() as api:
                scene = Scene(api, metrics)
                context = _context(lab)
                async with on_socket(scene.answer, context=context) as address:
                    await _prepare(api, urlsplit(address).port or 0, spec)
                    yield scene
        finally:
            os.environ.pop("LAB_HPA_SYNC")
            if before is not None:
                os.environ["LAB_HPA_SYNC"] = before
            await asyncio.to_thread(cluster.down, lab)


def _context(lab: Lab) -> ssl.SSLContext:
    certificates.make_authority(lab.pki, "metrics-ca")
    certificates.make_certificate(
        lab.pki, "metrics", subject="/CN=metrics", authority="metrics-ca", names=("DNS:localhost",)
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(lab.pki / "metrics.crt", lab.pki / "metrics.key")
    return context


async def _prepare(api: Api, port: int, spec: Object) -> None:
    await api.make_namespace(NAMESPACE)
    service = {"type": "ExternalName", "externalName": "localhost"}
    registration = {
        "group": GROUP,
        "version": "v1beta2",
        "groupPriorityMinimum": 100,
        "versionPriority": 100,
        "insecureSkipTLSVerify": True,
        "service": {"name": "metrics", "namespace": NAMESPACE, "port": port},
    }
    rights = {
        "rules": [{"apiGroups": [GROUP], "resources": ["*"], "verbs": ["get", "list"]}],
    }
    account = {"kind": "ServiceAccount", "name": "horizontal-pod-autoscaler", "namespace": "kube-system"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "metrics"}
    pod = {"containers": [{"name": "c", "image": "none"}]}
    labels = {"app": NAME}
    deployment = {
        "replicas": 2,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    for path, version, kind, body in (
        (f"/api/v1/namespaces/{NAMESPACE}/services/metrics", "v1", "Service", {"spec": service}),
        (
            f"/apis/apiregistration.k8s.io/v1/apiservices/v1beta2.{GROUP}",
            "apiregistration.k8s.io/v1",
            "APIService",
            {"spec": registration},
        ),
        (f"{rbac}/clusterroles/metrics", "rbac.authorization.k8s.io/v1", "ClusterRole", rights),
        (
            f"{rbac}/clusterrolebindings/metrics",
            "rbac.authorization.k8s.io/v1",
            "ClusterRoleBinding",
            {"roleRef": role, "subjects": [account]},
        ),
        (DEPLOYMENT, "apps/v1", "Deployment", {"spec": deployment}),
        (HPA, "autoscaling/v2", "HorizontalPodAutoscaler", {"spec": spec}),
    ):
        whole: dict[str, Any] = {"apiVersion": version, "kind": kind, "metadata": {"name": path.rpartition("/")[2]}}
        await api.must("PATCH", path, whole | body, kind=APPLY, fieldManager="tests", fieldValidation="Strict")
