"""How a kernel finds its tiles: along a span of blocks, or along a list where there are functions.

Scalars that were read before the kernel began tell it, to the index maps as to the kernel.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_mha.attention.pallas_tpu.operands import At, of_example, scalars_of
from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.attention.pallas_tpu.spans import NUMBERS


class Span:
    """One step along a span, which may reach beyond the `end` of all blocks."""

    def __init__(self, numbers: list[Any], step: Any, end: int | None = None) -> None:
        self.start, self.whole_start, self.whole_stop, self.stop = numbers
        self.step, self.end = step, end

    @functools.cached_property
    def block(self) -> Any:
        return self.start + self.step

    @property
    def last(self) -> Any:
        stop = self.stop if self.end is None else jnp.minimum(self.stop, self.end)
        return jnp.maximum(stop - 1, 0)

    @property
    def fetched(self) -> Any:
        """Where nothing is left to visit, the last block again: it is not fetched anew."""
        return jnp.clip(self.start + self.step, 0, self.last)

    def up_to(self, last: Any) -> Any:
        """The same, of a `last` that is known."""
        return jnp.clip(self.start + self.step, 0, last)

    @property
    def is_visited(self) -> Any:
        return self.block < self.stop

    @property
    def is_whole(self) -> Any:
        return (self.block >= self.whole_start) & (self.block < self.whole_stop)


class Listed(NamedTuple):
    """One step along a list; behind its end, the last block again."""

    entry: Any
    is_visited: Any

    @property
    def block(self) -> Any:
        return self.entry >> 1

    @property
    def last(self) -> Any:
        return self.block

    @property
    def fetched(self) -> Any:
        return self.block

    def up_to(self, last: Any) -> Any:
        return last

    @property
    def is_whole(self) -> Any:
        return (self.entry & 1) == 1


class InSpan(NamedTuple):
    """A block that may lie in a span."""

    block: Any
    start: Any
    whole_start: Any
    whole_stop: Any
    stop: Any

    @property
    def fetched(self) -> Any:
        return jnp.clip(self.block, self.start, jnp.maximum(self.stop - 1, self.start))

    @property
    def is_visited(self) -> Any:
        return (self.block >= self.start) & (self.block < self.stop)

    @property
    def is_whole(self) -> Any:
        return (self.block >= self.whole_start) & (self.block < self.whole_stop)


class Near(NamedTuple):
    """A block, and the nearest one that is visited: perhaps itself, perhaps none."""

    block: Any
    entry: Any
    blocks: int

    @property
    def fetched(self) -> Any:
        return jnp.minimum(self.entry >> 1, self.blocks - 1)

    @property
    def is_visited(self) -> Any:
        return self.entry >> 1 == self.block

    @property
    def is_whole(self) -> Any:
        return (self.entry & 1) == 1


def key_walk(plan: Plan, scalars: Any, b: Any, i: Any, step: Any) -> Span | Listed:
    """A step of query block i along its key blocks."""
    if "visits" in plan.names:
        return _listed(plan, scalars, b, i, plan.key_blocks, step)
    return Span(_span(plan, scalars, b, i), step)


def query_walk(
    plan: Plan, scalars: Any, b: Any, j: Any, step: Any, first: Any, blocks: int
) -> Span | Listed:
    """A step of key block j along those of its query blocks that a turn has."""
    if "visits" in plan.names:
        return _listed(plan, scalars, b, j, plan.query_blocks, step)
    start, whole_start, whole_stop, stop = _span(plan, scalars, b, j)
    start, stop = jnp.maximum(start, first), jnp.minimum(stop, first + blocks)
    return Span([start, whole_start, whole_stop, stop], step, plan.query_blocks)


def tile_walk(plan: Plan, scalars: Any, tile: At) -> "Near | InSpan":
    """A tile of a walk over all of them."""
    if "visits" not in plan.names:
        return InSpan(tile.j, *_span(plan, scalars, tile.b, tile.i))
    visits, place = _row(plan, scalars, "visits", tile.b)
    return Near(tile.j, visits[place + tile.i * plan.key_blocks + tile.j], plan.key_blocks)


def _span(plan: Plan, scalars: Any, b: Any, own: Any) -> list[Any]:
    spans, place = _row(plan, scalars, "spans", b)
    first = place + own * NUMBERS
    return [spans[first + n] for n in range(NUMBERS)]


def _listed(plan: Plan, scalars: Any, b: Any, own: Any, there: int, step: Any) -> Listed:
    visits, place = _row(plan, scalars, "visits", b)
    first = place + own * (1 + there)
    count = visits[first]
    entry = visits[first + 1 + jnp.clip(step, 0, jnp.maximum(count - 1, 0))]
    return Listed(entry, step < count)


def _row(plan: Plan, scalars: Any, name: str, b: Any) -> tuple[Any, Any]:
    """A scalar operand, and where the numbers of an example begin in it."""
    ref = scalars[scalars_of(plan.names).index(name)]
    return ref, of_example(plan, name, b) * plan.shape(name)[1]
