"""One call of the layer, checked and folded to canonical rank: what stands before the equation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha import _checks
from flax_mha._dtypes import promoted
from flax_mha._folding import Folding
from flax_mha._typing import Array, DType, ParamsLike
from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.masks import Mask
from flax_mha.params import check_params


class Restrictions(NamedTuple):
    """What says which query may attend to which key, as the caller gave it; `bias` included."""

    query_mask: Any = None
    value_mask: Any = None
    key_mask: Any = None
    attention_mask: Any = None
    bias: Any = None
    segment_ids: Any = None


class Call(NamedTuple):
    """Inputs, masks and bias of one call with the axes `[B, T, ...]`; `project` is x . W + b."""

    folding: Folding
    query_BTD: Array
    key_BSC: Array
    value_BSM: Array
    mask: Mask
    bias_bnts: Array | None
    project: Any


def prepare(
    params: ParamsLike,
    arrays: tuple[Array, Array, Array],
    restrictions: Restrictions,
    config: MultiHeadAttentionConfig,
    use_causal_mask: bool,
) -> Call:
    """Checks shapes and parameters, folds everything, joins the masks."""
    query, value, key = arrays
    _checks.layer_inputs(query.shape, value.shape, key.shape)
    check_params(params, config, query.shape, value.shape, key.shape)
    folding = Folding.of(query.shape, value.shape, config.attention_axes)
    mask = _mask(restrictions, folding, config, use_causal_mask)
    project = functools.partial(
        _project,
        dtype=_compute_dtype(params, arrays, config),
        precision=config.precision,
        isolate=mask.removes_positions,
    )
    query_BTD, key_BSC, value_BSM = (folding.fold(x) for x in (query, key, value))
    bias_bnts = _bias(restrictions.bias, folding, config)
    return Call(folding, query_BTD, key_BSC, value_BSM, mask, bias_bnts, project)


def _project(
    equation: str, x: Array, projection: Any, *, dtype: DType, precision: Any, isolate: bool
) -> Array:
    """x . kernel + bias in the compute dtype.

    With `isolate`, a position that holds NaN or Inf passes the product as zeros and is NaN behind
    it: its NaN times a zero cotangent would otherwise reach the kernel's gradient.
    """
    finite_BT = jnp.isfinite(x).all(tuple(range(2, x.ndim)))
    if isolate:
        x = jnp.where(as_rank(finite_BT, x.ndim), x, 0)
    kernel = projection["kernel"].astype(dtype)
    y = jnp.einsum(equation, x.astype(dtype), kernel, precision=precision)
    if "bias" in projection:
        y += jax.lax.broadcast_to_rank(projection["bias"].astype(dtype), y.ndim)
    return jnp.where(as_rank(finite_BT, y.ndim), y, jnp.nan) if isolate else y


def as_rank(x_BT: Array, rank: int) -> Array:
    return x_BT.reshape(*x_BT.shape, *(1,) * (rank - 2))


def _mask(
    restrictions: Restrictions, folding: Folding, config: MultiHeadAttentionConfig, causal: bool
) -> Mask:
    """Every restriction at full rank, as one structured mask."""
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
        mask &= _segments(restrictions.segment_ids, folding)
    if causal:
        mask &= Mask.causal()
    if config.sliding_window is not None:
        mask &= Mask.window(config.sliding_window - 1, config.sliding_window - 1)
    return mask


def _segments(segment_ids: Any, folding: Folding) -> Mask:
    """One array for self-attention, or a pair of the queries' and the keys' ids."""
    if _checks.is_array(segment_ids):
        if folding.targets != folding.sources:
            rule = "`segment_ids` must be a pair (query ids [B, T], key ids [B, S]) where T != S."
            evidence = f"one array, T={folding.targets}, S={folding.sources}"
            _checks.fail(ValueError, rule, evidence)
        segment_ids = (segment_ids, segment_ids)
    query_ids, key_ids = (_checks.integer_ids("segment_ids", ids) for ids in segment_ids)
    return Mask.segments(
        folding.fold_padding("segment_ids", query_ids, folding.targets, "T"),
        folding.fold_padding("segment_ids", key_ids, folding.sources, "S"),
    )


def _bias(bias: Array | None, folding: Folding, config: MultiHeadAttentionConfig) -> Array | None:
    return None if bias is None else folding.fold_scores("bias", bias, config.num_heads)


def _compute_dtype(params: Any, arrays: Any, config: MultiHeadAttentionConfig) -> DType:
    """The config's dtype, or what inputs and parameters promote to."""
    if config.dtype is not None:
        return jnp.dtype(config.dtype)
    return promoted(leaf.dtype for leaf in jax.tree.leaves((params, arrays)))
