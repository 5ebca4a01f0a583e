"""The initializers whose law does not depend on the array's shape, and the base of all."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.frozen import Frozen, NonNegative, Number, Seed, number
from flax_mha.core.typing import Array, DType, PRNGKey, Shape

Key: TypeAlias = PRNGKey | None
Fans: TypeAlias = tuple[float, float] | None


class Initializer(Frozen):
    """A rule for the first values of an array."""

    def __call__(self, init_key: Key, shape: Shape, dtype: DType, *, fans: Fans = None) -> Array:
        """An array of this shape and dtype; `init_key` is read by random, unseeded ones.

        Raises:
            TypeError, ValueError: `shape` is not one, `dtype` not floating, `fans` not two sizes.
        """
        shape = checks.sizes("shape", shape)
        if fans is not None:
            fans = _two_fans(fans)
        return self._values(init_key, shape, checks.floating_dtype("dtype", dtype), fans)

    @abstractmethod
    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array: ...


def _two_fans(fans: Any) -> Fans:
    if not isinstance(fans, Sequence) or isinstance(fans, str | bytes) or len(fans) != 2:
        rule = "`fans` must be a pair (fan_in, fan_out)."
        checks.fail(TypeError, rule, f"fans={checks.shortened(fans)}")
    return tuple(number(low=0)(f"fans[{i}]", n) for i, n in enumerate(fans))


# --- without randomness -------------------------------------------------------------------------


@dataclass(frozen=True)
class Zeros(Initializer):
    """Zero everywhere.

    Example:
        >>> Zeros()(None, (2,), "float32").tolist()
        [0.0, 0.0]
    """

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        return jnp.zeros(shape, dtype)


@dataclass(frozen=True)
class Ones(Initializer):
    """One everywhere.

    Example:
        >>> Ones()(None, (2,), "float32").tolist()
        [1.0, 1.0]
    """

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class Constant(Initializer):
    """The number `value` everywhere.

    Args:
        value: that number.

    Example:
        >>> Constant(0.5)(None, (2,), "float32").tolist()
        [0.5, 0.5]
    """

    value: Number = 0.0

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class Identity(Initializer):
    """`gain` on the diagonal of a matrix, 0 elsewhere.

    Args:
        gain: the number on the diagonal.

    Raises:
        ValueError: on the call, if `shape` is not that of a matrix.

    Example:
        >>> Identity(2.0)(None, (2, 2), "float32").tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    gain: Number = 1.0

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        if len(shape) != 2:
            rule = "Identity initializes matrices, arrays of rank 2."
            remedy = "Kernels of attention have rank 3: Orthogonal serves any rank from 2 on."
            checks.fail(ValueError, rule, f"shape {shape}", remedy)
        return self.gain * jnp.eye(*shape, dtype=dtype)


# --- random -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomNormal(Initializer):
    """Normal: `mean + stddev * N(0, 1)`.

    Args:
        mean: the middle.
        stddev: the standard deviation.
        seed: None, or the integer that stands in for `init_key`: then query, key and value of one
            shape get equal numbers, as in Keras; without it they differ.

    Example:
        >>> RandomNormal(mean=5.0, stddev=0.0, seed=1)(None, (2,), "float32").tolist()
        [5.0, 5.0]
    """

    mean: Number = 0.0
    stddev: NonNegative = 0.05
    seed: Seed = None

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        draw = jax.random.normal(_draw_key(self.seed, init_key), shape, dtype)
        return draw * self.stddev + self.mean


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normal, but never over 2 from the middle: `mean + stddev * (N(0, 1) given |N(0, 1)| <= 2)`.

    Its standard deviation is 0.87962566 `stddev`.

    Args:
        mean: the middle.
        stddev: the standard deviation before the ends are cut off.
        seed: None, or the integer that stands in for `init_key`: then query, key and value of one
            shape get equal numbers, as in Keras; without it they differ.

    Example:
        >>> values = TruncatedNormal(stddev=1.0, seed=1)(None, (1000,), "float32")
        >>> bool(abs(values).max() <= 2)
        True
    """

    mean: Number = 0.0
    stddev: NonNegative = 0.05
    seed: Seed = None

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        init_key = _draw_key(self.seed, init_key)
        draw = jax.random.truncated_normal(init_key, -2.0, 2.0, shape, dtype)
        return draw * self.stddev + self.mean


@dataclass(frozen=True)
class RandomUniform(Initializer):
    """Uniform in [minval, maxval).

    Args:
        minval: the lower end.
        maxval: the upper end.
        seed: None, or the integer that stands in for `init_key`: then query, key and value of one
            shape get equal numbers, as in Keras; without it they differ.

    Example:
        >>> values = RandomUniform(0.0, 1.0, seed=1)(None, (1000,), "float32")
        >>> bool(values.min() >= 0 and values.max() < 1)
        True
    """

    minval: Number = -0.05
    maxval: Number = 0.05
    seed: Seed = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minval > self.maxval:
            rule = "`RandomUniform.minval` must be at most `maxval`."
            evidence = f"minval={self.minval}, maxval={self.maxval}"
            checks.fail(ValueError, rule, evidence, "Are the two swapped?")

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        init_key = _draw_key(self.seed, init_key)
        return jax.random.uniform(init_key, shape, dtype, self.minval, self.maxval)


@dataclass(frozen=True)
class Orthogonal(Initializer):
    """`gain * Q`, where Q R is a matrix of normals and Q is uniform among orthogonal matrices.

    Of more than two axes all but the last are rows. The shorter of rows and columns are
    orthonormal, before `gain`.

    Args:
        gain: the factor of Q.
        seed: None, or the integer that stands in for `init_key`: then query, key and value of one
            shape get equal numbers, as in Keras; without it they differ.

    Reference: Saxe et al., 2014, https://arxiv.org/abs/1312.6120

    Raises:
        ValueError: on the call, if `shape` has less than two axes.

    Example:
        >>> Q = Orthogonal(seed=1)(None, (3, 2), "float32")
        >>> abs(Q.T @ Q).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    gain: Number = 1.0
    seed: Seed = None

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        if len(shape) < 2:
            rule = "Orthogonal initializes arrays of rank 2 or more."
            checks.fail(ValueError, rule, f"shape {shape}", "For biases use Zeros.")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        tall = (max(rows, columns), min(rows, columns))
        init_key = _draw_key(self.seed, init_key)
        Q, R = jnp.linalg.qr(jax.random.normal(init_key, tall, wide_dtype(dtype)))
        Q = Q * jnp.sign(jnp.diagonal(R))[None, :]
        Q = Q.T if rows < columns else Q
        return (self.gain * Q.reshape(shape)).astype(dtype)


def _draw_key(seed: int | None, init_key: Any) -> PRNGKey:
    """The caller's key; or, of a seed, the pair [seed, 0] that Keras passes to jax.random."""
    if seed is not None:
        return jax.random.wrap_key_data(jnp.array([seed, 0], jnp.uint32), impl="threefry2x32")
    checks.prng_key("init_key", init_key)
    return init_key
