"""Which adapters a module has: what stands beside a layer's config, for its parameters stay."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax_mha.core import checks


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a flax module: `MultiHeadAttention(..., lora=flax_mha.Lora(rank=8))`.

        y = x . W + alpha / rank (drop(x) . a) . b

    Args:
        rank: r, how many numbers stand between input and output.
        alpha: the scale is alpha / rank; None = rank, a scale of 1.
        which: the projections that get one, by their names in the parameter tree.
        dropout: probability in [0, 1) of dropping a number that an adapter reads, in training.

    Raises:
        ValueError: a rank below 1, an alpha that is no finite number above 0, a rate of 1 or above.
        TypeError: a value of another type.

    Reference: Hu et al., "LoRA", https://arxiv.org/abs/2106.09685.

    Example:
        >>> import jax, flax_mha
        >>> lora = flax_mha.Lora(rank=4, alpha=8)
        >>> layer = flax_mha.MultiHeadAttention(num_heads=2, key_dim=16, lora=lora)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> variables = layer.init(jax.random.key(1), x, x)
        >>> sorted(variables), sorted(variables["lora"]), lora.scale
        (['lora', 'params'], ['query', 'value'], 2.0)
    """

    rank: int = 8
    alpha: float | None = None
    which: Any = ("query", "value")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("rank", checks.integer("Lora.rank", self.rank, minimum=1))
        if self.alpha is not None:
            put("alpha", checks.positive("Lora.alpha", self.alpha))
        put("which", names_of("Lora.which", self.which))
        put("dropout", checks.rate_below_one("Lora.dropout", self.dropout))

    @property
    def scale(self) -> float:
        """The factor of what the adapters add."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def names_of(name: str, which: Any) -> tuple[str, ...]:
    """Names of projections, each once; which there are is the layer's to say."""
    names = tuple(dict.fromkeys(checks.names(name, which)))
    if not names:
        rule = f"`{name}` must be names of projections."
        checks.fail(ValueError, rule, f"{names}", 'For example `("query", "value")`.')
    return names
