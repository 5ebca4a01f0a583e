"""Greedy decoding of an encoder-decoder: the source is encoded and projected once.

Every step reads one token and what the caches hold of those before it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import init_cache, init_cross_cache
from flax_mha.core.typing import Array
from flax_mha.demo.models.translator import PADDING, LayerCaches, Translator


@functools.partial(jax.jit, static_argnums=0)
def translate(model: Translator, params: Any, source_BS: Array) -> Array:
    """`[B, T]`: at every position the likeliest token after those before it."""
    caches = _begin(model, params, source_BS)

    def step(carry: tuple[Array, Any], _: None) -> Any:
        token_B, caches = carry
        logits_B1Y, caches = model.apply(
            {"params": params}, token_B[:, None], None, None, caches=caches, method="decode"
        )
        token_B = logits_B1Y[:, 0].argmax(-1).astype(jnp.int32)
        return (token_B, caches), token_B

    start_B = jnp.full(len(source_BS), model.tokens.target, jnp.int32)
    _, token_TB = jax.lax.scan(step, (start_B, caches), length=model.tokens.target_length)
    return token_TB.T


def _begin(model: Translator, params: Any, source_BS: Array) -> tuple[LayerCaches, ...]:
    """Empty caches of the target, and full ones of the source."""
    encoded_BSD: Any = model.apply({"params": params}, source_BS, method="encode")
    own = init_cache(model.attention, len(source_BS), model.tokens.target_length)
    return tuple(
        LayerCaches(
            own,
            init_cross_cache(
                params[f"decoder_{i}"]["cross_attention"],
                encoded_BSD,
                config=model.attention,
                value_mask=source_BS != PADDING,
            ),
        )
        for i in range(model.model.layers)
    )
