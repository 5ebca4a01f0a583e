"""Attention within chunks of a fixed size: segments of positions, and the band that holds them."""

import dataclasses

from flax_mha.core.dtypes import at_least_32_bits
from flax_mha.core.typing import Array
from flax_mha.masks import Mask


def chunk_mask(
    size: int,
    query_bT: Array,
    key_bS: Array,
    *,
    counted: bool = True,
    query_offset: Array | None = None,
) -> Mask:
    """Who is in whose chunk, of tokens at these positions.

    Where positions are `counted` one by one, from `query_offset` on, nobody of a chunk is `size`
    tokens away: the band lets blocks skip the rest, which segments alone do not tell in advance.
    """
    mask = Mask.segments(*(at_least_32_bits(x) // size for x in (query_bT, key_bS)))
    if not counted:
        return mask
    band = Mask.window(size - 1, size - 1)
    return mask & dataclasses.replace(band, query_offset=query_offset)
