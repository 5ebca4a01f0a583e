"""logits = cap(scale query . key), where the scaled product is rounded once, wherever it is used.

Where XLA fuses a factor into what follows, it may round the logits once for their maximum and once
for the exponent. Beyond 2^24 the two differ by more than 1, and e^(logits - row_max) by a factor. A
query that is scaled first makes the product final. A 16-bit query would be rounded once more by
that, which doubles the error of the context: it is scaled in float32, or else the product is.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_mha.attention.contract import Options
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array, DType


def scales(options: Options, dtype: DType) -> tuple[float, float]:
    """(factor of the query, factor of the product), whose product is `options.scale`."""
    return (options.scale, 1.0) if dtype == wide_dtype(dtype) else (1.0, options.scale)


def scaled_product(
    multiply: Callable[[Array, Array], Array], query: Array, key: Array, options: Options
) -> Array:
    """`multiply(query, key)`, of a query that has its factor, times the product's factor."""
    _, of_product = scales(options, query.dtype)
    if math.frexp(of_product)[0] == 0.5:  # a power of two, 1 among them, changes no digit
        return multiply(query, key) * of_product
    wide = wide_dtype(query.dtype)

    def query_first(query: Array, key: Array) -> Array:
        return multiply(query.astype(wide) * of_product, key.astype(wide))

    def product_after(query: Array, key: Array) -> Array:
        return jax.lax.optimization_barrier(multiply(query, key) * of_product)

    def product_between(query: Array, key: Array) -> Array:
        return jnp.maximum(multiply(query, key) * of_product, jnp.finfo(wide).min)

    # XLA's CPU multiplies in float32 whatever it is given, and drops barriers before it fuses. On a
    # TPU a barrier would keep the maximum over keys apart from the product: a pass more over
    # memory. No factor is drawn into what follows over another operation, the maximum.
    return jax.lax.platform_dependent(
        query, key, cpu=query_first, tpu=product_between, default=product_after
    )


def unforbidden(logits: Array, allowed: Array | None) -> Array:
    """The logits that a score function is given: of a forbidden pair 1, whose gradient is nobody's.

    A gradient of 0 times a slope of inf would be NaN: that of the logarithm of a 0, which is what a
    removed query's logit is.
    """
    return logits if allowed is None else jnp.where(allowed, logits, 1)


def soft_capped(logits: Array, options: Options) -> Array:
    """cap tanh(logits / cap), which stays within (-cap, cap); the logits where there is no cap."""
    cap = options.soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)
