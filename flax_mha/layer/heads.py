"""Query, key and value heads: projected, normalized, turned to their positions.

heads = rotary(norm(x . W + b), position)
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.nans import nan_where
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.layer.call import Call
from flax_mha.layer.projection import as_rank
from flax_mha.positions import Rotary

# Of "rms", added to the mean square, as in Gemma and Qwen 3; of "l2" the norm that counts as zero.
EPSILONS = {"rms": 1e-6, "l2": 1e-12}


def query_heads(params: ParamsLike, call: Call, config: MultiHeadAttentionConfig) -> Array:
    query_BTNH = call.project("BTD,DNH->BTNH", call.query_BTD, params["query"])
    query_BTNH = _normalized(query_BTNH, params.get("query_norm"), call, config)
    return _turned(query_BTNH, call.query_position_bT, config)


def key_heads(params: ParamsLike, call: Call, config: MultiHeadAttentionConfig) -> Array:
    key_BSKH = call.project("BSC,CKH->BSKH", call.key_BSC, params["key"])
    key_BSKH = _normalized(key_BSKH, params.get("key_norm"), call, config)
    return _turned(key_BSKH, call.key_position_bS, config)


def value_heads(params: ParamsLike, call: Call) -> Array:
    return call.project("BSM,MKV->BSKV", call.value_BSM, params["value"])


def _normalized(x: Array, norm: Any, call: Call, config: MultiHeadAttentionConfig) -> Array:
    """Each head over its features: "rms" x / sqrt(mean(x^2) + epsilon) * scale, "l2" `_unit`."""
    if config.qk_norm is None:
        return x
    epsilon = config.qk_norm_epsilon or EPSILONS[config.qk_norm]
    wide = x.astype(wide_dtype(x.dtype))
    # NaN at a removed position times a zero cotangent would reach the scale's gradient.
    finite = as_rank(jnp.isfinite(x).all((-2, -1)), x.ndim)
    safe = jnp.where(finite, wide, 0) if call.mask.removes_positions else wide
    if config.qk_norm == "l2":
        unit = _unit(safe, epsilon)
    else:
        unit = safe / jnp.sqrt((safe**2).mean(-1, keepdims=True) + epsilon)
    if norm is not None:
        unit *= norm["scale"].astype(unit.dtype)[None, None, None]
    if call.mask.removes_positions:
        unit = jnp.where(finite, unit, nan_where(~finite, unit.dtype))
    return unit.astype(x.dtype)


def _unit(x: Array, epsilon: float) -> Array:
    """sqrt(H) x / |x|: products divided by sqrt(H) are sqrt(H) cos. Up to epsilon |x| counts as 0.

    The largest feature is divided out first, for squares of 1e-23 or 1e20 leave float32. It needs
    no gradient: the result does not depend on it.
    """
    largest = jax.lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))
    safe = x / jnp.where(largest > 0, largest, 1)
    square = (safe**2).mean(-1, keepdims=True)
    # A zero has no direction: with |x| <= epsilon no gradient of 1 / epsilon comes back. NaN stays.
    is_zero = largest * jnp.sqrt(jax.lax.stop_gradient(square) * x.shape[-1]) <= epsilon
    return jnp.where(is_zero, 0, safe / jnp.sqrt(jnp.where(is_zero, 1, square)))


def _turned(x: Array, position_bT: Array | None, config: MultiHeadAttentionConfig) -> Array:
    if position_bT is None:
        return x
    assert isinstance(config.position, Rotary)
    return config.position(x, position_bT)
