"""Two rules of dtypes, said once, and independent of JAX's promotion mode."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from flax_mha.core.typing import Array, DType


def wide_dtype(dtype: DType) -> DType:
    """The dtype of sums, of norms and of the softmax: float64 stays, all else is float32.

    Squares overflow float16 from 256 on, and bfloat16 keeps three digits.
    """
    return jnp.dtype("float64") if jnp.dtype(dtype) == jnp.float64 else jnp.dtype("float32")


def at_least_32_bits(integers: Array) -> Array:
    """Integers that no sum or quotient of a few makes wrap, as it does those of 8 bits."""
    return integers if integers.dtype.itemsize >= 4 else integers.astype("int32")


def promoted(dtypes: Iterable[DType]) -> DType:
    """The dtype in which arrays of these dtypes meet."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)
