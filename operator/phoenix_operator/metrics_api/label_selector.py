"""Label selectors as in the query of a list: `a=b,c!=d,e in (f,g),h notin (i),j,!k`. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 4096
_NAME = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY = rf"(?:[a-z0-9][-a-z0-9.]{{0,252}}/)?{_NAME}"
_VALUE = rf"(?:{_NAME})?"
_REQUIREMENT = re.compile(
    rf"""\s*(?:
        !\s*(?P<absent>{_KEY})
      | (?P<key>{_KEY})\s*(?:
            (?P<sign>==|=|!=)\s*(?P<value>{_VALUE})
          | \s(?P<word>in|notin)\s*\((?P<values>[^()]*)\)
        )?
    )\s*(?:,|$)""",
    re.VERBOSE,
)
_VALUES = re.compile(rf"\s*{_VALUE}\s*(?:,\s*{_VALUE}\s*)*")


class SelectorError(ValueError):
    """A selector that cannot be read."""


@dataclass(frozen=True, slots=True)
class _Requirement:
    """As in `matchExpressions`: `In` and `NotIn` with values, `Exists` and `DoesNotExist` without."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if self.operator in ("Exists", "DoesNotExist"):
            return (value is not None) == (self.operator == "Exists")
        # who has not the label at all is not in the set
        return (value in self.values) == (self.operator == "In")


@dataclass(frozen=True, slots=True)
class Selector:
    """Requirements that all hold; none is everything."""

    requirements: tuple[_Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether labels are selected."""
        return all(requirement.matches(labels) for requirement in self.requirements)

    def as_object(self) -> dict[str, Any] | None:
        """Return it as a LabelSelector of the API; None for everything."""
        if not self.requirements:
            return None
        rows: Sequence[dict[str, Any]] = [
            {"key": row.key, "operator": row.operator, **({"values": list(row.values)} if row.values else {})}
            for row in self.requirements
        ]
        return {"matchExpressions": rows}


def parse_selector(text: str) -> Selector:
    """Return the selector that a query parameter holds. Raises `SelectorError`."""
    if len(text) > _LONGEST:
        raise SelectorError(f"expected a label selector of at most {_LONGEST} characters, got {len(text)}")
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _REQUIREMENT.match(text, at)
        if match is None or (match["values"] is not None and not _VALUES.fullmatch(match["values"])):
            raise SelectorError(f"expected a label selector, got {text[:80]!r}; see its character {at + 1}")
        found.append(_requirement(match))
        at = match.end()
    if text.rstrip().endswith(","):
        raise SelectorError(f"expected a label selector, got {text[:80]!r}; it ends with a comma")
    return Selector(tuple(found))


def _requirement(match: "re.Match[str]") -> _Requirement:
    if match["absent"]:
        return _Requirement(match["absent"], "DoesNotExist")
    if match["sign"]:
        return _Requirement(match["key"], "NotIn" if match["sign"] == "!=" else "In", (match["value"],))
    if match["word"]:
        values = tuple(value.strip() for value in match["values"].split(","))
        return _Requirement(match["key"], "In" if match["word"] == "in" else "NotIn", values)
    return _Requirement(match["key"], "Exists")
