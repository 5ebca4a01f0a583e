"""One call of the layer, checked and folded to canonical rank: what stands before the equation."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from flax_mha.attention.context.positions import whole_length
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
from flax_mha.masks import Mask, Neighborhood
from flax_mha.params.quantized import QuantizedKernel
from flax_mha.params.tree import check_params, features_of


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
    mask = _mask(restrictions, folding, config, use_causal_mask, cache)
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
    cache: KVCache | CrossCache | None,
) -> Mask:
    """Every restriction at full rank, as one structured mask."""
    # Of a KVCache, `extend` makes the band, which counts from its slots.
    first_B = cache.length.reshape(-1) if isinstance(cache, CrossCache) else None
    mask = Mask()
    for name, lengths, letter, side in (
        ("query_mask", folding.targets, "T", "query"),
        ("value_mask", folding.sources, "S", "key"),
        ("key_mask", folding.sources, "S", "key"),
    ):
        array = getattr(restrictions, name)
        if array is not None:
            mask &= Mask.padding(**{side: folding.fold_padding(name, array, lengths, letter)})
    # Beside a cache it is asked by positions, which the cache's view tells.
    by_position = cache is not None and mask_by_position(restrictions) is not None
    if restrictions.attention_mask is not None and not by_position:
        mask &= _of_pairs(restrictions.attention_mask, folding, config)
    if restrictions.segment_ids is not None:
        mask &= Mask.segments(*folded_pair("segment_ids", restrictions.segment_ids, folding))
    if causal:
        mask &= Mask.causal(first_B)
    if isinstance(config.sliding_window, Neighborhood):
        mask &= _neighborhood(config.sliding_window, folding)
    elif config.sliding_window is not None:
        window = Mask.window(config.sliding_window - 1, config.sliding_window - 1)
        mask &= dataclasses.replace(window, query_offset=first_B)
    return mask


def _neighborhood(near: Neighborhood, folding: Folding) -> Mask:
    """A window in several axes, of tokens that see each other."""
    if folding.targets != folding.sources:
        rule = "A `sliding_window` in several axes needs queries and keys of one grid."
        evidence = f"T={folding.targets}, S={folding.sources}, sliding_window={near.window}"
        checks.fail(ValueError, rule, evidence, "An int, along the raster, has no such need.")
    if len(near.window) != len(folding.targets):
        rule = "`sliding_window` in several axes must have one size for each attended axis."
        evidence = f"sliding_window={near.window}, attended axes of sizes {folding.targets}"
        checks.fail(ValueError, rule, evidence, "Name them by `attention_axes`.")
    rest = {"dilation": near.dilation, "is_causal": near.is_causal}
    return Mask.neighborhood(folding.targets, near.window, **rest)


def mask_by_position(restrictions: Restrictions) -> Mask | None:
    """The caller's `attention_mask` where it is a `Mask`, not an array."""
    given = restrictions.attention_mask
    return given if isinstance(given, Mask) else None


def _of_pairs(given: Any, folding: Folding, config: MultiHeadAttentionConfig) -> Mask:
    """The caller's `attention_mask`, folded and found to fit."""
    N, S = config.num_heads, folding.S
    if not isinstance(given, Mask):
        return Mask.dense(folding.fold_scores("attention_mask", given, N))
    # Of a dense mask every device has the columns of all of them.
    columns = whole_length(config.context_axis, S)
    dataclasses.replace(given, dense_masks=()).check(folding.B, N, folding.T, S)
    Mask(dense_masks=given.dense_masks).check(folding.B, N, folding.T, columns)
    return given


def _bias(bias: Array | None, folding: Folding, config: MultiHeadAttentionConfig) -> Array | None:
    return None if bias is None else folding.fold_scores("bias", bias, config.num_heads)


def _compute_dtype(params: Any, arrays: Any, config: MultiHeadAttentionConfig) -> DType:
    """The config's dtype, or what inputs and parameters promote to."""
    if config.dtype is not None:
        return jnp.dtype(config.dtype)
    whole = lambda x: isinstance(x, QuantizedKernel)  # noqa: E731
    return promoted(leaf.dtype for leaf in jax.tree.leaves((params, arrays), is_leaf=whole))
