"""Cycles of a TPU kernel, from the static schedule that libtpu writes down when it compiles.

A TPU core executes one bundle of instructions a cycle, in the order that the compiler decided. Two
of the files that `DUMP_FLAGS` ask for are read here, for every kernel:

    ...-final_hlo-static-per-bundle-utilization.txt   how many slots of each unit a bundle uses
    ...-final_bundles.txt                             its instructions, and where jumps lead

A region is what stands between two places where a jump leads. The body of a tile is a region that
feeds the matrix units as much as the one that feeds them most, give or take a half: what prepares a
tile or writes it back multiplies nothing, and a tile without mask and one with it multiply alike.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

DUMP_FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles|utilization"
)
_USE = re.compile(r"^\d+-(?P<kernel>.*)-\d+-final_hlo-static-per-bundle-utilization\.txt$")
_BUNDLES = re.compile(r"^\d+-(?P<kernel>.*)-\d+-final_bundles\.txt$")
_TARGET = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:LH|LB|LE|PB|PF|CT):")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s.*?:")
_PRODUCT = re.compile(r"= vmatmul\.((?:[a-z]+\.)*?)([a-z]+\d+)")
# Rows that one instruction multiplies: a register has 8 sublanes of 32 bits. `vmatmul.lmr`, which
# v5e turns an operand by, takes half of them: so the five products of a gradient come out whole.
_ROWS = {"f32": 8, "bf16": 16}
_HALF = "lmr."


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles in a row.

    Attributes:
        bundles: how many; cycles, if nothing waits for memory or for a full queue.
        use: of each unit, the share of its slots that hold an instruction.
        rows: how many rows are multiplied with a square of weights as wide as a matrix unit.
    """

    bundles: int
    use: Mapping[str, float]
    rows: int


def kernels(files: Iterable[Path]) -> dict[str, list[Region]]:
    """The regions of every kernel and fusion of a dump, by the name of its HLO instruction."""
    files = sorted(files)
    found = {pattern: {} for pattern in (_USE, _BUNDLES)}  # type: dict[re.Pattern[str], dict]
    for path, pattern in itertools.product(files, found):
        if match := pattern.match(path.name):
            found[pattern][match["kernel"]] = path
    return {
        name: regions(path.read_text(), found[_BUNDLES][name].read_text())
        for name, path in found[_USE].items()
        if name in found[_BUNDLES]
    }


def regions(use: str, bundles: str) -> list[Region]:
    """The regions of one kernel, of the texts of its two files."""
    units, capacity, table = _table(use)
    lines = bundles.splitlines()
    starts = {int(match[1], 16) for line in lines if (match := _TARGET.match(line))}
    edges = sorted({0, len(table), *starts})
    rows = _rows(lines, len(table))
    return [
        Region(
            bundles=end - start,
            use=dict(zip(units, _shares(table[start:end], capacity))),
            rows=sum(rows[start:end]),
        )
        for start, end in itertools.pairwise(edges)
    ]


def bodies(found: Sequence[Region]) -> list[Region]:
    """The bodies of a tile, first the one with the least vector arithmetic: that without a mask."""
    most = max((region.rows for region in found), default=0)
    chosen = [region for region in found if 2 * region.rows > most]
    return sorted(chosen, key=lambda region: region.use["VALU"] * region.bundles)


def _table(use: str) -> tuple[list[str], list[int], list[list[int]]]:
    head, rows = use.split("== UTILIZATION:\n")
    _, units, capacity = head.strip().splitlines()
    table = [[int(slots) for slots in row.split()] for row in rows.splitlines()]
    return units.strip().split(", "), [int(slots) for slots in capacity.split()], table


def _shares(table: Sequence[Sequence[int]], capacity: Sequence[int]) -> list[float]:
    return [sum(column) / len(table) / slots for column, slots in zip(zip(*table), capacity)]


def _rows(lines: Iterable[str], length: int) -> list[int]:
    """The rows that each bundle multiplies."""
    rows = [0] * length
    for line in lines:
        if match := _BUNDLE.match(line):
            products = _PRODUCT.findall(line)
            rows[int(match[1], 16)] += sum(
                _ROWS.get(dtype, 0) // (2 if _HALF in kinds else 1) for kinds, dtype in products
            )
    return rows
