"""An encoder-decoder Transformer: the decoder attends to what the encoder made of the source.

    encoder   x = embedding[source] + position;  x += attention(norm(x));  x += mlp(norm(x)) ...
    decoder   y = embedding[target] + position
              y += attention(norm(y))            causal
              y += attention(norm(y), encoded)   cross: padding of the source is hidden
              y += mlp(norm(y))                  ... `layers` times each
    logits = norm(y) @ head

Letters: S source positions, T target positions, beside those of `layers.py`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from flax_mha import CrossCache, KVCache, MultiHeadAttention, MultiHeadAttentionConfig
from flax_mha.core.typing import Array
from flax_mha.demo.models.layers import MLP, Block, unit_normal, waves
from flax_mha.demo.settings import number

PADDING = 0


@dataclasses.dataclass(frozen=True)
class TranslatorSettings:
    """The Transformer around the attention."""

    layers: int = 2
    features: int = 64
    mlp_ratio: int = 4
    dropout: float = number(0.0, below=1)


class Tokens(NamedTuple):
    """How many of them there are; static."""

    source: int  # values, the padding 0 among them
    source_length: int
    target: int  # values that are predicted; the decoder is also given one more, the start
    target_length: int


class LayerCaches(NamedTuple):
    """What one layer of the decoder keeps from step to step."""

    own: KVCache
    cross: CrossCache


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and MLP; with `caches`, the source is in them."""

    model: TranslatorSettings
    attention: MultiHeadAttentionConfig
    sow_attention_scores: bool = False

    @nn.compact
    def __call__(
        self,
        y_BTD: Array,
        encoded_BSD: Array | None,
        mask_BS: Array | None,
        training: bool = False,
        caches: LayerCaches | None = None,
    ) -> tuple[Array, LayerCaches | None]:
        drop = nn.Dropout(self.model.dropout, deterministic=not training)
        layer = lambda name: MultiHeadAttention.from_config(  # noqa: E731
            self.attention, name=name, sow_attention_scores=self.sow_attention_scores
        )
        own: Any = None if caches is None else caches.own
        cross: Any = None if caches is None else caches.cross
        x_BTD = nn.LayerNorm(name="self_norm")(y_BTD)
        attended = layer("self_attention")(
            x_BTD, x_BTD, use_causal_mask=True, training=training, cache=own
        )
        attended_BTD, own = (attended, None) if own is None else attended
        y_BTD = y_BTD + drop(attended_BTD)
        x_BTD = nn.LayerNorm(name="cross_norm")(y_BTD)
        attended = layer("cross_attention")(
            x_BTD, encoded_BSD, value_mask=mask_BS, training=training, cache=cross
        )
        attended_BTD, cross = (attended, None) if cross is None else attended
        y_BTD = y_BTD + drop(attended_BTD)
        mlp = MLP(self.model.features, self.model.mlp_ratio, name="mlp")
        y_BTD = y_BTD + drop(mlp(nn.LayerNorm(name="mlp_norm")(y_BTD)))
        return y_BTD, None if caches is None else LayerCaches(own, cross)


class Translator(nn.Module):
    """The logits of each target token given those before it, `[B, T, target]`.

    `encode` and `decode` are its halves: decoding step by step encodes once.
    """

    model: TranslatorSettings
    attention: MultiHeadAttentionConfig
    tokens: Tokens
    sow_attention_scores: bool = False

    def setup(self) -> None:
        """Names the parts; those of the two halves begin with `source` or `target`."""
        model, tokens, sow = self.model, self.tokens, self.sow_attention_scores
        features, layers = model.features, range(model.layers)
        embed = lambda count: nn.Embed(count, features, embedding_init=unit_normal)  # noqa: E731
        self.source_embed, self.target_embed = embed(tokens.source), embed(tokens.target + 1)
        self.source_position = self.param(
            "source_position", waves, (tokens.source_length, features)
        )
        self.target_position = self.param(
            "target_position", waves, (tokens.target_length, features)
        )
        self.encoder = [Block(model, self.attention, False, sow) for _ in layers]
        self.decoder = [DecoderBlock(model, self.attention, sow) for _ in layers]
        self.source_norm, self.target_norm = nn.LayerNorm(), nn.LayerNorm()
        self.head = nn.Dense(tokens.target)

    def __call__(self, source_BS: Array, target_BT: Array, training: bool = False) -> Array:
        encoded_BSD = self.encode(source_BS, training)
        return self.decode(target_BT, encoded_BSD, source_BS != PADDING, training)[0]

    def encode(self, source_BS: Array, training: bool = False) -> Array:
        """`[B, S, D]`; what stands at padding means nothing."""
        mask_BS = source_BS != PADDING
        x_BSD = self.source_embed(source_BS) + self.source_position[None]
        for block in self.encoder:
            x_BSD, _ = block(x_BSD, training, mask=mask_BS)
        return self.source_norm(x_BSD)

    def decode(
        self,
        target_BT: Array,
        encoded_BSD: Array | None,
        mask_BS: Array | None,
        training: bool = False,
        caches: tuple[LayerCaches, ...] | None = None,
    ) -> tuple[Array, Any]:
        """Logits `[B, T, target]`, and the caches, where they were given."""
        start = 0 if caches is None else caches[0].own.length[0]
        position_TD = jax.lax.dynamic_slice_in_dim(self.target_position, start, target_BT.shape[1])
        y_BTD = self.target_embed(target_BT) + position_TD[None]
        kept = []
        for i, block in enumerate(self.decoder):
            own = None if caches is None else caches[i]
            y_BTD, own = block(y_BTD, encoded_BSD, mask_BS, training, own)
            kept.append(own)
        return self.head(self.target_norm(y_BTD)), None if caches is None else tuple(kept)
