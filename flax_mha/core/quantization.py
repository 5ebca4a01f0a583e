"""Numbers as small ones and a scale: x = value scale, the largest of a row as the largest number.

A row of zeros has the scale 0. One that holds NaN or Inf has that as its scale: its products are
NaN, as those of the row itself.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array, DType

DTYPES = ("int8", "int4", "float8_e4m3fn")


class Quantized(NamedTuple):
    """Small numbers, and the scale of each row of them: without the axes that a row is."""

    value: Array
    scale: Array


def quantized(
    x: Array, axes: int | tuple[int, ...], dtype: DType = "int8", scale_dtype: DType = "float32"
) -> Quantized:
    """x by rows of these axes. A scale is rounded up before it divides, so nothing is lost by that.

    An int8 is off by at most half a step, max|row| / 254; of a bfloat16 scale 1 / 253.

    Example:
        >>> import jax.numpy as jnp
        >>> value, scale = quantized(jnp.array([[1.0, -2.54], [0.0, 0.0]]), -1)
        >>> value.tolist(), [round(x, 4) for x in scale.tolist()]
        ([[50, -127], [0, 0]], [0.02, 0.0])
    """
    x, most = x.astype(wide_dtype(x.dtype)), largest(dtype)
    exact = jnp.abs(x).max(axes, initial=0, keepdims=True) / most
    scale = _rounded_up(exact, scale_dtype)
    divisor = scale.astype(x.dtype)
    usable = jnp.isfinite(divisor) & (divisor > 0)
    value = jnp.where(usable, x / jnp.where(usable, divisor, 1), 0).clip(-most, most)
    if jnp.issubdtype(dtype, jnp.integer):
        value = jnp.round(value)
    return Quantized(value.astype(dtype), scale.squeeze(axes))


def _rounded_up(x: Array, dtype: DType) -> Array:
    """x >= 0 in a dtype, at least x: of a float16 near 0 the nearest may be half of it, or 0."""
    nearest = x.astype(dtype)
    above = jnp.nextafter(nearest, jnp.asarray(jnp.inf, dtype))
    return jnp.where(nearest.astype(x.dtype) < x, above, nearest)


def largest(dtype: DType) -> float:
    """The largest number, whose negative there is as well."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)


def small_dtype(name: str, dtype: Any) -> str:
    """The name of a dtype that numbers can be quantized to."""
    try:
        known = repr(dtype) if isinstance(dtype, tuple) else jnp.dtype(dtype).name
    except TypeError:
        known = repr(dtype)
    return checks.one_of(name, known, DTYPES)
