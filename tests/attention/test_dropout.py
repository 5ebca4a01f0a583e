"""Dropout bits: a function of position, of the right rate, independent where they should be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close
from jax.extend.random import threefry_2x32

from flax_mha import dot_product_attention
from flax_mha.attention.dropout import keep_mask, words_of
from flax_mha.attention.threefry import threefry

SHAPE = (2, 3, 40, 52)


def mask(rate=0.25, shape=SHAPE, start=(0, 0, 0, 0), dropout_key=None):
    dropout_key = jax.random.key(3) if dropout_key is None else dropout_key
    return np.asarray(keep_mask(words_of(dropout_key), rate, shape, start))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 8, 16), (2, 1, 40, 3)])
@pytest.mark.parametrize("start", [(0, 0, 0, 0), (0, 1, 12, 5), (0, 0, 36, 0)])
def test_any_tile_holds_the_same_bits(shape, start):
    stop = [a + n for a, n in zip(start, shape)]
    if any(b > n for b, n in zip(stop, SHAPE)):
        stop = [min(b, n) for b, n in zip(stop, SHAPE)]
    whole = mask()[tuple(slice(a, b) for a, b in zip(start, stop))]
    tile = mask(shape=tuple(b - a for a, b in zip(start, stop)), start=start)
    np.testing.assert_array_equal(tile, whole)


def test_a_traced_start_gives_the_same_bits():
    word_2 = words_of(jax.random.key(3))
    tile = jax.jit(lambda t, s: keep_mask(word_2, 0.25, (2, 3, 8, 12), (0, 0, t, s)))
    np.testing.assert_array_equal(tile(16, 8), mask()[:, :, 16:24, 8:20])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_rate(rate):
    kept = mask(rate, (4, 4, 128, 128))
    sigma = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) <= 5 * sigma + 2**-17


def test_every_position_draws_by_itself():
    """No two rows, columns, heads, examples or neighbours share their bits."""
    kept = mask(0.5, (4, 4, 64, 64)).astype(float) * 2 - 1
    for axis, step in itertools.product(range(4), (1, 2, 3)):
        a = np.take(kept, range(kept.shape[axis] - step), axis)
        b = np.take(kept, range(step, kept.shape[axis]), axis)
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size), (axis, step)


def test_keys_matter_and_repeat():
    assert (mask(0.5) == mask(0.5)).all()
    other = mask(0.5, dropout_key=jax.random.key(4))
    assert 0.4 < (mask(0.5) == other).mean() < 0.6


def test_threefry_is_jax_s():
    """The words that jax.extend gives for the same key and counters."""
    words = jax.random.bits(jax.random.key(0), (4, 1000), jnp.uint32)
    expected = threefry_2x32(words[:2, 0], words[2:])
    np.testing.assert_array_equal(jnp.stack(threefry(words[:2, 0], *words[2:])), expected)


@pytest.mark.parametrize(
    "make", [jax.random.PRNGKey, jax.random.key, lambda s: jax.random.key(s, impl="rbg")]
)
def test_every_kind_of_key_works(make):
    assert 0.6 < mask(0.3, dropout_key=make(0)).mean() < 0.8


def test_vmap_over_keys_is_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda dropout_key: keep_mask(words_of(dropout_key), 0.25, SHAPE))(keys)
    for dropout_key, kept in zip(keys, stacked):
        np.testing.assert_array_equal(kept, mask(dropout_key=dropout_key))


def test_kept_weights_are_divided_and_the_weights_returned_are_not():
    query, key = jax.random.normal(jax.random.key(0), (2, *SHAPE[:1], 40, 3, 8))
    one_hot = jnp.broadcast_to(jnp.eye(40)[None, :, None], (2, 40, 3, 40))
    call = dict(query=query, key=key, value=one_hot, dropout_rate=0.25, return_weights=True)
    context, weights = dot_product_attention(**call, dropout_key=jax.random.key(3))
    kept = mask(shape=(2, 3, 40, 40))
    np.testing.assert_allclose(context.swapaxes(1, 2), np.where(kept, weights / 0.75, 0), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


# --- one mask for all examples and heads --------------------------------------------------------


def test_a_shared_mask_is_that_of_the_first_example_and_head():
    key = jax.random.key(3)
    shared = np.asarray(keep_mask(words_of(key), 0.25, SHAPE, shared=True))
    np.testing.assert_array_equal(shared, np.broadcast_to(mask()[:1, :1], SHAPE))
    tile = keep_mask(words_of(key), 0.25, (1, 2, 8, 5), (1, 1, 12, 7), shared=True)
    np.testing.assert_array_equal(tile, shared[1:, 1:, 12:20, 7:12])


RAGGED = (2, 11, 6, 8)
CALLS = [
    {"implementation": "reference"},
    {"implementation": "blockwise", "block_sizes": (4, 3)},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_implementation_shares_one_mask(call):
    """Grouped heads too; forward and gradient; equal for a batch and under vmap."""
    query = jax.random.normal(jax.random.key(0), RAGGED)
    key, value = jax.random.normal(jax.random.key(1), (2, 2, 13, 2, 8))
    drop = {"dropout_rate": 0.25, "dropout_key": jax.random.key(3), "broadcast_dropout": True}
    attend = lambda *arrays: dot_product_attention(*arrays, **drop, **call)
    keep = mask(shape=(1, 1, 11, 13))

    def expected(query, key, value):
        key, value = (jnp.repeat(x, 3, 2) for x in (key, value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8, dtype="float32")
        weights = jnp.where(keep, jax.nn.softmax(logits) / 0.75, 0)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    with_gradient = lambda f: jax.jit(
        lambda *arrays: (f(*arrays), jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))(*arrays))
    )
    whole = with_gradient(attend)(query, key, value)
    assert_trees_close(whole, with_gradient(expected)(query, key, value), "float32")
    each = jax.jit(jax.vmap(attend))(query, key, value)
    assert_trees_close(each, whole[0], "float32")


def test_shared_dropout_without_a_key_or_a_rate_is_none():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    quiet = dot_product_attention(x, x, x)
    for call in ({"dropout_rate": 0.5}, {"dropout_key": jax.random.key(3)}):
        output = dot_product_attention(x, x, x, broadcast_dropout=True, **call)
        np.testing.assert_array_equal(output, quiet)
    with pytest.raises(TypeError, match="`broadcast_dropout` must be True or False"):
        dot_product_attention(x, x, x, broadcast_dropout=None)
