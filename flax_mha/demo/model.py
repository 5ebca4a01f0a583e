"""A decoder-only Transformer over bytes, built on `flax_mha.MultiHeadAttention`.

    x = embedding[byte] + position
    x = x + attention(norm(x))        causal: a byte sees itself and what stands before it
    x = x + mlp(norm(x))              ... `layers` times
    logits = norm(x) @ head           of the next byte

Letters: B batch, T positions, D features of the residual stream, Y the 256 byte values.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flax_mha import MultiHeadAttention, MultiHeadAttentionConfig
from flax_mha._typing import Array
from flax_mha.demo.settings import ModelSettings

BYTE_VALUES = 256
_unit = nn.initializers.normal(1.0)
SLOWEST_WAVE = 256  # of the positions' first values, in bytes per radian


def waves(init_key: Any, shape: tuple[int, int]) -> Array:
    """Sines and cosines of the position: "the byte before" is then a fixed rotation.

    Only where the positions begin: they are learned from here on.
    """
    T, D = shape
    frequency_D = SLOWEST_WAVE ** (-jnp.arange(0, D, 2) / D)
    angle_TD = jnp.outer(jnp.arange(T, dtype=jnp.float32), frequency_D)
    return jnp.concatenate([jnp.sin(angle_TD), jnp.cos(angle_TD)], axis=-1)[:, :D]


class MLP(nn.Module):
    """`gelu(x @ up) @ down`."""

    features: int
    ratio: int

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        hidden = nn.gelu(nn.Dense(self.ratio * self.features, name="up")(x_BTD))
        return nn.Dense(self.features, name="down")(hidden)


class Block(nn.Module):
    """One layer: attention mixes positions, the MLP mixes features; both are residual."""

    model: ModelSettings
    attention: MultiHeadAttentionConfig
    sow_attention_scores: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array, training: bool = False) -> Array:
        drop = nn.Dropout(self.model.dropout, deterministic=not training)
        attention = MultiHeadAttention.from_config(
            self.attention, name="attention", sow_attention_scores=self.sow_attention_scores
        )
        y_BTD = nn.LayerNorm(name="attention_norm")(x_BTD)
        x_BTD = x_BTD + drop(attention(y_BTD, y_BTD, use_causal_mask=True, training=training))
        y_BTD = nn.LayerNorm(name="mlp_norm")(x_BTD)
        return x_BTD + drop(MLP(self.model.features, self.model.mlp_ratio, name="mlp")(y_BTD))


class Transformer(nn.Module):
    """The logits of the next byte at every position, `[B, T]` bytes to `[B, T, 256]`."""

    model: ModelSettings
    attention: MultiHeadAttentionConfig
    sow_attention_scores: bool = False

    @nn.compact
    def __call__(self, tokens_BT: Array, training: bool = False) -> Array:
        model = self.model
        embed = nn.Embed(BYTE_VALUES, model.features, embedding_init=_unit, name="embed")
        position_TD = self.param("position", waves, (model.context, model.features))
        x_BTD = embed(tokens_BT) + position_TD[None, : tokens_BT.shape[1]]
        for i in range(model.layers):
            block = Block(model, self.attention, self.sow_attention_scores, name=f"block_{i}")
            x_BTD = block(x_BTD, training)
        x_BTD = nn.LayerNorm(name="final_norm")(x_BTD)
        if model.tied_head:
            return embed.attend(x_BTD) / model.features**0.5
        return nn.Dense(BYTE_VALUES, use_bias=False, name="head")(x_BTD)
