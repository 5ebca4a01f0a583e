"""Backward kernel of biases: d_logits summed over the axes in which a bias has size 1.

So is the gradient of an operand of a score function, that is d_logits times the score's slope.
A dense bias: the grid's outer axes are those that the bias has, the inner ones are summed over. A
bias of distances: its outer axes are the tiles' diagonals, and a diagonal's tiles are added rows of
128 queries by rows, each 128 entries further on, so that they stand as the operand does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flax_mha.attention.pallas_tpu.backward import d_logits
from flax_mha.attention.pallas_tpu.lanes import as_row
from flax_mha.attention.pallas_tpu.launch import launch
from flax_mha.attention.pallas_tpu.operands import STRETCHES, At, axes_of, kind_of, scalars_of, spec
from flax_mha.attention.pallas_tpu.part import Here, parts
from flax_mha.attention.pallas_tpu.plan import LANES, Plan
from flax_mha.attention.pallas_tpu.visits import nearest, with_visits
from flax_mha.attention.pallas_tpu.walk import tile_walk
from flax_mha.core.typing import Array, Shape

LETTERS = "BKGTS"  # the axes of a grid over all tiles
GRID = len(LETTERS)
Kernel = Callable[[Plan, dict[str, Array]], Array]


def bias_sums(plan: Plan, operands: dict[str, Array]) -> Array:
    """d_bias `[b, k, g, t, s]`, in float32; a bias over T and S has whole tiles."""
    return _sums(plan, operands, "flax_mha_bias", "d_bias", plan.shape("bias"), Added(_add_dense))


def operand_sums(name: str) -> Kernel:
    """The kernel of a score's operand: of a row `[b, k, g, 1, T]`, of a number `[.., 1, 1]`."""

    def sums(plan: Plan, operands: dict[str, Array]) -> Array:
        kind, shape = kind_of(name), plan.shape(name)
        if kind == "number":
            shape = (shape[0], *((1, 1) if shape[1] == 1 else (plan.K, plan.G)), 1, 1)
        add = _add_row if kind == "row" else _add_dense
        return _sums(plan, operands, "flax_mha_score", f"d_{kind}", shape, Added(add, name))

    return sums


class Added(NamedTuple):
    """How a part is added; `of` = an operand of the score, if it is one's gradient."""

    add: Any
    of: str | None = None


def _sums(
    plan: Plan, operands: dict[str, Array], name: str, output: str, shape: Shape, added: Added
) -> Array:
    plan, operands = with_visits(plan, operands, functools.partial(nearest, plan))
    sizes = dict(zip(LETTERS, (plan.B, plan.K, plan.G, plan.query_blocks, plan.key_blocks)))
    outer = [axis for axis, size in zip(axes_of(output), shape) if size > 1]
    inner = [axis for axis in LETTERS if axis not in outer]

    def at(*ids: Any) -> At:
        place = dict(zip(outer + inner, ids))
        return At(*(place[axis] for axis in LETTERS))

    (sums,) = launch(
        plan,
        functools.partial(_kernel, at=at, inner=len(inner), added=added),
        name=name,
        operands=operands,
        outputs={"sums": jax.ShapeDtypeStruct(shape, "float32")},
        output_specs={"sums": spec(plan, output, shape, at)},
        grid=tuple(sizes[axis] for axis in outer + inner),
        sequential=len(inner),
        at=functools.partial(_fetched, plan, at),
        scratch={},
    )
    return sums


def distance_sums(plan: Plan, operands: dict[str, Array]) -> Array:
    """d_distances `[b, K, G, 128, T + S]`, in float32."""
    plan, operands = with_visits(plan, operands, functools.partial(nearest, plan))
    b, K, G, _, size = plan.shape("distances")
    Q, J = plan.query_blocks, plan.key_blocks
    diagonals = Q + J - 1
    own = [] if b == 1 else ["B"]  # examples of other offsets do not share a diagonal
    order = [*own, "K", "G", "D", *(axis for axis in "BT" if axis not in own)]
    sizes = {"B": plan.B, "K": K, "G": G, "D": diagonals, "T": Q}

    def at(*ids: Any) -> At:
        place = dict(zip(order, ids))
        i = place["T"]
        return At(place["B"], place["K"], place["G"], i, place["D"] - (Q - 1) + i)

    def output(*ids: Any) -> tuple[Any, ...]:
        place = dict(zip(order, ids))
        return (place["B"] if own else 0, place["K"], place["G"], place["D"], 0, 0)

    stretch = STRETCHES * plan.t
    inner = len(order) - order.index("D") - 1
    (windows,) = launch(
        plan,
        functools.partial(_kernel, at=at, inner=inner, added=Added(_add_diagonal)),
        name="flax_mha_distances",
        operands=operands,
        outputs={"sums": jax.ShapeDtypeStruct((b, K, G, diagonals, LANES, stretch), "float32")},
        output_specs={"sums": pl.BlockSpec((None, None, None, None, LANES, stretch), output)},
        grid=tuple(sizes[axis] for axis in order),
        sequential=inner,
        at=functools.partial(_fetched, plan, at),
        scratch={},
    )
    # A diagonal's window is two blocks long; the next one begins a block further on.
    halves = jnp.moveaxis(windows, 3, 4).reshape(b, K, G, LANES, diagonals, 2, plan.t)
    low, high = (halves[..., n, :].reshape(b, K, G, LANES, size - plan.t) for n in range(2))
    edge = ((0, 0),) * 4
    return jnp.pad(low, (*edge, (0, plan.t))) + jnp.pad(high, (*edge, (plan.t, 0)))


def _fetched(plan: Plan, at: Any, *ids: Any) -> At:
    """The tile, or the nearest one that is visited: a block that stands still is not fetched."""
    ids, scalars = ids[:GRID], ids[GRID:]
    tile = at(*ids)
    return tile._replace(j=tile_walk(plan, scalars, tile).fetched)


def _kernel(plan: Plan, refs: dict[str, Any], at: Any, inner: int, added: Added) -> None:
    ids = [pl.program_id(axis) for axis in range(GRID)]
    tile = at(*ids)
    walk = tile_walk(plan, [refs[n] for n in scalars_of(plan.names)], tile)
    is_first = functools.reduce(
        lambda a, b: a & b, [x == 0 for x in ids[GRID - inner :]], jnp.bool_(True)
    )

    @pl.when(is_first)
    def _() -> None:
        refs["sums"][...] = jnp.zeros_like(refs["sums"])

    visited, whole = walk.is_visited, walk.is_whole
    pl.when(visited & whole)(functools.partial(_add_tile, plan, refs, tile, added, masked=False))
    if plan.is_masked:
        pl.when(visited & ~whole)(
            functools.partial(_add_tile, plan, refs, tile, added, masked=True)
        )


def _add_tile(plan: Plan, refs: dict[str, Any], at: At, added: Added, masked: bool) -> None:
    for here in parts(plan, refs, at, plan.backward_part):
        added.add(here, d_logits(here, masked, added.of)[0])


def _add_dense(here: Here, d_logits_ts: Array) -> None:
    ref = here.refs["sums"]
    summed = tuple(axis for axis in range(2) if ref.shape[axis] == 1)
    rows = here.rows if ref.shape[0] > 1 else slice(None)
    columns = here.columns if ref.shape[1] > 1 else slice(None)
    ref[rows, columns] = ref[rows, columns] + d_logits_ts.sum(summed, keepdims=True)


def _add_row(here: Here, d_logits_ts: Array) -> None:
    ref = here.refs["sums"]
    ref[:, here.rows] = ref[:, here.rows] + as_row(d_logits_ts.sum(1, keepdims=True))


def _add_diagonal(here: Here, d_logits_ts: Array) -> None:
    ref, size = here.refs["sums"], here.part.columns
    for row in range(0, here.part.rows, LANES):
        first = here.plan.t - here.row + here.column - row
        place = slice(first, first + size)
        ref[:, place] = ref[:, place] + d_logits_ts[row : row + LANES]
