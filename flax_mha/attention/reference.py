"""The definition: einsum, softmax, einsum. O(T S) memory; every feature; any derivative."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention import dropout, stored
from flax_mha.attention.contract import Inputs, Options, Output, Residuals, named, shift_of
from flax_mha.attention.logits import scaled_product, scales, soft_capped, unforbidden
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.sizes import at_least
from flax_mha.core.typing import Array


def unsupported(inputs: Inputs, options: Options, platform: str | None) -> str | None:
    """The reference serves every call, everywhere; it has no blocks whose size could be chosen."""
    return None if options.block_sizes is None else "it has no blocks, so block_sizes must be None"


def attend(inputs: Inputs, options: Options) -> Output:
    """context = dropout(softmax(scale query . key + bias, over allowed keys)) . value."""
    logits_BNTS = _logits(inputs, options)
    weights_BNTS, residuals = _softmax(logits_BNTS)
    kept_BNTS = _kept(weights_BNTS, inputs, options)
    context_BTNV = _context(kept_BNTS, inputs, options)
    context_BTNV, residuals = named(context_BTNV, residuals)
    return Output(context_BTNV, weights_BNTS.astype(inputs.query_BTNH.dtype), residuals)


def _logits(inputs: Inputs, options: Options) -> Array:
    """score(scale query . key (capped) + bias) where allowed, -inf elsewhere; float32 at least."""
    (B, T, N, _), (_, S, _, _) = inputs.query_BTNH.shape, inputs.key_BSKH.shape
    einsum = _einsum(inputs.query_BTNH, options)
    of_query, _ = scales(options, inputs.query_BTNH.dtype)

    def multiply(rows_BKRH: Array, key_BSKH: Array) -> Array:
        if inputs.scales is not None:
            return stored.product(einsum, rows_BKRH, inputs.key_BSKH, inputs.scales)
        if at_least(T, 2) is not False:
            return einsum("BKRH,BSKH->BKRS", rows_BKRH, key_BSKH)
        # The keys first: the other way XLA's CPU would transpose a whole cache of them.
        return einsum("BSKH,BKRH->BKSR", key_BSKH, rows_BKRH).swapaxes(2, 3)

    product_BKRS = scaled_product(multiply, _rows(inputs) * of_query, inputs.key_BSKH, options)
    logits_BNTS = soft_capped(product_BKRS.reshape(B, N, T, S), options)
    if inputs.bias_bnts is not None:
        logits_BNTS += inputs.bias_bnts.astype(logits_BNTS.dtype)
    if inputs.distance_bias is not None:
        logits_BNTS += inputs.distance_bias.as_array(T, S).astype(logits_BNTS.dtype)
    parts = [] if inputs.mask.is_empty else [inputs.mask.as_array(T, S)]
    parts += [one.pairs.whole() for one in inputs.where]
    allowed_bnts = functools.reduce(jnp.logical_and, parts) if parts else None
    if inputs.score is not None:
        logits_BNTS = inputs.score.whole(unforbidden(logits_BNTS, allowed_bnts))
    if allowed_bnts is None:
        return logits_BNTS
    return jnp.where(allowed_bnts, logits_BNTS, -jnp.inf)


def _rows(inputs: Inputs) -> Array:
    """The R = G T queries that meet the keys of one key/value head."""
    (B, T, N, H), K = inputs.query_BTNH.shape, inputs.key_BSKH.shape[2]
    return inputs.query_BTNH.swapaxes(1, 2).reshape(B, K, N // K * T, H)


def _einsum(x: Array, options: Options) -> Any:
    """jnp.einsum that sums in float32 at least."""
    wide = wide_dtype(x.dtype)
    return functools.partial(jnp.einsum, precision=options.precision, preferred_element_type=wide)


def _softmax(logits_BNTS: Array) -> tuple[Array, Residuals]:
    """exp(logits - row_max) / row_sum; a row of -inf has weights 0 and a zero gradient."""
    row_max_BNT = jnp.max(jax.lax.stop_gradient(logits_BNTS), axis=-1, initial=-jnp.inf)
    exp_BNTS = jnp.exp(logits_BNTS - shift_of(row_max_BNT)[..., None])
    row_sum_BNT = exp_BNTS.sum(-1)
    divisor_BNT = jnp.where(jnp.isneginf(row_max_BNT), 1, row_sum_BNT)
    return exp_BNTS / divisor_BNT[..., None], Residuals(row_max_BNT, row_sum_BNT)


def _kept(weights_BNTS: Array, inputs: Inputs, options: Options) -> Array:
    """0 where dropped. What is kept grows in the context: a factor here would round the gradient
    twice, and that of a key that has all of its row would not be 0.
    """
    if options.dropout_rate == 0.0:
        return weights_BNTS
    assert inputs.dropout_word_2 is not None
    rate, shared = options.dropout_rate, options.broadcast_dropout
    shape, origin_4 = weights_BNTS.shape, inputs.dropout_start_4
    keep_BNTS = dropout.keep_mask(
        inputs.dropout_word_2, rate, shape, shared=shared, origin_4=origin_4
    )
    return jnp.where(keep_BNTS, weights_BNTS, 0)


def _context(weights_BNTS: Array, inputs: Inputs, options: Options) -> Array:
    B, N, T, S = weights_BNTS.shape
    K, V = inputs.value_BSKV.shape[2:]
    dtype = inputs.query_BTNH.dtype
    einsum = _einsum(inputs.query_BTNH, options)
    weights_BKRS = weights_BNTS.reshape(B, K, N // K * T, S)
    if inputs.scales is None:
        context_BKRV = einsum("BKRS,BSKV->BKRV", weights_BKRS.astype(dtype), inputs.value_BSKV)
    else:
        context_BKRV = stored.context(einsum, weights_BKRS, inputs.value_BSKV, inputs.scales, dtype)
    context_BKRV *= dropout.growth(options.dropout_rate)
    context_BNTV = context_BKRV.reshape(B, N, T, V).astype(dtype)
    return context_BNTV.swapaxes(1, 2)
