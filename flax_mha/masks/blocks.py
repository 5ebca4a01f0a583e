"""The blocks of a mask, computed once and kept: `block_mask`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.pairs.blocks import Grid, by_evaluation
from flax_mha.core.pairs.function import mask_function
from flax_mha.core.pairs.separated import separated
from flax_mha.core.typing import Array
from flax_mha.masks import of_pairs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of pairs a mask leaves; a pytree.

    Attributes:
        some: booleans `[b, n, Q, J]`, whether a pair of the block may attend; b and n may be 1.
        whole: likewise, whether all pairs may.
        lengths: (T, S); static.
        block_size: (queries, keys) a block; static.

    Example:
        >>> import flax_mha
        >>> blocks = flax_mha.block_mask(lambda b, n, t, s: s <= t, 4, 4, block_size=2)
        >>> blocks.some[0, 0].tolist(), blocks.visited
        ([[True, False], [True, True]], 0.75)
    """

    some: Array
    whole: Array
    lengths: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block_size: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def visited(self) -> float:
        """The part of the blocks in which any pair may attend."""
        return float(np.mean(self.some))


def block_mask(
    f: Any,
    T: int,
    S: int,
    *,
    B: int = 1,
    N: int = 1,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """The blocks of a mask, by asking it for every pair: to keep for many calls, or to look at.

    Args:
        f: a mask function `f(b, n, t, s) -> bool`, or a `Mask`.
        T: queries.
        S: keys.
        B: examples, for a function that looks at b.
        N: heads, for a function that looks at n.
        block_size: queries and keys a block, or both in turn.

    Returns:
        A `BlockMask`, for `Mask.function(f, blocks=...)`.

    Raises:
        As `Mask.function`; ValueError of sizes that are not positive.

    Memory: B N T S booleans a row of blocks, of which b or n is 1 where f does not look at it.

    Example:
        >>> import flax_mha
        >>> near = lambda b, n, t, s: abs(t - s) < 100
        >>> blocks = flax_mha.block_mask(near, 1024, 1024)
        >>> blocks.some.shape, blocks.visited
        ((1, 1, 8, 8), 0.34375)
        >>> mask = flax_mha.Mask.function(near, blocks=blocks)
    """
    sizes = (block_size, block_size) if hasattr(block_size, "__index__") else block_size
    if not isinstance(sizes, tuple | list) or len(sizes) != 2:
        rule = "`block_size` must be an int, or a pair (queries, keys)."
        checks.fail(TypeError, rule, f"block_size={block_size!r}")
    t, s = (checks.integer("block_size", x, minimum=1) for x in sizes)
    named = {"B": B, "N": N, "T": T, "S": S}
    B, N, T, S = (checks.integer(name, x, minimum=1) for name, x in named.items())
    pair = mask_function(functools.partial(of_pairs.at, f) if hasattr(f, "band") else f)
    places = {x: jnp.arange(n, dtype="int32") for x, n in zip("bnts", (B, N, T, S))}
    some, whole = by_evaluation(separated(pair, places), Grid(T, S, t, s))
    return BlockMask(some, whole, (T, S), (t, s))
