"""A Transformer over the pixels of an image: every pixel attends to all, along both axes at once.

    x = embed(pixel, its neighbours) + position        [B, X, Y, D]
    x = x + attention(norm(x))        attention_axes=(1, 2): no axis is flattened
    x = x + mlp(norm(x))              ... `layers` times
    logits = norm(mean(x, over pixels)) @ head

Letters: X rows, Y columns, beside those of `layers.py`.
"""

import dataclasses

from flax import linen as nn

from flax_mha import MultiHeadAttentionConfig
from flax_mha.core.typing import Array
from flax_mha.demo.models.layers import Block, unit_normal
from flax_mha.demo.settings import number


@dataclasses.dataclass(frozen=True)
class PixelsSettings:
    """The Transformer around the attention."""

    layers: int = 3
    features: int = 64
    mlp_ratio: int = 2
    dropout: float = number(0.1, below=1)


class Pixels(nn.Module):
    """The logits of the classes, `[B, X, Y]` pixels to `[B, classes]`."""

    model: PixelsSettings
    attention: MultiHeadAttentionConfig
    classes: int
    sow_attention_scores: bool = False

    @nn.compact
    def __call__(self, image_BXY: Array, training: bool = False) -> Array:
        model, attention = self.model, self.attention.replace(attention_axes=(1, 2))
        _, X, Y = image_BXY.shape
        position_XYD = self.param("position", unit_normal, (X, Y, model.features))
        strokes = nn.Conv(model.features, (3, 3), name="embed")
        x_BXYD = strokes(image_BXY[..., None]) + position_XYD[None]
        for i in range(model.layers):
            block = Block(model, attention, False, self.sow_attention_scores, name=f"block_{i}")
            x_BXYD, _ = block(x_BXYD, training)
        x_BD = nn.LayerNorm(name="final_norm")(x_BXYD.mean((1, 2)))
        return nn.Dense(self.classes, name="head")(x_BD)
