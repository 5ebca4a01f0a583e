"""Attention over blocks of queries and keys: memory O(T + S), and a VJP of its own.

Blocks that the causal order or a window rules out are never visited, and blocks that padding or
segment ids leave empty are skipped. The backward pass keeps (row_max, row_sum) and computes each
block's weights again.

References: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory",
https://arxiv.org/abs/2112.05682; Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.backward import backward
from flax_mha.attention.blockwise.call import Blocks, Plan
from flax_mha.attention.blockwise.forward import Softmax, forward
from flax_mha.attention.blockwise.tile_sizes import tiling_of
from flax_mha.attention.blockwise.tiles import Tiling
from flax_mha.attention.contract import Inputs, Options, Output, Residuals
from flax_mha.attention.distance import DistanceBias
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array
from flax_mha.masks import Mask


def unsupported(inputs: Inputs, options: Options) -> str | None:
    """Everything is served but the weights, which never exist as a whole."""
    if options.return_weights:
        return "it never holds the weights [T, S] that return_weights asks for"
    return None


def attend(inputs: Inputs, options: Options) -> Output:
    """context = dropout(softmax(scale query . key + bias)) . value, block by block."""
    if 0 in (*inputs.query_BTNH.shape[:3], inputs.key_BSKH.shape[1]):
        return _nothing(inputs)
    tiling = tiling_of(inputs, options.block_sizes)
    context, *rows = _core(Plan(tiling, options), _blocks(inputs, tiling))
    context_BTNV = context[:, : tiling.T].astype(inputs.value_BSKV.dtype)
    row_max_BNT, row_sum_BNT = (x[..., : tiling.T] for x in rows)
    return Output(context_BTNV, None, Residuals(row_max_BNT, row_sum_BNT))


def _nothing(inputs: Inputs) -> Output:
    """No query or no key: nobody attends to anything."""
    B, T, N, _ = inputs.query_BTNH.shape
    V, dtype = inputs.value_BSKV.shape[-1], inputs.value_BSKV.dtype
    zeros_BNT = jnp.zeros((B, N, T), wide_dtype(dtype))
    return Output(jnp.zeros((B, T, N, V), dtype), None, Residuals(zeros_BNT - jnp.inf, zeros_BNT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(plan: Plan, blocks: Blocks) -> Softmax:
    return forward(plan, blocks)


def _core_forward(plan: Plan, blocks: Blocks) -> tuple[Softmax, Any]:
    softmax = forward(plan, blocks)
    return softmax, (blocks, softmax)


def _core_backward(plan: Plan, saved: tuple[Blocks, Softmax], cotangent: Softmax) -> Any:
    blocks, softmax = saved
    d_query, d_key, d_value, d_biases = backward(plan, blocks, softmax, cotangent)
    nothing: Any = None  # for the mask, the offsets and the key, which have no gradient
    d_distance_bias = nothing
    if blocks.distance_bias is not None:
        values = _as(blocks.distance_bias.values, d_biases.values_NL)
        d_distance_bias = DistanceBias(values, nothing, blocks.distance_bias.first)
    d_blocks = Blocks(
        _as(blocks.query_BTNH, d_query),
        _as(blocks.key_BSKH, d_key),
        _as(blocks.value_BSKV, d_value),
        nothing if blocks.bias_bnts is None else _as(blocks.bias_bnts, d_biases.bias_bnts),
        d_distance_bias,
        nothing,
        nothing,
    )
    return (d_blocks,)


def _as(x: Array, gradient: Any) -> Array:
    return gradient.astype(x.dtype)


_core.defvjp(_core_forward, _core_backward)


# --- whole blocks -------------------------------------------------------------------------------


def _blocks(inputs: Inputs, tiling: Tiling) -> Blocks:
    """Every length filled up to whole blocks."""
    T, S = tiling.query_blocks * tiling.t, tiling.key_blocks * tiling.s
    bias = inputs.bias_bnts
    return Blocks(
        _fill(inputs.query_BTNH, 1, T),
        _fill(inputs.key_BSKH, 1, S),
        _fill(inputs.value_BSKV, 1, S),
        None if bias is None else _fill_scores(bias, T, S),
        _fill_distances(inputs.distance_bias, tiling.t + tiling.s),
        _fill_mask(inputs.mask, T, S),
        inputs.dropout_word_2,
        inputs.dropout_start_4,
    )


def _fill(x: Array, axis: int, length: int) -> Array:
    """Zeros, or False, behind the end of one axis."""
    widths = [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if x.shape[axis] < length else x


def _fill_scores(x_bnts: Array, T: int, S: int) -> Array:
    for axis, length in ((2, T), (3, S)):
        x_bnts = x_bnts if x_bnts.shape[axis] == 1 else _fill(x_bnts, axis, length)
    return x_bnts


def _fill_distances(bias: DistanceBias | None, width: int) -> DistanceBias | None:
    """The ends' values repeated, so that a tile that reaches beyond an end finds them."""
    if bias is None:
        return None
    values = jnp.pad(bias.values, ((0, 0), (width, width)), mode="edge")
    return dataclasses.replace(bias, values=values, first=bias.first - width)


def _fill_mask(mask: Mask, T: int, S: int) -> Mask:
    fill = lambda x, length: None if x is None else _fill(x, 1, length)  # noqa: E731
    return dataclasses.replace(
        mask,
        query_padding=fill(mask.query_padding, T),
        key_padding=fill(mask.key_padding, S),
        segment_ids=tuple((_fill(q, 1, T), _fill(k, 1, S)) for q, k in mask.segment_ids),
        dense_masks=tuple(_fill_scores(x, T, S) for x in mask.dense_masks),
    )
