"""Which blocks are visited: exactly those that the band leaves, and whole ones without a mask."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import Mask
from flax_mha.attention._tiles import Tile, Tiling, allowed, key_spans, query_spans

LENGTHS = [(13, 13), (13, 22), (22, 13), (16, 16), (1, 9)]
BLOCKS = [(4, 4), (4, 8), (8, 4), (5, 12), (32, 32)]
BANDS = [(None, None), (None, 0), (0, None), (3, 3), (0, 0), (7, 0), (None, 5), (1, None)]


def tile_of(array, i, j, tiling):
    return array[i * tiling.t : (i + 1) * tiling.t, j * tiling.s : (j + 1) * tiling.s]


def visited(spans):
    """{block: whether it is masked}; a block visited twice would count twice in the softmax."""
    blocks = [(int(n), span.masked) for span in spans for n in range(span.start, span.stop)]
    assert len({n for n, _ in blocks}) == len(blocks)
    return dict(blocks)


@pytest.mark.parametrize("offset", [0, 5, -4])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_spans_are_the_blocks_that_the_band_leaves(band, offset):
    for (T, S), (t, s) in itertools.product(LENGTHS, BLOCKS):
        tiling = Tiling(T=T, S=S, t=t, s=s, K=1, G=1)
        mask = Mask(band=band, query_offset=jnp.array([offset]))
        # With the rows that fill the last query block, as the loops see them.
        full = np.asarray(mask.as_array(tiling.query_blocks * t, S))[0, 0]
        for i, j in itertools.product(range(tiling.query_blocks), range(tiling.key_blocks)):
            tile = tile_of(full, i, j, tiling)
            of_keys = visited(key_spans(tiling, mask, jnp.int32(0), jnp.int32(i)))
            of_queries = visited(query_spans(tiling, mask, jnp.int32(0), jnp.int32(j)))
            assert (j in of_keys) == (i in of_queries) == tile.any(), (T, S, t, s, i, j)
            if tile.any() and not of_keys[j]:
                assert tile.all(), "an unmasked tile must be whole"
                assert tile.shape[1] == s, "and must not reach behind the last key"
            if tile.any():
                assert of_keys[j] == of_queries[i]


def test_causal_visits_half_of_the_tiles_and_masks_the_diagonal_alone():
    tiling = Tiling(T=64, S=64, t=8, s=8, K=1, G=1)
    seen = [visited(key_spans(tiling, Mask.causal(), jnp.int32(0), jnp.int32(i))) for i in range(8)]
    assert [len(blocks) for blocks in seen] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [sum(blocks.values()) for blocks in seen] == [1] * 8


def test_a_tile_s_mask_is_the_mask_s_tile():
    rng = np.random.default_rng(0)
    padding, ids = rng.random((2, 16)) < 0.7, rng.integers(0, 3, (2, 16))
    dense = rng.random((2, 6, 16, 16)) < 0.8
    mask = Mask.causal() & Mask.padding(padding, padding) & Mask.segments(ids, ids)
    mask &= Mask.dense(dense)
    tiling = Tiling(T=16, S=16, t=8, s=4, K=3, G=2)
    whole = np.asarray(mask.as_array(16, 16))
    for g, i, j in itertools.product(range(6), range(2), range(4)):
        got = np.asarray(allowed(tiling, mask, Tile(jnp.int32(g), i, j)))
        for head in range(2):
            expected = tile_of(whole[g // 3, g % 3 * 2 + head], i, j, tiling)
            np.testing.assert_array_equal(got[head], expected)
