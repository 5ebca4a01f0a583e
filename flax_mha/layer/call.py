"""One call of the layer, checked and folded to canonical rank: what stands before the equation."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks
from flax_mha.core.dtypes import promoted
from flax_mha.core.folding import Folding
from flax_mha.core.typing import Array, DType, ParamsLike, Shape
from flax_mha.layer import projection
from flax_mha.layer.arguments import Arrays, Restrictions
from flax_mha.layer.cached_call import check_cache
from flax_mha.layer.caches import CrossCache, KVCache
from flax_mha.layer.chunks import chunk_mask
from flax_mha.layer.placement import folded_pair, positions_of, with_dense_bias
from flax_mha.masks import Mask
from flax_mha.params import check_params, features_of


class Call(NamedTuple):
    """Inputs, masks and bias of one call with the axes `[B, T, ...]`; `project` is x . W + b."""

    folding: Folding
    query_BTD: Array
    key_BSC: Array | None
    value_BSM: Array | None
    mask: Mask
    bias_bnts: Array | None
    query_position_bT: Any  # integers, or None where nothing reads them
    key_position_bS: Any
    project: Any


def prepare(
    params: ParamsLike,
    arrays: Arrays,
    restrictions: Restrictions,
    config: MultiHeadAttentionConfig,
    use_causal_mask: bool,
    cache: KVCache | CrossCache | None = None,
) -> Call:
    """Checks shapes and parameters, folds everything, joins the masks.

    Positions count on from the length of a cache; a `CrossCache` stands in for value and key.
    """
    query, value, key = arrays
    folding = checked_folding(params, arrays, config, cache)
    dtype = _compute_dtype(params, arrays, config)
    if cache is not None:
        check_cache(cache, folding, config, dtype)
    # Of a KVCache, `extend` makes the band, which counts from its slots.
    first_B = cache.length.reshape(-1) if isinstance(cache, CrossCache) else None
    mask = _mask(restrictions, folding, config, use_causal_mask, first_B)
    given = restrictions.positions, restrictions.segment_ids
    positions = positions_of(*given, folding, config, cache)
    if config.chunk_size is not None and cache is None:  # of a cache, `extend` counts the chunks
        counted = all(x is None for x in given)
        mask &= chunk_mask(config.chunk_size, *cast(Any, positions), counted=counted)
    project = functools.partial(
        projection.project, dtype=dtype, precision=config.precision, isolate=mask.removes_positions
    )
    fold = lambda x: None if x is None else folding.fold(x)  # noqa: E731
    bias_bnts = with_dense_bias(
        _bias(restrictions.bias, folding, config), params, folding, config, cache
    )
    folded = (folding.fold(query), fold(key), fold(value))
    return Call(folding, *folded, mask, bias_bnts, *positions, project)


def checked_folding(
    params: ParamsLike,
    arrays: Arrays,
    config: MultiHeadAttentionConfig,
    cache: KVCache | CrossCache | None = None,
) -> Folding:
    """How a call's arrays fold, once their shapes and those of the parameters are found right."""
    query_shape = arrays[0].shape
    value_shape, key_shape = _source_shapes(params, arrays, cache)
    checks.layer_inputs(query_shape, value_shape, key_shape)
    check_params(params, config, query_shape, value_shape, key_shape)
    return Folding.of(query_shape, value_shape, config.attention_axes)


def _source_shapes(params: ParamsLike, arrays: Arrays, cache: Any) -> tuple[Shape, Shape]:
    """The shapes of value and key; of a `CrossCache`, those that were projected into it."""
    query, value, key = arrays
    if not isinstance(cache, CrossCache):
        return value.shape, key.shape
    leading = (*query.shape[:-2], cache.key.shape[-2])
    boxes.refuse(params, "params")
    features = features_of(params)
    return (*leading, features["value_features"]), (*leading, features["key_features"])


def _mask(
    restrictions: Restrictions,
    folding: Folding,
    config: MultiHeadAttentionConfig,
    causal: bool,
    first_B: Array | None,
) -> Mask:
    """Every restriction at full rank, as one structured mask; `first_B` is where query 0 stands."""
    mask = Mask()
    for name, lengths, letter, side in (
        ("query_mask", folding.targets, "T", "query"),
        ("value_mask", folding.sources, "S", "key"),
        ("key_mask", folding.sources, "S", "key"),
    ):
        array = getattr(restrictions, name)
        if array is not None:
            mask &= Mask.padding(**{side: folding.fold_padding(name, array, lengths, letter)})
    if restrictions.attention_mask is not None:
        N = config.num_heads
        mask &= Mask.dense(folding.fold_scores("attention_mask", restrictions.attention_mask, N))
    if restrictions.segment_ids is not None:
        mask &= Mask.segments(*folded_pair("segment_ids", restrictions.segment_ids, folding))
    if causal:
        mask &= Mask.causal(first_B)
    if config.sliding_window is not None:
        window = Mask.window(config.sliding_window - 1, config.sliding_window - 1)
        mask &= dataclasses.replace(window, query_offset=first_B)
    return mask


def _bias(bias: Array | None, folding: Folding, config: MultiHeadAttentionConfig) -> Array | None:
    return None if bias is None else folding.fold_scores("bias", bias, config.num_heads)


def _compute_dtype(params: Any, arrays: Any, config: MultiHeadAttentionConfig) -> DType:
    """The config's dtype, or what inputs and parameters promote to."""
    if config.dtype is not None:
        return jnp.dtype(config.dtype)
    return promoted(leaf.dtype for leaf in jax.tree.leaves((params, arrays)))
