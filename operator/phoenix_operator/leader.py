"""One active operator among several: a Lease that its holder renews and gives back.

The protocol is client-go's: a candidate trusts its own clock only, and takes the lease when it has not seen it change
for as long as the holder promised to renew it, or when the holder has let go. (The election that the `kubernetes`
package ships has no way to let go, so a standby would always wait for the whole lease.)
"""

import asyncio
import logging
import time
from datetime import UTC, datetime

from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.kinds import LEASE
from phoenix_operator.observed import Object

_log = logging.getLogger(__name__)
_RETRY_S = 1.0
_MOST_CONFLICTS = 5


class Lease:
    """The right to act. `identity` names this process; `seconds` is how long a silent holder is waited for."""

    def __init__(self, cluster: Cluster, *, namespace: str, name: str, identity: str, seconds: int) -> None:
        self._cluster = cluster
        self._namespace, self._name, self._identity, self._seconds = namespace, name, identity, seconds
        self._held: Object | None = None
        self._renewed_at = 0.0
        self._seen_version, self._seen_at = "", 0.0

    async def acquire(self) -> None:
        """Return once the lease is ours."""
        is_told = False
        while True:
            try:
                if await self._try():
                    _log.info("leading", extra={"identity": self._identity})
                    return
                if not is_told:
                    _log.info("standing by", extra={"identity": self._identity})
                    is_told = True
            except ApiError as error:
                _log.warning("the lease cannot be had", extra={"cause": error.message})
            await asyncio.sleep(_RETRY_S)

    async def hold(self) -> None:
        """Renew the lease; return when it is lost, or was not renewed for two thirds of its time.

        That is before a standby may begin, however long a request hangs.
        """
        while (left_s := self._renewed_at + self._seconds * 2 / 3 - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await asyncio.sleep(self._seconds / 5)
                    async with asyncio.timeout(self._seconds / 3):
                        if not await self._try():
                            return
            except (ApiError, TimeoutError) as error:
                _log.warning("the lease was not renewed", extra={"cause": str(error)})

    async def release(self) -> None:
        """Let go, so that a standby takes over at once."""
        if self._held is None:
            return
        try:
            await self._cluster.replace(LEASE, self._record(self._held, holder=""))
        except ApiError as error:
            _log.warning("the lease was not given back", extra={"cause": error.message})
        self._held = None

    async def _try(self) -> bool:
        """Take or renew the lease; return whether it is ours. Raises `ApiError`: then nobody knows.

        Whoever wrote at the same moment need not have taken it: it may have been a label. A second look tells.
        """
        for tries_left in reversed(range(_MOST_CONFLICTS)):
            try:
                return await self._try_once()
            except ApiError as error:
                if error.code != 409 or not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _try_once(self) -> bool:
        began = time.monotonic()
        known = await self._cluster.get(LEASE, self._namespace, self._name)
        if known is None:
            self._held = await self._cluster.create(LEASE, self._record(None, holder=self._identity))
        elif self._may_take(known):
            self._held = await self._cluster.replace(LEASE, self._record(known, holder=self._identity))
        else:
            return False
        self._renewed_at = began
        return True

    def _may_take(self, known: Object) -> bool:
        holder = known["spec"].get("holderIdentity")
        if holder in (None, "", self._identity):
            return True
        version = known["metadata"]["resourceVersion"]
        if version != self._seen_version:
            self._seen_version, self._seen_at = version, time.monotonic()
        promised_s = float(known["spec"].get("leaseDurationSeconds", self._seconds))
        return time.monotonic() - self._seen_at > promised_s

    def _record(self, known: Object | None, *, holder: str) -> Object:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = known["spec"] if known else {}
        is_same = before.get("holderIdentity") == holder
        spec = {
            "holderIdentity": holder,
            # 1 for a lease that is let go: those that do not look at the holder need not wait either
            "leaseDurationSeconds": self._seconds if holder else 1,
            "acquireTime": before.get("acquireTime", now) if is_same else now,
            "renewTime": now,
            "leaseTransitions": before.get("leaseTransitions", 0) + (0 if is_same or not holder or not known else 1),
        }
        metadata = known["metadata"] if known else {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}
