"""Forward kernel: a query block meets its key blocks one after the other, with an online softmax.

row_max' = max(row_max, max_s logits)        exp = e^(logits - row_max')
row_sum' = row_sum e^(row_max - row_max') + sum_s exp
sum'     = sum     e^(row_max - row_max') + drop(exp) . value       context = sum / row_sum
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha.attention.pallas_tpu.lanes import wide
from flax_mha.attention.pallas_tpu.launch import launch
from flax_mha.attention.pallas_tpu.operands import At, row_shape, scalars_of
from flax_mha.attention.pallas_tpu.pair_tile import score_of
from flax_mha.attention.pallas_tpu.part import Here, parts
from flax_mha.attention.pallas_tpu.plan import LANES, Plan
from flax_mha.attention.pallas_tpu.tile import (
    ROWS_BY_COLUMNS,
    allowed,
    dot,
    dropped,
    keeps,
    logits,
)
from flax_mha.attention.pallas_tpu.visits import by_queries, most, with_visits
from flax_mha.attention.pallas_tpu.walk import key_walk
from flax_mha.core.typing import Array

LOG2_E = math.log2(math.e)
LEAST = np.float32(np.finfo("float32").min)


def forward(plan: Plan, operands: dict[str, Array]) -> list[Array]:
    """[context, row_max, row_sum], float32: `[B, K, G, T, V]` and twice `[B, K, G, 1, T]`."""
    plan, operands = with_visits(plan, operands, functools.partial(by_queries, plan))

    def at(b: Any, k: Any, g: Any, i: Any, step: Any, *scalars: Any) -> At:
        return At(b, k, g, i, key_walk(plan, scalars, b, i, step).fetched)

    rows = jax.ShapeDtypeStruct(row_shape(plan), "float32")
    context = jax.ShapeDtypeStruct((plan.B, plan.K, plan.G, plan.T, plan.V), "float32")
    return launch(
        plan,
        _kernel,
        name="flax_mha_forward",
        operands=operands,
        outputs={"context": context, "row_max": rows, "row_sum": rows},
        grid=(plan.B, plan.K, plan.G, plan.query_blocks, _steps(plan, operands)),
        sequential=1,
        at=at,
        scratch={
            "highest": pltpu.VMEM((plan.t, LANES), jnp.float32),
            "total": pltpu.VMEM((plan.t, LANES), jnp.float32),
            "sum": pltpu.VMEM((plan.t, plan.V), jnp.float32),
        },
    )


def _steps(plan: Plan, operands: dict[str, Array]) -> Any:
    """How many key blocks a query block visits at most, which the device knows with functions."""
    if "visits" not in operands:
        return plan.key_steps
    return most(operands["visits"], plan.query_blocks)


def _kernel(plan: Plan, refs: dict[str, Any]) -> None:
    b, k, g, i, step = (pl.program_id(axis) for axis in range(5))
    walk = key_walk(plan, [refs[n] for n in scalars_of(plan.names)], b, i, step)
    at = At(b, k, g, i, walk.block)

    @pl.when(step == 0)
    def _() -> None:
        refs["highest"][...] = jnp.full_like(refs["highest"], LEAST)
        refs["total"][...] = jnp.zeros_like(refs["total"])
        refs["sum"][...] = jnp.zeros_like(refs["sum"])

    visited, whole = walk.is_visited, walk.is_whole
    pl.when(visited & whole)(functools.partial(_add_tile, plan, refs, at, masked=False))
    if plan.is_masked:
        pl.when(visited & ~whole)(functools.partial(_add_tile, plan, refs, at, masked=True))
    steps = pl.num_programs(4) if "visits" in plan.names else plan.key_steps
    pl.when(step == steps - 1)(functools.partial(_finish, plan, refs))


class Rows(NamedTuple):
    """What is known of some queries after some of their keys; a number stands in all 128 lanes."""

    highest: Array
    total: Array  # lane by lane: the lanes themselves are added once, at the end
    sum: Array


def _add_tile(plan: Plan, refs: dict[str, Any], at: At, masked: bool) -> None:
    rows = Rows(*(refs[name][...] for name in Rows._fields))
    for here in parts(plan, refs, at, plan.forward_part):
        rows = _add_part(here, rows, masked)
    for name, x in rows._asdict().items():
        refs[name][...] = x


def _add_part(here: Here, rows: Rows, masked: bool) -> Rows:
    """One step of the online softmax; `highest` is finite, so that no -inf - (-inf) is a NaN."""
    plan, refs = here.plan, here.refs
    value = refs["value"][here.columns]
    logits_ts, _ = logits(here, refs["query"][here.rows], refs["key"][here.columns])
    if plan.score is not None:
        logits_ts = score_of(here, logits_ts)
    if masked:
        logits_ts = jnp.where(allowed(here), logits_ts, -jnp.inf)
    highest = jnp.maximum(rows.highest, logits_ts.max(1)[:, None])
    exp = lambda x: jnp.exp2(x * np.float32(plan.late * LOG2_E))  # noqa: E731
    exp_ts = exp(logits_ts - wide(highest, here.part.columns))
    decay = exp(rows.highest - highest)
    total = rows.total * decay + _over_lanes(exp_ts)
    kept = dropped(exp_ts, keeps(here) if plan.rate > 0 else None).astype(value.dtype)
    added = dot(plan, kept, value, ROWS_BY_COLUMNS)
    return Rows(highest, total, rows.sum * wide(decay, plan.V) + added)


def _over_lanes(exp_ts: Array) -> Array:
    """The row's sum, lane by lane: the lanes themselves are added once, at the end."""
    return sum(exp_ts[:, x : x + LANES] for x in range(0, exp_ts.shape[1], LANES))  # type: ignore[return-value]


def _finish(plan: Plan, refs: dict[str, Any]) -> None:
    total = jnp.broadcast_to(refs["total"][...].sum(1)[:, None], (plan.t, LANES))
    kept = 1 / (1 - plan.rate) if plan.rate < 1 else 0.0
    # A query that may attend nowhere has sum 0 and total 0: its context is 0.
    share = jnp.where(total == 0, 0.0, kept / jnp.where(total == 0, 1.0, total))
    refs["context"][...] = refs["sum"][...] * wide(share, plan.V)
    highest = refs["highest"][...] * plan.late
    refs["row_max"][...] = jnp.where(total == 0, -jnp.inf, highest).T[:1]
    refs["row_sum"][...] = total.T[:1]
