"""How large a kernel's tiles are, with the schedules behind them, and what they need of VMEM.

Cycles per 512 x 512 entries of the body without a mask, bf16, H = 128, by the compiler's static
schedule (jax 0.12.0.1, libtpu 0.0.50.1):

    tile                forward               backward
    512 x 512           1111 on v5e, 919 on v6e
    1024 x 1024         1021         692      2196         1197

Parts of a tile, backward, its products in the other order: all of 1024 x 1024 2291 / 1110, 512 x
1024 2346 / 1124, 256 x 1024 2416, 1024 x 512 2374; d_key as d_product^T . query, with the tile
transposed, 2224 / 1315. In this order (d_value, d_key, d_query) 2196 / 1197.

In float32, backward, where a key that has all of its row is looked for: parts of 256 x 256 2578 /
1430, 512 x 256 2599 / 1510, 1024 x 256 2648 / 1498, 256 x 128 2686 / 2373, all of it 2756 / 1684;
in two rows, whether and what, 256 x 256 2598 / 1591. Without, all of it 2510 / 1380.

With dropout, forward: 1024 x 256 2015 / 1842 (x 512 2275 / 1903). Backward, where a part's products
follow the next part's draws: 256 x 128 2781 / 2277, in the other order 2760 / 2264, with transposed
operands and columns of row_max made once a tile 2225 on v6e; 256 x 256 3554 / 2235. Where they
follow its own draws the matrix units stand still, then the vector units do: 1024 x 128 3059 / 2622
(the other order 2774 / 2705, with the next part's draws made before 2700), 1024 x 256 3458 / 2376,
512 x 256 3532 / 2490, 256 x 256 3265 / 2785. Its vector operations alone take some 2080 / 2100, the
five products at their nominal pace 2560 / 1280.

With a dense bias, forward on v6e, float32 / bfloat16: 1024 x 1024 763.5 / 777, x 512 764 / 800, x
256 815; a float32 one is bound by memory, 1120 cycles at 1640 GB/s. On v5e 1024 x 1024 1100, x 512
1063 / 1035.

A scale that stays out of the maximum (`Plan.late`) makes forward 1021 / 692 of 1072 / 772; with
distances, which are divided by it before, 1092 / 745 of 1074 / 771; with a dense bias, multiplied
in the kernel, 780 on v6e where it is 764. In a base of 2 from the start it is 993 / 646, but then
huge logits are rounded twice.
"""

from typing import Any

from flax_mha.attention.pallas_tpu.pair_refusal import pair_refusal
from flax_mha.attention.pallas_tpu.plan import LANES
from flax_mha.core.sizes import is_known

LARGEST = 1024
LARGEST_OF_FEW = 512
VMEM_FOR_BLOCKS = 40 << 20
DTYPES = ("float32", "bfloat16")
DIVISOR = LANES  # a row of a softmax is a row of lanes


def tile_sizes(inputs: Any, block_sizes: tuple[int, int] | None) -> tuple[int, int]:
    """(t, s) of a call's `Inputs` or `Blocks`; `block_sizes` overrules them."""
    if block_sizes is not None:
        return block_sizes
    T, S = inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1]
    left, right = inputs.mask.band
    both = left is not None and right is not None
    narrow = both and left + right < LARGEST_OF_FEW
    largest = LARGEST_OF_FEW if narrow or inputs.where or inputs.score is not None else LARGEST
    while largest > DIVISOR and vmem_bytes(inputs, largest, largest) > VMEM_FOR_BLOCKS:
        largest //= 2
    t, s = even_tile(T, largest), even_tile(S, largest)
    return (min(t, s),) * 2 if inputs.distance_bias is not None else (t, s)


def refusal(inputs: Any, options: Any) -> str | None:
    """Why the kernels cannot serve a call, on any platform."""
    if inputs.scales is not None:
        return "it reads keys and values as they are, and those of this cache are int8"
    dtypes = {str(x.dtype) for x in (inputs.query_BTNH, inputs.key_BSKH, inputs.value_BSKV)}
    if options.return_weights:
        return "it never holds the weights [T, S] that return_weights asks for"
    if not dtypes <= set(DTYPES):
        return f"it computes in {' and '.join(DTYPES)}, and the arrays are {sorted(dtypes)[0]}"
    if not is_known(*inputs.query_BTNH.shape, *inputs.key_BSKH.shape):
        return "a size is a symbol, and its grid must be known when it is lowered"
    why = pair_refusal(inputs.where, inputs.score)
    if why is not None:
        return why
    return None if options.block_sizes is None else _tile_refusal(inputs, *options.block_sizes)


def _tile_refusal(inputs: Any, t: int, s: int) -> str | None:
    if t % DIVISOR or s % DIVISOR:
        return f"block_sizes must be multiples of {DIVISOR}, and are {(t, s)}"
    if inputs.distance_bias is not None and t != s:
        return f"with a distance bias both block_sizes must be the same, and are {(t, s)}"
    needed = vmem_bytes(inputs, t, s)
    if needed > VMEM_FOR_BLOCKS:
        own = tile_sizes(inputs, None)
        return (
            f"block_sizes {(t, s)} need about {needed >> 20} MiB of VMEM, and tiles may take "
            f"{VMEM_FOR_BLOCKS >> 20}; None takes {own}"
        )
    return None


def even_tile(length: int, largest: int) -> int:
    """Tiles of about equal size, a multiple of 128, at most `largest`.

    Example:
        >>> even_tile(1100, 1024), even_tile(300, 1024), even_tile(4096, 1024)
        (640, 384, 1024)
    """
    blocks = max(1, -(-length // largest))
    return max(1, -(-length // (DIVISOR * blocks))) * DIVISOR


def vmem_bytes(inputs: Any, t: int, s: int) -> int:
    """Roughly what a call's largest kernel holds at once: blocks twice, and a tile's floats."""
    H, V = inputs.query_BTNH.shape[-1], inputs.value_BSKV.shape[-1]
    H, V = (-(-x // LANES) * LANES for x in (H, V))
    size = inputs.query_BTNH.dtype.itemsize
    arrays = 2 * size * (t * H + s * (H + V) + t * V) + 4 * (t * V + 2 * s * (H + V))
    tile = 4 * t * s * 3
    scores = 0 if inputs.bias_bnts is None else 2 * inputs.bias_bnts.dtype.itemsize * t * s
    distances = 0 if inputs.distance_bias is None else 2 * 4 * 2 * LANES * t
    dense = 2 * t * s * len(inputs.mask.dense_masks)
    return arrays + tile + scores + distances + dense
