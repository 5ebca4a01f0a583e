"""The operands of the kernels: their axes by letters, and so the blocks of them that a tile reads.

    query        B K G T H     row_max, delta    B K G 1 T       bias, dense  b k g t s
    key          B K S H       query_ids         b R T           distances    b k g 128 L
    value        B K S V       key_ids           b R S           scalars      b X

A lower-case axis may have size 1. R = pairs of ids; a removed position is an id that meets none.
Scalars are read before a tile begins: the spans, the position of query 0, the words and the start
of dropout, and the first query head and block of a backward turn. Of functions of pairs there are
rows b k g 1 T, columns b k g 1 S, and more scalars: numbers of heads b n, and the tiles to visit.
`d_alone` stands as delta does.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.core.typing import Shape

SCALARS = ("spans", "offset", "words", "start", "turn")
AXES = {
    "query": "BKGTH",
    "key": "BKSH",
    "value": "BKSV",
    "query_ids": "BRT",
    "key_ids": "BRS",
    "bias": "BKGTS",
    "d_bias": "BKGTS",
    "dense": "BKGTS",
    "distances": "BKGRD",
    "d_context": "BKGTV",
    "context": "BKGTV",
    "row_max": "BKG1T",
    "row_sum": "BKG1T",
    "delta": "BKG1T",
    "d_alone": "BKG1T",
    "row": "BKG1T",
    "column": "BKG1S",
    "d_row": "BKG1T",
    "d_column": "BKG1S",
    "d_number": "BKG11",
}
MORE_SCALARS = ("number", "visits")  # those of functions of pairs
STRETCHES = 2  # of the distances that a tile of t = s reaches over


class At(NamedTuple):
    """A tile: example, key/value head, query head of that one, query block, key block."""

    b: Any
    k: Any
    g: Any
    i: Any
    j: Any


def kind_of(name: str) -> str:
    """Its name without a number behind it."""
    return name.rstrip("0123456789")


def axes_of(name: str) -> str:
    return AXES[kind_of(name)]


def scalars_of(names: Iterable[str]) -> tuple[str, ...]:
    """The scalars among some operands: those of every kernel, and in front."""
    return (*SCALARS, *(name for name in names if kind_of(name) in MORE_SCALARS))


def spec(
    plan: Plan, name: str, shape: Shape, at: Callable[..., At], stretch: int = 0
) -> pl.BlockSpec:
    """The block of an operand that belongs to the tile `at(*program ids, *scalars)`."""
    axes = axes_of(name)
    sizes = {"T": plan.t, "S": plan.s, "D": plan.t}
    block = tuple(_block(axis, size, sizes) for axis, size in zip(axes, shape))
    return pl.BlockSpec(block, functools.partial(_index, plan, axes, shape, at, stretch))


def _block(axis: str, size: int, sizes: dict[str, int]) -> int | None:
    if axis in "BKG":
        return None
    return sizes[axis] if axis in sizes and size > 1 else size


def _index(
    plan: Plan, axes: str, shape: Shape, at: Callable[..., At], stretch: int, *ids: Any
) -> tuple[Any, ...]:
    b, k, g, i, j = at(*ids)
    place = {"B": b, "K": k, "G": g, "T": i, "S": j}
    place["D"] = plan.query_blocks - 1 - i + j + stretch
    return tuple(0 if n == 1 else place.get(axis, 0) for axis, n in zip(axes, shape))


def row_shape(plan: Plan) -> Shape:
    return (plan.B, plan.K, plan.G, 1, plan.T)


def of_example(plan: Plan, name: str, b: Any) -> Any:
    """The row of a scalar operand that belongs to example b."""
    return 0 if plan.shape(name)[0] == 1 else b
