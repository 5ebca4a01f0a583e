"""Inside the kernels, numbers of rows in the lanes of registers."""

import jax.numpy as jnp

from flax_mha.attention.pallas_tpu.plan import LANES
from flax_mha.core.typing import Array


def as_column(row: Array) -> Array:
    """`[1, r]` to `[r, 128]`, every column of which is that row."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def as_row(column: Array) -> Array:
    """`[r, 1]` to `[1, r]`."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def wide(x: Array, size: int) -> Array:
    """`[r, 128]` of equal columns, as `[r, size]`."""
    copies = -(-size // LANES)
    x = jnp.tile(x, (1, copies)) if copies > 1 else x
    return x[:, :size] if size % LANES else x
