"""Windows in several axes: against loops and NATTEN, by every implementation; what is refused."""

import dataclasses
import functools
import hashlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid_oracles import BEYOND_NATTEN, GRIDS, attention, neighbors
from helpers import assert_close, normal

from flax_mha import Mask, Neighborhood, block_mask, dot_product_attention
from flax_mha.attention.allowed import blocks_left, split_mask
from flax_mha.attention.static_band import FINEST
from flax_mha.core.pairs.blocks import Grid

IMPLEMENTATIONS = pytest.mark.parametrize(
    "options",
    [
        {"implementation": "reference"},
        {"implementation": "blockwise", "block_sizes": (8, 8)},
        {"implementation": "blockwise", "block_sizes": (5, 16)},
    ],
    ids=["reference", "blockwise", "blockwise, uneven"],
)
# The first of SHA-256 of the packed masks that NATTEN 0.21.7 itself has (flex-fna, torch 2.13):
# rows of zeros as queries and keys, one-hot values.
NATTEN = {
    "1-D": "6517308b98ae51a5",
    "1-D, even": "b80924214a5ee7bd",
    "1-D, dilated": "79c893e0ca5482c8",
    "1-D, dilated, even": "147a35bb69699f9b",
    "1-D, causal": "8153f682804f0b02",
    "1-D, causal, dilated": "be92b343456cba3d",
    "2-D": "ac5865a5f9a5a69b",
    "2-D, even": "201e32451f4babdb",
    "2-D, whole": "da055ff82b5d5d41",
    "2-D, whole rows": "962d37e495fc99d5",
    "2-D, dilated": "62949a3be24e7086",
    "2-D, as wide as can be": "442e3adbb42c0a5f",
    "2-D, causal rows": "947c457f4d381a14",
    "2-D, causal columns, dilated": "71e6eac48f7b671a",
    "3-D": "0d8e7ee44c03abe3",
    "3-D, a video": "698f3baa48f5a281",
}


def mask_of(name):
    shape, window, dilation, is_causal = GRIDS[name]
    return Mask.neighborhood(shape, window, dilation=dilation, is_causal=is_causal)


def dense(mask, T):
    return np.asarray(mask.as_array(T, T))[0, 0]


# --- who sees whom ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_the_mask_is_that_of_the_loops(name):
    allowed_TS = neighbors(*GRIDS[name])
    np.testing.assert_array_equal(dense(mask_of(name), len(allowed_TS)), allowed_TS)


@pytest.mark.slow
def test_the_masks_are_those_of_natten():
    """All but what it does not have."""
    assert set(NATTEN) == set(GRIDS) - set(BEYOND_NATTEN)
    packed = {name: np.packbits(dense(mask_of(name), math.prod(GRIDS[name][0]))) for name in NATTEN}
    found = {name: hashlib.sha256(x.tobytes()).hexdigest()[:16] for name, x in packed.items()}
    assert found == NATTEN


@pytest.mark.parametrize("name", ["2-D", "2-D, even", "2-D, dilated", "3-D"])
def test_every_query_sees_as_many_keys_at_borders_too(name):
    shape, window, _, _ = GRIDS[name]
    assert set(dense(mask_of(name), math.prod(shape)).sum(-1)) == {math.prod(window)}


def test_one_axis_is_no_band():
    """w keys in all, where a band has fewer at the ends, and Keras's has 2 w - 1 in the middle."""
    near = dense(Mask.neighborhood((6,), (3,)), 6)
    assert near.sum(-1).tolist() == [3] * 6
    assert dense(Mask.window(1, 1), 6).sum(-1).tolist() == [2, 3, 3, 3, 3, 2]


def test_a_causal_axis_is_a_causal_band():
    band = dense(Mask.causal() & Mask.window(2, None), 9)
    np.testing.assert_array_equal(dense(Mask.neighborhood((9,), (3,), is_causal=True), 9), band)


def test_a_dilated_grid_is_that_of_each_group():
    """Every second row and third column are a picture of their own."""
    shape, dilation = (6, 9), (2, 3)
    near = neighbors(shape, (3, 2), dilation).reshape(*shape, *shape)
    alone = neighbors((3, 3), (3, 2)).reshape(3, 3, 3, 3)
    for i, j in np.ndindex(*dilation):
        np.testing.assert_array_equal(near[i::2, j::3, i::2, j::3], alone)
    found = dense(Mask.neighborhood(shape, (3, 2), dilation=dilation), 54)
    np.testing.assert_array_equal(found, near.reshape(54, 54))


@pytest.mark.parametrize("name", GRIDS)
def test_its_band_holds_all_pairs_and_not_many_more(name):
    """How far a window reaches in the raster is known when traced: by it tiles are sized."""
    near = neighbors(*GRIDS[name])
    T = len(near)
    apart = np.subtract(*np.nonzero(near))
    bands = zip(separate(mask_of(name), T)[0].band, (apart.max(), -apart.min()), strict=True)
    for found, exact in bands:
        assert exact <= (T - 1 if found is None else found) < exact + 2 * FINEST


def test_a_window_of_all_is_everyone():
    assert dense(Mask.neighborhood((4, 5), (4, 5)), 20).all()


def test_the_algebra_of_masks():
    mask = Mask.neighborhood((4, 5), (3, 3))
    near = neighbors((4, 5), (3, 3))
    before = np.tril(np.ones((20, 20), bool))
    np.testing.assert_array_equal(dense(mask & Mask.causal(), 20), near & before)
    np.testing.assert_array_equal(dense(mask | Mask.prefix(2), 20), near | (np.arange(20) < 2))
    np.testing.assert_array_equal(dense(~mask, 20), ~near)


def test_a_class_token_before_the_picture():
    """What the function is for: it takes its part in another."""
    near = Neighborhood((3, 3)).function((4, 5))
    mask = Mask.function(lambda b, n, t, s: (t == 0) | (s == 0) | near(b, n, t - 1, s - 1))
    wanted = np.ones((21, 21), bool)
    wanted[1:, 1:] = neighbors((4, 5), (3, 3))
    np.testing.assert_array_equal(dense(mask, 21), wanted)


# --- attention ----------------------------------------------------------------------------------


def arrays(T, B=2, N=4, K=2, H=8):
    return normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", GRIDS)
def test_attention_and_its_gradients(name, options):
    """The context is that of the loops; the gradients are those through a dense mask."""
    allowed_TS = neighbors(*GRIDS[name])
    query, key, value = qkv = arrays(len(allowed_TS))
    probe = normal(4, *query.shape)

    def run(mask, options):
        def loss(*qkv):
            context = dot_product_attention(*qkv, mask=mask, **options)
            return (context * probe).sum(), context

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

    grads, context = run(mask_of(name), options)
    wide = [np.repeat(x, 2, axis=2) for x in (key, value)]
    assert_close(context, attention(query, *wide, allowed_TS), "float32")
    wanted, _ = run(jnp.asarray(allowed_TS), {"implementation": "reference"})
    for ours, theirs in zip(grads, wanted, strict=True):
        assert_close(ours, theirs, "float32")


@IMPLEMENTATIONS
def test_far_tokens_hold_anything_within_a_gradient(options):
    """A key outside of every chosen window has a gradient of exactly 0."""
    query, key, value = arrays(35)
    mask = Mask.neighborhood((5, 7), (3, 3))

    @functools.partial(jax.grad, argnums=(0, 1))
    def corner(key, value):
        return dot_product_attention(query, key, value, mask=mask, **options)[:, 0].sum()

    seen = neighbors((5, 7), (3, 3))[0]
    for grad in jax.jit(corner)(key, value):
        assert (np.asarray(grad)[:, ~seen] == 0).all()
        assert (np.asarray(grad)[:, seen] != 0).any((0, 2, 3)).all()


def test_equal_windows_are_traced_once():
    traces = []

    @functools.partial(jax.jit, static_argnames="near")
    def call(qkv, near):
        traces.append(near)
        mask = Mask.neighborhood((5, 7), near.window, dilation=near.dilation)
        return dot_product_attention(*qkv, mask=mask)

    qkv = arrays(35)
    call(qkv, Neighborhood((3, 3)))
    call(qkv, Neighborhood([np.int64(3), 3], dilation=[1, 1], is_causal=(False, 0)))
    assert len(traces) == 1
    call(qkv, Neighborhood((3, 4)))
    assert len(traces) == 2


def test_a_mask_is_data_to_jit():
    """Two masks of one window have one structure: made outside, the call is traced once."""
    traces = []

    @jax.jit
    def call(qkv, mask):
        traces.append(mask)
        return dot_product_attention(*qkv, mask=mask)

    for _ in range(2):
        call(arrays(35), Mask.neighborhood((5, 7), (3, 3)))
    assert len(traces) == 1


# --- blocks -------------------------------------------------------------------------------------


def separate(mask, T):
    places = {x: jnp.arange(n, dtype="int32") for x, n in zip("bnts", (1, 1, T, T), strict=True)}
    return split_mask(mask, places, (1, 1, T, T))


def by_intervals(mask, T, t, s):
    _, where = separate(mask, T)
    return jax.jit(lambda where: blocks_left(where, Grid(T, T, t, s)))(where)


@pytest.mark.parametrize("sizes", [(4, 4), (3, 8), (16, 5)])
@pytest.mark.parametrize("name", GRIDS)
def test_intervals_leave_out_no_pair_and_call_none_whole_that_is_not(name, sizes):
    allowed_TS = neighbors(*GRIDS[name])
    T, (t, s) = len(allowed_TS), sizes
    some, whole = (np.asarray(x)[0, 0] for x in by_intervals(mask_of(name), T, t, s))
    for i, j in np.ndindex(*some.shape):
        block = allowed_TS[i * t : (i + 1) * t, j * s : (j + 1) * s]
        assert some[i, j] >= block.any()
        assert whole[i, j] <= block.all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "window", "sizes", "visited"),
    [
        ((32, 32), (7, 7), (32, 32), 7 * 32),  # rows of blocks: 7 of 32 each, first and last too
        ((32, 32), (7, 7), (128, 128), 3 * 6 + 2 * 2),
        ((8, 256), (3, 7), (64, 64), 8 * 3 * (2 + 3 + 3 + 2)),  # parts of rows: columns tell too
        ((32, 32), (8, 32), (32, 32), 8 * 32),
    ],
)
def test_the_blocks_that_intervals_leave_are_those_that_are_needed(shape, window, sizes, visited):
    mask, T = Mask.neighborhood(shape, window), math.prod(shape)
    needed = np.asarray(block_mask(mask, T, T, block_size=sizes).some)
    found = np.asarray(by_intervals(mask, T, *sizes).some)
    np.testing.assert_array_equal(found, needed)
    assert found.sum() == visited


def test_groups_of_rows_that_never_meet_are_left_out():
    """Every second row: half of the window's blocks."""
    mask = Mask.neighborhood((32, 32), (5, 32), dilation=(2, 1))
    found = by_intervals(mask, 1024, 32, 32)
    assert np.asarray(found.some).sum(-1).tolist() == [[[5] * 32]]
    np.testing.assert_array_equal(found.some, found.whole)  # rows are whole: no tile is asked


@pytest.mark.slow
def test_no_buffer_of_all_pairs():
    """T = 4,096, forward and backward: no array is near the size of [T, T]."""
    mask, T = Mask.neighborhood((64, 64), (7, 7)), 4096
    x = jax.ShapeDtypeStruct((1, T, 2, 16), "float32")

    def loss(query, key, value):
        context = dot_product_attention(query, key, value, mask=mask, implementation="blockwise")
        return (context**2).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    shapes = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < 128 * T
    assert program.memory_analysis().temp_size_in_bytes < T * T  # what booleans of all pairs hold


# --- the object ---------------------------------------------------------------------------------


def test_the_object_is_a_value():
    near = Neighborhood([3, 5], dilation=2, is_causal=[1, False])
    assert near == Neighborhood((3, 5), (2, 2), (True, False))
    assert hash(near) == hash(Neighborhood((3, 5), (2, 2), (True, False)))
    assert near.to_dict() == {"window": [3, 5], "dilation": [2, 2], "is_causal": [True, False]}
    assert Neighborhood.from_dict(json.loads(json.dumps(near.to_dict()))) == near
    assert dataclasses.replace(near, window=(7, 7)).dilation == (2, 2)
    assert near != Neighborhood((3, 5), 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Neighborhood(7), TypeError, r"`Neighborhood\.window` must be a tuple .*\(7, 7\)"),
        (lambda: Neighborhood("77"), TypeError, r"`Neighborhood\.window` must be a tuple"),
        (lambda: Neighborhood(()), ValueError, r"one size for each axis.*window=\(\)"),
        (lambda: Neighborhood((3, 0)), ValueError, "positive integer.*window=0"),
        (lambda: Neighborhood((3.0, 3)), TypeError, r"positive integer.*Pass 3: `/` gives a float"),
        (lambda: Neighborhood((True, 3)), TypeError, "positive integer.*window=True"),
        (
            lambda: Neighborhood((3, 3), dilation=(2,)),
            ValueError,
            r"one value for all axes or one for each of the 2.*dilation=\(2,\)",
        ),
        (lambda: Neighborhood((3, 3), dilation=0), ValueError, "positive integer.*dilation=0"),
        (lambda: Neighborhood((3, 3), is_causal=(True,) * 3), ValueError, "each of the 2"),
        (lambda: Neighborhood((3, 3), is_causal="no"), TypeError, "is_causal.*True or False"),
        (lambda: Neighborhood.from_dict({"windows": [3]}), ValueError, "Did you mean 'window'"),
        (lambda: Neighborhood.from_dict({"dilation": 2}), TypeError, "must be a tuple.*None"),
        (
            lambda: Mask.neighborhood((5, 7), (3,)),
            ValueError,
            r"a size for each axis of the grid.*window=\(3,\), the grid \(5, 7\)",
        ),
        (lambda: Mask.neighborhood(35, (3,)), TypeError, r"`shape` must be a tuple.*35"),
        (
            lambda: Mask.neighborhood((5, 7), (7, 3)),
            ValueError,
            r"at most as long as the axis.*window 7 .*axis 0 of \(5, 7\).*at most 5",
        ),
        (
            lambda: Mask.neighborhood((5, 7), (3, 3), dilation=(1, 3)),
            ValueError,
            r"window \* dilation.*3 \* 3 = 9 .*axis 1 of \(5, 7\).*at most 2, or a dilation.*2",
        ),
        (lambda: Mask.neighborhood((5, 0), (3, 3)), ValueError, r"axis 1 of \(5, 0\)"),
    ],
)
def test_what_is_no_neighborhood(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: ~m, lambda m: m | Mask.causal()])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_tokens_that_are_not_the_grid_s(implementation, wrap):
    """A class token more would shift every row: it is refused, and not guessed."""
    mask = wrap(Mask.neighborhood((5, 7), (3, 3)))
    message = r"T <= S = 35, the tokens of its grid.*T=36, S=36.*Neighborhood.*function"
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*arrays(36), mask=mask, implementation=implementation)
