"""What was found, as plain dataclasses that become JSON, and how it is read from a program.

A tile is 512 x 512 entries of `[T, S]` of one head, however large the tiles of a contender are. How
many entries a body computes is told by its matrix products: attention has two, its gradient three
to five, all of them entries x H multiply-adds, and tiles are powers of two. A kernel whose body is
cut in two by a jump would be misread: its products are then those of half a tile.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax_mha.bench.aot.compile import Compiled
from flax_mha.bench.aot.hlo import Steps
from flax_mha.bench.aot.schedule import Region, bodies

TILE = 512 * 512
FORWARD, BACKWARD = 2, (3, 4, 5)
HIGHEST = 6  # passes of a float32 product at the highest precision; one at the default
UNITS = ("MXU", "VALU", "EUP", "XLU", "VLOAD", "VSTORE")


@dataclasses.dataclass
class Part:
    """A kernel, or the loops of one pass over tiles, or a program without either.

    Attributes:
        name: of the kernel, or of the computation.
        source: "schedule", bundles of a kernel; "estimate", the estimated cycles of fusions.
        cycles: of each body, as the compiler counts them.
        entries: that a body computes; None where its products are not those of attention.
        products: matrix products an entry; None likewise.
        use: of the first body, the share of each unit's slots; empty of an estimate.
    """

    name: str
    source: str
    cycles: list[int]
    entries: int | None
    products: float | None
    use: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> float | None:
        """Cycles a tile without mask; of one body that always masks, as `masked`."""
        return self.entries and self.cycles[0] * TILE / self.entries

    @property
    def masked(self) -> float | None:
        return self.entries and self.cycles[-1] * TILE / self.entries


@dataclasses.dataclass
class Figure:
    """One program of one contender. `status` is ok, unserved or refused, with its `reason`."""

    topology: str
    case: str
    contender: str
    gradient: bool
    status: str = "ok"
    reason: str = ""
    parts: list[Part] = dataclasses.field(default_factory=list)
    outside: int = 0  # estimated cycles of the entry's other fusions, at T = 2048
    extra_bytes: dict[int, int | str] = dataclasses.field(default_factory=dict)  # by T
    largest_buffer: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> float | None:
        return _sum([part.whole for part in self.parts if part.products != 0])

    @property
    def masked(self) -> float | None:
        return _sum([part.masked for part in self.parts if part.products != 0])

    @property
    def kernels(self) -> list[str]:
        return [part.name for part in self.parts if part.source == "schedule"]

    def use(self, unit: str) -> float | None:
        """The share of a unit's slots over all kernels; None where there is none."""
        found = [(part.use[unit], part.whole) for part in self.parts if part.use and part.whole]
        total = sum(whole for _, whole in found)
        return sum(share * whole for share, whole in found) / total if found else None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"whole": self.whole, "masked": self.masked}


def _sum(numbers: Sequence[float | None]) -> float | None:
    return sum(numbers) if numbers and None not in numbers else None  # type: ignore[arg-type]


def parts_of(compiled: Compiled, H: int, width: int, forward: Sequence[Part] = ()) -> list[Part]:
    """The kernels of a program, and what computes entries beside them.

    Args:
        compiled: the program.
        H: features of a head.
        width: of a matrix unit.
        forward: of a gradient, the parts of the program without it, which it runs too.
    """
    own = [
        _kernel(name, compiled.regions.get(name, ()), _wide(H, width) / width**2, forward)
        for name in compiled.module.kernels
    ]
    return [*own, *map(_estimate, compiled.module.steps)]


def _wide(H: int, width: int) -> int:
    """Features with the zeros that fill up a matrix unit."""
    return -(-H // width) * width


def _kernel(name: str, found: Sequence[Region], rows: float, forward: Sequence[Part]) -> Part:
    """`rows`: how many a product of one entry takes."""
    chosen = bodies(found)
    if not chosen:
        return Part(name, "schedule", [], None, 0.0 if found else None)
    multiplied = chosen[0].rows / rows
    same = (x.entries for x in forward if x.entries and x.entries * (x.products or 0) == multiplied)
    entries = next(same, None) or entries_of(multiplied, _products(forward))
    return Part(
        name=name,
        source="schedule",
        cycles=[body.bundles for body in chosen],
        entries=entries,
        products=entries and multiplied / entries,
        use={unit: chosen[0].use[unit] for unit in UNITS},
    )


def _products(forward: Sequence[Part]) -> tuple[int, ...]:
    """How many products an entry may have; each pass of one counts."""
    if not forward:
        return FORWARD, HIGHEST * FORWARD
    passes = HIGHEST if any(x.products == HIGHEST * FORWARD for x in forward) else 1
    return tuple(passes * number for number in BACKWARD)


def _estimate(steps: Steps) -> Part:
    return Part(steps.name, "estimate", list(steps.cycles), steps.entries, steps.products)


def entries_of(multiplied: float, products: Sequence[int]) -> int | None:
    """The power of two that is `multiplied` over one of `products`.

    Example:
        >>> entries_of(5 * 1024 * 1024, (3, 4, 5)), entries_of(7.0, (2, 12))
        (1048576, None)
    """
    for number in products:
        entries = multiplied / number
        if entries >= 1 and entries.is_integer() and int(entries).bit_count() == 1:
            return int(entries)
    return None
