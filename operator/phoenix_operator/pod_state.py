"""Asks each ready pod once what it loaded: digest, version, provider, signature.

Hides HTTP, deadlines and how long an answer stays good: as long as the container is the same one. A pod that does not
answer is asked again at the next reconcile; until then the status says less, never something wrong.
"""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence

import aiohttp

from phoenix_api.status import LoadedModel
from phoenix_operator.desired.bindings import KINDS
from phoenix_operator.desired.naming import HTTP_PORT
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Loaded, Pod

_log = logging.getLogger(__name__)
_MOST_REMEMBERED = 20_000
_MOST_BYTES = 1 << 20
_MOST_WORDS = 300
_LONGEST_LOAD_S = 86_400
_MOST_TENSORS = 256  # a status holds no more of each side


class PodStates:
    """What pods said."""

    def __init__(self, metrics: Metrics, *, timeout_s: float) -> None:
        self._metrics = metrics
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s), connector=aiohttp.TCPConnector(limit=32, force_close=True)
        )
        self._known: OrderedDict[tuple[str, int], Loaded] = OrderedDict()

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def of(
        self, model: str, pods: Sequence[Pod], *, is_bound: bool = False, is_autoscaled: bool = False
    ) -> dict[str, Loaded]:
        """Return what the ready ones among these pods loaded, by uid; those that do not say are left out.

        What a model with bindings says of its backends changes while it runs, so it is asked each time; what one that
        is autoscaled says of its capacity comes later than ready, so it is asked until it does.
        """
        ready = [pod for pod in pods if pod.is_ready and pod.ip]
        answers = await asyncio.gather(
            *(self._ask(model, pod, is_bound=is_bound, is_autoscaled=is_autoscaled) for pod in ready)
        )
        return {pod.uid: answer for pod, answer in zip(ready, answers, strict=True) if answer is not None}

    async def _ask(self, model: str, pod: Pod, *, is_bound: bool, is_autoscaled: bool) -> Loaded | None:
        key = (pod.uid, pod.restarts)
        known = self._known.get(key)
        if known is not None and not is_bound and not (is_autoscaled and known.capacity is None):
            return known
        host = f"[{pod.ip}]" if ":" in (pod.ip or "") else pod.ip
        try:
            async with self._session.get(f"http://{host}:{HTTP_PORT}/v2/models/{model}/state") as response:
                response.raise_for_status()
                answer = _read(json.loads(await _body(response)))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
            self._metrics.state_failures.inc()
            _log.warning("a ready pod did not say what it loaded", extra={"pod": pod.name, "cause": repr(error)})
            return known
        self._known[key] = answer
        self._known.move_to_end(key)
        if len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        return answer


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """Read the body, but no more than a pod may say: its image is the user's."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise ValueError(f"an answer of more than {_MOST_BYTES} bytes")
    return bytes(body)


def _read(answer: object) -> Loaded:
    """Take what the status can hold. Raises `ValueError`, `KeyError` or `TypeError`."""
    if not isinstance(answer, dict):
        raise TypeError("expected an object")
    told = LoadedModel.model_validate(
        {name: _text(answer.get(name)) for name in ("sha256", "version", "provider")}
        | {side: _tensors(answer[side]) for side in ("inputs", "outputs")}
    )
    inputs, outputs = ([row.model_dump() for row in rows] for rows in (told.inputs, told.outputs))
    return Loaded(
        told.sha256,
        told.version,
        told.provider,
        inputs,
        outputs,
        load_s=_seconds(answer.get("load_seconds")),
        capacity=_capacity(answer.get("capacity")),
        bindings=_failing(answer.get("bindings")),
    )


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < _LONGEST_LOAD_S else 0.0


def _capacity(measured: object) -> int | None:
    found = measured.get("concurrency") if isinstance(measured, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def _failing(bindings: object) -> dict[str, str]:
    """Return what the server says against its backends, by kind; whatever else an image may say there is nothing."""
    if not isinstance(bindings, dict):
        return {}
    rows = {kind: bindings[kind] for kind in KINDS if isinstance(bindings.get(kind), dict)}
    return {
        kind: str(row.get("error") or "no answer")[:_MOST_WORDS] for kind, row in rows.items() if row.get("up") is False
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _tensors(rows: object) -> list[dict[str, object]]:
    if not isinstance(rows, list):
        raise TypeError("expected a list of tensors")
    return [{name: row[name] for name in ("name", "datatype", "shape")} for row in rows[:_MOST_TENSORS]]
