"""Backward kernel of biases: d_logits summed over the axes in which a bias has size 1.

A dense bias: the grid's outer axes are those that the bias has, the inner ones are summed over. A
bias of distances: its outer axes are the tiles' diagonals, and a diagonal's tiles are added rows of
128 queries by rows, each 128 entries further on, so that they stand as the operand does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flax_mha.attention.pallas_tpu.backward import d_logits
from flax_mha.attention.pallas_tpu.forward import key_span
from flax_mha.attention.pallas_tpu.launch import launch
from flax_mha.attention.pallas_tpu.operands import SCALARS, STRETCHES, At
from flax_mha.attention.pallas_tpu.plan import LANES, Plan
from flax_mha.attention.pallas_tpu.tile import Here, parts
from flax_mha.core.typing import Array

LETTERS = "BKGTS"  # the axes of a grid over all tiles


def bias_sums(plan: Plan, operands: dict[str, Array]) -> Array:
    """d_bias `[b, k, g, t, s]`, in float32; a bias over T and S has whole tiles."""
    shape = plan.shape("bias")
    sizes = dict(zip(LETTERS, (plan.B, plan.K, plan.G, plan.query_blocks, plan.key_blocks)))
    outer = [axis for axis, size in zip(LETTERS, shape) if size > 1]
    inner = [axis for axis in LETTERS if axis not in outer]

    def at(*ids: Any) -> At:
        place = dict(zip(outer + inner, ids))
        return At(*(place[axis] for axis in LETTERS))

    (d_bias,) = launch(
        plan,
        functools.partial(_kernel, at=at, inner=len(inner), add=_add_dense),
        name="flax_mha_bias",
        operands=operands,
        outputs={"d_bias": jax.ShapeDtypeStruct(shape, "float32")},
        grid=tuple(sizes[axis] for axis in outer + inner),
        sequential=len(inner),
        at=functools.partial(_fetched, plan, at),
        output_at=at,
        scratch={},
    )
    return d_bias


def distance_sums(plan: Plan, operands: dict[str, Array]) -> Array:
    """d_distances `[b, K, G, 128, T + S]`, in float32."""
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
        functools.partial(_kernel, at=at, inner=inner, add=_add_diagonal),
        name="flax_mha_distances",
        operands=operands,
        outputs={"d_bias": jax.ShapeDtypeStruct((b, K, G, diagonals, LANES, stretch), "float32")},
        output_specs={"d_bias": pl.BlockSpec((None, None, None, None, LANES, stretch), output)},
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
    ids, scalars = ids[: -len(SCALARS)], ids[-len(SCALARS) :]
    tile = at(*ids)
    start, _, _, stop = key_span(plan, scalars, tile.b, tile.i)
    return tile._replace(j=jnp.clip(tile.j, start, jnp.maximum(stop - 1, start)))


def _kernel(plan: Plan, refs: dict[str, Any], at: Any, inner: int, add: Any) -> None:
    grid = 5
    ids = [pl.program_id(axis) for axis in range(grid)]
    tile = at(*ids)
    start, whole_start, whole_stop, stop = key_span(
        plan, [refs[n] for n in SCALARS], tile.b, tile.i
    )
    is_first = functools.reduce(
        lambda a, b: a & b, [x == 0 for x in ids[grid - inner :]], jnp.bool_(True)
    )

    @pl.when(is_first)
    def _() -> None:
        refs["d_bias"][...] = jnp.zeros_like(refs["d_bias"])

    visited = (tile.j >= start) & (tile.j < stop)
    whole = (tile.j >= whole_start) & (tile.j < whole_stop)
    pl.when(visited & whole)(functools.partial(_add_tile, plan, refs, tile, add, masked=False))
    if plan.is_masked:
        pl.when(visited & ~whole)(functools.partial(_add_tile, plan, refs, tile, add, masked=True))


def _add_tile(plan: Plan, refs: dict[str, Any], at: At, add: Any, masked: bool) -> None:
    for here in parts(plan, refs, at, plan.backward_part):
        add(here, d_logits(here, masked)[0])


def _add_dense(here: Here, d_logits_ts: Array) -> None:
    ref = here.refs["d_bias"]
    summed = tuple(axis for axis in range(2) if ref.shape[axis] == 1)
    rows = here.rows if ref.shape[0] > 1 else slice(None)
    columns = here.columns if ref.shape[1] > 1 else slice(None)
    ref[rows, columns] = ref[rows, columns] + d_logits_ts.sum(summed, keepdims=True)


def _add_diagonal(here: Here, d_logits_ts: Array) -> None:
    ref, size = here.refs["d_bias"], here.part.columns
    for row in range(0, here.part.rows, LANES):
        first = here.plan.t - here.row + here.column - row
        place = slice(first, first + size)
        ref[:, place] = ref[:, place] + d_logits_ts[row : row + LANES]
