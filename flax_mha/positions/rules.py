"""Rules of the fields of positions: (name, value) -> the normalized value."""

from typing import Any

from flax_mha.core import checks
from flax_mha.core.frozen import number

nonnegative = number(low=0)


def size(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=1)


def optional_size(name: str, value: Any) -> int | None:
    return None if value is None else size(name, value)


def optional_positive(name: str, value: Any) -> float | None:
    return None if value is None else checks.positive(name, value)


def optional_nonnegative(name: str, value: Any) -> float | None:
    return None if value is None else nonnegative(name, value)


def proportion(name: str, value: Any) -> float:
    if checks.positive(name, value) > 1:
        checks.fail(ValueError, f"`{name}` must be in (0, 1].", f"{value!r}")
    return float(value)


def factors(name: str, value: Any) -> tuple[float, ...]:
    """A number for each pair of features."""
    rule = f"`{name}` must be numbers > 0, one for each pair of features that turn."
    if not isinstance(value, tuple | list):
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")
    return tuple(checks.positive(name, factor) for factor in value)


def sections(name: str, value: Any) -> tuple[int, ...]:
    """A number of pairs for each axis."""
    rule = f"`{name}` must be the number of pairs of each axis, such as (16, 24, 24)."
    if not isinstance(value, tuple | list):
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")
    counts = tuple(size(name, count) for count in value)
    return counts or checks.fail(ValueError, rule, f"{value!r}")


def even(name: str, value: Any) -> int | None:
    if value is not None and checks.integer(name, value, minimum=1) % 2:
        checks.fail(ValueError, f"`{name}` must be even: features turn in pairs.", f"{value}")
    return value
