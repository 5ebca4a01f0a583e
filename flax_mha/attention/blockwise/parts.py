"""The arrays of a call and, of each kind, what a tile reads of it and adds to it.

    Queries     [B, T, N, F]    of a tile [b, k, r, F]
    Keys        [B, S, K, F]    of a tile [b, k, s, F]
    Rows        [B, N, T]       of a tile [b, k, r]
    Scores      [b, n, t, s]    of a tile [b, k, G, t, s]; any axis may have size 1
    Operands    as Scores, of a function of pairs
    Table       any shape       of a tile all of it
    Distances   [N, L]          of a tile [k G, t + s - 1]

`take` and `add` are transposes of each other; so are `fill`, to whole blocks, and `trim`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from flax_mha.attention.blockwise.call import (
    Blocks,
    Plan,
    key_tile,
    of_keys,
    of_queries,
    of_rows,
    put_keys,
    put_queries,
    put_rows,
    stretch,
    value_tile,
)
from flax_mha.attention.blockwise.tiles import (
    Tile,
    Tiling,
    of_scores,
    put_at,
    scores_place,
    slice_at,
)
from flax_mha.core.typing import Array, DType, Shape


@dataclasses.dataclass(frozen=True)
class Here:
    """One tile of a call; `blocks` holds the mask and the offsets."""

    plan: Plan
    blocks: Blocks
    tile: Tile
    masked: bool

    @property
    def tiling(self) -> Tiling:
        return self.plan.tiling


@dataclasses.dataclass(frozen=True)
class Part:
    """An array of a call, by its shape; static and hashable."""

    shape: Shape
    dtype: DType

    @classmethod
    def of(cls, x: Any) -> Any:
        return cls(tuple(x.shape), jnp.dtype(x.dtype))

    def filled(self, tiling: Tiling) -> Shape:
        """The shape with every length filled up to whole blocks."""
        raise NotImplementedError

    def tile_shape(self, tiling: Tiling) -> Shape:
        raise NotImplementedError

    def take(self, here: Here, x: Array) -> Array:
        raise NotImplementedError

    def put(self, here: Here, x: Array, part: Array) -> Array:
        raise NotImplementedError

    def add(self, here: Here, x: Array, part: Array) -> Array:
        return self.put(here, x, self.take(here, x) + part)

    def fill(self, tiling: Tiling, x: Array) -> Array:
        """Zeros, or False, behind the ends."""
        full = self.filled(tiling)
        if x.shape == full:
            return x
        return jnp.pad(x, [(0, after - before) for before, after in zip(x.shape, full)])

    def trim(self, x: Array) -> Array:
        return x[tuple(slice(size) for size in self.shape)] if x.shape != self.shape else x


class Queries(Part):
    def filled(self, tiling: Tiling) -> Shape:
        B, _, N, F = self.shape
        return (B, tiling.query_blocks * tiling.t, N, F)

    def tile_shape(self, tiling: Tiling) -> Shape:
        return (tiling.b, tiling.k, tiling.r, self.shape[3])

    def take(self, here: Here, x: Array) -> Array:
        return of_queries(here.tiling, x, here.tile)

    def put(self, here: Here, x: Array, part: Array) -> Array:
        return put_queries(here.tiling, x, part, here.tile)


class Keys(Part):
    def filled(self, tiling: Tiling) -> Shape:
        B, _, K, F = self.shape
        return (B, tiling.key_blocks * tiling.s, K, F)

    def tile_shape(self, tiling: Tiling) -> Shape:
        return (tiling.b, tiling.k, tiling.s, self.shape[3])

    def take(self, here: Here, x: Array) -> Array:
        return of_keys(here.tiling, x, here.tile)

    def put(self, here: Here, x: Array, part: Array) -> Array:
        return put_keys(x, part, here.tile)


class StoredKeys(Keys):
    """Keys that are int8; of a tile, what they stand for."""

    def take(self, here: Here, x: Array) -> Array:
        return key_tile(here.plan, here.blocks, here.tile)


class StoredValues(Keys):
    def take(self, here: Here, x: Array) -> Array:
        return value_tile(here.plan, here.blocks, here.tile)


class Rows(Part):
    def filled(self, tiling: Tiling) -> Shape:
        B, N, _ = self.shape
        return (B, N, tiling.query_blocks * tiling.t)

    def tile_shape(self, tiling: Tiling) -> Shape:
        return (tiling.b, tiling.k, tiling.r)

    def take(self, here: Here, x: Array) -> Array:
        return of_rows(here.tiling, x, here.tile)

    def put(self, here: Here, x: Array, part: Array) -> Array:
        return put_rows(here.tiling, x, part, here.tile)


class Scores(Part):
    def filled(self, tiling: Tiling) -> Shape:
        b, n, t, s = self.shape
        T, S = tiling.query_blocks * tiling.t, tiling.key_blocks * tiling.s
        return (b, n, t if t == 1 else T, s if s == 1 else S)

    def tile_shape(self, tiling: Tiling) -> Shape:
        b, n, t, s = self.shape
        heads = (1, 1) if n == 1 else (tiling.k, tiling.G)
        sizes = zip((b, t, s), (tiling.b, tiling.t, tiling.s))
        b, t, s = (1 if n == 1 else size for n, size in sizes)
        return (b, *heads, t, s)

    def take(self, here: Here, x: Array) -> Array:
        return of_scores(here.tiling, x, here.tile)

    def put(self, here: Here, x: Array, part: Array) -> Array:
        start, size = scores_place(here.tiling, x.shape, here.tile)
        return put_at(x, part.reshape(size), start)


class Edged(Part):
    """Of a call with a score: a function, or its slope, might make a NaN of zeros."""

    def fill(self, tiling: Tiling, x: Array) -> Array:
        """Behind the ends what stands at them."""
        more = [(0, after - before) for before, after in zip(x.shape, self.filled(tiling))]
        return jnp.pad(x, more, mode="edge")


class Operands(Edged, Scores):
    pass


class ScoredQueries(Edged, Queries):
    pass


class Table(Part):
    def filled(self, tiling: Tiling) -> Shape:
        return self.shape

    def tile_shape(self, tiling: Tiling) -> Shape:
        return self.shape

    def take(self, here: Here, x: Array) -> Array:
        return x

    def put(self, here: Here, x: Array, part: Array) -> Array:
        return part


class Distances(Part):
    def filled(self, tiling: Tiling) -> Shape:
        return self.shape  # its ends' values were repeated before

    def tile_shape(self, tiling: Tiling) -> Shape:
        return (tiling.k * tiling.G, tiling.t + tiling.s - 1)

    def take(self, here: Here, x: Array) -> Array:
        return slice_at(x, *stretch(here.plan, here.blocks, here.tile))

    def put(self, here: Here, x: Array, part: Array) -> Array:
        return put_at(x, part, stretch(here.plan, here.blocks, here.tile)[0])
