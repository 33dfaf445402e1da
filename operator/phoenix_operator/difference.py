"""Whether a live object already is what the operator wants, so that nothing need be sent.

Two questions: was the wish the same when the object was last applied (the hash annotation), and does the live object
still hold every field of the wish? Fields that others own are none of our business, and the API server's own ways of
writing things down (defaults, empty values left out, quantities in their shortest form) are no difference.
"""

from decimal import ROUND_UP, Context, Decimal

from phoenix_api.quantity import amount
from phoenix_operator.observed import HASH, Object

# Lists that the API keeps as maps, by field, with what identifies a member: others may add members of their own. Every
# other list belongs to one owner as a whole, and is compared in order.
_MAP_KEYS = {
    "ownerReferences": ("uid",),
    "containers": ("name",),
    "env": ("name",),
    "ports": ("name",),  # of containers and Services; those of a NetworkPolicy have no name and are one owner's
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "imagePullSecrets": ("name",),
    "resourceClaims": ("name",),
    "claims": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}
# Objects that the API keeps whole: a label that somebody adds to a selector makes it select nothing.
_WHOLE = {"selector", "podSelector", "namespaceSelector", "labelSelector", "nodeSelector"}
_EXACT = Context(prec=64, rounding=ROUND_UP)
_LEAST, _MOST = Decimal("0.001"), Decimal(2**63 - 1)
_QUANTITY_FIELDS = {"requests", "limits", "sizeLimit", "divisor"}


def is_as_wanted(wanted: Object, live: Object) -> bool:
    """Return whether applying `wanted` would change nothing in `live`."""
    annotations = live["metadata"].get("annotations") or {}
    is_same_wish = annotations.get(HASH) == wanted["metadata"]["annotations"][HASH]
    return is_same_wish and _holds(wanted, live)


def _holds(wanted: object, live: object, *, field: str = "", is_quantity: bool = False) -> bool:
    if wanted in (None, "", [], {}):
        return live in (None, "", [], {})
    if field in _WHOLE:
        return wanted == live
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            _holds(value, live.get(key), field=key, is_quantity=is_quantity or key in _QUANTITY_FIELDS)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(live, list) and _list_holds(wanted, live, field)
    return wanted == live or (is_quantity and _amount(wanted) == _amount(live) is not None)


def _list_holds(wanted: list[object], live: list[object], field: str) -> bool:
    mine, theirs = _by_key(wanted, field), _by_key(live, field)
    if mine is None or theirs is None:
        return len(wanted) == len(live) and all(_holds(*pair) for pair in zip(wanted, live, strict=True))
    return all(_holds(row, theirs.get(key)) for key, row in mine.items())


def _by_key(rows: list[object], field: str) -> dict[tuple[object, ...], object] | None:
    """Return the members of a list that is a map; None if it is none."""
    names = _MAP_KEYS.get(field)
    if names is None:
        return None
    found: dict[tuple[object, ...], object] = {
        tuple(row.get(name) for name in names): row for row in rows if isinstance(row, dict)
    }
    is_map = len(found) == len(rows) and not any(None in key for key in found)
    return found if is_map else None


def _amount(value: object) -> object:
    """Return the amount that the API server stores: whole thousandths, rounded up, no more than an int64 holds."""
    if not isinstance(value, str | int):
        return None
    try:
        return min(amount(str(value)), _MOST).quantize(_LEAST, context=_EXACT)
    except ValueError:
        return None
