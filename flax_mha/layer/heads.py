"""Query, key and value heads: projected, normalized, turned to their positions.

heads = rotary(norm(x . W + b), position)
"""

from typing import Any

import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.nans import nan_where
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.layer.call import Call
from flax_mha.layer.projection import as_rank
from flax_mha.positions import Rotary

EPSILON = 1e-6


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
    """x / sqrt(mean(x^2) + epsilon) * scale, over the features of each head."""
    if config.qk_norm is None:
        return x
    wide = x.astype(wide_dtype(x.dtype))
    # NaN at a removed position times a zero cotangent would reach the scale's gradient.
    finite = as_rank(jnp.isfinite(x).all((-2, -1)), x.ndim)
    safe = jnp.where(finite, wide, 0) if call.mask.removes_positions else wide
    unit = safe / jnp.sqrt((safe**2).mean(-1, keepdims=True) + EPSILON)
    if norm is not None:
        unit *= norm["scale"].astype(unit.dtype)[None, None, None]
    if call.mask.removes_positions:
        unit = jnp.where(finite, unit, nan_where(~finite, unit.dtype))
    return unit.astype(x.dtype)


def _turned(x: Array, position_bT: Array | None, config: MultiHeadAttentionConfig) -> Array:
    if position_bT is None:
        return x
    assert isinstance(config.position, Rotary)
    return config.position(x, position_bT)
