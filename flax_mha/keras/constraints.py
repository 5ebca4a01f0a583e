"""Keras's constraints: projections of one array of weights, `constraint(w) -> w`.

Each is a frozen value; `flax_mha.apply_constraints` and `flax_mha.constrain` apply them to whole
parameter trees. Norms are Euclidean, along `axis`: an int, several ints, or None for all axes.

    Kernels are [D, N, H] (query, key, value) and [N, V, E] (output), so that Keras's default
    `axis=0` measures a vector of features in the first, and one across heads in the last.

Differs from Keras: (1) 16-bit weights are projected in float32, then rounded back; (2) bounds that
no weights can meet are refused.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.frozen import (
    EPSILON,
    Axes,
    Fraction,
    Frozen,
    NonNegative,
    at_least_float32,
    axes_within,
)
from flax_mha.core.typing import Array


class Constraint(Frozen):
    """A projection of one array of weights."""

    def __call__(self, w: Array) -> Array:
        """`w` projected; its shape and dtype stay.

        Raises:
            TypeError: `w` is no array of floating-point numbers.
            ValueError: an axis of the norm is none of `w`.
        """
        checks.floating_array("w", w, "of weights")
        return self._projected(at_least_float32(w)).astype(w.dtype)

    @abstractmethod
    def _projected(self, w: Array) -> Array: ...


@dataclass(frozen=True)
class NonNeg(Constraint):
    """Weights of at least 0: `max(w, 0)`.

    Example:
        >>> import jax.numpy as jnp
        >>> NonNeg()(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    def _projected(self, w: Array) -> Array:
        return jnp.maximum(w, 0)


@dataclass(frozen=True)
class MaxNorm(Constraint):
    """A norm of at most `max_value`: `w * min(|w|, max_value) / (|w| + 1e-7)`.

    Args:
        max_value: the largest norm.
        axis: the axis, or axes, along which the norm is taken.

    Example:
        >>> import jax.numpy as jnp
        >>> MaxNorm(1.0)(jnp.array([[3.0], [4.0]])).round(3).tolist()
        [[0.6000000238418579], [0.800000011920929]]
    """

    max_value: NonNegative = 2
    axis: Axes = 0

    def _projected(self, w: Array) -> Array:
        return _with_norm(lambda norm: jnp.minimum(norm, self.max_value), w, self.axis)


@dataclass(frozen=True)
class UnitNorm(Constraint):
    """A norm of 1: `w / (|w| + 1e-7)`; weights that are all 0 stay 0.

    Args:
        axis: the axis, or axes, along which the norm is taken.

    Example:
        >>> import jax.numpy as jnp
        >>> UnitNorm()(jnp.array([[3.0], [4.0]])).round(3).tolist()
        [[0.6000000238418579], [0.800000011920929]]
    """

    axis: Axes = 0

    def _projected(self, w: Array) -> Array:
        return _with_norm(jnp.ones_like, w, self.axis)


@dataclass(frozen=True)
class MinMaxNorm(Constraint):
    """A norm drawn towards [min_value, max_value]: `w * desired / (|w| + 1e-7)`.

        desired = rate * clip(|w|, min_value, max_value) + (1 - rate) * |w|

    Args:
        min_value: the smallest norm.
        max_value: the largest norm.
        rate: 1 enforces the bounds at once; less goes that part of the way each time.
        axis: the axis, or axes, along which the norm is taken.

    Example:
        >>> import jax.numpy as jnp
        >>> MinMaxNorm(max_value=1.0, rate=0.5)(jnp.array([[0.0], [4.0]])).tolist()
        [[0.0], [2.5]]
    """

    min_value: NonNegative = 0.0
    max_value: NonNegative = 1.0
    rate: Fraction = 1.0
    axis: Axes = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_value > self.max_value:
            rule = "`MinMaxNorm.min_value` must be at most `max_value`."
            evidence = f"min_value={self.min_value}, max_value={self.max_value}"
            checks.fail(ValueError, rule, evidence, "Are the two swapped?")

    def _projected(self, w: Array) -> Array:
        return _with_norm(self._desired, w, self.axis)

    def _desired(self, norm: Array) -> Array:
        clipped = jnp.clip(norm, self.min_value, self.max_value)
        return self.rate * clipped + (1 - self.rate) * norm


def _with_norm(
    desired: Callable[[Array], Array], w: Array, axis: int | tuple[int, ...] | None
) -> Array:
    """`w * desired(|w|) / (|w| + 1e-7)`, with |w| the norm along `axis`."""
    axes = (axis,) if isinstance(axis, int) else axis
    axes = tuple(range(w.ndim)) if axes is None else axes_within("axis", axes, w.shape)
    norm = jnp.sqrt(jnp.sum(jnp.square(w), axis=axes, keepdims=True))
    return w * (desired(norm) / (norm + EPSILON))
