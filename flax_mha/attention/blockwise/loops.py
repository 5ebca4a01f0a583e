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


def key_loop(
    plan: Plan, blocks: Blocks, at: tuple[Array, Array, Array], step: Any, carry: Any
) -> Any:
    """`carry = step(masked, j, carry)` over the key blocks that query block i may attend to."""
    (b, k, i), needed = at, blocks.needed_bnQJ
    spans = key_spans(plan.tiling, blocks.mask, b, i, bool(blocks.where))
    if needed is not None:
        spans = narrowed(spans, lanes_need(plan.tiling, needed, b, k)[i])
    return loop(spans, step, carry)


def query_loop(
    plan: Plan, blocks: Blocks, at: tuple[Array, Array, Array], step: Any, carry: Any
) -> Any:
    """`carry = step(masked, i, carry)` over the query blocks that may attend to key block j."""
    (b, k, j), needed = at, blocks.needed_bnQJ
    spans = query_spans(plan.tiling, blocks.mask, b, j, bool(blocks.where))
    if needed is not None:
        spans = narrowed(spans, lanes_need(plan.tiling, needed, b, k)[:, j])
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
