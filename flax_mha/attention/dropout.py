"""Dropout as a function of position: who is dropped depends on (key, b, n, t, s) and no more."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention.threefry import threefry
from flax_mha.core import checks
from flax_mha.core.typing import Array, PRNGKey, Shape

# One threefry gives two 32-bit words: four draws of 16 bits, for four queries that lie 8 apart. So
# each draw of 8 x 128 words fills one register of a TPU, and none is shuffled.
DRAWS = 4
ROWS = 8
GROUP = DRAWS * ROWS
LEVELS = 1 << 16
POSITIONS = 1 << 32
RULE = "`dropout_start` must be four integers (b, n, t, s), each in [0, 2^32)."
REMEDY = "Any of them may be traced, as `jax.lax.axis_index(axis) * B`."


def words_of(dropout_key: PRNGKey) -> Array:
    """The two 32-bit words of a key that all draws of a call come from.

    Taken once: a key that each tile of a loop consumed would be one that is used again, which
    `jax_debug_key_reuse` rightly refuses. One key gives one mask here, forward and backward.
    """
    return jax.random.bits(dropout_key, (2,), jnp.uint32)


def start_of(start: Any) -> Array | None:
    """`dropout_start` as uint32 `[4]`; what is seen to be no position is refused."""
    if start is None:
        return None
    if checks.is_array(start) and (start.dtype, start.shape) == (jnp.uint32, (4,)):
        return jnp.asarray(start)
    of_one_axis = checks.is_array(start) and len(start.shape) == 1
    if not (isinstance(start, tuple | list) or of_one_axis) or len(start) != 4:
        received = f"shape {start.shape}" if checks.is_array(start) else repr(start)
        checks.fail(TypeError, RULE, f"dropout_start of {received}", REMEDY)
    return jnp.stack([_position(x) for x in start])


def _position(x: Any) -> Array:
    """One of the four; uint32 reaches twice as far as int32, and counts on as the draws do."""
    is_array = checks.is_array(x)
    if is_array and (x.shape or not jnp.issubdtype(x.dtype, jnp.integer)):
        checks.fail(TypeError, RULE, f"{x.dtype} of shape {x.shape} in dropout_start", REMEDY)
    if isinstance(x, jax.core.Tracer):
        return x.astype("uint32")
    number = int(x) if is_array else checks.integer("dropout_start", x)
    if not 0 <= number < POSITIONS:
        checks.fail(ValueError, RULE, f"{number} in dropout_start")
    return jnp.asarray(np.uint32(number))


def keep_mask(
    word_2: Array,
    rate: float,
    shape: Shape,
    start: tuple[Array | int, ...] = (0, 0, 0, 0),
    shared: bool = False,
    origin_4: Array | None = None,
) -> Array:
    """Booleans `[B, N, T, S]`, True with probability 1 - rate: the weights that stay.

    Entry (b, n, t, s) of the tile that begins at `start` is the same whatever the tile: equal for
    every implementation, block size and sharding. `start[-2]` must be a multiple of 32, unless
    there is `origin_4`: where entry 0 of the call stands in the whole array, which may be anywhere.
    The probability is `1 - rate` rounded to a multiple of 2^-16. A `shared` mask is that of example
    0 and head 0 for all of them.

    Memory: 1 byte an entry, and two 32-bit words for every four while it is computed.
    """
    if shared:
        origin_4 = None if origin_4 is None else origin_4.at[:2].set(0)
        one = keep_mask(word_2, rate, (1, 1, *shape[2:]), (0, 0, *start[2:]), origin_4=origin_4)
        return jnp.broadcast_to(one, shape)
    if origin_4 is None:
        return _drawn(word_2, shape, start) < round((1.0 - rate) * LEVELS)
    b, n, t, s = (jnp.asarray(i, "uint32") + origin for i, origin in zip(start, origin_4))
    # Nobody knows where t stands in its group: up to 31 more queries are drawn for, and cut.
    more = (*shape[:2], shape[2] + GROUP - 1, shape[3])
    draw_BNTS = _drawn(word_2, more, (b, n, t - t % GROUP, s))
    draw_BNTS = jax.lax.dynamic_slice_in_dim(draw_BNTS, t % GROUP, shape[2], axis=2)
    return draw_BNTS < round((1.0 - rate) * LEVELS)


def _drawn(word_2: Array, shape: Shape, start: tuple[Array | int, ...]) -> Array:
    """16 random bits for each entry of a tile whose `start[-2]` is a multiple of 32."""
    B, N, T, S = shape
    b, n, t, s = start
    groups = -(-T // GROUP)
    head_BN, tail_BN = head_words(word_2, (B, N), (b, n))
    head_BN11 = (head_BN[..., None, None], tail_BN[..., None, None])
    row_11r1 = (_index(t, 1) // DRAWS + _index(0, groups * ROWS))[None, None, :, None]
    column_111S = _index(s, S)[None, None, None, :]
    words = threefry(head_BN11, row_11r1, column_111S)
    word_BNg2rS = jnp.stack([x.reshape(B, N, groups, ROWS, S) for x in words], -3)
    # Stacks are written down by XLA's CPU; words that are only broadcast, each use draws again.
    draw_BNg22rS = jnp.stack((word_BNg2rS & 0xFFFF, word_BNg2rS >> 16), -3)
    return draw_BNg22rS.reshape(B, N, groups * GROUP, S)[:, :, :T]


def head_words(
    word_2: Array, size: tuple[int, int], first: tuple[Array | int, ...] = (0, 0)
) -> tuple[Array, Array]:
    """The two words `[B, N]` of each head, from which its draws come."""
    (B, N), (b, n) = size, first[:2]
    return threefry((word_2[0], word_2[1]), _index(b, B)[:, None], _index(n, N)[None, :])


def drop(weights_BNTS: Array, keep_BNTS: Array, rate: float) -> Array:
    """`weights / (1 - rate)` where kept, 0 elsewhere; all zeros at rate 1."""
    return jnp.where(keep_BNTS, weights_BNTS * growth(rate), 0)


def growth(rate: float) -> float:
    """The factor of what is kept, 1 / (1 - rate); 0 at rate 1, where nothing is."""
    return 0.0 if rate == 1.0 else 1.0 / (1.0 - rate)


def _index(start: Array | int, size: int) -> Array:
    return jnp.asarray(start, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)
