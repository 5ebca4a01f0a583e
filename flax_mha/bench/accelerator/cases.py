"""What is measured: one case is a size, a dtype, a direction and the options of the attention."""

import dataclasses
import math
import re
from typing import Any

from flax_mha.bench.cases import BenchError
from flax_mha.core import checks

EXAMPLE = "8x2048x16x128 FB bfloat16 causal"


@dataclasses.dataclass(frozen=True)
class Case:
    """Self-attention of `[batch, length, heads, head_size]`.

    `gradient` is FB, the gradient of query, key, value and the bias; without it F, the context.
    `bias` is one for each head, `[N, T, T]`. `window` counts as Keras's: |t - s| < window.
    """

    batch: int
    length: int
    heads: int
    head_size: int
    gradient: bool = False
    dtype: str = "bfloat16"
    causal: bool = False
    window: int | None = None
    dropout: float = 0.0
    bias: bool = False

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The case that a text such as `8x2048x16x128 FB bfloat16 causal` describes.

        Args:
            text: `BxTxNxH`, then any of F, FB, bfloat16, float16, float32, causal, window=KEYS,
                dropout=RATE, bias.

        Raises:
            BenchError: a text that describes no case.

        Example:
            >>> Case.parse("2x64x4x32 FB window=8 causal").label
            '2x64x4x32 FB bfloat16 causal window=8'
        """
        size, *options = text.split() or [""]
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", size):
            _fail("A case must begin with BxTxNxH, four positive numbers.", repr(text))
        fields: dict[str, Any] = {}
        for option in options:
            fields |= _option(option, text)
        B, T, N, H = map(int, size.split("x"))
        return cls(B, T, N, H, **fields)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.length, self.heads, self.head_size)

    @property
    def label(self) -> str:
        words = ["x".join(map(str, self.shape)), "FB" if self.gradient else "F", self.dtype]
        words += ["causal"] * self.causal
        words += [f"window={self.window}"] * (self.window is not None)
        words += [f"dropout={self.dropout:g}"] * bool(self.dropout)
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
        reach = min(self.window or self.length, self.length)
        before = reach * (reach - 1) // 2 + (self.length - reach + 1) * reach
        pairs = before if self.causal else 2 * before - self.length
        forward = 4 * self.batch * self.heads * self.head_size * pairs
        return 3.5 * forward if self.gradient else forward


def _option(option: str, text: str) -> dict[str, Any]:
    flags: dict[str, tuple[str, Any]] = {"F": ("gradient", False), "FB": ("gradient", True)}
    flags |= {"causal": ("causal", True), "bias": ("bias", True)}
    flags |= {name: ("dtype", name) for name in ("bfloat16", "float16", "float32")}
    if option in flags:
        name, value = flags[option]
        return {name: value}
    if re.fullmatch(r"dropout=0?\.\d+", option):
        return {"dropout": float(option.partition("=")[2])}
    if re.fullmatch(r"window=[1-9]\d*", option):
        return {"window": int(option.partition("=")[2])}
    return _fail(
        "After the size a case may have: F, FB, bfloat16, float16, float32, causal, window=KEYS, "
        "dropout=RATE (below 1), bias.",
        f"{option!r} in {text!r}",
    )


def _fail(rule: str, evidence: str) -> Any:
    checks.fail(BenchError, rule, evidence, f"An example: --case '{EXAMPLE}'.")


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
