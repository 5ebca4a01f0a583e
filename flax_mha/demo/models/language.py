"""A decoder-only Transformer over bytes, built on `flax_mha.MultiHeadAttention`.

    x = embedding[byte] + position
    x = x + attention(norm(x))        causal: a byte sees itself and what stands before it
    x = x + mlp(norm(x))              ... `layers` times
    logits = norm(x) @ head           of the next byte

Letters: as in `layers.py`.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
from flax import linen as nn

from flax_mha import KVCache, Lora, MultiHeadAttentionConfig, init_cache
from flax_mha.core.typing import Array
from flax_mha.demo.models.layers import Block, unit_normal, waves
from flax_mha.demo.settings import number

Caches: TypeAlias = tuple[KVCache, ...]
BYTE_VALUES = 256


@dataclasses.dataclass(frozen=True)
class TransformerSettings:
    """The Transformer around the attention."""

    layers: int = 4
    features: int = 128
    context: int = 128
    mlp_ratio: int = 4
    dropout: float = number(0.0, below=1)
    tied_head: bool = True


class Transformer(nn.Module):
    """The logits of the next byte at every position, `[B, T]` bytes to `[B, T, 256]`.

    With `caches`, one a layer, the bytes continue those that the caches hold; returns
    (logits, caches). Positions are learned, unless the attention has positions of its own.
    With `lora`, the attention layers have adapters, which are the collection "lora".
    """

    model: TransformerSettings
    attention: MultiHeadAttentionConfig
    sow_attention_scores: bool = False
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self, tokens_BT: Array, training: bool = False, caches: Caches | None = None
    ) -> Any:
        model = self.model
        embed = nn.Embed(BYTE_VALUES, model.features, embedding_init=unit_normal, name="embed")
        x_BTD = embed(tokens_BT)
        if self.attention.position is None:
            x_BTD += self._positions(tokens_BT.shape[1], caches)[None]
        kept = []
        for i in range(model.layers):
            block = Block(
                model, self.attention, True, self.sow_attention_scores, self.lora, name=f"block_{i}"
            )
            x_BTD, cache = block(x_BTD, training, cache=None if caches is None else caches[i])
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


def empty_caches(model: Transformer, batch: int, dtype: str | None = None) -> Caches:
    """One a layer, of all the positions that there are; no dtype = that which is computed in."""
    cache = init_cache(model.attention, batch, model.model.context, dtype)
    return (cache,) * model.model.layers
