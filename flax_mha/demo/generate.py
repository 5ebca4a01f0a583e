"""Text from a model: the whole window is computed again for every byte, without a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha._typing import Array, PRNGKey
from flax_mha.demo.model import Transformer


def generate(
    model: Transformer,
    params: Any,
    prompt: bytes,
    *,
    count: int,
    context: int,
    temperature: float,
    sample_key: PRNGKey,
) -> bytes:
    """`count` bytes that follow the prompt, each drawn from softmax(logits / temperature)."""
    known = (prompt or b"\n")[-context:]
    tokens_T = jnp.zeros(context, jnp.int32).at[: len(known)].set(jnp.asarray(list(known)))
    keys = jax.random.split(sample_key, count)
    draw = functools.partial(_draw, model, params, temperature)
    step = jax.jit(lambda carry, keys: jax.lax.scan(draw, carry, keys))
    _, sampled = step((tokens_T, jnp.asarray(len(known))), keys)
    return bytes(sampled.tolist())


def _draw(
    model: Transformer, params: Any, temperature: float, carry: Any, sample_key: PRNGKey
) -> tuple[Any, Array]:
    """One more byte; a full window first loses its oldest."""
    tokens_T, length = carry
    context = tokens_T.shape[0]
    # Behind `length` stand zeros: the causal mask keeps them from what is read.
    logits_TY = model.apply({"params": params}, tokens_T[None])[0]
    byte = jax.random.categorical(sample_key, logits_TY[length - 1] / temperature)
    full = length == context
    tokens_T = jnp.where(full, jnp.roll(tokens_T, -1), tokens_T)
    length = jnp.where(full, context, length + 1)
    return (tokens_T.at[length - 1].set(byte.astype(jnp.int32)), length), byte
