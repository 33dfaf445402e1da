"""The PhoenixModels there are, by namespace, with their labels: asked of the API server, kept for a moment."""

from collections.abc import Mapping

from phoenix_operator.cluster import Cluster
from phoenix_operator.kinds import PHOENIX_MODEL
from phoenix_operator.metrics_api.shared import Shared

_STANDS_S, _FAILURE_S = 10.0, 2.0
_FRESH_S = 1.0

Labels = Mapping[str, str]


class Models:
    """Names and labels of the models of each namespace. Only metadata is asked for."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._shared: Shared[str, Mapping[str, Labels]] = Shared(
            self._ask, lifetime_s=lambda _: _STANDS_S, failure_s=_FAILURE_S
        )

    async def of(self, namespace: str) -> Mapping[str, Labels]:
        """Return the labels of each model of a namespace. Raises `ApiError`."""
        return await self._shared.get(namespace)

    async def exists(self, namespace: str, name: str) -> bool:
        """Return whether there is such a model; one that is not known may be new. Raises `ApiError`."""
        if name in await self._shared.get(namespace):
            return True
        return name in await self._shared.get(namespace, max_age_s=_FRESH_S)

    async def close(self) -> None:
        """Ask no more."""
        await self._shared.close()

    async def _ask(self, namespace: str) -> Mapping[str, Labels]:
        page = await self._cluster.list(PHOENIX_MODEL, namespace, only_metadata=True)
        return {item["metadata"]["name"]: item["metadata"].get("labels") or {} for item in page.items}
