"""Dropout as a function of position: who is dropped depends on (key, b, n, t, s) and no more."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from flax_mha._typing import Array, PRNGKey, Shape

# One threefry gives two 32-bit words: four draws of 16 bits, for four neighbours along S.
DRAWS = 4
LEVELS = 1 << 16


def keep_mask(
    dropout_key: PRNGKey, rate: float, shape: Shape, start: tuple[Array | int, ...] = (0, 0, 0, 0)
) -> Array:
    """Booleans `[B, N, T, S]`, True with probability 1 - rate: the weights that stay.

    Entry (b, n, t, s) of the tile that begins at `start` is the same whatever the tile: equal for
    every implementation, block size and sharding. `start[-1]` must be a multiple of 4. The
    probability is `1 - rate` rounded to a multiple of 2^-16.

    Memory: 1 byte an entry, and two 32-bit words for every four while it is computed.
    """
    B, N, T, S = shape
    b, n, t, s = start
    word_2 = tuple(jax.random.bits(dropout_key, (2,), jnp.uint32))
    head_2BN = _threefry(word_2, _index(b, B)[:, None], _index(n, N)[None, :])
    columns = -(-S // DRAWS)
    column = _index(s, 1) // DRAWS + _index(0, columns)

    def head_draws(*head_key: Array) -> Array:
        word_2TC = _threefry(head_key, _index(t, T)[:, None], column[None, :])
        halves = [word_TC >> shift & 0xFFFF for word_TC in word_2TC for shift in (0, 16)]
        draw_TC4 = jnp.stack(halves, -1)
        return draw_TC4.reshape(T, columns * DRAWS)[:, :S]

    draw_BNTS = jax.vmap(jax.vmap(head_draws))(*head_2BN)
    return draw_BNTS < round((1.0 - rate) * LEVELS)


def drop(weights_BNTS: Array, keep_BNTS: Array, rate: float) -> Array:
    """`weights / (1 - rate)` where kept, 0 elsewhere; all zeros at rate 1."""
    scale = 0.0 if rate == 1.0 else 1.0 / (1.0 - rate)
    return jnp.where(keep_BNTS, weights_BNTS * scale, 0)


def _index(start: Array | int, size: int) -> Array:
    return jnp.asarray(start, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)


def _threefry(keypair: tuple[Array, ...], high: Array, low: Array) -> Array:
    """Two random words `[2, ...]` for every pair of counters (high, low)."""
    counter = jnp.stack(jnp.broadcast_arrays(high, low))
    return threefry_2x32(keypair, counter)
