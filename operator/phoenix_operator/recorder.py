"""Kubernetes events about a model: what `kubectl describe` shows. One for each change, the same one counted up.

An event tells that something happened; what holds is in the conditions. One that cannot be written is counted and
dropped: no reconcile waits for it or fails with it.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from phoenix_api import ConditionType, Reason
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.desired.naming import OPERATOR, digest
from phoenix_operator.kinds import EVENT, PHOENIX_MODEL
from phoenix_operator.metrics import Metrics
from phoenix_operator.observed import Object, Subject, stamp

_log = logging.getLogger(__name__)
_MOST_REMEMBERED = 4096
# Reasons that every start goes through: telling of them says nothing.
_USUAL = {"Loading", "Unknown", "SpecUnderstood", "ReplicasAvailable"}


@dataclass(frozen=True, slots=True)
class Happening:
    """What an event says."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def happenings(before: Sequence[Object], after: Sequence[Object]) -> list[Happening]:
    """Return what is worth an event in the change from one list of conditions to the next."""
    old = {row["type"]: row for row in before}
    found: dict[str, Happening] = {}
    causes = {row["reason"] for row in after if row["status"] == "False"}
    for row in after:
        was = old.get(row["type"], {})
        is_new = (was.get("status"), was.get("reason")) != (row["status"], row["reason"])
        if not is_new or row["reason"] in _USUAL:
            continue
        is_ready = row["type"] == ConditionType.READY
        if row["status"] == "False" and not is_ready:
            # one cause often fails several conditions: it is told once
            if row["reason"] == Reason.CRASH_LOOP and row["message"].partition(":")[0] in causes:
                continue
            # no pods are what was asked for
            kind: Literal["Normal", "Warning"] = "Normal" if row["reason"] == Reason.SCALED_TO_ZERO else "Warning"
            found.setdefault(row["reason"], Happening(kind, row["reason"], row["message"]))
        elif row["reason"] == Reason.SCHEMA_CHANGED:
            found.setdefault(row["reason"], Happening("Warning", row["reason"], row["message"]))
        elif row["status"] == "True" and (is_ready or (row["type"] == ConditionType.PROGRESSING and was)):
            found.setdefault(row["reason"], Happening("Normal", row["reason"], row["message"]))
    return list(found.values())


class Recorder:
    """Writes events in the model's namespace."""

    def __init__(self, cluster: Cluster, metrics: Metrics, *, host: str) -> None:
        self._cluster, self._metrics, self._host = cluster, metrics, host
        self._known: OrderedDict[tuple[str, str], Object] = OrderedDict()

    async def record(self, subject: Subject, happened: Happening, now: datetime) -> None:
        """Write an event, or count up the one that says the same."""
        name = f"{subject.name}.{digest([subject.uid, happened.type, happened.reason, happened.message])}"
        at = stamp(now)
        try:
            known = self._known.get((subject.namespace, name))
            if known is None:
                known = await self._cluster.get(EVENT, subject.namespace, name)
            if known is None:
                stored = await self._cluster.create(EVENT, self._event(subject, happened, name, at))
            else:
                counted = known | {"count": known.get("count", 1) + 1, "lastTimestamp": at}
                stored = await self._cluster.replace(EVENT, counted)
        except ApiError as error:
            self._known.pop((subject.namespace, name), None)
            self._metrics.events_dropped.inc()
            if not error.is_namespace_ending:
                _log.warning("event not written", extra={"model": subject.name, "cause": error.message})
            return
        self._known[subject.namespace, name] = stored
        if len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)

    def _event(self, subject: Subject, happened: Happening, name: str, at: str) -> Object:
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": name, "namespace": subject.namespace},
            "involvedObject": {
                "apiVersion": PHOENIX_MODEL.api_version,
                "kind": PHOENIX_MODEL.kind,
                "name": subject.name,
                "namespace": subject.namespace,
                "uid": subject.uid,
            },
            "type": happened.type,
            "reason": happened.reason,
            "message": happened.message[:1024],
            "source": {"component": OPERATOR},
            "reportingComponent": "phoenix-ml.io/operator",
            "reportingInstance": self._host,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }
