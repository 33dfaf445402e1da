"""Hides the notation of Kubernetes quantities ("64Mi", "200m", 1); used by `types` and `status`, read by everybody.

Notation: k8s.io/apimachinery/pkg/api/resource. The same expression goes into the CRD as a pattern, so that both sides
accept the same strings.
"""

import re
from decimal import Context, Decimal
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

QUANTITY_PATTERN = r"^([0-9]{1,18}(\.[0-9]{0,9})?|\.[0-9]{1,9})([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$"
QUANTITY_MAX_LENGTH = 32
_MOST_INTEGER = 2**53  # of one that is written without quotes: a bound in a JSON schema is a double
_FACTORS = {
    "": Decimal(1),
    **{suffix: Decimal(10) ** (3 * power) for power, suffix in enumerate("num", start=-3)},
    **{suffix: Decimal(10) ** (3 * power) for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}
_EXACT = Context(prec=64)  # 18 digits, 9 decimals, and 19 digits of Ei
_PARTS = re.compile(r"([+-]?[0-9.]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?", re.ASCII)


def amount(written: str) -> Decimal:
    """Return the exact amount of a quantity as Kubernetes stores it, which may have more digits than a manifest may.

    Raises `ValueError` for what is none.
    """
    parts = _PARTS.fullmatch(written)
    try:
        if parts is None:
            raise ValueError(written)
        number, suffix = Decimal(parts[1]), parts[2] or ""
        return _EXACT.multiply(number, _FACTORS[suffix]) if suffix in _FACTORS else number.scaleb(int(suffix[1:]))
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"expected a quantity of Kubernetes, got {written[:64]!r}") from error


class Quantity(str):
    """An amount as written in a manifest, for example `64Mi`; never negative. `value` is the exact amount.

    It stays the string that was written, so that a manifest is dumped as it was read. A YAML integer is accepted, a
    YAML float is not: the API server refuses it too (int-or-string).
    """

    __slots__ = ()
    _expression: ClassVar[re.Pattern[str]] = re.compile(QUANTITY_PATTERN, re.ASCII)

    def __new__(cls, text: str | int) -> "Quantity":
        """Check the notation. Raises `ValueError` for anything that Kubernetes would not read as an amount."""
        written = str(text)
        if len(written) > QUANTITY_MAX_LENGTH or not cls._expression.fullmatch(written):
            raise ValueError(f"expected a quantity such as 64Mi, 200m or 1, got {written[:64]!r}")
        return super().__new__(cls, written)

    @property
    def value(self) -> Decimal:
        """The exact amount in the base unit (bytes, seconds, cores): `Quantity("200m").value == Decimal("0.2")`."""
        return amount(self)

    def __float__(self) -> float:
        return float(self.value)

    def __int__(self) -> int:
        return int(self.value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read strings and integers."""
        return core_schema.no_info_plain_validator_function(cls._read)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe it as Kubernetes' int-or-string."""
        return {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": QUANTITY_PATTERN,
            "minimum": 0,
            "maximum": _MOST_INTEGER,
            "maxLength": QUANTITY_MAX_LENGTH,
            "x-expects": "a quantity such as 64Mi, 200m or 1",
        }

    @classmethod
    def _read(cls, value: Any) -> "Quantity":
        # bool is an int in Python, but `cpu: true` is no quantity
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise PydanticCustomError(
                "quantity", "expected a quantity such as 64Mi, 200m or 1, as a string or an integer"
            )
        try:
            if isinstance(value, int) and value > _MOST_INTEGER:
                raise ValueError("too large for a number of JSON")
            return cls(value)
        except ValueError as error:
            raise PydanticCustomError("quantity", "expected a quantity such as 64Mi, 200m or 1") from error
