"""Sums over tiles, a family that is closed under transposes and tangents.

    output = sum over tiles of function(tile of the known arrays, tile of the linear arrays)

Its transpose is the sum of the functions' transposes, and its tangent the sum of their tangents:
so a derivative of any order visits the tiles once more, and keeps nothing of what they computed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax

from flax_mha.attention.blockwise.engine import Blocks, Call, Engine
from flax_mha.attention.blockwise.lanes import begin
from flax_mha.attention.blockwise.loops import every, query_loop, where_needed
from flax_mha.attention.blockwise.parts import Here, Part
from flax_mha.attention.blockwise.signature import Signature
from flax_mha.attention.blockwise.tiles import Tile
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.platform import Place
from flax_mha.core.program import Program
from flax_mha.core.typing import Array
from flax_mha.core.varying import full


class TileFunction(Protocol):
    """Of one tile, in float32 at least; linear in `linear`; static and hashable."""

    def __call__(self, here: Here, known: list[Array], linear: list[Array]) -> list[Array]: ...


@dataclasses.dataclass(frozen=True)
class Transposed:
    """(known, cotangents of the function's outputs) -> cotangents of its linear arrays."""

    function: TileFunction
    linear: tuple[Part, ...]

    def __call__(self, here: Here, known: list[Array], linear: list[Array]) -> list[Array]:
        shapes = [part.tile_shape(here.tiling) for part in self.linear]
        nothing = [full(known[0], shape, 0) for shape in shapes]
        _, transpose = jax.vjp(lambda x: self.function(here, known, x), nothing)
        return transpose(linear)[0]


@dataclasses.dataclass(frozen=True)
class Moved:
    """(known + linear, tangents of the chosen known arrays) -> tangents of the function's outputs.

    `split` is how many the function knows.
    """

    function: TileFunction
    split: int
    chosen: tuple[int, ...]

    def __call__(self, here: Here, known: list[Array], linear: list[Array]) -> list[Array]:
        fixed, own_linear = known[: self.split], known[self.split :]

        def of_chosen(moved: list[Array]) -> list[Array]:
            arrays = dict(enumerate(fixed)) | dict(zip(self.chosen, moved))
            return self.function(here, list(arrays.values()), own_linear)

        return jax.jvp(of_chosen, ([fixed[i] for i in self.chosen],), (linear,))[1]


@dataclasses.dataclass(frozen=True)
class TileSum(Program):
    """The program of one such sum; its known arrays are [*facts, *arrays, *softmax, *more].

    `softmax_by` says what computed the softmax of these keys; None = it is one of more keys. Where
    that is not the blocks themselves they compute it anew: logits of 1e8 that two programs compute
    differ by 8, and e^(logits - row_max) of the two by e^8.
    """

    signature: Signature
    function: TileFunction
    known: tuple[Part, ...]
    linear: tuple[Part, ...]
    outputs: tuple[Part, ...]
    softmax_by: Engine | None

    @property
    def count(self) -> int:
        return len(self.outputs)

    def transpose(self) -> Any:
        function = Transposed(self.function, self.linear)
        return dataclasses.replace(
            self, function=function, linear=self.outputs, outputs=self.linear
        )

    def tangent(self, chosen: tuple[int, ...]) -> Any:
        chosen = tuple(i - self.signature.leaves for i in chosen)
        return TileSum(
            self.signature,
            Moved(self.function, len(self.known), chosen),
            self.known + self.linear,
            tuple(self.known[i] for i in chosen),
            self.outputs,
            self.softmax_by,
        )

    def run(self, known: list[Array], linear: list[Array], place: Place) -> list[Array]:
        plan, blocks = self.signature.filled(known, place)
        tiling, wide = plan.tiling, wide_dtype(blocks.query_BTNH.dtype)
        fill = lambda parts, xs: [(p, p.fill(tiling, x)) for p, x in zip(parts, xs)]  # noqa: E731
        known = self._with_own_softmax(known, place)
        arrays = fill(self.known, known[self.signature.leaves :]), fill(self.linear, linear)

        def add(tile: Tile, masked: bool, sums: list[Array]) -> list[Array]:
            here = Here(plan, blocks, tile, masked)

            def compute() -> list[Array]:
                return self.function(here, *(_taken(here, group, wide) for group in arrays))

            def nothing() -> list[Array]:
                shapes = [part.tile_shape(tiling) for part in self.outputs]
                return [full(blocks.query_BTNH, shape, 0, wide) for shape in shapes]

            added = where_needed(plan, blocks, tile, compute, nothing)
            return [p.add(here, x, one) for p, x, one in zip(self.outputs, sums, added)]

        def lane(index: Array, sums: list[Array]) -> list[Array]:
            corner = begin(tiling, index)

            def key_block(j: Array, sums: list[Array]) -> list[Array]:
                step = lambda masked, i, sums: add(  # noqa: E731
                    Tile(*corner, i * tiling.t, j * tiling.s), masked, sums
                )
                return query_loop(plan, blocks, (*corner, j), step, sums)

            return every(tiling.key_blocks, key_block, sums)

        zeros = [full(blocks.query_BTNH, p.filled(tiling), 0, wide) for p in self.outputs]
        sums = every(tiling.lanes, lane, zeros)
        return [p.trim(x).astype(p.dtype) for p, x in zip(self.outputs, sums)]

    def _with_own_softmax(self, known: list[Array], place: Place) -> list[Array]:
        if self.softmax_by is None or isinstance(self.softmax_by.at(place), Blocks):
            return known
        end = self.signature.leaves + len(self.signature.parts)
        softmax = Blocks().forward(Call(self.signature, known[:end], place))
        return [*known[:end], *softmax, *known[end + len(softmax) :]]


def _taken(here: Here, arrays: Sequence[tuple[Part, Array]], wide: Any) -> list[Array]:
    return [part.take(here, x).astype(wide) for part, x in arrays]
