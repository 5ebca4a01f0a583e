"""NaN where it is meant, and nowhere on the way: `jax_debug_nans` finds no other."""

import jax.numpy as jnp

from flax_mha.core.typing import Array, DType


def nan_where(wrong: Array, dtype: DType) -> Array:
    """NaN where `wrong`, 0 elsewhere.

    `jnp.where(wrong, jnp.nan, 0)` would make a NaN first and choose after, which is an error with
    `jax_debug_nans` and without jit, though nothing is wrong.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> with jax.debug_nans(True), jax.disable_jit():
        ...     nan_where(jnp.array([False, False]), "float32").tolist()
        [0.0, 0.0]
    """
    infinite = jnp.where(wrong, jnp.inf, 0.0).astype(dtype)
    return infinite - infinite
