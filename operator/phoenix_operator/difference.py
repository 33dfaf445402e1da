"""Whether a live object already is what the operator wants, so that nothing need be sent.

Two questions: was the wish the same when the object was last applied (the hash annotation), and does the live object
still hold every field of the wish? Fields that others own are none of our business, and the API server's own ways of
writing things down (defaults, empty values left out, quantities in their shortest form) are no difference.
"""

from phoenix_api import Quantity
from phoenix_operator.observed import HASH, Object

# Fields of a list's members that identify them, as in the API's own list-map keys; other lists are compared in order.
_MERGE_KEYS = ("name", "containerPort", "mountPath", "uid")
_QUANTITY_FIELDS = {"requests", "limits", "sizeLimit", "divisor"}


def is_as_wanted(wanted: Object, live: Object) -> bool:
    """Return whether applying `wanted` would change nothing in `live`."""
    annotations = live["metadata"].get("annotations") or {}
    is_same_wish = annotations.get(HASH) == wanted["metadata"]["annotations"][HASH]
    return is_same_wish and _holds(wanted, live, is_quantity=False)


def _holds(wanted: object, live: object, *, is_quantity: bool) -> bool:
    if wanted in (None, "", [], {}):
        return live in (None, "", [], {})
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            _holds(value, live.get(key), is_quantity=is_quantity or key in _QUANTITY_FIELDS)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(live, list) and _list_holds(wanted, live, is_quantity=is_quantity)
    return wanted == live or (is_quantity and _amount(wanted) == _amount(live) is not None)


def _list_holds(wanted: list[object], live: list[object], *, is_quantity: bool) -> bool:
    key = next((key for key in _MERGE_KEYS if all(isinstance(row, dict) and key in row for row in wanted)), None)
    if key is None:
        pairs = list(zip(wanted, live, strict=False))
        return len(wanted) == len(live) and all(_holds(mine, theirs, is_quantity=is_quantity) for mine, theirs in pairs)
    by_key = {row[key]: row for row in live if isinstance(row, dict) and key in row}
    return all(
        _holds(row, by_key.get(row[key]), is_quantity=is_quantity)
        for row in wanted
        if isinstance(row, dict)  # all are, or there was no key
    )


def _amount(value: object) -> object:
    try:
        return Quantity(value).value if isinstance(value, str | int) else None
    except ValueError:
        return None
