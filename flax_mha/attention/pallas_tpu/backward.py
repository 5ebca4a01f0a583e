"""Backward kernel: a key block meets its query blocks; all three gradients in one pass.

    exp = e^(logits - row_max)          d_context, delta: already divided by row_sum
    d_logits = score' exp (drop(d_context . value^T) - delta)       d_product = cap' d_logits
    d_query = scale d_product . key     d_key = d_product^T . scale query
    d_value = drop(exp)^T . d_context

In float32 d_logits of a key that has all of its row is d_row_sum, as by blocks: not a rounding.

d_query of all queries stays in VMEM until every key block has added to it: of more queries than
there is room for, some heads or some rows go at a time, and the keys' gradients are summed over
these turns. d_key and d_value are summed transposed, `[h, s]`: so queries stand in rows in every
product and every mask, as in the forward kernel.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha.attention.pallas_tpu.lanes import as_column, wide
from flax_mha.attention.pallas_tpu.launch import launch
from flax_mha.attention.pallas_tpu.operands import SCALARS, At, scalars_of
from flax_mha.attention.pallas_tpu.pair_tile import score_and_slope, through
from flax_mha.attention.pallas_tpu.part import Here, parts
from flax_mha.attention.pallas_tpu.plan import LANES, Plan
from flax_mha.attention.pallas_tpu.tile import (
    COLUMNS_BY_COLUMNS,
    ROWS_BY_COLUMNS,
    ROWS_BY_ROWS,
    allowed,
    dot,
    dropped,
    keeps,
    logits,
)
from flax_mha.attention.pallas_tpu.visits import by_keys, most, with_visits
from flax_mha.attention.pallas_tpu.walk import query_walk
from flax_mha.core.typing import Array

BYTES_A_TURN = 32 << 20  # of d_query in VMEM, where an output has two blocks


def backward(plan: Plan, operands: dict[str, Array]) -> tuple[Array, Array, Array]:
    """d_query `[B, K, G, T, H]`, d_key `[B, K, S, H]`, d_value `[B, K, S, V]`; float32."""
    heads, blocks = _turn(plan)
    over_heads, over_blocks = plan.G // heads, -(-plan.query_blocks // blocks)
    run = functools.partial(_turn_of, plan, operands, heads, blocks)
    if over_heads * over_blocks == 1:
        d_query, d_key, d_value = run(0, 0)
        return d_query, d_key, d_value

    def turn(index: Array, sums: Any) -> Any:
        g, i = jax.lax.div(index, over_blocks) * heads, jax.lax.rem(index, over_blocks) * blocks
        d_query, d_key, d_value = run(g, i)
        place = (0, 0, g, i * plan.t, 0)
        return (
            jax.lax.dynamic_update_slice(sums[0], d_query, place),
            sums[1] + d_key,
            sums[2] + d_value,
        )

    like = operands["query"]
    zeros = lambda *shape: jax.lax.full_like(like, 0, "float32", shape)  # noqa: E731
    rows = over_blocks * blocks * plan.t
    B, K, S = plan.B, plan.K, plan.S
    start = (zeros(B, K, plan.G, rows, plan.H), zeros(B, K, S, plan.H), zeros(B, K, S, plan.V))
    d_query, d_key, d_value = jax.lax.fori_loop(0, over_heads * over_blocks, turn, start)
    return d_query[:, :, :, : plan.T], d_key, d_value


def _turn(plan: Plan) -> tuple[int, int]:
    """(query heads of a key/value head, query blocks) a turn."""
    rows = BYTES_A_TURN // (2 * 4 * LANES * math.ceil(plan.H / LANES))
    if rows < plan.T:
        return 1, max(1, rows // plan.t)
    most = rows // plan.T
    return max(n for n in range(1, most + 1) if plan.G % n == 0), plan.query_blocks


def _turn_of(
    plan: Plan, operands: dict[str, Array], heads: int, blocks: int, g: Any, i: Any
) -> list[Array]:
    """The gradients of one turn's queries, those of query head g and block i on."""
    first = jnp.asarray([[g, i]], "int32")
    visits = functools.partial(by_keys, plan, first=i, blocks=blocks)
    plan, operands = with_visits(plan, operands, visits)
    listed = "visits" in operands
    steps = min(blocks, plan.query_steps)
    rows = (plan.B, plan.K, heads, blocks * plan.t, plan.H)
    types = {"d_query": rows, "d_key": (plan.B, plan.K, plan.S, plan.H)}
    types["d_value"] = (plan.B, plan.K, plan.S, plan.V)
    everything = pl.BlockSpec(
        (None, None, heads, rows[3], plan.H), lambda b, k, *_: (b, k, 0, 0, 0)
    )
    keys = lambda b, k, j, *_: (b, k, j, 0)  # noqa: E731
    return launch(
        plan,
        functools.partial(_kernel, heads=heads, blocks=blocks, steps=None if listed else steps),
        name="flax_mha_backward",
        operands={**operands, "turn": first},
        outputs={n: jax.ShapeDtypeStruct(x, "float32") for n, x in types.items()},
        output_specs={
            "d_query": everything,
            "d_key": pl.BlockSpec((None, None, plan.s, plan.H), keys),
            "d_value": pl.BlockSpec((None, None, plan.s, plan.V), keys),
        },
        grid=(
            *(plan.B, plan.K, plan.key_blocks, heads),
            most(operands["visits"], plan.key_blocks) if listed else steps,
        ),
        sequential=3,
        at=functools.partial(_at, plan, blocks=blocks),
        scratch={
            "d_key_hs": pltpu.VMEM((plan.H, plan.s), jnp.float32),
            "d_value_vs": pltpu.VMEM((plan.V, plan.s), jnp.float32),
        },
    )


def _at(plan: Plan, b: Any, k: Any, j: Any, g: Any, step: Any, *scalars: Any, blocks: int) -> At:
    turn = scalars[SCALARS.index("turn")]
    walk = query_walk(plan, scalars, b, j, step, turn[1], blocks)
    last = walk.last
    return At(b, k, turn[0] + g, walk.up_to(last), j)


def _kernel(plan: Plan, refs: dict[str, Any], heads: int, blocks: int, steps: int | None) -> None:
    b, k, j, g, step = (pl.program_id(axis) for axis in range(5))
    first = refs["turn"][1]
    walk = query_walk(plan, [refs[n] for n in scalars_of(plan.names)], b, j, step, first, blocks)
    i = walk.block
    at = At(b, k, refs["turn"][0] + g, i, j)
    last_step = (pl.num_programs(4) if steps is None else steps) - 1
    is_first, is_last = (g == 0) & (step == 0), (g == heads - 1) & (step == last_step)

    @pl.when(is_first & (j == 0))
    def _() -> None:
        refs["d_query"][...] = jnp.zeros_like(refs["d_query"])

    @pl.when(is_first)
    def _() -> None:
        refs["d_key_hs"][...] = jnp.zeros_like(refs["d_key_hs"])
        refs["d_value_vs"][...] = jnp.zeros_like(refs["d_value_vs"])

    visited, whole = walk.is_visited, walk.is_whole
    add = functools.partial(_add_tile, plan, refs, at, g, (i - first) * plan.t)
    pl.when(visited & whole)(functools.partial(add, masked=False))
    if plan.is_masked:
        pl.when(visited & ~whole)(functools.partial(add, masked=True))

    @pl.when(is_last)
    def _() -> None:
        refs["d_key"][...] = refs["d_key_hs"][...].T * plan.scale
        refs["d_value"][...] = refs["d_value_vs"][...].T


def _add_tile(plan: Plan, refs: dict[str, Any], at: At, g: Any, row: Any, masked: bool) -> None:
    """Adds part by part, each when the next one's logits are there.

    For the compiler fills a unit's idle cycles only with what stands near in the program.
    """
    sums = (
        functools.partial(_add_part, here, *d_logits(here, masked)[1:], g=g, row=row)
        for here in parts(plan, refs, at, plan.backward_part)
    )
    add = next(sums)
    for following in sums:
        add()
        add = following
    add()


def _add_part(here: Here, d_product: Array, kept: Array, *, g: Any, row: Any) -> None:
    plan, refs, columns = here.plan, here.refs, here.columns
    place = pl.ds(pl.multiple_of(row + here.row, here.part.rows), here.part.rows)
    # In this order: sizes.py says why.
    d_value_vs = dot(plan, refs["d_context"][here.rows], kept, COLUMNS_BY_COLUMNS)
    d_key_hs = dot(plan, refs["query"][here.rows], d_product, COLUMNS_BY_COLUMNS)
    d_query = dot(plan, d_product, refs["key"][columns], ROWS_BY_COLUMNS)
    refs["d_query"][g, place] = refs["d_query"][g, place] + d_query
    refs["d_key_hs"][:, columns] = refs["d_key_hs"][:, columns] + d_key_hs
    refs["d_value_vs"][:, columns] = refs["d_value_vs"][:, columns] + d_value_vs


def d_logits(here: Here, masked: bool, of: str | None = None) -> tuple[Array, Array, Array]:
    """d_logits in float32; d_product and the kept exp in the compute dtype, for products.

    With a score d_logits are those before it; or, `of` an operand of it, the part's share of that
    one's gradient.
    """
    plan, refs, rows, columns = here.plan, here.refs, here.rows, here.columns
    size = here.part.columns
    query, key, value = refs["query"][rows], refs["key"][columns], refs["value"][columns]
    logits_ts, slope = logits(here, query, key)
    if plan.late != 1:
        logits_ts = logits_ts * plan.late
    if plan.score is not None:
        logits_ts, steep = score_and_slope(here, logits_ts, of)
    if masked:
        logits_ts = jnp.where(allowed(here), logits_ts, -jnp.inf)
    of_row = lambda name: wide(as_column(refs[name][:, rows]), size)  # noqa: E731
    exp_ts = jnp.exp(logits_ts - of_row("row_max"))
    d_exp = dot(plan, refs["d_context"][rows], value, ROWS_BY_ROWS)
    kept = keeps(here) if plan.rate > 0 else None
    d_logits_ts = exp_ts * (dropped(d_exp, kept) - of_row("delta"))
    if "d_alone" in refs:  # NaN of a row that no key has as a whole
        d_alone = of_row("d_alone")
        d_logits_ts = jnp.where((exp_ts >= 1) & (d_alone == d_alone), d_alone, d_logits_ts)
    if plan.score is not None:
        d_logits_ts = through(d_logits_ts, steep)
    d_product = d_logits_ts if slope is None else d_logits_ts * slope
    return d_logits_ts, d_product.astype(key.dtype), dropped(exp_ts, kept).astype(value.dtype)
