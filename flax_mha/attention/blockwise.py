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

from flax_mha._dtypes import wide_dtype
from flax_mha._typing import Array
from flax_mha.attention._blockwise_backward import backward
from flax_mha.attention._blockwise_call import Blocks, Plan
from flax_mha.attention._blockwise_forward import Softmax, forward
from flax_mha.attention._contract import Inputs, Options, Output, Residuals
from flax_mha.attention._distance import DistanceBias
from flax_mha.attention._tiles import Tiling
from flax_mha.masks import Mask

# Measured on CPU at T = 4096: 512 x 512 is best or near it, 256 x 256 loses 40%.
LARGEST_BLOCK = 512


def unsupported(inputs: Inputs, options: Options) -> str | None:
    """Everything is served but the weights, which never exist as a whole."""
    if options.return_weights:
        return "it never holds the weights [T, S] that return_weights asks for"
    return None


def attend(inputs: Inputs, options: Options) -> Output:
    """context = dropout(softmax(scale query . key + bias)) . value, block by block."""
    B, T, N, _ = inputs.query_BTNH.shape
    tiling = _tiling(inputs, options)
    if 0 in (B, T, N, tiling.S):
        return _nothing(inputs)
    softmax = _core(Plan(tiling, options), _blocks(inputs, tiling))
    context_BTNV, row_max_BNT, row_sum_BNT = _ungroup(softmax, tiling)
    residuals = Residuals(row_max_BNT, row_sum_BNT)
    return Output(context_BTNV.astype(inputs.value_BSKV.dtype), None, residuals)


def block_size(length: int) -> int:
    """Blocks of about equal size, a multiple of 8, at most `LARGEST_BLOCK`."""
    blocks = max(1, -(-length // LARGEST_BLOCK))
    return max(8, -(-length // (8 * blocks)) * 8)


def _tiling(inputs: Inputs, options: Options) -> Tiling:
    (_, T, N, _), (_, S, K, _) = inputs.query_BTNH.shape, inputs.key_BSKH.shape
    t, s = options.block_sizes or (block_size(T), block_size(S))
    return Tiling(T=T, S=S, t=t, s=s, K=K, G=N // K)


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
        _as(blocks.query_gGTH, d_query),
        _as(blocks.key_gSH, d_key),
        _as(blocks.value_gSV, d_value),
        nothing if blocks.bias_bnts is None else _as(blocks.bias_bnts, d_biases.bias_bnts),
        d_distance_bias,
        nothing,
        nothing,
    )
    return (d_blocks,)


def _as(x: Array, gradient: Any) -> Array:
    return gradient.astype(x.dtype)


_core.defvjp(_core_forward, _core_backward)


# --- groups and whole blocks --------------------------------------------------------------------


def _blocks(inputs: Inputs, tiling: Tiling) -> Blocks:
    """BTNH to gGTH with g = b K + k, and every length filled up to whole blocks."""
    T, S = tiling.query_blocks * tiling.t, tiling.key_blocks * tiling.s
    B, _, _, H = inputs.query_BTNH.shape
    query_BTKGH = _fill(inputs.query_BTNH, 1, T).reshape(B, T, tiling.K, tiling.G, H)
    bias = inputs.bias_bnts
    return Blocks(
        query_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B * tiling.K, tiling.G, T, H),
        _fill(inputs.key_BSKH, 1, S).swapaxes(1, 2).reshape(B * tiling.K, S, H),
        _fill(inputs.value_BSKV, 1, S).swapaxes(1, 2).reshape(B * tiling.K, S, -1),
        None if bias is None else _fill_scores(bias, T, S),
        _fill_distances(inputs.distance_bias, tiling.t + tiling.s),
        _fill_mask(inputs.mask, T, S),
        inputs.dropout_key,
    )


def _ungroup(softmax: Softmax, tiling: Tiling) -> tuple[Array, Array, Array]:
    """GGTV to BTNV, and gGT to BNT, without what filled the last block."""
    groups, G, T, V = softmax.sum_Gtv.shape
    B, N = groups // tiling.K, tiling.K * G
    context_BNTV = softmax.sum_Gtv.reshape(B, N, T, V)[:, :, : tiling.T]
    row_max_BNT, row_sum_BNT = (x.reshape(B, N, T)[:, :, : tiling.T] for x in softmax[1:])
    return context_BNTV.swapaxes(1, 2), row_max_BNT, row_sum_BNT


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
