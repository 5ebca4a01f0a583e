"""Dropout as a function of position: who is dropped depends on (key, b, n, t, s) and no more."""

import jax
import jax.numpy as jnp

from flax_mha.attention.threefry import threefry
from flax_mha.core.typing import Array, PRNGKey, Shape

# One threefry gives two 32-bit words: four draws of 16 bits, for four neighbours along T.
DRAWS = 4
LEVELS = 1 << 16


def words_of(dropout_key: PRNGKey) -> Array:
    """The two 32-bit words of a key that all draws of a call come from.

    Taken once: a key that each tile of a loop consumed would be one that is used again, which
    `jax_debug_key_reuse` rightly refuses. One key gives one mask here, forward and backward.
    """
    return jax.random.bits(dropout_key, (2,), jnp.uint32)


def keep_mask(
    word_2: Array,
    rate: float,
    shape: Shape,
    start: tuple[Array | int, ...] = (0, 0, 0, 0),
    shared: bool = False,
) -> Array:
    """Booleans `[B, N, T, S]`, True with probability 1 - rate: the weights that stay.

    Entry (b, n, t, s) of the tile that begins at `start` is the same whatever the tile: equal for
    every implementation, block size and sharding. `start[-2]` must be a multiple of 4. The
    probability is `1 - rate` rounded to a multiple of 2^-16. A `shared` mask is that of example 0
    and head 0 for all of them.

    Memory: 1 byte an entry, and two 32-bit words for every four while it is computed.
    """
    if shared:
        one = keep_mask(word_2, rate, (1, 1, *shape[2:]), (0, 0, *start[2:]))
        return jnp.broadcast_to(one, shape)
    B, N, T, S = shape
    b, n, t, s = start
    rows = -(-T // DRAWS)
    head_2BN = threefry((word_2[0], word_2[1]), _index(b, B)[:, None], _index(n, N)[None, :])
    head_BN11 = (head_2BN[0][..., None, None], head_2BN[1][..., None, None])
    row_11r1 = (_index(t, 1) // DRAWS + _index(0, rows))[None, None, :, None]
    column_111S = _index(s, S)[None, None, None, :]
    word_BNr2S = jnp.stack(threefry(head_BN11, row_11r1, column_111S), -2)
    # Stacks are written down by XLA's CPU; words that are only broadcast, each use draws again.
    draw_BNr22S = jnp.stack((word_BNr2S & 0xFFFF, word_BNr2S >> 16), -2)
    draw_BNTS = draw_BNr22S.reshape(B, N, rows * DRAWS, S)[:, :, :T]
    return draw_BNTS < round((1.0 - rate) * LEVELS)


def drop(weights_BNTS: Array, keep_BNTS: Array, rate: float) -> Array:
    """`weights / (1 - rate)` where kept, 0 elsewhere; all zeros at rate 1."""
    scale = 0.0 if rate == 1.0 else 1.0 / (1.0 - rate)
    return jnp.where(keep_BNTS, weights_BNTS * scale, 0)


def _index(start: Array | int, size: int) -> Array:
    return jnp.asarray(start, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)
