"""The band in which a mask function can allow anything, where the function is known when traced.

Blocks are made as large as suits a band, and this is told by a number before the call runs. What
closes over arrays is known only when it runs: it gets no band.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.pairs.blocks import Grid, by_intervals, reason_to_evaluate
from flax_mha.core.pairs.expression import NO_MESH, Expression
from flax_mha.core.pairs.function import PairFunction
from flax_mha.core.pairs.separated import separated
from flax_mha.core.sizes import is_known
from flax_mha.core.typing import Array

FINEST, MOST = 8, 2048  # positions a block that is looked at, and such blocks along a length
Sides = tuple[int | None, int | None]


def static_band(function: PairFunction, B: int, N: int, T: int, S: int) -> Sides:
    """(left, right) as of `Mask.window`: no pair beyond may attend, though fewer might.

    None = without bound.
    """
    if function.arrays or not is_known(B, N, T, S) or 0 in (B, N, T, S):
        return None, None
    B, N = (size if function.reads(letter) else 1 for letter, size in (("b", B), ("n", N)))
    return _found(function.expression, B, N, T, S)


@functools.lru_cache(maxsize=1024)
def _found(expression: Expression, B: int, N: int, T: int, S: int) -> Sides:
    grain = max(FINEST, -(-max(T, S) // MOST))
    places = {x: np.arange(n, dtype="int32") for x, n in zip("bnts", (B, N, T, S))}
    # Not on the mesh of a `jax.shard_map` around the call, where nothing can be run by itself.
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(NO_MESH):
        some_QJ = _blocks(expression, grain, places)
    i, j = np.nonzero(np.asarray(some_QJ))
    before, after = (max(0, int(x.max(initial=0))) * grain + grain - 1 for x in (i - j, j - i))
    return before if before < T - 1 else None, after if after < S - 1 else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _blocks(expression: Expression, grain: int, places: dict[str, Array]) -> Array:
    """Booleans `[Q, J]`: the blocks that may hold a pair; all, where intervals cannot tell."""
    mask = separated(PairFunction((), expression), places)
    grid = Grid(len(places["t"]), len(places["s"]), grain, grain)
    if reason_to_evaluate(mask):
        return jnp.ones(grid.shape, bool)
    return by_intervals(mask, grid).some.any((0, 1))
