"""Whether a caller may: the API server is asked by SubjectAccessReview, and its answer stands for some seconds.

The autoscaler asks for every model, so it is asked first whether a caller may read all metrics of all models: then one
review answers for thousands of requests. The API server has reviewed the request itself before it came here; this
review holds when somebody else has a certificate of its front proxy.
"""

from dataclasses import dataclass

from phoenix_operator.cluster import Cluster
from phoenix_operator.kinds import SUBJECT_ACCESS_REVIEW
from phoenix_operator.metrics_api.answers import Question
from phoenix_operator.metrics_api.authentication import Caller
from phoenix_operator.metrics_api.names import GROUP, RESOURCE
from phoenix_operator.metrics_api.shared import Shared
from phoenix_operator.observed import Object

_ALLOWED_S, _DENIED_S, _FAILURE_S = 10.0, 5.0, 1.0


@dataclass(frozen=True, slots=True)
class _Review:
    caller: Caller
    version: str
    namespace: str
    resource: str
    metric: str
    name: str


class Authorizer:
    """Asks who may read what."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._shared: Shared[_Review, bool] = Shared(
            self._ask, lifetime_s=lambda is_allowed: _ALLOWED_S if is_allowed else _DENIED_S, failure_s=_FAILURE_S
        )

    async def allows(self, caller: Caller, question: Question) -> bool:
        """Return whether the caller may ask this. Raises `ApiError`."""
        if await self._shared.get(_Review(caller, question.version, "", RESOURCE, "*", "")):
            return True
        exact = _Review(caller, question.version, question.namespace, question.resource, question.metric, question.name)
        return await self._shared.get(exact)

    async def close(self) -> None:
        """Ask no more."""
        await self._shared.close()

    async def _ask(self, review: _Review) -> bool:
        answer = await self._cluster.create(SUBJECT_ACCESS_REVIEW, _manifest(review))
        return (answer.get("status") or {}).get("allowed") is True


def _manifest(review: _Review) -> Object:
    caller = review.caller
    attributes = {
        "group": GROUP,
        "version": review.version,
        "namespace": review.namespace,
        "resource": review.resource,
        "subresource": review.metric,
        "name": review.name,
        "verb": "get",  # of a path with a name, `*` too: as the API server itself sees it
    }
    spec: Object = {
        "user": caller.name,
        "groups": list(caller.groups),
        "resourceAttributes": {key: value for key, value in attributes.items() if value},
    }
    spec |= {"uid": caller.uid} if caller.uid else {}
    spec |= {"extra": {key: list(values) for key, values in caller.extra}} if caller.extra else {}
    return {
        "apiVersion": SUBJECT_ACCESS_REVIEW.api_version,
        "kind": SUBJECT_ACCESS_REVIEW.kind,
        "metadata": {},
        "spec": spec,
    }
