"""Scalings of rotary frequencies for one length, or with numbers of their own for each pair.

References: Ding et al., "LongRoPE", https://arxiv.org/abs/2402.13753; the dynamic NTK scaling of
the transformers library; Gemma 4's proportional frequencies.
"""

import dataclasses
import math
from typing import Annotated

import numpy as np

from flax_mha.core import checks
from flax_mha.core.frozen import Positive
from flax_mha.positions import rules
from flax_mha.positions.scalings import Scaling


@dataclasses.dataclass(frozen=True)
class LongRopeScaling(Scaling):
    """LongRoPE: each pair of features has a factor of its own by which its frequency is divided.

    Models have two lists, for texts up to `original_length` and for longer ones. One object holds
    one of them: which, is chosen where texts are known, for cached keys cannot turn back.

    Args:
        factors: a number for each pair that turns; long_factor or short_factor of a Phi-3.
        factor: how much longer texts may be: max_position_embeddings / original_length.
        original_length: the longest text in training; read where factor > 1.
        attention_factor: what cos and sin are multiplied by; None =
            sqrt(1 + ln(factor) / ln(original_length)), and 1 up to factor = 1.

    Raises:
        ValueError: factor > 1 with neither `original_length` nor `attention_factor`; factors that
            are not as many as the pairs.

    Reference: Ding et al., "LongRoPE", https://arxiv.org/abs/2402.13753.

    Example:
        >>> from flax_mha.positions import LongRopeScaling, Rotary
        >>> scaling = LongRopeScaling(factors=(1.0, 4.0), factor=32.0, original_length=4096)
        >>> Rotary(scaling=scaling).frequencies(4).tolist(), round(scaling.magnitude(), 4)
        ([1.0, 0.0025], 1.1902)
    """

    factors: Annotated[tuple[float, ...], rules.factors]
    factor: Positive = 1.0
    original_length: Annotated[int | None, rules.optional_size] = None
    attention_factor: Annotated[float | None, rules.optional_positive] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_factor is None and self.factor > 1 and (self.original_length or 1) < 2:
            rule = "`original_length` says by how much cos and sin grow with `factor`."
            evidence = f"factor={self.factor}, original_length={self.original_length}"
            checks.fail(ValueError, rule, evidence, "Pass it, or `attention_factor`.")

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.original_length is None or self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        if len(self.factors) != len(frequencies):
            rule = "`factors` must be one number for each pair of features that turn."
            evidence = f"{len(self.factors)} factors, {len(frequencies)} pairs"
            checks.fail(ValueError, rule, evidence, "Set `Rotary(dim=...)` to 2 len(factors).")
        return frequencies / np.array(self.factors)


@dataclasses.dataclass(frozen=True)
class DynamicScaling(Scaling):
    """Dynamic NTK: the base grows with the length of the text; here, for one length.

        base' = base (factor length / original_length - (factor - 1))^(dim / (dim - 2))

    Models that have it compute frequencies anew as a text grows. Here a length is chosen, for
    cached keys cannot turn back: that of the longest text.

    Args:
        factor: how strongly the base grows.
        original_length: the longest text in training: up to it nothing changes.
        length: the length of the texts to come.

    Reference: bloc97 and emozilla, https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr.

    Example:
        >>> from flax_mha.positions import DynamicScaling, Rotary
        >>> scaling = DynamicScaling(factor=2.0, original_length=2048, length=4096)
        >>> Rotary(scaling=scaling).frequencies(6).round(5).tolist()
        [1.0, 0.0268, 0.00072]
    """

    factor: Positive
    original_length: Annotated[int, rules.size]
    length: Annotated[int, rules.size]

    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        pairs = len(frequencies)
        longer = max(self.length / self.original_length, 1.0)
        grown = self.factor * longer - (self.factor - 1)
        return frequencies * grown ** (-np.arange(pairs) / max(pairs - 1, 1))


@dataclasses.dataclass(frozen=True)
class ProportionalScaling(Scaling):
    """Gemma 4: the fastest pairs turn, with the frequencies of the whole head; the others stay.

    `Rotary(dim=...)` lets fewer features turn, too, but pairs them among themselves, and its
    frequencies fall within them.

    Args:
        proportion: the share of the pairs that turn, partial_rotary_factor.
        factor: how much longer texts may be: all frequencies are divided by it.

    Reference: "proportional" of the transformers library, https://github.com/huggingface/transformers.

    Example:
        >>> from flax_mha.positions import ProportionalScaling, Rotary
        >>> Rotary(scaling=ProportionalScaling(0.5), base=10000.0).frequencies(8).tolist()
        [1.0, 0.1, 0.0, 0.0]
    """

    proportion: Annotated[float, rules.proportion]
    factor: Positive = 1.0

    def __call__(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        turning = int(self.proportion * 2 * len(frequencies) // 2)
        return np.where(np.arange(len(frequencies)) < turning, frequencies, 0) / self.factor
