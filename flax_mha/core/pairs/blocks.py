"""Which blocks of pairs a mask leaves: told by intervals, or by asking for every pair.

A block is t queries by s keys; the last ones may reach beyond the end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.core.pairs.intervals import Interval, bounds, without_rule
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.typing import Array


class Blocks(NamedTuple):
    """Booleans `[b, n, Q, J]`, where b and n may be 1: what a block may hold, never too little.

    Attributes:
        some: whether a pair of the block may attend.
        whole: whether all of them surely may.
    """

    some: Array
    whole: Array


class Grid(NamedTuple):
    """T queries and S keys, t and s a block."""

    T: Any
    S: Any
    t: int
    s: int

    @property
    def shape(self) -> tuple[Any, Any]:
        return -(-self.T // self.t), -(-self.S // self.s)


def blocks_of(mask: Separated, grid: Grid) -> Blocks:
    """By intervals where every operation has a rule, else by evaluation."""
    by = by_evaluation if reason_to_evaluate(mask) else by_intervals
    return by(mask, grid)


def reason_to_evaluate(mask: Separated) -> str | None:
    """The operation that intervals cannot follow, or None."""
    return without_rule(mask.expression, mask.table_inputs)


def by_intervals(mask: Separated, grid: Grid) -> Blocks:
    """By the least and greatest operand of each block; wide, never wrong."""
    ends = [_ends(x, grid) for x in mask.operands]
    points = [Interval(x, x) for x in mask.tables]
    low, high = bounds(mask.expression, *ends, *points)
    return Blocks(_full(high, grid), _full(low, grid))


def by_evaluation(mask: Separated, grid: Grid) -> Blocks:
    """Exact: every pair is asked, one row of blocks at a time."""
    Q, J = grid.shape
    operands = [_padded(x, grid) for x in mask.operands]

    def row(i: Array) -> tuple[Array, Array]:
        cut = [
            x if x.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(x, i * grid.t, grid.t, axis=2)
            for x in operands
        ]
        allowed = mask.at(cut, mask.tables)
        b, n, t, s = allowed.shape if allowed.ndim else (1, 1, 1, 1)
        allowed = jnp.broadcast_to(allowed, (b, n, t, s))
        by_block = allowed.reshape(b, n, t, *((1, 1) if s == 1 else (J, grid.s)))
        return by_block.any((2, 4)), by_block.all((2, 4))

    some, whole = (jnp.moveaxis(x, 0, 2) for x in jax.lax.map(row, jnp.arange(Q, dtype="int32")))
    return Blocks(*(jnp.broadcast_to(x, (*x.shape[:2], Q, J)) for x in (some, whole)))


def both(first: Blocks, second: Blocks) -> Blocks:
    """What two masks leave that must agree."""
    return Blocks(first.some & second.some, first.whole & second.whole)


def _padded(x: Array, grid: Grid) -> Array:
    """Up to whole blocks; behind the end stands what stands at the end."""
    Q, J = grid.shape
    more = [0 if n == 1 else full - n for n, full in zip(x.shape[2:], (Q * grid.t, J * grid.s))]
    return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])), mode="edge")


def _ends(x: Array, grid: Grid) -> Interval:
    x = _padded(x, grid)
    b, n, t, s = x.shape
    tiles = (1, 1) if t == 1 else (t // grid.t, grid.t)
    x = x.reshape(b, n, *tiles, *((1, 1) if s == 1 else (s // grid.s, grid.s)))
    return Interval(x.min((3, 5)), x.max((3, 5)))


def _full(x: Array, grid: Grid) -> Array:
    b, n = x.shape[:2] if x.ndim else (1, 1)
    return jnp.broadcast_to(x, (b, n, *grid.shape))
