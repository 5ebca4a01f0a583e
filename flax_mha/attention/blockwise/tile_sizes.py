"""How large the tiles of the blockwise implementation are, and the measurements behind it.

On CPU a step is a handful of products that two cores share. A tile must be large enough to be worth
handing half of it over, and small enough to stay in the cache: 1.5 x 2^20 numbers. Milliseconds of
forward / forward and backward, 8 heads of 64, the least of many, two cores, jax 0.10:

    B=8 T=512                 b k t s = 1 1 512 512     21 / 58      1 4 512 512      16 / 55
                                        1 8 512 512     18 / 65
    B=32 T=128                          2 8 128 128      9 / 26      4 8 128 128       7 / 24
                                        16 8 128 128     7 / 38
    B=1 T=4096                          1 4 512 512    123 / 420     1 1 1024 1024   114 / 387
    B=1 T=4096 causal                   1 1 1024 1024  106 / 330     1 4 512 512     104 / 314
    B=1 T=8192 window 256     512 512 97 / 339     256 256  73 / 257     128 128      71 / 254
      the same, causal        512 512 68 / 254     256 256  49 / 182     128 128      45 / 172

A causal order or a window cuts through the tiles on its edges, whose other half is computed for
nothing: their blocks are smaller.

Elsewhere, and on CPUs over which XLA may have spread the arrays, all examples and heads stand side
by side in each tile: the device spreads them over its units, and a sharded axis that a loop cuts
would be gathered on every device.
"""

from typing import Any

from flax_mha.attention.blockwise.tiles import Tiling
from flax_mha.core.platform import Place
from flax_mha.core.sizes import is_known

NUMBERS_A_TILE = 3 << 19
LARGEST_BLOCK = 1024
LARGEST_BANDED_BLOCK = 512
SMALLEST_BANDED_BLOCK = 128
FEWEST_QUERIES = 64


def tiling_of(inputs: Any, block_sizes: tuple[int, int] | None, place: Place) -> Tiling:
    """The tiling of a call's `Inputs` or `Blocks`; `block_sizes` overrules (t, s)."""
    (B, T, N, _), (_, S, K, _) = inputs.query_BTNH.shape, inputs.key_BSKH.shape
    t, s = block_sizes or _block_sizes(inputs, place)
    b, k = _examples_and_heads(inputs, N // K * t, s, place)
    return Tiling(B=B, K=K, T=T, S=S, b=b, k=k, t=t, s=s, G=N // K)


def _block_sizes(inputs: Any, place: Place) -> tuple[int, int]:
    (_, T, N, _), (_, S, K, _) = inputs.query_BTNH.shape, inputs.key_BSKH.shape
    left, right = inputs.mask.band
    largest = _largest_block(left, right, place)
    if place.cpu and place.is_shared:
        largest = _shared_block(inputs, largest, place)
    queries = max(FEWEST_QUERIES, largest // (N // K))  # G heads share keys: a tile has G t rows
    return even_block(T, queries), even_block(S, largest)


def _largest_block(left: int | None, right: int | None, place: Place) -> int:
    """Half of the band's width, within bounds; a block of its own where there is no band."""
    if left is None and right is None and place.cpu:
        return LARGEST_BLOCK
    if left is None or right is None:
        return LARGEST_BANDED_BLOCK
    half = (left + right + 2) // 2
    return min(LARGEST_BANDED_BLOCK, max(SMALLEST_BANDED_BLOCK, half))


def even_block(length: int, largest: int) -> int:
    """Blocks of about equal size, a multiple of 8, at most `largest`.

    Example:
        >>> even_block(1030, 1024), even_block(100, 1024)
        (520, 104)
    """
    if not is_known(length):
        return largest
    blocks = max(1, -(-length // largest))
    return max(8, -(-length // (8 * blocks)) * 8)


def _shared_block(inputs: Any, largest: int, place: Place) -> int:
    """Halved until each device's part of a tile, with its share of all heads, is small enough."""
    (B, _, N, H), V = inputs.query_BTNH.shape, inputs.value_BSKV.shape[-1]
    heads = -(-B * N // place.devices) if is_known(B) else N
    while largest > SMALLEST_BANDED_BLOCK and heads * _numbers(largest, largest, H, V) > (
        NUMBERS_A_TILE
    ):
        largest //= 2
    return largest


def _numbers(r: int, s: int, H: int, V: int) -> int:
    """Those of a tile: logits; query, context, key and value."""
    return r * s + (r + s) * (H + V)


def _examples_and_heads(inputs: Any, r: int, s: int, place: Place) -> tuple[int, int]:
    """(b, k): how many examples, and key/value heads that r rows and s keys meet, make a tile."""
    (B, _, _, H), (_, _, K, V) = inputs.query_BTNH.shape, inputs.value_BSKV.shape
    b, k = B, K
    if not place.is_shared:
        room = NUMBERS_A_TILE // _numbers(r, s, H, V)
        k = _divisor(K, room)
        b = _divisor(B, room // K) if k == K and is_known(B) else 1
    return (1 if _has_own_distances(inputs) else b), k


def _has_own_distances(inputs: Any) -> bool:
    """Whether every example reads another stretch of the distance bias: they go one by one."""
    bias = inputs.distance_bias
    return bias is not None and bias.query_offset is not None and bias.query_offset.size > 1


def _divisor(number: int, most: int) -> int:
    """The greatest divisor that is at most `most`, and 1 at least.

    Example:
        >>> _divisor(12, 5), _divisor(7, 5), _divisor(8, 0)
        (4, 1, 1)
    """
    return max((n for n in range(1, most + 1) if n <= number and number % n == 0), default=1)
