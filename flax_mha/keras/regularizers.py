"""Keras's regularizers: penalties of one array, `regularizer(x) -> scalar`.

Each is a frozen value; whole parameter trees are summed by `flax_mha.regularization_loss`.

Differs from Keras: (1) a 16-bit array is summed, and its penalty given, in float32; (2) factors
keep the digits that were typed, where Keras rounds some to float32; (3) an orthogonal regularizer
gives 0, not NaN, for a single row, and a row of zeros has no direction: its gradient is 0.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from jax import lax

from flax_mha.core import checks
from flax_mha.core.frozen import EPSILON, Frozen, NonNegative, at_least_float32, choice
from flax_mha.core.typing import Array


class Regularizer(Frozen):
    """A penalty of one array."""

    def __call__(self, x: Array) -> Array:
        """The penalty of `x`, a scalar of its dtype, at least float32.

        Raises:
            TypeError: `x` is no array of floating-point numbers.
        """
        checks.floating_array("x", x, "of weights")
        return self._penalty(at_least_float32(x))

    @abstractmethod
    def _penalty(self, x: Array) -> Array: ...


@dataclass(frozen=True)
class L1(Regularizer):
    """The penalty `l1 * sum |x|`.

    Args:
        l1: the factor.

    Example:
        >>> import jax.numpy as jnp
        >>> float(L1(0.5)(jnp.array([1.0, -3.0])))
        2.0
    """

    l1: NonNegative = 0.01

    def _penalty(self, x: Array) -> Array:
        return self.l1 * jnp.sum(jnp.abs(x))


@dataclass(frozen=True)
class L2(Regularizer):
    """The penalty `l2 * sum x^2`.

    Args:
        l2: the factor.

    Example:
        >>> import jax.numpy as jnp
        >>> float(L2(0.5)(jnp.array([1.0, -3.0])))
        5.0
    """

    l2: NonNegative = 0.01

    def _penalty(self, x: Array) -> Array:
        return self.l2 * jnp.sum(jnp.square(x))


@dataclass(frozen=True)
class L1L2(Regularizer):
    """The penalty `l1 * sum |x| + l2 * sum x^2`.

    Both factors are 0 unless given, as in Keras: the bare name "l1l2" penalizes nothing.

    Args:
        l1: the factor of sum |x|.
        l2: the factor of sum x^2.

    Example:
        >>> import jax.numpy as jnp
        >>> float(L1L2(l1=0.5, l2=0.5)(jnp.array([1.0, -3.0])))
        7.0
    """

    l1: NonNegative = 0.0
    l2: NonNegative = 0.0

    def _penalty(self, x: Array) -> Array:
        return L1(self.l1)(x) + L2(self.l2)(x)


@dataclass(frozen=True)
class OrthogonalRegularizer(Regularizer):
    """The penalty `factor * mean_{i < j} |cos(x_i, x_j)|` over the rows, or columns, of a matrix.

    Args:
        factor: of the mean.
        mode: "rows" or "columns": which vectors are to be orthogonal.

    Raises:
        ValueError: on the call, if `x` is no matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> float(OrthogonalRegularizer(0.5)(jnp.array([[1.0, 0.0], [3.0, 0.0]])))
        0.5
    """

    factor: NonNegative = 0.01
    mode: Annotated[str, choice("rows", "columns")] = "rows"

    def _penalty(self, x: Array) -> Array:
        if x.ndim != 2:
            rule = "OrthogonalRegularizer needs a matrix `x`, an array of rank 2."
            remedy = "Kernels of attention have rank 3: use L1 or L2, or a callable that reshapes."
            checks.fail(ValueError, rule, f"shape {x.shape}", remedy)
        rows = x if self.mode == "rows" else x.T
        length2 = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
        # The maximum keeps the branch not taken finite: its gradient, times 0, would be NaN.
        inverse = lax.rsqrt(jnp.maximum(length2, EPSILON**2))
        units = rows * jnp.where(length2 > EPSILON**2, inverse, 0)
        cosines = jnp.abs(jnp.tril(units @ units.T, k=-1))
        pairs = len(rows) * (len(rows) - 1) // 2
        return self.factor * jnp.sum(cosines) / max(pairs, 1)
