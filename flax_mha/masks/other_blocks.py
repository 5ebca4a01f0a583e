"""The blocks of a `BlockMask` as those of another size, for an implementation's own tiles."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_mha.core.pairs.blocks import Blocks, Grid
from flax_mha.core.typing import Array
from flax_mha.masks.blocks import BlockMask


def blocks_over(mask: BlockMask, grid: Grid) -> Blocks:
    """The same of the blocks of `grid`, each by all that it touches."""
    Q, J = grid.shape
    spans = (_touched(Q, grid.t, mask, 0), _touched(J, grid.s, mask, 1))
    return Blocks(_joined(mask.some, spans, jnp.any), _joined(mask.whole, spans, jnp.all))


def _touched(count: int, size: int, mask: BlockMask, axis: int) -> np.ndarray:
    """The kept blocks `[count, most]` that each block of `size` positions touches."""
    kept, length = mask.block_size[axis], mask.lengths[axis]
    first = np.minimum(np.arange(count) * size, length - 1) // kept
    last = np.minimum(np.arange(count) * size + size - 1, length - 1) // kept
    most = int((last - first).max()) + 1
    return np.minimum(first[:, None] + np.arange(most), last[:, None])


def _joined(x: Array, spans: tuple[np.ndarray, np.ndarray], join: Any) -> Array:
    rows = join(jnp.take(x, spans[0], axis=2), axis=3)
    return join(jnp.take(rows, spans[1], axis=3), axis=4)
