"""Products with keys and values that are int8: their scales meet the logits and the weights.

    logits_s = (query . key_s) scale_s          context = sum_s (weights_s scale_s) value_s

so that no copy of a cache in the compute dtype is made where its product can read int8. XLA's CPU
cannot: it would write that copy down. There one head's slots at a time are widened, in the caches
of its cores. Milliseconds of one query against 8,192 slots, 8 examples, 8 heads of 64, medians of
9 in turns, two cores of an EPYC Zen 3: float32 56; int8 as a whole 448, in blocks of 256 slots of
all heads 48, by heads 34.
"""

from collections.abc import Callable
from typing import Any

import jax

from flax_mha.attention.contract import Scales
from flax_mha.core.typing import Array, DType

Einsum = Callable[..., Array]
UNIT = 2.0**-7  # an int8 times it is below 1


def product(einsum: Einsum, rows_BKRH: Array, key_BSKH: Array, scales: Scales) -> Array:
    """query . key `[B, K, R, S]`, of keys that are int8."""
    dtype = rows_BKRH.dtype

    def of_head(rows_RH: Array, key_SH: Array) -> Array:
        return einsum("RH,SH->RS", rows_RH, key_SH.astype(dtype))

    product_BKRS = _each_head(of_head, rows_BKRH, key_BSKH)
    return product_BKRS * _beside_rows(scales.key_BSK).astype(product_BKRS.dtype)


def context(
    einsum: Einsum, weights_BKRS: Array, value_BSKV: Array, scales: Scales, dtype: DType
) -> Array:
    """weights . value `[B, K, R, V]`, of values that are int8.

    Values are below 1 and scales of the size of the values they stand for: small weights times the
    scales themselves would leave float16.
    """

    def of_head(weights_RS: Array, value_SV: Array) -> Array:
        return einsum("RS,SV->RV", weights_RS, value_SV.astype(dtype) * UNIT)

    scale_BK1S = _beside_rows(scales.value_BSK).astype(weights_BKRS.dtype) / UNIT
    scaled_BKRS = weights_BKRS * scale_BK1S
    return _each_head(of_head, scaled_BKRS.astype(dtype), value_BSKV)


def _beside_rows(scale_BSK: Array) -> Array:
    """`[B, K, 1, S]`"""
    return scale_BSK.swapaxes(1, 2)[:, :, None]


def _each_head(of_head: Any, rows_BKRF: Array, stored_BSKF: Array) -> Array:
    """`of_head` of every example and head: one after the other on CPU, elsewhere at once."""
    stored_BKSF = stored_BSKF.swapaxes(1, 2)

    def in_turn(rows_BKRF: Array, stored_BKSF: Array) -> Array:
        one = lambda arrays: of_head(*arrays)  # noqa: E731
        B, K = rows_BKRF.shape[:2]
        merge = lambda x: x.reshape(B * K, *x.shape[2:])  # noqa: E731
        results = jax.lax.map(one, (merge(rows_BKRF), merge(stored_BKSF)))
        return results.reshape(B, K, *results.shape[1:])

    at_once = jax.vmap(jax.vmap(of_head))
    return jax.lax.platform_dependent(rows_BKRF, stored_BKSF, cpu=in_turn, default=at_once)
