"""Attention sinks: a learned logit for each head that takes its share of the softmax and gives 0.

    weights_s = e^logits_s / (e^sink + sum_s e^logits_s)

A sink is one more key whose value is 0, so any implementation's output is merged with it.

Reference: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
https://arxiv.org/abs/2309.17453; the form with a learned logit: OpenAI, gpt-oss (2025).
"""

import jax
import jax.numpy as jnp

from flax_mha.attention.contract import Output, Residuals, shift_of
from flax_mha.attention.merge import merge
from flax_mha.core.typing import Array


def with_sinks(output: Output, sinks_N: Array | None) -> Output:
    """The output of attention to the keys, made that of attention to the keys and the sink."""
    if sinks_N is None:
        return output
    context_BTNV, weights_BNTS, residuals = output
    assert residuals is not None
    wide = residuals.row_sum_BNT.dtype
    sink_BNT = jnp.broadcast_to(sinks_N[None, :, None].astype(wide), residuals.row_sum_BNT.shape)
    row_max_BNT = jax.lax.stop_gradient(sink_BNT)
    # The sink's gradient runs through row_sum = e^(sink - row_max), which is 1; of none, -inf, 0.
    sink = Residuals(row_max_BNT, jnp.exp(sink_BNT - shift_of(row_max_BNT)))
    nothing_BTNV = jnp.zeros_like(context_BTNV)
    context_BTNV, joined = merge((context_BTNV, residuals), (nothing_BTNV, sink))
    if weights_BNTS is not None:
        own_max_BNT = jax.lax.stop_gradient(residuals.row_max_BNT)
        decay_BNT = jnp.exp(own_max_BNT - shift_of(joined.row_max_BNT))
        divisor_BNT = jnp.where(joined.row_sum_BNT == 0, 1, joined.row_sum_BNT)
        share_BNT = residuals.row_sum_BNT * decay_BNT / divisor_BNT
        weights_BNTS *= share_BNT[..., None].astype(weights_BNTS.dtype)
    return Output(context_BTNV, weights_BNTS, joined)
