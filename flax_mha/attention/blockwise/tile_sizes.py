"""How large the tiles of the blockwise implementation are, and the measurements behind it.

On CPU a step is a handful of products that two cores share. A tile must be large enough to be worth
handing half of it over, and small enough to stay in the cache: 1.5 x 2^20 numbers, or half of that
where a head alone has 2^18 logits. Milliseconds of forward / forward and backward, 8 heads of 64,
the least of many, two cores of a Zen 5, jax 0.10:

    B=8 T=512                 b k t s = 1 1 512 512     21 / 58      1 4 512 512      16 / 55
                                        1 8 512 512     18 / 65
    B=32 T=128                          2 8 128 128      9 / 26      4 8 128 128       7 / 24
                                        16 8 128 128     7 / 38
    B=1 T=4096                          1 4 512 512    123 / 420     1 1 1024 1024   114 / 387
    B=1 T=4096 causal                   1 1 1024 1024  106 / 330     1 4 512 512     104 / 314
    B=1 T=8192 window 256     512 512 97 / 339     256 256  73 / 257     128 128      71 / 254
      the same, causal        512 512 68 / 254     256 256  49 / 182     128 128      45 / 172

Two cores of a Zen 3, whose second caches hold 512 KiB each: medians over those of 1 1 1024 1024,
and causal of 1 4 512 512, T=2048, forward / forward and backward, jax 0.10.2:

    b k t s = 1 1 512 1024  0.96 / 0.91    1 1 512 512  0.98 / 0.89    1 2 512 512  1.13 / 0.92
    causal    1 2 512 512   0.86 / 0.84    1 1 512 512  0.85 / 0.84    1 2 512 256  0.97 / 0.97
    T=4096    1 1 512 1024  0.93 / 0.82    causal 1 2 512 512  0.83 / 0.88

A causal order or a window cuts through the tiles on its edges, whose other half is computed for
nothing: their blocks are smaller.

A TPU computes on 8 x 128 numbers at once, and holds what a step leaves for the next in its own
memory of 64 to 128 MiB. Cycles that the compiler estimates for v5e a tile of 512 x 512 and head,
forward / backward, of which the schedules of its fusions take 1,120 to 1,180 / 2,580 to 2,640
whatever the blocks; bfloat16, H = 128:

    8 heads    t s = 512 512   1,620 / 6,567      1024 512    1,409 / 6,034
                     512 1024  1,390 / 5,593      1024 1024   1,293 / 5,444, not all in that memory
    32 heads   512 512         1,509 / 6,105
    128 heads  512 512         5,766 / 16,069     256 256   1,781 / 8,211    128 256   2,683 / 7,847

    T=8192 window 256 causal, 8 heads, thousands of cycles for 512 queries, forward and backward
                     128 128   350         256 256   186         512 512   180

Many heads of large tiles go through the main memory. One device loops over examples and heads, too;
devices that share an array get smaller blocks, for a sharded axis that a loop cuts would be
gathered on every device. So do CPUs over which XLA may have spread the arrays.

On GPUs all examples and heads stand side by side in each tile. Estimated for an H100 from the
program that XLA compiles for one, not measured: 3 us a launch, of which a tile has 12 or 13
forward and 12 to 16 backward, and for what each moves or multiplies the longer of bytes at 3.35
TB/s and products at 989 TFLOP/s, NVIDIA's figures. Microseconds a tile of 512 x 512 and head,
bytes + launches, forward / backward, causal, bfloat16, H = 128:

    t s           256 256        512 512        512 1024       1024 1024      2048 2048
    8 heads      2.4 + 18       1.9 + 4.5      1.9 + 2.3      1.6 + 1.1      1.4 + 0.3
               / 4.5 + 20     / 3.3 + 5.0    / 3.0 + 2.3    / 2.7 + 1.3    / 2.4 + 0.3
    128 heads    3.1 + 1.2      2.5 + 0.3      2.3 + 0.2      2.2 + 0.1      2.0 + 0.0
               / 4.8 + 1.4    / 3.7 + 0.4    / 3.4 + 0.2    / 3.2 + 0.1    / 2.9 + 0.0

Milliseconds, forward and backward, of all tiles that are visited, and MiB beside arguments and
results:

    t s                            256 256     512 512      1024 1024     2048 2048
    8 heads, T=4096                            4.3   81     2.1  161      1.7  468
             T=16384                            66  226      30  307       20  614
    128 heads, T=4096                           32 1415      28 2695       31 7562
    8 heads, T=8192, window 256    5.7  107    3.7  129     3.2  210
    128 heads                       21 1964     27 2317      42 3598

At 1 us a launch, as XLA's own model has it, 8 heads of T=4096 take 2.4, 1.6 and 1.5.

Measured since on an H200 (jax 0.11.2), causal, bfloat16, H = 128: ms forward / and backward, and
MiB of the latter:

    t s                            512 512           1024 1024           2048 2048
    128 heads, T=2048         3.2 /  7.9   964    2.9 /  7.0  2244    2.6 /  5.9  6150
    32 heads, T=8192         11.6 / 28.9   579    8.3 / 20.9   900    7.1 / 18.5  2120
    8 heads, T=8192           6.2                 3.4                 2.4
"""

from typing import Any

from flax_mha.attention.blockwise.tiles import Tiling
from flax_mha.attention.dropout import GROUP
from flax_mha.core.platform import Place
from flax_mha.core.sizes import is_known

NUMBERS_A_TILE = {"cpu": 3 << 19, "tpu": 24 << 20}  # on GPUs of all examples and heads
LARGEST_BLOCK = 1024
LARGEST_BANDED_BLOCK = 512
SMALLEST_BANDED_BLOCK = 128
LARGEST_ASKED_BLOCK = 256  # documents of 256 in 4,096: 0.3 of the time of 512; all pairs: 1.3
LARGE_TILE = 1 << 18  # logits of a head; from here on half as many heads make a tile
NUMBERS_A_GPU_TILE = 48 << 20
GPU_BLOCKS = 512, 2048  # the smallest and the largest
GPU_BANDED_BLOCKS = 256, 1024  # those where half the band's width is no more
FEWEST_QUERIES = 64
FEWEST_TURNED = 512  # rows: 0.81 of the time from there on, of 128 rows 1.1
LANES = 128  # of a vector on a TPU


def tiling_of(inputs: Any, block_sizes: tuple[int, int] | None, place: Place) -> Tiling:
    """The tiling of a call's `Inputs` or `Blocks`; `block_sizes` overrules (t, s)."""
    (B, T, N, _), (_, S, K, _) = inputs.query_BTNH.shape, inputs.key_BSKH.shape
    t, s = block_sizes or _block_sizes(inputs, place)
    b, k = _examples_and_heads(inputs, N // K * t, s, place)
    G, r = N // K, N // K * t
    last = _is_tpu(place) and r >= LANES  # fewer queries would leave lanes empty
    turns = place.cpu and r >= FEWEST_TURNED
    return Tiling(B, K, T, S, b, k, t, s, G, queries_last=last, turns_queries=turns)


def _block_sizes(inputs: Any, place: Place) -> tuple[int, int]:
    (_, T, N, _), (_, S, K, _) = inputs.query_BTNH.shape, inputs.key_BSKH.shape
    left, right = inputs.mask.band
    if place.cpu or _is_tpu(place):
        queries, keys = _largest_blocks(left, right, place)
        if inputs.where and place.cpu:  # what functions leave is known when it runs
            queries, keys = (min(x, LARGEST_ASKED_BLOCK) for x in (queries, keys))
        if place.is_shared or _is_tpu(place):
            queries, keys = _fitting(inputs, queries, keys, place)
    else:
        queries = keys = _gpu_block(inputs, place)
    if place.cpu:  # G heads share keys: a tile has G t rows
        queries = max(FEWEST_QUERIES, queries // (N // K))
    drawn = 8 if inputs.dropout_word_2 is None else GROUP
    multiple = LANES if _is_tpu(place) else 8
    return even_block(T, queries, max(multiple, drawn)), even_block(S, keys, multiple)


def _largest_blocks(left: int | None, right: int | None, place: Place) -> tuple[int, int]:
    """Half of the band's width, within bounds; blocks of their own where there is no band."""
    if left is not None and right is not None:
        half = (left + right + 2) // 2
        least = 2 * LANES if _is_tpu(place) else SMALLEST_BANDED_BLOCK
        block = min(LARGEST_BANDED_BLOCK, max(least, half))
        return block, block
    if _is_tpu(place):
        return LARGEST_BANDED_BLOCK, LARGEST_BLOCK
    if (left, right) != (None, None):
        return LARGEST_BANDED_BLOCK, LARGEST_BANDED_BLOCK
    return LARGEST_BLOCK if place.is_shared else LARGEST_BANDED_BLOCK, LARGEST_BLOCK


def _gpu_block(inputs: Any, place: Place) -> int:
    """Of queries and of keys: the fewer heads a device has, the larger."""
    (B, T, N, H), (_, S, _, V) = inputs.query_BTNH.shape, inputs.value_BSKV.shape
    least, block = GPU_BLOCKS
    if not all(map(is_known, (B, T, S))):  # what is not known is filled up to whole blocks
        return least
    left, right = inputs.mask.band
    if left is not None and right is not None:
        half, (least_banded, largest_banded) = (left + right + 2) // 2, GPU_BANDED_BLOCKS
        least, block = min(least, max(least_banded, half)), min(block, max(largest_banded, half))
    heads = -(-B * N // place.devices)
    while block > least and (
        heads * _numbers(min(block, T), min(block, S), H, V) > NUMBERS_A_GPU_TILE
    ):
        block = max(least, block // 2)
    return block


def even_block(length: int, largest: int, multiple: int = 8) -> int:
    """Blocks of about equal size, a multiple of 8 or of what is asked for, at most `largest`.

    One that divides the length is taken if it is little smaller: nothing must be filled up then.

    Example:
        >>> even_block(1030, 1024), even_block(100, 1024), even_block(4096, 136)
        (520, 104, 128)
        >>> even_block(1030, 1024, multiple=128), even_block(100, 1024, multiple=128)
        (640, 104)
    """
    if not is_known(length):
        return largest
    blocks = max(1, -(-length // largest))
    multiple = multiple if length > multiple else 8
    block = max(8, -(-length // (multiple * blocks)) * multiple)
    smaller = range(block, block * 3 // 4, -multiple)
    return next((size for size in smaller if length % size == 0), block)


def _fitting(inputs: Any, queries: int, keys: int, place: Place) -> tuple[int, int]:
    """Halved until a tile of the heads that no loop can part is small enough, on each device."""
    (B, _, N, H), (_, _, K, V) = inputs.query_BTNH.shape, inputs.value_BSKV.shape
    heads = N // K
    if place.is_shared:  # each device holds its share of all heads
        heads = -(-B * N // place.devices) if is_known(B) else N
    most = NUMBERS_A_TILE[place.platform]
    while queries > SMALLEST_BANDED_BLOCK and heads * _numbers(queries, keys, H, V) > most:
        queries, keys = queries // 2, keys // 2
    return queries, keys


def _numbers(r: int, s: int, H: int, V: int) -> int:
    """Those of a tile: logits; query, context, key and value."""
    return r * s + (r + s) * (H + V)


def _examples_and_heads(inputs: Any, r: int, s: int, place: Place) -> tuple[int, int]:
    """(b, k): how many examples, and key/value heads that r rows and s keys meet, make a tile."""
    (B, _, _, H), (_, _, K, V) = inputs.query_BTNH.shape, inputs.value_BSKV.shape
    b, k = B, K
    if place.platform in NUMBERS_A_TILE and not place.is_shared:
        room = NUMBERS_A_TILE[place.platform] // _numbers(r, s, H, V)
        if place.cpu and r * s >= LARGE_TILE:
            room = max(1, room // 2)
        k = _divisor(K, room)
        b = _divisor(B, room // K) if k == K and is_known(B) else 1
    return (1 if _has_own_distances(inputs) else b), k


def _has_own_distances(inputs: Any) -> bool:
    """Whether every example reads another stretch of the distance bias: they go one by one."""
    bias = inputs.distance_bias
    return bias is not None and bias.query_offset is not None and bias.query_offset.size > 1


def _is_tpu(place: Place) -> bool:
    return place.platform == "tpu"


def _divisor(number: int, most: int) -> int:
    """The greatest divisor that is at most `most`, and 1 at least.

    Example:
        >>> _divisor(12, 5), _divisor(7, 5), _divisor(8, 0)
        (4, 1, 1)
    """
    return max((n for n in range(1, most + 1) if n <= number and number % n == 0), default=1)
