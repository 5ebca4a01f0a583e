"""What initializers, regularizers and constraints share: frozen objects that check their fields.

A field's type says its rule, `l2: NonNegative = 0.01`; the rule also normalizes the value, so that
equal objects are equal, hash alike and are written to JSON alike.
"""

import dataclasses
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array, Shape

EPSILON = 1e-7  # keras.config.epsilon(): below it a norm counts as zero


@dataclasses.dataclass(frozen=True)
class Frozen(ABC):
    """A Keras object as a value: hashable, equal by its fields, usable as a static argument."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            for rule in getattr(field.type, "__metadata__", ()):
                name = f"{type(self).__name__}.{field.name}"
                object.__setattr__(self, field.name, rule(name, getattr(self, field.name)))

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the object computes, of arrays."""


def arguments(cls: type[Frozen]) -> tuple[str, ...]:
    """The names of the constructor's arguments, in order."""
    return tuple(field.name for field in dataclasses.fields(cls) if field.init)


# --- rules: (name, value) -> the normalized value -----------------------------------------------


def number(low: float = -math.inf, high: float = math.inf, positive: bool = False) -> Callable:
    """The rule of a finite number in [low, high]; `positive` leaves 0 out."""
    bounds = {-math.inf: "", 0: " >= 0", 1: " in [0, 1]"}
    kind = "a finite number" + (" > 0" if positive else bounds[high if high == 1 else low])

    def rule(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            evidence = f"{value!r} of type {type(value).__name__}"
            checks.fail(TypeError, f"`{name}` must be {kind}.", evidence, "Pass a Python float.")
        result = checks.as_float(value)
        if not (math.isfinite(result) and low <= result <= high) or (positive and result == 0):
            checks.fail(ValueError, f"`{name}` must be {kind}.", checks.shortened(value))
        return result

    return rule


def seed(name: str, value: Any) -> int | None:
    """None, or the 32 bits from which Keras makes a key on JAX."""
    if value is None:
        return None
    if not hasattr(value, "__index__"):
        rule = f"`{name}` must be None or an integer."
        remedy = "A frozen object holds no random state: pass the integer that seeds it."
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}", remedy)
    if not 0 <= checks.integer(name, value) < 2**32:
        rule = f"`{name}` must be in [0, 2**32), for it is one word of a PRNG key."
        checks.fail(ValueError, rule, repr(value), f"Pass `seed % 2**32` = {value % 2**32}.")
    return checks.integer(name, value)


def optional_axes(name: str, value: Any) -> tuple[int, ...] | None:
    return None if value is None else checks.axes(name, value)


def axis_or_axes(name: str, value: Any) -> int | tuple[int, ...] | None:
    """An int stays an int, as Keras writes it; None means all axes."""
    axes = optional_axes(name, value)
    return axes[0] if axes is not None and hasattr(value, "__index__") else axes


def choice(*valid: str) -> Callable:
    return lambda name, value: checks.one_of(name, value, valid)


Number: TypeAlias = Annotated[float, number()]
NonNegative: TypeAlias = Annotated[float, number(low=0)]
Positive: TypeAlias = Annotated[float, number(low=0, positive=True)]
Fraction: TypeAlias = Annotated[float, number(low=0, high=1)]
Seed: TypeAlias = Annotated[int | None, seed]
OptionalAxes: TypeAlias = Annotated[tuple[int, ...] | None, optional_axes]
Axes: TypeAlias = Annotated[int | tuple[int, ...] | None, axis_or_axes]


# --- arrays -------------------------------------------------------------------------------------


def axes_within(name: str, axes: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
    """`axes`, counted from the front, each of them an axis of `shape` and none twice."""
    rank = len(shape)
    counted = tuple(axis % rank for axis in axes if -rank <= axis < rank)
    if len(set(counted)) != len(axes):
        rule = f"`{name}` must be different axes of the array, of rank {rank}."
        checks.fail(ValueError, rule, f"{name}={axes} and shape {tuple(shape)}")
    return counted


def at_least_float32(x: Array) -> Array:
    return jnp.asarray(x).astype(wide_dtype(jnp.asarray(x).dtype))
