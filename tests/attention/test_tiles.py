"""Which blocks are visited: exactly those that the band leaves, and whole ones without a mask."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal
from jax import export

from flax_mha import Mask
from flax_mha.attention.blockwise.attend import _widest
from flax_mha.attention.blockwise.call import (
    of_keys,
    of_queries,
    of_rows,
    put_keys,
    put_queries,
    put_rows,
)
from flax_mha.attention.blockwise.engine import Blocks
from flax_mha.attention.blockwise.programs import Forward
from flax_mha.attention.blockwise.signature import Facts, Signature
from flax_mha.attention.blockwise.tile_sizes import tiling_of
from flax_mha.attention.blockwise.tiles import Tile, Tiling, allowed, key_spans, query_spans
from flax_mha.attention.contract import Inputs, Options
from flax_mha.core.platform import PLATFORMS, Place

CPU = Place("cpu")
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


@pytest.mark.slow
@pytest.mark.parametrize("offsets", [[0], [5], [-4], [-4, 0, 5]], ids=str)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_spans_are_the_blocks_that_the_band_leaves(band, offsets):
    """Of several examples, the blocks that any of them needs; masked unless whole for all."""
    B = len(offsets)
    for (T, S), (t, s) in itertools.product(LENGTHS, BLOCKS):
        tiling = Tiling(B=B, K=1, G=1, T=T, S=S, b=B, k=1, t=t, s=s)
        mask = Mask(band=band, query_offset=jnp.array(offsets))
        # With the rows that fill the last query block, as the loops see them.
        full = np.asarray(mask.as_array(tiling.query_blocks * t, S))[:, 0]
        for i, j in itertools.product(range(tiling.query_blocks), range(tiling.key_blocks)):
            tiles = [tile_of(example, i, j, tiling) for example in full]
            of_keys = visited(key_spans(tiling, mask, jnp.int32(0), jnp.int32(i)))
            of_queries = visited(query_spans(tiling, mask, jnp.int32(0), jnp.int32(j)))
            needed = any(tile.any() for tile in tiles)
            for seen, block, blocks in (
                (of_keys, j, tiling.key_blocks),
                (of_queries, i, tiling.query_blocks),
            ):
                exact = blocks > 1 and B == 1  # the one block there is, is never left out
                assert block in seen if needed else not (exact and block in seen), (T, S, t, s)
                if not seen.get(block, True):
                    assert all(tile.all() for tile in tiles), "an unmasked tile must be whole"
                    assert tiles[0].shape[1] == s, "and must not reach behind the last key"


def test_causal_visits_half_of_the_tiles_and_masks_the_diagonal_alone():
    tiling = Tiling(B=1, K=1, G=1, T=64, S=64, b=1, k=1, t=8, s=8)
    seen = [visited(key_spans(tiling, Mask.causal(), jnp.int32(0), jnp.int32(i))) for i in range(8)]
    assert [len(blocks) for blocks in seen] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [sum(blocks.values()) for blocks in seen] == [1] * 8


@pytest.mark.slow
@pytest.mark.parametrize(("b", "k"), [(1, 1), (1, 3), (2, 3), (4, 3)])
def test_a_tile_s_mask_is_the_mask_s_tile(b, k):
    B, K, G, T, S, t, s = 4, 3, 2, 16, 16, 8, 4
    rng = np.random.default_rng(0)
    padding, ids = rng.random((B, T)) < 0.7, rng.integers(0, 3, (B, T))
    mask = Mask.causal(jnp.array([0, 3, -2, 5])) & Mask.padding(padding, padding)
    mask &= Mask.segments(ids, ids) & Mask.dense(rng.random((B, K * G, T, S)) < 0.8)
    mask &= Mask.dense(rng.random((1, K * G, 1, S)) < 0.9)
    tiling = Tiling(B=B, K=K, G=G, T=T, S=S, b=b, k=k, t=t, s=s)
    whole = np.asarray(mask.as_array(T, S)).reshape(B, K, G, T, S)
    corners = itertools.product(*(range(0, n, step) for n, step in zip((B, K, T, S), (b, k, t, s))))
    for corner in corners:
        got = np.asarray(allowed(tiling, mask, Tile(*map(jnp.int32, corner))))
        expected = whole[
            corner[0] : corner[0] + b,
            corner[1] : corner[1] + k,
            :,
            corner[2] : corner[2] + t,
            corner[3] : corner[3] + s,
        ]
        np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)


def inputs_of(T, S, *, B=1, N=8, K=None, H=64, mask=None):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    return Inputs(
        query_BTNH=shape(B, T, N, H),
        key_BSKH=shape(B, S, K or N, H),
        value_BSKV=shape(B, S, K or N, H),
        mask=Mask() if mask is None else mask,
    )


def sizes_of(T, S, *, block_sizes=None, place=CPU, **call):
    tiling = tiling_of(inputs_of(T, S, **call), block_sizes, place)
    return tiling.b, tiling.k, tiling.t, tiling.s


def test_a_tile_on_cpu_is_large_enough_for_two_cores_and_small_enough_for_the_cache():
    assert sizes_of(4096, 4096) == (1, 1, 512, 1024)
    assert sizes_of(4096, 4096, mask=Mask.causal()) == (1, 2, 512, 512)
    assert sizes_of(4096, 4096, mask=Mask.window(255, 255)) == (1, 8, 256, 256)
    assert sizes_of(4096, 4096, mask=Mask.window(99, 0)) == (1, 8, 128, 128)
    assert sizes_of(4096, 4096, mask=Mask.window(None, 0)) == (1, 2, 512, 512)
    assert sizes_of(512, 512, B=8) == (1, 2, 512, 512)
    assert sizes_of(128, 128, B=32) == (4, 8, 128, 128)
    assert sizes_of(64, 64, B=64) == (8, 8, 64, 64)
    assert sizes_of(4096, 4096, K=1) == (1, 1, 64, 1024)  # 8 heads share a key: 512 rows
    assert sizes_of(300, 1100, B=7, N=5) == (1, 5, 304, 552)
    assert sizes_of(8, 8, B=7, N=5, block_sizes=(4, 4)) == (7, 5, 4, 4)


def test_examples_and_heads_that_devices_may_share_are_never_cut():
    """A sharded axis that a loop cuts would be gathered on every device."""
    gpu, tpus = Place("gpu"), Place("tpu", devices=4)
    assert sizes_of(4096, 4096, B=16, place=gpu) == (16, 8, 512, 512)
    assert sizes_of(4096, 4096, B=4, place=tpus) == (4, 8, 512, 1024)
    assert sizes_of(4096, 4096, B=64, place=tpus) == (64, 8, 128, 256)


def test_a_tile_on_a_tpu_fills_its_lanes_and_stays_in_its_own_memory():
    tpu = Place("tpu")
    assert sizes_of(4096, 4096, H=128, place=tpu) == (1, 8, 512, 1024)
    assert sizes_of(4096, 4096, mask=Mask.causal(), place=tpu) == (1, 8, 512, 1024)
    assert sizes_of(4096, 4096, mask=Mask.window(255, 0), place=tpu) == (1, 8, 256, 256)
    assert sizes_of(4096, 4096, B=16, H=128, place=tpu) == (2, 8, 512, 1024)
    assert sizes_of(4096, 4096, B=7, K=2, H=128, place=tpu) == (1, 2, 512, 1024)
    assert sizes_of(4096, 4096, N=64, K=1, H=128, place=tpu) == (1, 1, 256, 512)
    assert sizes_of(1030, 1300, H=128, place=tpu) == (1, 8, 384, 768)
    assert sizes_of(130, 100, B=3, K=2, place=tpu) == (3, 2, 256, 104)


def test_a_tile_on_a_gpu_is_larger_where_there_are_few_heads():
    """All examples and heads stand side by side: the fewer, the more entries of each."""
    sizes = lambda *lengths, **call: sizes_of(*lengths, H=128, place=Place("gpu"), **call)
    window = Mask.window(255, 0)
    assert sizes(16384, 16384) == (1, 8, 2048, 2048)
    assert sizes(16384, 16384, mask=Mask.causal()) == (1, 8, 2048, 2048)
    assert sizes(16384, 16384, N=32, K=8) == (1, 8, 1024, 1024)  # G heads' queries count as theirs
    assert sizes(16384, 16384, B=16) == (16, 8, 512, 512)
    assert sizes(600, 600, N=64) == (1, 64, 600, 600)  # as long as the call is
    assert sizes(16384, 16384, mask=window) == (1, 8, 1024, 1024)
    assert sizes(16384, 16384, B=16, mask=window) == (16, 8, 256, 256)
    assert sizes(16384, 16384, B=16, mask=Mask.window(1023, 0)) == (16, 8, 512, 512)
    assert sizes(16384, 16384, mask=Mask.window(9999, 0)) == (1, 8, 2048, 2048)
    four = Place("gpu", devices=4)
    assert sizes_of(16384, 16384, B=4, H=128, place=four) == (4, 8, 2048, 2048)  # 8 heads on each


def test_lengths_that_a_gpu_program_does_not_know_are_not_filled_up_far():
    (T,) = export.symbolic_shape("T")
    assert sizes_of(T, 4096, place=Place("gpu")) == (1, 8, 512, 512)
    (B,) = export.symbolic_shape("B")
    assert sizes_of(4096, 4096, B=B, place=Place("gpu")) == (B, 8, 512, 512)


@pytest.mark.parametrize("band", [(None, None), (None, 0), (255, 0), (3000, 100)], ids=str)
def test_no_place_has_tiles_beyond_the_width_that_a_distance_bias_is_filled_up_by(band):
    """Of 128 heads of one key, each of 64 TPUs has 2, and larger tiles than one that has all."""
    lengths, heads = itertools.product((1, 513, 1030, 4096), repeat=2), ((8, 8), (128, 1))
    for (T, S), (N, K), B in itertools.product(lengths, heads, (1, 64)):
        inputs = inputs_of(T, S, B=B, N=N, K=K, H=128, mask=Mask(band=band))
        width = _widest(inputs, Options(scale=1.0))
        for place in itertools.starmap(Place, itertools.product((*PLATFORMS, "any"), (1, 2, 64))):
            tiling = tiling_of(inputs, None, place)
            assert tiling.t + tiling.s <= width, (T, S, N, K, B, place)


@pytest.mark.parametrize(("T", "K", "turned"), [(128, 8, True), (96, 8, False), (40, 2, True)])
def test_tiles_are_turned_where_a_tpu_s_lanes_are_filled(T, K, turned):
    """The G heads' queries of a tile lie along the lanes: of 96 they would be a quarter empty."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    key_BSKH = shape(1, 4096, K, 64)
    inputs = Inputs(
        query_BTNH=shape(1, T, 8, 64), key_BSKH=key_BSKH, value_BSKV=key_BSKH, mask=Mask()
    )
    assert tiling_of(inputs, None, Place("tpu")).queries_last == turned
    for place in (CPU, Place("gpu"), Place("cpu", devices=4)):
        assert not tiling_of(inputs, None, place).queries_last


def test_cpus_that_share_an_array_cut_its_lengths_alone():
    """Each device's part of a tile, of 16 heads a device here, stays in its cache."""
    eight = Place("cpu", devices=8)
    assert sizes_of(512, 512, B=16, place=eight) == (16, 8, 128, 128)
    assert sizes_of(4096, 4096, B=1, place=eight) == (1, 8, 1024, 1024)
    assert sizes_of(4096, 4096, B=64, place=eight) == (64, 8, 128, 128)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_numbers_are_the_same_elsewhere(is_causal):
    """The tiling of other platforms, run on this one."""
    arrays = [normal(seed, 2, 40, heads, 8) for seed, heads in ((0, 6), (1, 3), (2, 3))]
    options = Options(scale=1.0, block_sizes=(16, 8))
    facts = Facts(Mask.causal() if is_causal else Mask(), None, None, None, 0)
    signature = Signature.of(options, facts, dict(zip(("query", "key", "value"), arrays)))
    known = [*jax.tree.leaves(facts), *arrays]
    places = (CPU, Place("tpu"))
    tilings = [signature.filled(known, place)[0].tiling for place in places]
    here, elsewhere = (Forward(Blocks(), signature).run(known, [], place) for place in places)
    assert (tilings[0].lanes, tilings[1].lanes) == (1, 1)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), elsewhere, here)


def test_query_spans_follow_the_offset():
    """Forward sees `key_spans` alone: a gradient through several key blocks, these."""
    tiling = Tiling(B=1, K=1, G=1, T=16, S=16, b=1, k=1, t=4, s=4)
    for offset, first in ((5, [0, 0, 0, 1]), (-6, [1, 2, 3, 4])):
        mask = Mask.causal(jnp.array([offset]))
        seen = [visited(query_spans(tiling, mask, jnp.int32(0), jnp.int32(j))) for j in range(4)]
        assert [sorted(blocks) for blocks in seen] == [list(range(i, 4)) for i in first], offset


def test_several_tiles_of_grouped_heads_are_cut_and_put_together_again():
    """Key/value head k has the query heads k G to k G + G - 1, in whatever tile it falls."""
    B, K, G, T, S, F = 2, 4, 3, 8, 8, 5
    tiling = Tiling(B=B, K=K, G=G, T=T, S=S, b=1, k=2, t=4, s=4)
    x_BTNF, x_BSKF, x_BNT = normal(0, B, T, K * G, F), normal(1, B, S, K, F), normal(2, B, K * G, T)
    again = [jnp.zeros_like(x) for x in (x_BTNF, x_BSKF, x_BNT)]
    for b, k, i in itertools.product(range(B), (0, 2), (0, 4)):
        tile = Tile(*map(jnp.int32, (b, k, i, i)))
        heads, rows = slice(k * G, (k + 2) * G), slice(i, i + 4)
        queries, keys = of_queries(tiling, x_BTNF, tile), of_keys(tiling, x_BSKF, tile)
        row_bkr = of_rows(tiling, x_BNT, tile)
        expected = x_BTNF[b : b + 1, rows, heads].swapaxes(1, 2).reshape(1, 2, G * 4, F)
        np.testing.assert_array_equal(queries, expected)
        np.testing.assert_array_equal(keys[0], x_BSKF[b, rows, k : k + 2].swapaxes(0, 1))
        np.testing.assert_array_equal(row_bkr, x_BNT[b, heads, rows].reshape(1, 2, G * 4))
        again[0] = put_queries(tiling, again[0], queries, tile)
        again[1] = put_keys(again[1], keys, tile)
        again[2] = put_rows(tiling, again[2], row_bkr, tile)
    for found, x in zip(again, (x_BTNF, x_BSKF, x_BNT)):
        np.testing.assert_array_equal(found, x)
