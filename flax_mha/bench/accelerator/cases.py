"""What is measured: one case is a size, a dtype, a direction and the options of the attention."""

import dataclasses
import math
from typing import ClassVar

from flax_mha.bench.cases import AnyCase


@dataclasses.dataclass(frozen=True)
class Case(AnyCase):
    """Self-attention of `[batch, length, heads, head_size]`.

    A gradient is of query, key, value and the bias. `bias` is one for each head, `[N, T, T]`.

    Example:
        >>> Case.parse("2x64x4x32 FB window=8 causal").label
        '2x64x4x32 FB bfloat16 causal window=8'
    """

    SIZES = "BxTxNxH"
    FLAGS: ClassVar = {
        **{dtype: ("dtype", dtype) for dtype in ("bfloat16", "float16", "float32")},
        "bias": ("bias", True),
    }
    EXAMPLE = "8x2048x16x128 FB bfloat16 causal"

    heads: int
    head_size: int
    _: dataclasses.KW_ONLY
    dtype: str = "bfloat16"
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.length, self.heads, self.head_size)

    @property
    def label(self) -> str:
        words = ["x".join(map(str, self.shape)), self.mode, self.dtype, *self.options]
        return " ".join([*words, *["bias"] * self.bias])

    @property
    def reach(self) -> tuple[int, int] | None:
        """How many keys before and after itself a query sees; None = all.

        Example:
            >>> Case.parse("1x8x1x8 F window=3").reach, Case.parse("1x8x1x8 F causal").reach
            ((2, 2), None)
        """
        if self.window is None:
            return None
        return (self.window - 1, 0 if self.causal else self.window - 1)

    @property
    def flops(self) -> float:
        """Of the two products over the pairs that may attend; with a gradient's five, 3.5 times.

        Example:
            >>> Case.parse("1x4x1x8 F").flops, Case.parse("1x4x1x8 F causal").flops
            (512, 320)
        """
        forward = 4 * self.batch * self.heads * self.head_size * self.pairs
        return 3.5 * forward if self.gradient else forward


def _of(length: int, *variants: str, heads: str = "16x128") -> list[str]:
    """Cases of some 16,384 queries of 2,048 features."""
    return [f"{math.ceil(16384 / length)}x{length}x{heads} {variant}" for variant in variants]


_LENGTHS = (512, 2048, 8192, 32768)
_ACCELERATOR = [
    *(text for T in _LENGTHS for text in _of(T, "F causal", "FB", "FB causal")),
    *(text for T in _LENGTHS for text in _of(T, "F float32 causal", "FB float32 causal")),
    *(text for T in (2048, 8192) for text in _of(T, "F", "FB causal dropout=0.1")),
    *(text for T in (2048, 8192) for text in _of(T, "FB causal", heads="32x64")),
    *(text for T in (8192, 32768) for text in _of(T, "FB causal window=1024")),
    *(text for T in (512, 2048, 8192) for text in _of(T, "FB causal bias")),
]
_REHEARSAL = [
    *("2x64x2x16 F causal", "2x64x2x16 FB float32 causal bias", "1x128x2x16 FB causal window=16"),
    "1x128x2x16 FB dropout=0.1",
]
CASES, REHEARSAL = (tuple(map(Case.parse, texts)) for texts in (_ACCELERATOR, _REHEARSAL))
