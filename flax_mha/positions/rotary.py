"""Rotary embedding: queries and keys turn by angles that grow with their position.

    features (a, b) of pair i at position p  ->  (a cos - b sin, b cos + a sin),  angle = p w_i
    w_i = base^(-2 i / dim)

so that a product of query and key depends on the difference of their positions alone.

References: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864; Peng et al., "YaRN",
https://arxiv.org/abs/2309.00071; the Llama 3 models, https://arxiv.org/abs/2407.21783.
"""

import dataclasses
import math
from abc import abstractmethod
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.frozen import Frozen, Positive
from flax_mha.core.typing import Array


def _size(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=1)


def _optional_positive(name: str, value: Any) -> float | None:
    return None if value is None else checks.positive(name, value)


class Scaling(Frozen):
    """How frequencies change so that a model reads texts longer than it was trained on."""

    def magnitude(self) -> float:
        """What cos and sin are multiplied by.

        Example:
            >>> LinearScaling(4.0).magnitude()
            1.0
        """
        return 1.0

    @abstractmethod
    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """The frequencies w_i, float64 `[dim / 2]`, rescaled."""


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """Positions are interpolated: all frequencies become w / factor.

    Args:
        factor: how much longer texts may be.

    Reference: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation", https://arxiv.org/abs/2306.15595.

    Example:
        >>> from flax_mha.positions import LinearScaling, Rotary
        >>> Rotary(scaling=LinearScaling(4.0)).frequencies(4).tolist()
        [0.25, 0.0025]
    """

    factor: Positive

    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3.1: long waves are divided by `factor`, short ones stay, those between go over.

    Args:
        factor: how much longer texts may be.
        low_freq_factor: waves longer than original_length / low_freq_factor are long.
        high_freq_factor: waves shorter than original_length / high_freq_factor are short.
        original_length: the longest text in training.

    Reference: the Llama 3 models, https://arxiv.org/abs/2407.21783.

    Example:
        >>> from flax_mha.positions import Llama3Scaling, Rotary
        >>> Rotary(scaling=Llama3Scaling()).frequencies(4).round(6).tolist()
        [1.0, 0.01]
    """

    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_length: Annotated[int, _size] = 8192

    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        waves = self.original_length * frequencies / (2 * math.pi)  # in one text of that length
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((waves - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN: like Llama 3's, with a ramp over the pair's index, and logits that grow a little.

    Args:
        factor: how much longer texts may be.
        original_length: the longest text in training.
        beta_fast: pairs that turn more often than this in original_length stay.
        beta_slow: pairs that turn less often are divided by `factor`.
        attention_factor: what cos and sin are multiplied by; None = 0.1 ln(factor) + 1.

    Reference: Peng et al., "YaRN", https://arxiv.org/abs/2309.00071.

    Example:
        >>> from flax_mha.positions import Rotary, YarnScaling
        >>> scaling = YarnScaling(factor=4.0, original_length=4096)
        >>> Rotary(scaling=scaling).frequencies(4).tolist(), round(scaling.magnitude(), 4)
        ([1.0, 0.00625], 1.1386)
    """

    factor: Positive
    original_length: Annotated[int, _size]
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Annotated[float | None, _optional_positive] = None

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        dim = 2 * len(frequencies)
        first = max(math.floor(self._pair(self.beta_fast, dim, base)), 0)
        last = min(math.ceil(self._pair(self.beta_slow, dim, base)), dim - 1)
        width = last - first if last > first else 1e-3
        divided = np.clip((np.arange(dim // 2) - first) / width, 0, 1)
        return frequencies * (1 - divided + divided / self.factor)

    def _pair(self, turns: float, dim: int, base: float) -> float:
        """The index of the pair that turns so often in original_length."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))


SCALINGS = {cls.__name__: cls for cls in (LinearScaling, Llama3Scaling, YarnScaling)}


def _scaling(name: str, value: Any) -> Scaling | None:
    if value is not None:
        checks.instance(name, value, Scaling)
    return value


def _even(name: str, value: Any) -> int | None:
    if value is not None and checks.integer(name, value, minimum=1) % 2:
        checks.fail(ValueError, f"`{name}` must be even: features turn in pairs.", f"{value}")
    return value


@dataclasses.dataclass(frozen=True)
class Rotary(Frozen):
    """Rotary embedding of queries and keys: their product depends on the difference of positions.

        (a, b) -> (a cos(p w) - b sin(p w), b cos(p w) + a sin(p w))       w_i = base^(-2 i / dim)

    Args:
        base: the longest wave is about 2 pi base.
        dim: how many of a head's first features turn; None = all.
        interleaved: pairs are neighbours (2 i, 2 i + 1); otherwise halves (i, i + dim / 2), as in
            Llama checkpoints of the transformers library.
        scaling: `LinearScaling`, `Llama3Scaling` or `YarnScaling`; None = as trained.

    Reference: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.positions import Rotary
        >>> x = jnp.ones((1, 3, 2, 8))
        >>> turned = Rotary()(x, jnp.arange(3)[None])
        >>> bool((turned[:, 0] == 1).all()), round(float(turned[0, 1, 0, 0]), 4)
        (True, -0.3012)
        >>> Rotary(base=100.0).frequencies(4).tolist()
        [1.0, 0.1]
    """

    base: Positive = 10000.0
    dim: Annotated[int | None, _even] = None
    interleaved: bool = False
    scaling: Annotated[Scaling | None, _scaling] = None

    def frequencies(self, H: int) -> np.ndarray:
        """w_i, float64 `[dim / 2]`, for heads of size `H`.

        Raises:
            ValueError: an odd number of features, or more than a head has.
        """
        dim = H if self.dim is None else self.dim
        if dim > H or dim % 2:
            rule = "Rotary embedding needs an even number of features, at most key_dim."
            checks.fail(ValueError, rule, f"dim={self.dim}, key_dim={H}", "Set `dim`.")
        plain = self.base ** (-np.arange(0, dim, 2) / dim)
        return plain if self.scaling is None else self.scaling(plain, self.base)

    def __call__(self, x_BTNH: Array, position_bT: Array) -> Array:
        """The heads turned, `[B, T, N, H]`; positions `[B or 1, T]`. At least float32 inside."""
        wide = wide_dtype(x_BTNH.dtype)
        frequencies = jnp.asarray(self.frequencies(x_BTNH.shape[-1]), wide)
        angle_bTi = position_bT.astype(wide)[..., None] * frequencies[None, None]
        factor = 1.0 if self.scaling is None else self.scaling.magnitude()
        cos, sin = (factor * wave(angle_bTi)[:, :, None] for wave in (jnp.cos, jnp.sin))
        turning, rest = jnp.split(x_BTNH, [2 * len(frequencies)], -1)
        a, b = self._pairs(turning.astype(wide))
        turned = self._joined(a * cos - b * sin, b * cos + a * sin)
        return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], -1)

    def _pairs(self, x: Array) -> tuple[Array, Array]:
        if self.interleaved:
            return x[..., ::2], x[..., 1::2]
        first, second = jnp.split(x, 2, -1)
        return first, second

    def _joined(self, a: Array, b: Array) -> Array:
        if self.interleaved:
            return jnp.stack([a, b], -1).reshape(*a.shape[:-1], -1)
        return jnp.concatenate([a, b], -1)
