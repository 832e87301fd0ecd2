"""Hyperparameters that may differ between experts: a number, a mapping of experts' names to numbers, or numbers in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter

from moerge.errors import InputError


class PerExpert(dict[str, float]):
    """A value for each expert, by name; `MergeMethod.for_experts` puts them in order."""

    def __hash__(self) -> int:  # type: ignore[override]  # methods are frozen and hashable, and so is what they hold
        return hash(tuple(sorted(self.items())))

    def ordered(self, what: str, names: Sequence[str]) -> Ordered:
        """The values of some experts; InputError if one is missing."""
        missing = next((name for name in names if name not in self), None)
        if missing is not None:
            raise InputError(f"{what} has no value for the expert {missing!r}: add one")
        return Ordered(self[name] for name in names)


class Ordered(tuple[float, ...]):
    """A value for each expert, in their order."""


Values = float | PerExpert | Ordered


def each(values: Values, experts: int) -> tuple[float, ...]:
    """One value for each of so many experts."""
    assert not isinstance(values, PerExpert), "for_experts comes first"
    assert not isinstance(values, Ordered) or len(values) == experts, "check_experts comes first"
    return values if isinstance(values, Ordered) else (values,) * experts


def numbers(values: Values) -> tuple[float, ...]:
    """All values, whoever they are for."""
    return tuple(values.values()) if isinstance(values, PerExpert) else values if isinstance(values, Ordered) else (values,)


def pairs(first: Values, second: Values) -> list[tuple[float, float]]:
    """Each expert's two values."""
    if isinstance(first, PerExpert) and isinstance(second, PerExpert):
        return [(value, second[name]) for name, value in first.items() if name in second]
    count = max(len(numbers(first)), len(numbers(second)))
    listed = [numbers(values) if len(numbers(values)) == count else numbers(values) * count for values in (first, second)]
    return list(zip(*listed, strict=False))


def _by_expert(number: Any) -> Any:
    one, named, listed = TypeAdapter(number), TypeAdapter(dict[str, number]), TypeAdapter(tuple[number, ...])

    def validate(value: Any) -> Any:
        if isinstance(value, Mapping):
            return PerExpert(named.validate_python(dict(value)))
        if isinstance(value, list | tuple):
            return Ordered(listed.validate_python(tuple(value)))
        return one.validate_python(value)

    return validate


_Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
_Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]
_AS_IT_IS = PlainSerializer(lambda value: dict(value) if isinstance(value, dict) else value)

Density = Annotated[Values, PlainValidator(_by_expert(_Density)), _AS_IT_IS]
"""A fraction kept, in (0, 1]."""
Proportion = _Density
"""A fraction in (0, 1], the same for all experts."""
Share = Annotated[Values, PlainValidator(_by_expert(_Share)), _AS_IT_IS]
"""A fraction in [0, 1)."""
