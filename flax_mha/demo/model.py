"""A decoder-only Transformer over bytes, built on `flax_mha.MultiHeadAttention`.

    x = embedding[byte] + position
    x = x + attention(norm(x))        causal: a byte sees itself and what stands before it
    x = x + mlp(norm(x))              ... `layers` times
    logits = norm(x) @ head           of the next byte

Letters: B batch, T positions, D features of the residual stream, Y the 256 byte values.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_mha import KVCache, MultiHeadAttention, MultiHeadAttentionConfig
from flax_mha._typing import Array
from flax_mha.demo.settings import ModelSettings

Caches: TypeAlias = tuple[KVCache, ...]
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
    def __call__(
        self, x_BTD: Array, training: bool = False, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        drop = nn.Dropout(self.model.dropout, deterministic=not training)
        attention = MultiHeadAttention.from_config(
            self.attention, name="attention", sow_attention_scores=self.sow_attention_scores
        )
        y_BTD = nn.LayerNorm(name="attention_norm")(x_BTD)
        attended = attention(y_BTD, y_BTD, use_causal_mask=True, training=training, cache=cache)
        attended_BTD, cache = (attended, None) if cache is None else attended
        x_BTD = x_BTD + drop(attended_BTD)
        y_BTD = nn.LayerNorm(name="mlp_norm")(x_BTD)
        mlp = MLP(self.model.features, self.model.mlp_ratio, name="mlp")
        return x_BTD + drop(mlp(y_BTD)), cache


class Transformer(nn.Module):
    """The logits of the next byte at every position, `[B, T]` bytes to `[B, T, 256]`.

    With `caches`, one a layer, the bytes continue those that the caches hold; returns
    (logits, caches). Positions are learned, unless the attention has positions of its own.
    """

    model: ModelSettings
    attention: MultiHeadAttentionConfig
    sow_attention_scores: bool = False

    @nn.compact
    def __call__(
        self, tokens_BT: Array, training: bool = False, caches: Caches | None = None
    ) -> Any:
        model = self.model
        embed = nn.Embed(BYTE_VALUES, model.features, embedding_init=_unit, name="embed")
        x_BTD = embed(tokens_BT)
        if self.attention.position is None:
            x_BTD += self._positions(tokens_BT.shape[1], caches)[None]
        kept = []
        for i in range(model.layers):
            block = Block(model, self.attention, self.sow_attention_scores, name=f"block_{i}")
            x_BTD, cache = block(x_BTD, training, None if caches is None else caches[i])
            kept.append(cache)
        x_BTD = nn.LayerNorm(name="final_norm")(x_BTD)
        logits_BTY = self._logits(embed, x_BTD)
        return logits_BTY if caches is None else (logits_BTY, tuple(kept))

    def _positions(self, T: int, caches: Caches | None) -> Array:
        """The learned positions of T bytes, from the caches' length on: one for the batch."""
        shape = (self.model.context, self.model.features)
        position_TD = self.param("position", waves, shape)
        start = 0 if caches is None else caches[0].length.reshape(-1)[0]
        return jax.lax.dynamic_slice_in_dim(position_TD, start, T)

    def _logits(self, embed: nn.Embed, x_BTD: Array) -> Array:
        if self.model.tied_head:
            return embed.attend(x_BTD) / self.model.features**0.5
        return nn.Dense(BYTE_VALUES, use_bias=False, name="head")(x_BTD)
