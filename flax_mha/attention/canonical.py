"""The arguments of one attention call, checked and folded for an implementation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.allowed import split_mask
from flax_mha.attention.context.axis import ContextAxis
from flax_mha.attention.context.positions import (
    by_position,
    positions,
    stored_positions,
    whole_length,
)
from flax_mha.attention.contract import Inputs, Options, Scales
from flax_mha.attention.distance import DistanceBias
from flax_mha.attention.dropout import start_of, words_of
from flax_mha.core import checks
from flax_mha.core.folding import collapse
from flax_mha.core.pairs.function import PairFunction
from flax_mha.core.pairs.separated import separated
from flax_mha.core.typing import Array, PRNGKey, Shape
from flax_mha.masks import Mask, fits


def canonical(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None,
    bias: Array | None,
    score: PairFunction | None,
    distance_bias: DistanceBias | None,
    sinks: Array | None,
    soft_cap: float | None,
    scale: float | None,
    is_causal: bool,
    local_window_size: int | tuple[int, int] | None,
    dropout_rate: float,
    dropout_key: PRNGKey | None,
    dropout_start: Any,
    broadcast_dropout: bool,
    precision: Any,
    block_sizes: tuple[int, int] | None,
    return_weights: bool,
    return_residuals: bool,
    axis: ContextAxis | None,
    scales: Scales | None,
) -> tuple[Inputs, Options]:
    """Checks every argument and folds the batch axes: arrays of rank 4, mask and bias included.

    The arguments and their defaults are those of `dot_product_attention`. Where devices share the
    keys, biases, dense masks and functions of pairs have the columns of all of them. With `scales`
    key and value are int8, of a cache that was checked.
    """
    if scales is None:
        checks.attention_arrays(query, key, value)
    if dropout_key is not None:
        checks.prng_key("dropout_key", dropout_key)
    rate = checks.rate("dropout_rate", dropout_rate)
    start_4 = start_of(dropout_start)
    word_2 = words_of(dropout_key) if rate > 0 and dropout_key is not None else None
    drops = word_2 is not None
    batch, (T, N, H), S = query.shape[:-3], query.shape[-3:], key.shape[-3]
    sizes = (math.prod(batch), N, whole_length(axis, T), whole_length(axis, S))
    groups = (batch, (N,), (T,), sizes[3:])
    mask = _mask(mask, is_causal, local_window_size, groups)
    fits.check(mask, *sizes[:2], T, S, sizes[2:])
    # In zigzag order not every length has places; what does not ask for them needs none.
    asked = score is not None or not mask.is_plain
    places = _places(math.prod(batch), N, T, S, axis) if asked else {}
    mask, where = split_mask(by_position(axis, mask, T), places, sizes)
    inputs = Inputs(
        query_BTNH=_flat(query),
        key_BSKH=_flat(key),
        value_BSKV=_flat(value),
        mask=mask,
        scales=scales,
        where=where,
        score=None if score is None else separated(score, places, sizes),
        bias_bnts=None if bias is None else _over_scores("bias", _bias(bias), groups),
        distance_bias=_distance_bias(distance_bias, math.prod(batch), N),
        sinks_N=None if sinks is None else _sinks(sinks, N),
        dropout_word_2=word_2,
        dropout_start_4=start_4 if drops else None,
    )
    options = Options(
        scale=1 / math.sqrt(H) if scale is None else checks.finite("scale", scale),
        soft_cap=None if soft_cap is None else checks.soft_cap("soft_cap", soft_cap),
        dropout_rate=rate if drops else 0.0,
        broadcast_dropout=checks.boolean("broadcast_dropout", broadcast_dropout) and drops,
        precision=checks.precision("precision", precision),
        block_sizes=None if block_sizes is None else checks.block_sizes(block_sizes),
        return_weights=checks.boolean("return_weights", return_weights),
        return_residuals=checks.boolean("return_residuals", return_residuals),
    )
    return inputs, options


def _places(B: int, N: int, T: int, S: int, axis: ContextAxis | None) -> dict[str, Array]:
    """The indices that functions of pairs are asked for, int32 `[size]` by letter."""
    rows, columns = positions(axis, T), stored_positions(axis, S)
    index = lambda size: jnp.arange(size, dtype="int32")  # noqa: E731
    return {"b": index(B), "n": index(N), "t": rows, "s": columns}


def _flat(x: Array) -> Array:
    return jnp.reshape(x, (math.prod(x.shape[:-3]), *x.shape[-3:]))


def _mask(mask: Any, is_causal: bool, window: Any, groups: tuple[Shape, ...]) -> Mask:
    """All that restricts attention, as one structured mask."""
    if mask is None:
        mask = Mask()
    elif not isinstance(mask, Mask):
        dense = _over_scores("mask", checks.boolean_mask("mask", mask), groups)
        mask = Mask.dense(dense)
    if checks.boolean("is_causal", is_causal):
        mask &= Mask.causal(mask.query_offset)
    if window is not None:
        mask &= dataclasses.replace(_window(window), query_offset=mask.query_offset)
    return mask


def _window(window: Any) -> Mask:
    """Keys left and right of a query, as many on both sides or a pair; None = all of a side."""
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        rule = "`local_window_size` must be an int, or a pair (left, right)."
        checks.fail(ValueError, rule, f"local_window_size={window!r}")
    try:
        return Mask.window(*sides)
    except (TypeError, ValueError) as error:  # it names a side
        refusal = TypeError if isinstance(error, TypeError) else ValueError
        raise refusal(f"`local_window_size`: {error}") from None


def _bias(bias: Array) -> Array:
    checks.floating_array("bias", bias, "that broadcasts to [..., N, T, S]")
    return jnp.asarray(bias)


def _distance_bias(bias: Any, B: int, N: int) -> DistanceBias | None:
    if bias is not None:
        checks.instance("distance_bias", bias, DistanceBias)
        bias.check(B, N)
    return bias


def _sinks(sinks: Array, N: int) -> Array:
    checks.floating_array("sinks", sinks, "[N]")
    if sinks.shape != (N,):
        checks.fail(ValueError, f"`sinks` must be [N] = ({N},).", f"shape {tuple(sinks.shape)}")
    return jnp.asarray(sinks)


def _over_scores(name: str, array: Array, groups: tuple[Shape, ...]) -> Array:
    """Aligns to `[..., N, T, S]` from the right, and folds to `[b, n, t, s]`."""
    full = tuple(size for group in groups for size in group)
    aligned = jax.lax.broadcast_to_rank(array, max(len(full), array.ndim))
    T, S = full[-2:]
    remedy = "Did you swap T and S?" if array.shape[-2:] == (S, T) and T != S else ""
    letters = "[..., N, T, S]"
    checks.broadcastable(name, aligned.shape, full, letters, remedy, received=array.shape)
    return collapse(aligned, groups)
