"""Threefry-2x32 of 13 rounds, as plain arithmetic.

`jax.random`'s default generator has 20 rounds: 13 are the fewest that pass all of BigCrush, says
its paper, and seven more are a margin that dropout has no use for. XLA's CPU compiles
`jax.extend.random.threefry_2x32` to a loop whose steps pass through memory; unrolled, the rounds
are one pass.

Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011,
https://doi.org/10.1145/2063384.2063405.
"""

import jax.numpy as jnp
import numpy as np

from flax_mha.core.typing import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
ROUNDS = 13
ROUNDS_A_KEY = 4  # the key goes in anew after as many


def threefry(key: tuple[Array, Array], high: Array, low: Array) -> tuple[Array, Array]:
    """Two random words for every (key, high, low), which are of one rank and broadcast; uint32."""
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    high, low = jnp.broadcast_arrays(high, low)
    a, b = high + keys[0], low + keys[1]
    for done in range(ROUNDS):
        i, rotation = divmod(done, ROUNDS_A_KEY)
        a = a + b
        b = a ^ _rotated(b, ROTATIONS[i % 2][rotation])
        if rotation == ROUNDS_A_KEY - 1:
            a = a + keys[(i + 1) % 3]
            b = b + (keys[(i + 2) % 3] + np.uint32(i + 1))
    return a, b


def _rotated(x: Array, bits: int) -> Array:
    return x << np.uint32(bits) | x >> np.uint32(32 - bits)
