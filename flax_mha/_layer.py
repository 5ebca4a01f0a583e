"""The layer's equation on canonical arrays; compiled once for each set of shapes and config."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha import _checks
from flax_mha._dtypes import promoted
from flax_mha._folding import Folding
from flax_mha._typing import Array, DType, ParamsLike, PRNGKey, Shape
from flax_mha.attention import dot_product_attention
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


class Flags(NamedTuple):
    """The static arguments of one call."""

    use_causal_mask: bool
    return_attention_scores: bool
    return_projections: bool


class Activations(NamedTuple):
    """Every array of one call, each with the leading axes of its own input.

    The projections are None in `multi_head_attention`, `gate` without `use_gate`, and
    `attention_scores` where not asked for.
    """

    query: Array | None  # [..., N, H]
    key: Array | None  # [..., K, H]
    value: Array | None  # [..., K, V]
    gate: Array | None  # [..., N, V]
    output: Array  # [..., *E]
    attention_scores: Array | None  # [*batch, N, *T axes, *S axes]


@functools.partial(jax.jit, static_argnames=("config", "flags"))
def layer(
    params: ParamsLike,
    arrays: tuple[Array, Array, Array],
    restrictions: Restrictions,
    dropout_key: PRNGKey | None,
    *,
    config: MultiHeadAttentionConfig,
    flags: Flags,
) -> Activations:
    """query, key, value -> projections -> attention -> (gate) -> output projection."""
    query, value, key = arrays
    _checks.layer_inputs(query.shape, value.shape, key.shape)
    check_params(params, config, query.shape, value.shape, key.shape)
    folding = Folding.of(query.shape, value.shape, config.attention_axes)
    mask = _mask(restrictions, folding, config, flags)
    project = functools.partial(
        _project,
        dtype=_compute_dtype(params, arrays, config),
        precision=config.precision,
        isolate=mask.removes_positions,
    )
    query_BTD = folding.fold(query)
    query_BTNH = project("BTD,DNH->BTNH", query_BTD, params["query"])
    key_BSKH = project("BSC,CKH->BSKH", folding.fold(key), params["key"])
    value_BSKV = project("BSM,MKV->BSKV", folding.fold(value), params["value"])
    attended = dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKV,
        mask=mask,
        bias=_bias(restrictions.bias, folding, config),
        dropout_rate=config.dropout,
        dropout_key=dropout_key,
        precision=config.precision,
        implementation=config.implementation,
        return_weights=flags.return_attention_scores,
    )
    context_BTNV, weights_BNTS = attended if flags.return_attention_scores else (attended, None)
    gate_BTNV = None
    if config.use_gate:
        gate_BTNV = jax.nn.sigmoid(project("BTD,DNV->BTNV", query_BTD, params["gate"]))
        context_BTNV *= _of_real_queries(gate_BTNV, mask)
    output_BTE = project("BTNV,NVE->BTE", context_BTNV, _flat_output(params["attention_output"]))

    output_shape = params["attention_output"]["kernel"].shape[2:]
    unfold = functools.partial(_unfold, folding, flags)
    return Activations(
        query=unfold(query_BTNH, folding.targets),
        key=unfold(key_BSKH, folding.sources),
        value=unfold(value_BSKV, folding.sources),
        gate=unfold(gate_BTNV, folding.targets),
        output=folding.unfold(output_BTE, folding.targets, output_shape),
        attention_scores=None if weights_BNTS is None else folding.unfold_scores(weights_BNTS),
    )


def _project(
    equation: str, x: Array, projection: Any, *, dtype: DType, precision: Any, isolate: bool
) -> Array:
    """x . kernel + bias in the compute dtype.

    With `isolate`, a position that holds NaN or Inf passes the product as zeros and is NaN behind
    it: its NaN times a zero cotangent would otherwise reach the kernel's gradient.
    """
    finite_BT = jnp.isfinite(x).all(tuple(range(2, x.ndim)))
    if isolate:
        x = jnp.where(_as_rank(finite_BT, x.ndim), x, 0)
    kernel = projection["kernel"].astype(dtype)
    y = jnp.einsum(equation, x.astype(dtype), kernel, precision=precision)
    if "bias" in projection:
        y += jax.lax.broadcast_to_rank(projection["bias"].astype(dtype), y.ndim)
    return jnp.where(_as_rank(finite_BT, y.ndim), y, jnp.nan) if isolate else y


def _of_real_queries(gate_BTNV: Array, mask: Mask) -> Array:
    """The gate with zeros at removed queries, whose NaN times a context of 0 would be NaN."""
    if mask.query_padding is None:
        return gate_BTNV
    return jnp.where(_as_rank(mask.query_padding, gate_BTNV.ndim), gate_BTNV, 0)


def _as_rank(x_BT: Array, rank: int) -> Array:
    return x_BT.reshape(*x_BT.shape, *(1,) * (rank - 2))


def _flat_output(projection: Any) -> dict[str, Array]:
    """The output projection with its feature axes merged: NVE and E."""
    N, V, *features = projection["kernel"].shape
    shapes = {"kernel": (N, V, math.prod(features)), "bias": (math.prod(features),)}
    return {leaf: array.reshape(shapes[leaf]) for leaf, array in projection.items()}


def _unfold(folding: Folding, flags: Flags, x: Array | None, lengths: Shape) -> Array | None:
    """A projection with its input's leading axes, where projections were asked for."""
    if x is None or not flags.return_projections:
        return None
    return folding.unfold(x, lengths, x.shape[2:])


def _mask(
    restrictions: Restrictions, folding: Folding, config: MultiHeadAttentionConfig, flags: Flags
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
    if flags.use_causal_mask:
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
