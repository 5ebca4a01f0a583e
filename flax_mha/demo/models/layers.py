"""What the models share: the MLP, the residual block around the attention, where positions begin.

Letters: B batch, T positions, D features of the residual stream, Y the values of a prediction.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flax_mha import KVCache, Lora, MultiHeadAttention, MultiHeadAttentionConfig
from flax_mha.core.typing import Array

SLOWEST_WAVE = 256  # of the positions' first values, in positions per radian
unit_normal = nn.initializers.normal(1.0)


def waves(init_key: Any, shape: tuple[int, int]) -> Array:
    """Sines and cosines of the position: "the one before" is then a fixed rotation.

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
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(nn.Dense(self.ratio * self.features, name="up")(x))
        return nn.Dense(self.features, name="down")(hidden)


class Block(nn.Module):
    """One layer: attention mixes positions, the MLP mixes features; both are residual.

    `model` is the settings of the model around it; `mask` marks the real positions; `lora` is the
    attention's adapters.
    """

    model: Any
    attention: MultiHeadAttentionConfig
    is_causal: bool = False
    sow_attention_scores: bool = False
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        training: bool = False,
        mask: Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Array, KVCache | None]:
        drop = nn.Dropout(self.model.dropout, deterministic=not training)
        attention = MultiHeadAttention.from_config(
            self.attention,
            name="attention",
            lora=self.lora,
            sow_attention_scores=self.sow_attention_scores,
        )
        y = nn.LayerNorm(name="attention_norm")(x)
        attended = attention(
            y, y, value_mask=mask, use_causal_mask=self.is_causal, training=training, cache=cache
        )
        attended, cache = (attended, None) if cache is None else attended
        x = x + drop(attended)
        y = nn.LayerNorm(name="mlp_norm")(x)
        mlp = MLP(self.model.features, self.model.mlp_ratio, name="mlp")
        return x + drop(mlp(y)), cache
