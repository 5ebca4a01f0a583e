"""The angle p w of a position p and a frequency w, exact at every position.

float32 has 24 bits: as a product of two such numbers an angle at p = 10^6 is off by 0.005, and from
2^24 on positions themselves are rounded. But an angle matters up to whole turns alone. So
r = w / (2 pi) mod 1 is held in fixed point, 64 bits, and

    p r mod 1 = (p hi mod 2^32) 2^-32 + (p lo) 2^-64          r = hi 2^-32 + lo 2^-64

which is what products of uint32 that wrap around are: 32 bits of a turn at any p of 32 bits.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.typing import Array, DType

TWO_PI = Fraction("6.28318530717958647692528676655900576839433879875")


def angles(position_bTi: Array, frequency_i: np.ndarray, wide: DType) -> Array:
    """p w, `[b, T, i]`, of positions `[b, T, i]` or `[b, T, 1]`; of integers, up to whole turns.

    Integers of 32 bits or fewer, for float32: within 3e-7, the rounding of pi. Floats, and integers
    for float64: the product, as exact as its dtype.
    """
    is_integer = jnp.issubdtype(position_bTi.dtype, jnp.integer)
    if not is_integer or wide == jnp.float64:
        return position_bTi.astype(wide) * jnp.asarray(frequency_i, wide)[None, None]
    if position_bTi.dtype.itemsize > 4:  # then JAX has floats of 64 bits too
        turn_bTi = position_bTi.astype("float64") * jnp.asarray(frequency_i / math.tau)[None, None]
        return ((turn_bTi - jnp.round(turn_bTi)) * math.tau).astype(wide)
    return _turns(position_bTi, frequency_i) * np.float32(math.tau / 2**32)


def concrete(make: Callable[[], Any]) -> np.ndarray:
    """The float64 numbers that `make` returns, in a trace too, where those of JAX are traced."""
    with jax.ensure_compile_time_eval():
        return np.asarray(make(), np.float64)


def _turns(position_bTi: Array, frequency_i: np.ndarray) -> Array:
    """p w / (2 pi) mod 1 in [-1/2, 1/2), times 2^32: float32."""
    hi_11i, lo_11i = (word[None, None] for word in _words(frequency_i))
    # A negative position by its absolute value: p mod 2^32 times r is another number of turns.
    is_negative = position_bTi < 0
    signed = jnp.issubdtype(position_bTi.dtype, jnp.signedinteger)
    p = position_bTi.astype("int32" if signed else "uint32").astype("uint32")
    p = jnp.where(is_negative, np.uint32(0) - p, p)
    turn = (p * hi_11i + _high_word(p, lo_11i)).astype("int32").astype("float32")
    return jnp.where(is_negative, -turn, turn)


def _high_word(p: Array, lo: np.ndarray) -> Array:
    """The upper 32 bits of p lo, without the carries of its lower ones: at most 3 too small."""
    half, low = np.uint32(16), np.uint32(0xFFFF)
    p1, p0, lo1, lo0 = p >> half, p & low, lo >> half, lo & low
    return p1 * lo1 + ((p1 * lo0) >> half) + ((p0 * lo1) >> half)


def _words(frequency_i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w / (2 pi) mod 1 as two words of 32 bits, by whole numbers."""
    turns = [round(Fraction(float(w)) / TWO_PI * 2**64) % 2**64 for w in frequency_i]
    hi, lo = [x >> 32 for x in turns], [x & 0xFFFFFFFF for x in turns]
    return np.array(hi, np.uint32), np.array(lo, np.uint32)
