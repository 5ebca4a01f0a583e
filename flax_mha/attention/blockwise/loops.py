"""The loops over the tiles of a call, and which of them are left out."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention.blockwise.call import Blocks, Plan
from flax_mha.attention.blockwise.pair_tiles import is_needed, lanes_need, narrowed
from flax_mha.attention.blockwise.tiles import Tile, key_spans, may_meet, query_spans
from flax_mha.core.sizes import as_index, is_known
from flax_mha.core.typing import Array


def where_needed(plan: Plan, blocks: Blocks, tile: Tile, compute: Any, otherwise: Any) -> Any:
    """`compute()`, or `otherwise()` where padding and segments leave nothing of the tile."""
    checks = []
    if plan.skips and blocks.mask.removes_positions:
        checks.append(may_meet(plan.tiling, blocks.mask, tile))
    if blocks.needed_bnQJ is not None:
        checks.append(is_needed(plan.tiling, blocks.needed_bnQJ, tile))
    if not checks:
        return compute()
    return jax.lax.cond(functools.reduce(operator.and_, checks), compute, otherwise)


Lane = tuple[Array, Array, Array]  # first example, first key/value head, block


def key_loop(plan: Plan, blocks: Blocks, at: Lane, step: Any, carry: Any) -> Any:
    """`carry = step(masked, j, carry)` over the key blocks that query block i may attend to."""
    return _lane_loop(plan, blocks, at, (key_spans, 0), step, carry)


def query_loop(plan: Plan, blocks: Blocks, at: Lane, step: Any, carry: Any) -> Any:
    """`carry = step(masked, i, carry)` over the query blocks that may attend to key block j."""
    return _lane_loop(plan, blocks, at, (query_spans, 1), step, carry)


def _lane_loop(plan: Plan, blocks: Blocks, at: Lane, side: Any, step: Any, carry: Any) -> Any:
    """`side` = (what tells the spans of a block, the axis along which that block stands)."""
    (b, k, block), (spans_of, axis) = at, side
    spans = spans_of(plan.tiling, blocks.mask, b, block, bool(blocks.where))
    if blocks.needed_bnQJ is not None:
        needed_QJ = lanes_need(plan.tiling, blocks.needed_bnQJ, b, k)
        spans = narrowed(spans, jax.lax.dynamic_index_in_dim(needed_QJ, block, axis, False))
    return loop(spans, step, carry)


def every(steps: int, step: Any, carry: Any) -> Any:
    """`carry = step(index, carry)` for index = 0, 1, ... steps - 1."""
    steps = steps if is_known(steps) else as_index(steps)
    # In x64 the loop counts in 64 bits, however its bounds are given; without jit, in Python ints.
    body = lambda index, carry: step(jnp.asarray(index, "int32"), carry)  # noqa: E731
    return jax.lax.fori_loop(0, steps, body, carry)


def loop(spans: Any, step: Any, carry: Any) -> Any:
    """`carry = step(masked, block, carry)` over the blocks of all spans."""
    for start, stop, masked in spans:
        body = lambda block, carry, masked=masked: step(  # noqa: E731
            masked, jnp.asarray(block, "int32"), carry
        )
        if isinstance(start, int) and isinstance(stop, int) and stop - start == 1:
            carry = body(np.int32(start), carry)
        else:
            carry = jax.lax.fori_loop(start, stop, body, carry)
    return carry
