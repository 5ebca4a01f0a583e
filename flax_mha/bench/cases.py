"""What is measured: one case is a size, a direction and the options; a set is a list of cases."""

import dataclasses
import re
from typing import Any, ClassVar, Self

from flax_mha.bench.command import BenchError
from flax_mha.core import checks


@dataclasses.dataclass(frozen=True)
class AnyCase:
    """What the cases of layers and those of arrays (`accelerator`) have, and how both are written.

    `gradient` is FB; without it F, the forward pass. `window` counts as Keras's: |t - s| < window.
    A kind of case names its four sizes, and its own flags with the field that each fills in.
    """

    SIZES: ClassVar[str]
    FLAGS: ClassVar[dict[str, tuple[str, Any]]]
    EXAMPLE: ClassVar[str]

    batch: int
    length: int
    _: dataclasses.KW_ONLY
    gradient: bool = False
    causal: bool = False
    dropout: float = 0.0
    window: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The case that a text such as `8x512x512x8 FB causal dropout=0.1` describes.

        Args:
            text: the sizes, then any of F, FB, causal, dropout=RATE, window=KEYS and the flags.

        Raises:
            BenchError: a text that describes no case.

        Example:
            >>> Case.parse("8x512x512x8 FB causal").label
            '8x512x512x8 FB causal'
        """
        size, _, options = re.sub(r"\s*x\s*", "x", text.strip()).partition(" ")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", size):
            cls.fail(f"A case must begin with {cls.SIZES}, four positive numbers.", repr(text))
        fields: dict[str, Any] = {}
        for option in options.split():
            fields |= cls._option(option, text)
        return cls(*map(int, size.split("x")), **fields)

    @classmethod
    def _option(cls, option: str, text: str) -> dict[str, Any]:
        flags = {"F": ("gradient", False), "FB": ("gradient", True), "causal": ("causal", True)}
        flags |= cls.FLAGS
        if option in flags:
            name, value = flags[option]
            return {name: value}
        if re.fullmatch(r"dropout=0?\.\d+", option):
            return {"dropout": float(option.partition("=")[2])}
        if re.fullmatch(r"window=[1-9]\d*", option):
            return {"window": int(option.partition("=")[2])}
        valid = ", ".join([*flags, "dropout=RATE (below 1), window=KEYS"])
        return cls.fail(f"After the size a case may have: {valid}.", f"{option!r} in {text!r}")

    @classmethod
    def fail(cls, rule: str, evidence: str) -> Any:
        checks.fail(BenchError, rule, evidence, f"An example: --case '{cls.EXAMPLE}'.")

    @property
    def label(self) -> str:
        raise NotImplementedError

    @property
    def flops(self) -> float:
        raise NotImplementedError

    @property
    def mode(self) -> str:
        return "FB" if self.gradient else "F"

    @property
    def options(self) -> list[str]:
        """The words of the fields that every case has."""
        words = ["causal"] * self.causal
        words += [f"dropout={self.dropout:g}"] * bool(self.dropout)
        return words + [f"window={self.window}"] * (self.window is not None)

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs of one head may attend.

        Example:
            >>> Case(1, 5, 4, 2, causal=True).pairs, Case(1, 5, 4, 2, window=2).pairs
            (15, 13)
        """
        reach = self.length if self.window is None else min(self.window, self.length)
        before = reach * (reach - 1) // 2 + (self.length - reach + 1) * reach
        return before if self.causal else 2 * before - self.length


@dataclasses.dataclass(frozen=True)
class Case(AnyCase):
    """Self-attention of `[batch, length, features]` with `heads` heads of features / heads.

    A gradient is of parameters and input. `alone` leaves the peers out: the case says how our own
    time grows.
    """

    SIZES = "BxTxDxN"
    FLAGS: ClassVar = {"alone": ("alone", True)}
    EXAMPLE = "8x512x512x8 FB causal"

    features: int
    heads: int
    _: dataclasses.KW_ONLY
    alone: bool = False

    def __post_init__(self) -> None:
        if self.features % self.heads:
            self.fail("The features D must be a multiple of the heads N.", self.size)

    @property
    def head_size(self) -> int:
        return self.features // self.heads

    @property
    def size(self) -> str:
        return f"{self.batch}x{self.length}x{self.features}x{self.heads}"

    @property
    def variant(self) -> str:
        """All but the size: cases of one variant make one curve over T."""
        return " ".join([self.mode, *self.options])

    @property
    def label(self) -> str:
        return f"{self.size} {self.variant}" + " alone" * self.alone

    @property
    def flops(self) -> int:
        """Of the four projections and the two products; the gradient's are three times as many."""
        projections = 4 * 2 * self.batch * self.length * self.features**2
        products = 2 * 2 * self.batch * self.features * self.pairs
        return (projections + products) * (3 if self.gradient else 1)


_QUICK = ["4x32x64x4 F", "4x32x64x4 FB", "4x32x64x4 FB dropout=0.1", "2x256x64x4 FB causal"]
_README = [
    *(f"8x512x512x8 {variant}" for variant in ("F", "FB", "FB causal", "FB dropout=0.1")),
    *(f"1x4096x512x8 {variant}" for variant in ("F", "F causal", "FB", "FB causal")),
    *("32x128x512x8 F", "32x128x512x8 FB", "1x1024x512x8 F", "1x1024x512x8 FB"),
    *(f"64x{length}x512x8 {mode}" for length in (8, 32, 64) for mode in ("F", "FB")),
    *("1x8192x512x8 F window=256", "1x8192x512x8 FB window=256"),
    "1x16384x512x8 FB window=256 alone",
]
_CROSSOVER = [
    f"{max(1, 2048 // length)}x{length}x512x8 {variant}"
    for variant in ("F", "FB", "FB causal")
    for length in (16, 32, 64, 128, 256, 512, 1024)
]
SETS: dict[str, tuple[Case, ...]] = {
    name: tuple(map(Case.parse, texts))
    for name, texts in (("quick", _QUICK), ("readme", _README), ("crossover", _CROSSOVER))
}
