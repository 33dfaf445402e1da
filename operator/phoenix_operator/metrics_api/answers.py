"""What is answered: lists of values in both versions of the API, quantities, and failures as Status objects. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from phoenix_operator.kinds import PHOENIX_MODEL
from phoenix_operator.metrics_api.label_selector import Selector
from phoenix_operator.metrics_api.names import GROUP
from phoenix_operator.metrics_api.readings import Reading

Document = dict[str, Any]
_NAMESPACE = re.compile("[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile("[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")


class Failure(Exception):
    """An answer that is no success: HTTP code, the reason of the Status, and words."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message

    def document(self) -> Document:
        """Return the Status object."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }


@dataclass(frozen=True, slots=True)
class Question:
    """What a request is about. `name` is that of a model, or `*`."""

    version: str
    namespace: str
    resource: str
    name: str
    metric: str

    @property
    def is_possible(self) -> bool:
        """Whether there could be objects of these names; they become parts of paths and keys of what is kept."""
        names = (self.resource, self.metric, "x" if self.is_about_all else self.name)
        return bool(_NAMESPACE.fullmatch(self.namespace)) and all(_NAME.fullmatch(name) for name in names)

    @property
    def is_about_all(self) -> bool:
        """Whether it asks for every model of the namespace."""
        return self.name == "*"


def quantity(value: float) -> str:
    """Return a value of 0 or more as a Kubernetes quantity, exact to a millionth; above 0 it is never 0.

    Millionths and not thousandths: a latency of 0.4 ms is `400u`. Who takes thousandths of it, as the autoscaler does,
    rounds up (`Quantity.MilliValue`). Not more than millionths: the noise of a float, 3.0000000000000004, would become
    3.001 that way.
    """
    micro = int((Decimal(value) * 1_000_000).to_integral_value(ROUND_HALF_EVEN))
    if micro == 0 and value > 0:
        micro = 1
    if micro % 1_000_000 == 0:
        return str(micro // 1_000_000)
    return f"{micro // 1000}m" if micro % 1000 == 0 else f"{micro}u"


def value_list(question: Question, values: Iterable[tuple[str, Reading]], selector: Selector) -> Document:
    """Return a MetricValueList in the version that was asked for."""
    return {
        "kind": "MetricValueList",
        "apiVersion": f"{GROUP}/{question.version}",
        "metadata": {},
        "items": [_item(question, name, reading, selector) for name, reading in values],
    }


def _item(question: Question, name: str, reading: Reading, selector: Selector) -> Document:
    described = {
        "kind": PHOENIX_MODEL.kind,
        "namespace": question.namespace,
        "name": name,
        "apiVersion": PHOENIX_MODEL.api_version,
    }
    value = {"timestamp": _time(reading.at), "value": quantity(reading.value)}
    chosen = selector.as_object()
    if question.version == "v1beta1":
        return {"describedObject": described, "metricName": question.metric, **value, "selector": chosen}
    return {"describedObject": described, "metric": {"name": question.metric, "selector": chosen}, **value}


def _time(at: float) -> str:
    return datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
