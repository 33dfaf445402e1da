"""The vocabulary that `types` and `status` are written in: the base class of API objects and bounded field types.

It hides three habits of the Kubernetes API: camelCase names, null meaning absent, and cross-field rules that live
beside the schema (`rules`). Outside this package, only the settings of the operator are written in it.
"""

from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError

from phoenix_api.rules import rules_of

_MOST_LEVELS = 32  # of objects that are passed on; those of Kubernetes have fewer than ten


def _without_nulls(data: Any) -> Any:
    return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what only an attack nests so deeply: who copies or writes it would run out of stack."""
    level: list[Any] = [value]
    for _ in range(_MOST_LEVELS):
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)
                 if isinstance(child, dict | list)]  # fmt: skip
        if not level:
            return value
    raise PydanticCustomError("rule", f"expected a nesting of at most {_MOST_LEVELS} levels")


class ApiObject(BaseModel):
    """An immutable object of the API. Unknown fields are refused, unless the reader asks for lenience."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        frozen=True,
        defer_build=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Drop nulls, as kubectl and the API server do."""
        return _without_nulls(data)

    @model_validator(mode="after")
    def _obeys_its_rules(self) -> Self:
        broken = [rule for rule in rules_of(type(self)) if not rule.holds(self)]
        if broken:
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("rule", rule.message),
                    loc=rule.location,
                    input=rule.value_of(self),
                )
                for rule in broken
            ]
            raise ValidationError.from_exception_data(type(self).__name__, details)
        return self


def text(pattern: str, expects: str, *, max_length: int) -> Any:
    """Annotation of a string that matches `pattern`; `expects` says in words what that is, for messages."""
    # StringConstraints alone has no place for words, Field alone would lose them when the type is nested
    return Field(pattern=pattern, max_length=max_length, json_schema_extra={"x-expects": expects})


Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
FreeText = Annotated[str, StringConstraints(max_length=1024)]

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DnsLabel = Annotated[str, text(f"^{_LABEL}$", "a DNS label (a-z, 0-9 and -)", max_length=63)]
DnsName = Annotated[str, text(rf"^{_LABEL}(\.{_LABEL})*$", "a DNS name (a-z, 0-9, - and .)", max_length=253)]
LabelValue = Annotated[
    str, text("^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", "a Kubernetes label value", max_length=63)
]
# Kafka's own limit and characters; empty stands for the default topic.
Topic = Annotated[
    str, text("^([A-Za-z0-9_-][A-Za-z0-9._-]*)?$", "a Kafka topic name (A-Z, a-z, 0-9, ., _ and -)", max_length=249)
]
NullIsAbsent = BeforeValidator(_without_nulls)
"""For maps: the API server drops their nulls too."""
Labels = Annotated[dict[str, LabelValue], Field(max_length=64), NullIsAbsent]
Passthrough = Annotated[
    dict[str, Any],
    Field(max_length=64),
    AfterValidator(_shallow),
    WithJsonSchema({"type": "object", "maxProperties": 64, "x-kubernetes-preserve-unknown-fields": True}),
]
"""A Kubernetes object that is handed on as it is; the API server checks it when the operator applies it.

How deep it nests is the one thing that a CRD cannot bound: such a model is stored, and not accepted by the operator.
"""
