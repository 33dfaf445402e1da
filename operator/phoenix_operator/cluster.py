"""The API server, as plain dicts: get, list, apply, delete, patch the status, ask what is served.

Hides the `kubernetes` package (only `leader` also uses this module's client, nobody else imports the package), paths,
authentication, deadlines, pace, retries after 429, and how an error body becomes a sentence. Writes are server-side
apply under one field manager, so that the operator owns the fields it sends and no others.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import client, config

from phoenix_operator.kinds import Kind
from phoenix_operator.observed import Object

FIELD_MANAGER = "phoenix-operator"
_STATUS_MANAGER = "phoenix-operator-status"
_RESET_MANAGER = "phoenix-operator-reset"
_REPLICAS_MANAGER = "phoenix-operator-replicas"
_PAGE = 100
_MOST_TRIES = 5
# With a parameter the `kubernetes` package sends text as it is.
_APPLY = "application/apply-patch+yaml; charset=utf-8"
_JSON_PATCH, _MERGE_PATCH = "application/json-patch+json", "application/merge-patch+json"
_ONLY_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_ONLY_METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
# What the API server calls an internal error of its own, though the object or an admission webhook is at fault.
_UNFIT = "failed to create typed patch object"
_NOT_INTERNAL = (_UNFIT, "failed calling webhook")

_Body = Object | list[Object] | None  # of a request

# Told of each request: verb, HTTP code (0: no answer), seconds.
Observer = Callable[[str, int, float], None]


class ApiError(Exception):
    """An answer that is no success, or none at all (`code` 0). `reason` is the API server's, for example `Conflict`."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message

    @property
    def is_refusal(self) -> bool:
        """Whether the object, not the moment, is at fault: trying the same again at once is of little use."""
        is_called_internal = self.code == 500 and any(words in self.message for words in _NOT_INTERNAL)
        return is_called_internal or self.code in (400, 403, 405, 406, 413, 415, 422)

    @property
    def is_unfit(self) -> bool:
        """Whether the object does not fit its kind's schema. Which of several unknown fields is named, is by chance."""
        return self.code == 500 and _UNFIT in self.message

    @property
    def is_quota(self) -> bool:
        """Whether a quota of the namespace is exhausted."""
        return self.code == 403 and "exceeded quota" in self.message

    @property
    def is_namespace_ending(self) -> bool:
        """Whether the namespace is being deleted, or is gone before the watches have told of its objects."""
        is_gone = self.code == 404 and self.message.startswith('namespaces "')
        return is_gone or (self.code == 403 and "because it is being terminated" in self.message)


class Pace:
    """A token bucket: `per_second` on average, a second's worth at once."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._tokens, self._at = per_second, time.monotonic()

    async def wait(self) -> None:
        """Wait for a token."""
        now = time.monotonic()
        self._tokens = min(self._per_second, self._tokens + (now - self._at) * self._per_second)
        self._at = now
        self._tokens -= 1
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._per_second)


@dataclass(frozen=True, slots=True)
class Page:
    """A whole list with the version that it is of."""

    items: list[Object]
    version: str


class Cluster:
    """A connection to one API server."""

    def __init__(self, api: client.ApiClient, *, pace: Pace, timeout_s: float, observer: Observer) -> None:
        self._api, self._pace, self._timeout_s, self._observer = api, pace, timeout_s, observer

    @classmethod
    async def connect(
        cls, *, per_second: float, timeout_s: float, observer: Observer = lambda verb, code, seconds: None
    ) -> Self:
        """Use the pod's ServiceAccount where there is one, else the current kubeconfig."""
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = 32
        # else ~/.netrc is read for each request, in a thread; a proxy is the kubeconfig's `proxy-url`, as for kopf
        configuration.client_session_kwargs = {"trust_env": False}
        return cls(client.ApiClient(configuration), pace=Pace(per_second), timeout_s=timeout_s, observer=observer)

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """Return an object, or None if there is none."""
        try:
            answer: Object = await self._request("GET", kind.path(namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        return answer

    async def exists(self, kind: Kind, namespace: str, name: str) -> bool:
        """Return whether an object is there, without its content: a Secret stays where it is.

        One that may not be read counts as there: the kubelet will say what it finds.
        """
        try:
            await self._request("GET", kind.path(namespace, name), accept=_ONLY_METADATA)
        except ApiError as error:
            if error.code == 404:
                return False
            if error.code != 403:
                raise
        return True

    async def list(
        self,
        kind: Kind,
        namespace: str | None,
        *,
        labels: str | None = None,
        fields: str | None = None,
        only_metadata: bool = False,
    ) -> Page:
        """Return all objects of a kind without `managedFields`, asked for in pages of 100."""
        items: list[Object] = []
        query: dict[str, str] = {"limit": str(_PAGE)}
        query |= {"labelSelector": labels} if labels else {}
        query |= {"fieldSelector": fields} if fields else {}
        accept = _ONLY_METADATA_LIST if only_metadata else "application/json"
        while True:
            answer = await self._request("GET", kind.path(namespace), query=query, accept=accept, verb="LIST")
            page = answer.get("items") or []
            for item in page:
                item["metadata"].pop("managedFields", None)  # the larger part of most objects, and nobody asks for it
            items += page
            token = answer["metadata"].get("continue")
            if not token:
                return Page(items, answer["metadata"].get("resourceVersion", ""))
            query["continue"] = token

    async def apply(self, kind: Kind, manifest: Object, *, is_first: bool = False) -> Object:
        """Create the object or make it so; return what is stored. With `is_first` a foreign object is not overwritten.

        Raises `ApiError`: 409 if the object is new to us and somebody else's fields are in the way.
        """
        metadata = manifest["metadata"]
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        if not is_first:
            query["force"] = "true"
        path = kind.path(metadata.get("namespace"), metadata["name"])
        stored: Object = await self._request(
            "PATCH", path, query=query, body=manifest, content_type=_APPLY, verb="APPLY"
        )
        return stored

    async def apply_but_replicas(self, kind: Kind, manifest: Object, *, first_replicas: int) -> Object:
        """As `apply`, for a manifest without `spec.replicas` whose object has them from an autoscaler.

        An apply that leaves out what an earlier one had takes it away, and the API server's default of 1 would come
        back. So the number is kept by a manager of its own, who sets it when the object is made (`first_replicas`) or
        is taken over from the operator, and never again. Raises `ApiError`: 409 too if the autoscaler was faster.
        """
        metadata = manifest["metadata"]
        live = await self.get(kind, metadata["namespace"], metadata["name"])
        if live is None:
            spec = {"replicas": first_replicas, **manifest["spec"]}
            await self._apply_replicas(kind, manifest | {"spec": spec}, None)
        elif _owns_replicas(live, FIELD_MANAGER):
            await self._keep_replicas(kind, live)
        stored = await self.apply(kind, manifest)
        if _owns_more_than_replicas(stored):
            stored = await self._keep_replicas(kind, stored)
        return stored

    async def _keep_replicas(self, kind: Kind, live: Object) -> Object:
        """Have the manager of replicas own the live number, and nothing else."""
        known = live["metadata"]
        identity = {name: known[name] for name in ("name", "namespace", "uid")}
        body = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "metadata": identity,
            "spec": {"replicas": live["spec"].get("replicas", 1)},
        }
        return await self._apply_replicas(kind, body, known["resourceVersion"])

    async def _apply_replicas(self, kind: Kind, body: Object, version: str | None) -> Object:
        metadata = body["metadata"] | ({"resourceVersion": version} if version else {})
        query = {"fieldManager": _REPLICAS_MANAGER, "fieldValidation": "Strict"} | (
            {"force": "true"} if version else {}
        )
        path = kind.path(metadata["namespace"], metadata["name"])
        return await self._apply(path, query, body | {"metadata": metadata}, "APPLY")

    async def reset(self, kind: Kind, manifest: Object, live: Object) -> None:
        """Replace the spec of an object whole, whoever owns its fields; `replicas` that the manifest leaves out stay.

        For what no apply can mend, because what somebody added may not stand beside ours: a port of the same name under
        another number, a second handler in a probe. The fields have no owner afterwards, so that the next apply has
        them all, and can take each away again. Raises `ApiError`: 422 too if the object is another one by now.
        """
        metadata = manifest["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"])
        replicas = {name: live["spec"][name] for name in ("replicas",) if name in live["spec"]}
        spec = replicas | manifest["spec"]
        steps: _Body = [
            {"op": "test", "path": "/metadata/uid", "value": live["metadata"]["uid"]},
            {"op": "replace", "path": "/spec", "value": spec},
        ]
        query = {"fieldManager": _RESET_MANAGER, "fieldValidation": "Strict"}
        stored = await self._request("PATCH", path, query=query, body=steps, content_type=_JSON_PATCH, verb="RESET")
        for last in _tries():
            metadata = stored["metadata"]
            owners = [row for row in metadata.get("managedFields", []) if row.get("manager") != _RESET_MANAGER]
            body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "managedFields": owners}}
            try:
                await self._request("PATCH", path, query=query, body=body, content_type=_MERGE_PATCH, verb="RESET")
                return
            except ApiError as error:
                if error.code != 409 or last:  # its own controller may have been faster
                    raise
            stored = await self._request("GET", path)

    async def apply_status(self, kind: Kind, namespace: str, name: str, status: Object) -> Object:
        """Make the status so; return the object."""
        body = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "metadata": {"name": name, "namespace": namespace},
            "status": status,
        }
        query = {"fieldManager": _STATUS_MANAGER, "force": "true"}
        return await self._apply(kind.path(namespace, name, "status"), query, body, "STATUS")

    async def patch_metadata(
        self, kind: Kind, metadata: Object, *, finalizers: Sequence[str], annotations: Mapping[str, str | None]
    ) -> Object | None:
        """Set the finalizers and these annotations (None: no longer there) of the object of this resourceVersion.

        Return the object, None if it is gone. Not by apply: a finalizer that somebody else's apply repeats would have
        two owners, and ours alone could not take it away. Raises `ApiError` 409 if the object is newer.
        """
        body: Object = {
            "metadata": {
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
                "finalizers": list(finalizers),
                "annotations": dict(annotations),
            }
        }
        path = kind.path(metadata["namespace"], metadata["name"])
        query = {"fieldManager": FIELD_MANAGER}
        try:
            stored: Object = await self._request("PATCH", path, query=query, body=body, content_type=_MERGE_PATCH)
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        return stored

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str) -> None:
        """Delete the object with this uid; none is fine, one with another uid is left alone."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}, **_IN_BACKGROUND}
        try:
            await self._request("DELETE", kind.path(namespace, name), body=body)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    async def create(self, kind: Kind, manifest: Object) -> Object:
        """Create the object. Raises `ApiError` 409 if it is there."""
        stored: Object = await self._request(
            "POST", kind.path(manifest["metadata"].get("namespace")), body=manifest, verb="CREATE"
        )
        return stored

    async def replace(self, kind: Kind, manifest: Object) -> Object:
        """Replace the object of the same resourceVersion. Raises `ApiError` 409 if somebody was faster."""
        metadata = manifest["metadata"]
        stored: Object = await self._request("PUT", kind.path(metadata["namespace"], metadata["name"]), body=manifest)
        return stored

    async def served(self, kinds: tuple[Kind, ...]) -> frozenset[Kind]:
        """Return those of the kinds that the API server serves."""
        found = set()
        for root in {kind.root for kind in kinds}:
            try:
                answer = await self._request("GET", root)
            except ApiError as error:
                if error.code in (403, 404):
                    continue
                raise
            plurals = {row["name"] for row in answer.get("resources", [])}
            found |= {kind for kind in kinds if kind.root == root and kind.plural in plurals}
        return frozenset(found)

    async def _apply(self, path: str, query: dict[str, str], body: Object, verb: str) -> Object:
        stored: Object = await self._request("PATCH", path, query=query, body=body, content_type=_APPLY, verb=verb)
        return stored

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: _Body = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        verb: str | None = None,
    ) -> Any:
        headers = {"Content-Type": content_type, "Accept": accept, "User-Agent": FIELD_MANAGER}
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        address = f"{self._api.configuration.host}{quote(path)}" + (f"?{urlencode(query)}" if query else "")
        for last in _tries():
            await self._pace.wait()
            started = time.monotonic()
            code, answer, retry_after = await self._once(method, address, dict(headers), body)
            self._observer(verb or method, code, time.monotonic() - started)
            if code in (429, 503) and retry_after is not None and not last:
                # the server says when: jitter keeps those that were sent away together from coming back together
                await asyncio.sleep(min(retry_after, 30) * random.uniform(1, 1.5))
                continue
            break
        if 200 <= code < 300:
            return answer
        raise _error(code, answer, f"{verb or method} {path}")

    async def _once(
        self, method: str, address: str, headers: dict[str, str], body: _Body
    ) -> tuple[int, Any, float | None]:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s, connect=min(self._timeout_s, 10))
        text = as_yaml(body) if headers["Content-Type"] == _APPLY else body
        try:
            response = await self._api.rest_client.request(
                method, address, headers=headers, body=text, _request_timeout=timeout
            )
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return 0, {"message": f"no answer from the API server: {type(error).__name__} {error}".strip()}, None
        try:
            answer = json.loads(data) if data else {}
        except ValueError:
            answer = {"message": data[:200].decode(errors="replace")}
        return response.status, answer, _seconds(response.headers.get("Retry-After"))


def _owns_replicas(live: Object, manager: str) -> bool:
    """Whether the manager's applies had `spec.replicas`."""
    return any("f:replicas" in spec for spec in _applied_specs(live, manager))


def _owns_more_than_replicas(live: Object) -> bool:
    return any(set(spec) - {"f:replicas"} for spec in _applied_specs(live, _REPLICAS_MANAGER))


def _applied_specs(live: Object, manager: str) -> list[Object]:
    rows = live["metadata"].get("managedFields", [])
    return [
        row.get("fieldsV1", {}).get("f:spec", {})
        for row in rows
        if (row.get("manager"), row.get("operation")) == (manager, "Apply")
    ]


_IN_BACKGROUND = {"propagationPolicy": "Background"}


# Raw in JSON, but no character of YAML, or the end of a line there.
_NOT_IN_YAML = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")


def as_yaml(body: object) -> str:
    """Write JSON that is YAML too: the API server reads an apply as YAML, which has no surrogate pairs for an emoji."""
    text = json.dumps(body, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _tries() -> "list[bool]":
    return [*[False] * (_MOST_TRIES - 1), True]


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:
        return None


def _error(code: int, answer: Any, what: str) -> ApiError:
    body = answer if isinstance(answer, dict) else {}
    return ApiError(code, str(body.get("reason", "")), _in_order(body) or f"{what}: HTTP {code}")


def _in_order(status: Object) -> str:
    """Return the message with its causes sorted: the API server walks maps, so the same faults come in any order."""
    message = str(status.get("message") or "")
    causes = (status.get("details") or {}).get("causes") or []
    told = sorted({f"{cause.get('field', '')}: {cause.get('message', '')}" for cause in causes})
    subject, separator, _ = message.partition(" is invalid: ")
    if separator and len(told) > 1:
        return f"{subject}{separator}[{', '.join(told)}]"
    subject, separator, lines = message.partition("errors:\n")
    return subject + separator + "\n".join(sorted(lines.split("\n")))
