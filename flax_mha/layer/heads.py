"""Query, key and value heads: projected, clamped, normalized, placed: turned or grown.

heads = placed(norm(clip(x . W + b)), position)
"""

import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.nans import nan_where
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.layer.call import Call
from flax_mha.layer.projection import as_rank
from flax_mha.positions import PositionFunction


def query_heads(params: ParamsLike, call: Call, config: MultiHeadAttentionConfig) -> Array:
    query_BTNH = call.project("BTD,DNH->BTNH", call.query_BTD, params["query"])
    query_BTNH = _normalized("query_norm", _clamped(query_BTNH, config), params, call, config)
    position = _position_function(config)
    return query_BTNH if position is None else position.of_query(query_BTNH, call.query_position_bT)


def key_heads(params: ParamsLike, call: Call, config: MultiHeadAttentionConfig) -> Array:
    key_BSKH = call.project("BSC,CKH->BSKH", call.key_BSC, params["key"])
    key_BSKH = _normalized("key_norm", _clamped(key_BSKH, config), params, call, config)
    position = _position_function(config)
    return key_BSKH if position is None else position.of_key(key_BSKH, call.key_position_bS)


def value_heads(params: ParamsLike, call: Call, config: MultiHeadAttentionConfig) -> Array:
    value_BSKV = call.project("BSM,MKV->BSKV", call.value_BSM, params["value"])
    return _normalized("value_norm", _clamped(value_BSKV, config), params, call, config)


def _clamped(x: Array, config: MultiHeadAttentionConfig) -> Array:
    return x if config.clip_qkv is None else jnp.clip(x, -config.clip_qkv, config.clip_qkv)


def _normalized(
    name: str, x: Array, params: ParamsLike, call: Call, config: MultiHeadAttentionConfig
) -> Array:
    """The norm of that name, where there is one; at least float32 inside."""
    norm = config.norms.get(name)
    if norm is None:
        return x
    wide = x.astype(wide_dtype(x.dtype))
    if not call.mask.removes_positions:
        return norm(wide, params.get(name, {})).astype(x.dtype)
    # NaN at a removed position times a zero cotangent would reach the scale's gradient.
    finite = as_rank(jnp.isfinite(x).all((-2, -1)), x.ndim)
    normal = norm(jnp.where(finite, wide, 0), params.get(name, {}))
    return jnp.where(finite, normal, nan_where(~finite, normal.dtype)).astype(x.dtype)


def _position_function(config: MultiHeadAttentionConfig) -> PositionFunction | None:
    return config.position if isinstance(config.position, PositionFunction) else None
