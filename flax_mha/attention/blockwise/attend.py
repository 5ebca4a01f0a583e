"""Attention over blocks of queries and keys: memory O(T + S), in every derivative.

Blocks that the causal order or a window rules out are never visited, and blocks that padding or
segment ids leave empty are skipped. A derivative keeps (row_max, row_sum) and computes each block's
weights again.

References: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory",
https://arxiv.org/abs/2112.05682; Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flax_mha.attention.allowed import with_blocks
from flax_mha.attention.blockwise.engine import Blocks, Engine
from flax_mha.attention.blockwise.forward import Softmax
from flax_mha.attention.blockwise.programs import Forward, Tangent
from flax_mha.attention.blockwise.signature import Facts, Signature
from flax_mha.attention.blockwise.tile_sizes import tiling_of
from flax_mha.attention.contract import Inputs, Options, Output, Residuals, named
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.platform import PLATFORMS, Place
from flax_mha.core.program import apply
from flax_mha.core.typing import Array
from flax_mha.core.varying import varying_alike


def unsupported(inputs: Inputs, options: Options, platform: str | None) -> str | None:
    """Everything is served everywhere but the weights, which never exist as a whole."""
    if options.return_weights:
        return "it never holds the weights [T, S] that return_weights asks for"
    return None


def engine(inputs: Inputs, options: Options) -> Engine:
    return Blocks()


def attend(inputs: Inputs, options: Options) -> Output:
    """context = dropout(softmax(scale query . key + bias)) . value, block by block."""
    return attend_by(engine(inputs, options), inputs, options)


def attend_by(engine: Engine, inputs: Inputs, options: Options) -> Output:
    """The same, where `engine` computes the result and its first gradient."""
    if 0 in (*inputs.query_BTNH.shape[:3], inputs.key_BSKH.shape[1]):
        return _nothing(inputs)
    facts, arrays = split(varying_alike(inputs), options)
    signature = Signature.of(options, facts, arrays)
    context, row_max, row_sum = _softmax(engine, signature, facts, tuple(arrays.values()))
    dtype = inputs.query_BTNH.dtype
    return Output(context.astype(dtype), None, Residuals(row_max, row_sum))


def _nothing(inputs: Inputs) -> Output:
    """No query or no key: nobody attends to anything."""
    B, T, N, _ = inputs.query_BTNH.shape
    V, dtype = inputs.value_BSKV.shape[-1], inputs.query_BTNH.dtype
    zeros_BNT = jnp.zeros((B, N, T), wide_dtype(dtype))
    return Output(jnp.zeros((B, T, N, V), dtype), None, Residuals(zeros_BNT - jnp.inf, zeros_BNT))


def split(inputs: Inputs, options: Options) -> tuple[Facts, dict[str, Array]]:
    """The arrays of a call without a derivative, and those with one."""
    offset, first, distances = None, 0, None
    if inputs.distance_bias is not None:
        # The ends' values repeated, so that a tile that reaches beyond an end finds them.
        width = _widest(inputs, options)
        offset, first = inputs.distance_bias.query_offset, inputs.distance_bias.first - width
        distances = jnp.pad(inputs.distance_bias.values, ((0, 0), (width, width)), mode="edge")
    arrays = {
        "query": inputs.query_BTNH,
        "key": inputs.key_BSKH,
        "value": inputs.value_BSKV,
        "bias": inputs.bias_bnts,
        "distances": distances,
    }
    score, where = inputs.score, inputs.where
    if score is not None:
        arrays |= score.moving
        score = score.with_moving(dict.fromkeys(score.moving))
    T, S = inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1]
    where = with_blocks(where, T, S, options.block_sizes)
    dropout = (inputs.dropout_word_2, inputs.dropout_start_4)
    facts = Facts(inputs.mask, offset, *dropout, first, where, score, inputs.scales)
    return facts, {name: x for name, x in arrays.items() if x is not None}


def _widest(inputs: Inputs, options: Options) -> int:
    """At least t + s, wherever the call runs: blocks are largest where a device has few heads."""
    places = (Place(name, devices) for name in PLATFORMS for devices in (1, 1 << 30))
    tilings = [tiling_of(inputs, options.block_sizes, place) for place in places]
    return max(tiling.t + tiling.s for tiling in tilings)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _softmax(
    engine: Engine, signature: Signature, facts: Facts, arrays: tuple[Array, ...]
) -> Softmax:
    return Softmax(*apply(Forward(engine, signature), [*jax.tree.leaves(facts), *arrays]))


def _tangent(
    engine: Engine, signature: Signature, primals: Any, tangents: Any
) -> tuple[Softmax, Softmax]:
    (facts, arrays), (_, moved) = primals, tangents
    context, *rows = _softmax(engine, signature, facts, arrays)
    context, residuals = named(context, Residuals(*rows))
    softmax = Softmax(context, *residuals)
    moving = {n: x for n, x in zip(signature.names, moved) if not isinstance(x, SymbolicZero)}
    known = [*jax.tree.leaves(facts), *arrays, *softmax]
    program = Tangent.of(engine, signature, tuple(moving))
    d_context, d_row_sum = apply(program, known, list(moving.values()))
    still = jnp.zeros_like(softmax.row_max_BNT)  # the result is the same for every row_max
    return softmax, Softmax(d_context, still, d_row_sum)


_softmax.defjvp(_tangent, symbolic_zeros=True)
