"""What a mask says beyond bands, padding, segments and arrays: functions of pairs, separated.

A `Mask` of a call is split in two. Its plain part stays a `Mask`, by which blocks are walked; its
functions, unions and complements become functions over operands that every tile can slice.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import Any

import jax

from flax_mha.attention.static_band import static_band
from flax_mha.core.pairs.blocks import (
    Blocks,
    Grid,
    blocks_of,
    both,
    by_evaluation,
    reason_to_evaluate,
)
from flax_mha.core.pairs.function import mask_function
from flax_mha.core.pairs.separated import Separated, separated
from flax_mha.core.typing import Array
from flax_mha.masks import Mask
from flax_mha.masks.blocks import BlockMask
from flax_mha.masks.of_pairs import beyond
from flax_mha.masks.other_blocks import blocks_over
from flax_mha.masks.parts import BEYOND

GRAIN = 128  # queries and keys a block that is found by asking for every pair


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Allowed:
    """A function of pairs that must agree, and the blocks in which it does, where they are known.

    Without blocks, intervals tell them.
    """

    pairs: Separated
    blocks: BlockMask | None = None

    def over(self, grid: Grid) -> Blocks:
        """The blocks of this grid in which a pair may attend."""
        return (
            blocks_of(self.pairs, grid) if self.blocks is None else blocks_over(self.blocks, grid)
        )


def split_mask(
    mask: Mask, places: dict[str, Array], sizes: tuple[int, int, int, int]
) -> tuple[Mask, tuple[Allowed, ...]]:
    """(the plain part, the others as functions over operands), of the pairs of these indices.

    `sizes` are those of all pairs, B, N, T and S. The plain part gets the functions' bands.
    """
    if mask.is_plain:
        return mask, ()
    kept = [function.blocks for function in mask.functions]
    functions = [mask_function(function) for function in beyond(mask)]
    pieces = tuple(
        Allowed(separated(function, places, sizes), blocks)
        for function, blocks in itertools.zip_longest(functions, kept)
    )
    empty: Any = dict.fromkeys(BEYOND, ())
    plain = dataclasses.replace(mask, **empty)
    if mask.query_offset is not None:  # the plain part counts from elsewhere
        return plain, pieces
    bands = (static_band(function, *sizes) for function in functions)
    return functools.reduce(operator.and_, (Mask(band=band) for band in bands), plain), pieces


def with_blocks(where: tuple[Allowed, ...], T: Any, S: Any, sizes: Any) -> tuple[Allowed, ...]:
    """Where intervals cannot tell the blocks, they are found once, by asking for every pair."""

    def found(one: Allowed) -> Allowed:
        if one.blocks is not None or reason_to_evaluate(one.pairs) is None:
            return one
        t, s = sizes or (GRAIN, GRAIN)
        some, whole = by_evaluation(one.pairs, Grid(T, S, t, s))
        return dataclasses.replace(one, blocks=BlockMask(some, whole, (T, S), (t, s)))

    return tuple(map(found, where))


def how_found(where: tuple[Allowed, ...]) -> str:
    """How the blocks of each function are found, in words."""

    def one(allowed: Allowed) -> str:
        if allowed.blocks is not None:
            return "as given"
        reason = reason_to_evaluate(allowed.pairs)
        return "by intervals" if reason is None else f"by asking for every pair ({reason})"

    ways = list(dict.fromkeys(map(one, where)))
    return f"blocks of mask functions {' and '.join(ways)}"


def blocks_left(where: tuple[Allowed, ...], grid: Grid) -> Blocks | None:
    """What all of them leave; None where there are none."""
    found = [one.over(grid) for one in where]
    return functools.reduce(both, found) if found else None
