"""How a model's rotary frequencies change so that it reads texts longer than it was trained on.

References: Chen et al., "Positional Interpolation", https://arxiv.org/abs/2306.15595; Peng et al.,
"YaRN", https://arxiv.org/abs/2309.00071; the Llama 3 models, https://arxiv.org/abs/2407.21783.
"""

import dataclasses
import math
from abc import abstractmethod
from typing import Annotated

import numpy as np

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen, Positive
from flax_mha.positions import rules


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
    original_length: Annotated[int, rules.size] = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            rule = "`low_freq_factor` must be below `high_freq_factor`: waves between go over."
            checks.fail(ValueError, rule, f"{self.low_freq_factor} and {self.high_freq_factor}")

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
        attention_factor: what cos and sin are multiplied by; None = 0.1 ln(factor) + 1, or what
            the two below say.
        truncate: whether the ramp begins and ends at whole pairs; False for gpt-oss.
        mscale: with `mscale_all_dim`, as in DeepSeek: cos and sin are multiplied by
            (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1). None and 0 = not
            given, and one without the other changes nothing.
        mscale_all_dim: see `mscale`.

    Reference: Peng et al., "YaRN", https://arxiv.org/abs/2309.00071.

    Example:
        >>> from flax_mha.positions import Rotary, YarnScaling
        >>> scaling = YarnScaling(factor=4.0, original_length=4096)
        >>> Rotary(scaling=scaling).frequencies(4).tolist(), round(scaling.magnitude(), 4)
        ([1.0, 0.00625], 1.1386)
    """

    factor: Positive
    original_length: Annotated[int, rules.size]
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Annotated[float | None, rules.optional_positive] = None
    truncate: Annotated[bool, checks.boolean] = True
    mscale: Annotated[float | None, rules.optional_nonnegative] = None
    mscale_all_dim: Annotated[float | None, rules.optional_nonnegative] = None

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    def _grown(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        dim = 2 * len(frequencies)
        first, last = (self._pair(turns, dim, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        width = last - first or 1e-3  # a length within one wave of the first pair makes it negative
        divided = np.clip((np.arange(dim // 2) - first) / width, 0, 1)
        return frequencies * (1 - divided + divided / self.factor)

    def _pair(self, turns: float, dim: int, base: float) -> float:
        """The index of the pair that turns so often in original_length."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
