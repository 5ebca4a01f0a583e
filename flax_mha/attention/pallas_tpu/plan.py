"""The static half of a kernel's call: sizes, the tiles' shape, and which operands there are.

T and S are filled up to whole tiles of t queries and s keys; N = K G, query head n = k G + g.
A program instance computes one tile of one head, in parts of `rows` queries and `columns` keys.
"""

import dataclasses
from typing import Any

from flax_mha.attention.pallas_tpu.pairs import Pairs
from flax_mha.core.typing import Array, Shape

LANES = 128  # numbers in a row of a TPU's vector register; of eight such rows
Band = tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a tile that is computed at once."""

    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call; `shapes` = the operands that it has, by name."""

    B: int
    K: int
    G: int
    T: int
    S: int
    H: int
    V: int
    t: int
    s: int
    band: Band
    scale: float  # of the product: 1 where the query has it already, else from 1 to 2
    soft_cap: float | None
    rate: float
    precision: Any
    interpret: bool
    shapes: tuple[tuple[str, Shape], ...] = ()
    where: tuple[Pairs, ...] = ()  # the mask's functions
    score: Pairs | None = None

    def of(self, operands: dict[str, Array]) -> "tuple[Plan, dict[str, Array]]":
        """The plan of these operands, with them."""
        shapes = tuple((name, x.shape) for name, x in operands.items())
        return dataclasses.replace(self, shapes=shapes), operands

    @property
    def query_blocks(self) -> int:
        return self.T // self.t

    @property
    def key_blocks(self) -> int:
        return self.S // self.s

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.shapes)

    def shape(self, name: str) -> Shape:
        return dict(self.shapes)[name]

    @property
    def is_masked(self) -> bool:
        """Whether there are tiles of which a mask may take a part."""
        has = any(name.startswith(("query_ids", "dense")) for name in self.names)
        return has or self.band != (None, None) or bool(self.where)

    @property
    def late(self) -> float:
        """The factor of the logits that stays out of them until their maximum is subtracted.

        There it costs nothing beyond the factor of e^x = 2^(x log2 e). A soft cap and a score need
        it before, and a dense bias would have to be divided by it, entry by entry.
        """
        changes = self.soft_cap is not None or self.score is not None
        return 1.0 if changes or "bias" in self.names or self.scale <= 0 else self.scale

    @property
    def key_steps(self) -> int:
        """How many key blocks a query block meets at most."""
        return min(self.key_blocks, self._most(self.t, self.s))

    @property
    def query_steps(self) -> int:
        """How many query blocks a key block meets at most."""
        return min(self.query_blocks, self._most(self.s, self.t))

    def _most(self, here: int, there: int) -> int:
        """Blocks of `there` positions that a band around `here` positions may touch."""
        left, right = self.band
        if left is None or right is None:
            return max(self.query_blocks, self.key_blocks)
        return (here + left + right + there - 2) // there + 1

    @property
    def forward_part(self) -> Part:
        """All queries and half of the keys: so its products overlap with the other's softmax.

        With dropout a quarter, so that they overlap with the draws; with a dense bias all.
        """
        most = 256 if self.rate > 0 else 1024 if "bias" in self.names else 512
        return Part(self.t, largest_divisor(self.s, most))

    @property
    def backward_part(self) -> Part:
        """The whole tile: its five products leave the vector units time enough.

        With dropout so little that the products of one part overlap with the next one's draws. In
        float32 so little that what is looked at twice need not leave the registers for long.
        """
        if self.rate > 0:
            return Part(largest_divisor(self.t, 256), LANES)
        if "d_alone" in self.names:
            return Part(largest_divisor(self.t, 256), largest_divisor(self.s, 256))
        return Part(self.t, self.s)


def largest_divisor(size: int, most: int) -> int:
    """The greatest multiple of a register's lanes that divides `size`, at most `most`.

    Example:
        >>> largest_divisor(1024, 512), largest_divisor(640, 512), largest_divisor(384, 512)
        (512, 128, 384)
    """
    return max(n for n in range(LANES, most + 1, LANES) if size % n == 0)
