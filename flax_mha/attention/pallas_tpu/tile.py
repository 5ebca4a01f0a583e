"""Inside the kernels, one part of a tile: its logits, its mask, and what dropout keeps of it.

    logits = score(cap(scale query . key) + bias + distance bias)   -inf where the mask forbids

All three kernels compute them by these functions, of queries in rows and keys in columns.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha.attention.dropout import DRAWS, GROUP, LEVELS, ROWS
from flax_mha.attention.pallas_tpu.lanes import as_column, wide
from flax_mha.attention.pallas_tpu.operands import STRETCHES
from flax_mha.attention.pallas_tpu.pair_tile import agrees
from flax_mha.attention.pallas_tpu.part import Here
from flax_mha.attention.pallas_tpu.plan import LANES, Plan
from flax_mha.attention.threefry import threefry
from flax_mha.core.typing import Array

ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # a . b^T
ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))  # a . b
COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))  # a^T . b


def dot(plan: Plan, a: Array, b: Array, contraction: Any) -> Array:
    """A product that sums in float32."""
    return lax.dot_general(
        a, b, contraction, precision=plan.precision, preferred_element_type=jnp.float32
    )


def logits(here: Here, query: Array, key: Array) -> tuple[Array, Array | None]:
    """The part's logits over `plan.late`, before score and mask; the soft cap's slope, if any."""
    plan, slope = here.plan, None
    product = dot(plan, query, key, ROWS_BY_ROWS)
    if plan.scale != plan.late:
        product = product * plan.scale
    if plan.soft_cap is not None:
        tanh = jnp.tanh(product / plan.soft_cap)
        product, slope = plan.soft_cap * tanh, 1 - tanh**2
    if "bias" in here.refs:
        product = product + of_scores(here, "bias").astype(jnp.float32)
    if "distances0" in here.refs:
        product = product + _of_distances(here)
    return product, slope


def of_scores(here: Here, name: str) -> Array:
    """The part's entries of an array over the scores; an axis of size 1 stays one."""
    ref = here.refs[name]
    t, s = ref.shape
    return ref[here.rows if t > 1 else slice(None), here.columns if s > 1 else slice(None)]


def _of_distances(here: Here) -> Array:
    """Rows of 128 queries are slices, 128 entries apart, of one array that is skewed already."""
    skewed = jnp.concatenate([here.refs[f"distances{d}"][...] for d in range(STRETCHES)], 1)
    first = here.plan.t - here.row + here.column
    starts = [first - row for row in range(0, here.part.rows, LANES)]
    return jnp.concatenate([skewed[:, x : x + here.part.columns] for x in starts], 0)


def allowed(here: Here) -> Array:
    """Booleans: the part's pairs that may attend."""
    plan, at, part = here.plan, here.at, here.part
    left, right = plan.band
    checks = []
    if left is not None or right is not None:
        row = at.i * plan.t + here.row + here.scalar("offset", 0)
        row_r1 = row + lax.broadcasted_iota(jnp.int32, (part.rows, 1), 0)
        column = at.j * plan.s + here.column
        column_1s = column + lax.broadcasted_iota(jnp.int32, (1, part.columns), 1)
        if right is not None:
            checks.append(column_1s <= row_r1 + right)
        if left is not None:
            checks.append(column_1s >= row_r1 - left)
    if "query_ids" in here.refs:
        for pair in range(here.refs["query_ids"].shape[0]):
            row_1r = here.refs["query_ids"][pair : pair + 1, here.rows]
            ids_rs = wide(as_column(row_1r), part.columns)
            checks.append(ids_rs == here.refs["key_ids"][pair : pair + 1, here.columns])
    for name in here.refs:
        if name.startswith("dense"):
            checks.append(of_scores(here, name).astype(jnp.int32) != 0)
    checks += [agrees(here, pairs) for pairs in plan.where]
    result = checks[0]
    for check in checks[1:]:
        result = result & check
    return result


def keeps(here: Here) -> list[Array]:
    """What dropout keeps: for each of the draws booleans `[groups, 8, columns]`.

    One threefry gives four draws, of four rows that lie 8 apart, a vector register each.
    """
    plan, part = here.plan, here.part
    heads = plan.shape("words")[1] // 2
    n = here.at.k * plan.G + here.at.g if heads > 1 else 0
    words = (here.scalar("words", 2 * n), here.scalar("words", 2 * n + 1))
    row = here.scalar("start", 0) + here.at.i * (plan.t // DRAWS) + here.row // DRAWS
    column = here.scalar("start", 1) + here.at.j * plan.s + here.column
    rows = part.rows // DRAWS
    row_r1 = (row + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)).astype(jnp.uint32)
    column_1s = column + lax.broadcasted_iota(jnp.int32, (1, part.columns), 1)
    drawn = threefry(words, row_r1, column_1s.astype(jnp.uint32))
    threshold = np.int32(round((1 - plan.rate) * LEVELS))
    halves = []
    for word in drawn:
        grouped = word.reshape(part.rows // GROUP, ROWS, part.columns)
        for half in (grouped & np.uint32(0xFFFF), grouped >> np.uint32(16)):
            halves.append(lax.bitcast_convert_type(half, jnp.int32) < threshold)
    return halves


def dropped(x: Array, kept: list[Array] | None) -> Array:
    """`x` where it is kept, 0 elsewhere; what is kept is scaled where the rows are."""
    if kept is None:
        return x
    grouped = x.reshape(x.shape[0] // GROUP, DRAWS, ROWS, x.shape[1])
    stay = [jnp.where(keep, grouped[:, j], 0.0) for j, keep in enumerate(kept)]
    return jnp.stack(stay, 1).reshape(x.shape)
