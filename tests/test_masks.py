"""Mask objects, as pictures: rows are queries, columns keys, 1 = may attend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, H, N, S, T, assert_close, booleans, normal

from flax_mha import Mask, dot_product_attention


def picture(mask, T, S, b=0, n=0):
    """The mask of one example and head as lines of 0 and 1."""
    array = np.asarray(mask.as_array(T, S))
    assert array.dtype == bool
    assert array.ndim == 4
    return [" ".join(str(int(x)) for x in row) for row in array[b, n]]


def drawn(text):
    return [line.strip() for line in text.strip().splitlines()]


def full(mask):
    return np.broadcast_to(np.asarray(mask.as_array(T, S)), (B, N, T, S))


def test_causal():
    assert picture(Mask.causal(), 3, 4) == drawn("""
        1 0 0 0
        1 1 0 0
        1 1 1 0
    """)
    assert picture(Mask.causal(), 4, 2) == drawn("""
        1 0
        1 1
        1 1
        1 1
    """)


def test_window_counts_the_keys_beside_the_query():
    assert picture(Mask.window(2, 1), 5, 5) == drawn("""
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        0 1 1 1 1
        0 0 1 1 1
    """)
    assert picture(Mask.window(0, 0), 2, 3) == drawn("""
        1 0 0
        0 1 0
    """)
    assert picture(Mask.window(None, 0), 3, 4) == picture(Mask.causal(), 3, 4)


def test_padding():
    query, key = jnp.array([[1, 1, 0], [0, 1, 1]], bool), jnp.array([[1, 0], [0, 1]], bool)
    mask = Mask.padding(query=query, key=key)
    assert picture(mask, 3, 2, b=0) == drawn("""
        1 0
        1 0
        0 0
    """)
    assert picture(mask, 3, 2, b=1) == drawn("""
        0 0
        0 1
        0 1
    """)
    assert picture(Mask.padding(key=key), 3, 2, b=1) == drawn("""
        0 1
        0 1
        0 1
    """)
    assert picture(Mask.padding(query=query), 3, 2) == drawn("""
        1 1
        1 1
        0 0
    """)


def test_segments():
    mask = Mask.segments(jnp.array([[0, 0, 1], [1, 2, 2]]), jnp.array([[0, 1, 1, 2], [2, 2, 1, 0]]))
    assert picture(mask, 3, 4, b=0) == drawn("""
        1 0 0 0
        1 0 0 0
        0 1 1 0
    """)
    assert picture(mask, 3, 4, b=1) == drawn("""
        0 0 1 0
        1 1 0 0
        1 1 0 0
    """)


@pytest.mark.parametrize(
    "shape", [(T, S), (N, T, S), (B, N, T, S), (B, 1, T, S), (B, 1, 1, S), (1, 1, T, 1)], ids=str
)
def test_dense_aligns_from_the_right(shape):
    array = booleans(1, *shape)
    expected = np.broadcast_to(np.asarray(array), (B, N, T, S))
    np.testing.assert_array_equal(full(Mask.dense(array)), expected)


def test_and_is_the_intersection():
    mask = Mask.causal() & Mask.window(1, 1) & Mask.padding(key=jnp.array([[1, 0, 1, 1]], bool))
    assert picture(mask, 4, 4) == drawn("""
        1 0 0 0
        1 0 0 0
        0 0 1 0
        0 0 1 1
    """)


PARTS = {
    "causal": Mask.causal(),
    "window": Mask.window(3, 2),
    "query": Mask.padding(query=booleans(1, B, T)),
    "key": Mask.padding(key=booleans(2, B, S)),
    "key-1": Mask.padding(key=booleans(3, 1, S)),
    "segments": Mask.segments(jnp.arange(B * T).reshape(B, T) % 2, jnp.arange(S)[None] % 2),
    "dense": Mask.dense(booleans(4, B, N, T, S)),
    "dense-TS": Mask.dense(booleans(5, T, S)),
}


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
def test_and_of_every_two_kinds(first, second):
    both = full(PARTS[first] & PARTS[second])
    np.testing.assert_array_equal(both, full(PARTS[first]) & full(PARTS[second]))
    np.testing.assert_array_equal(both, full(PARTS[second] & PARTS[first]))


@pytest.mark.parametrize("name", PARTS)
def test_a_mask_object_is_its_array(name):
    query, key, value = normal(1, B, T, N, H), normal(2, B, S, N, H), normal(3, B, S, N, H)
    structured = dot_product_attention(query, key, value, mask=PARTS[name])
    dense = dot_product_attention(query, key, value, mask=jnp.asarray(full(PARTS[name])))
    assert_close(structured, dense, "float32")
    plain = dot_product_attention(query, key, value)
    assert np.abs(structured - plain).max() > 0.01


def test_masks_are_data_under_jit():
    traces = []

    @jax.jit
    def count(mask):
        traces.append(mask)
        return mask.as_array(T, S).sum()

    def mask(seed):
        return Mask.causal() & Mask.padding(key=booleans(seed, B, S))

    totals = [int(count(mask(seed))) for seed in range(4)]
    assert len(traces) == 1
    assert totals == [int(mask(seed).as_array(T, S).sum()) for seed in range(4)]
    count(mask(0) & Mask.window(1, 0))
    assert len(traces) == 2


def test_masks_are_pytrees():
    mask = Mask.causal() & Mask.segments(jnp.zeros((B, T), int), jnp.zeros((B, S), int))
    leaves, form = jax.tree.flatten(mask)
    assert len(leaves) == 2
    again = jax.tree.unflatten(form, leaves)
    np.testing.assert_array_equal(full(again), full(mask))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda: Mask.dense(normal(1, T, S)), TypeError, "`bias=`", id="float"),
        pytest.param(lambda: Mask.padding(key=normal(1, B, S)), TypeError, "bool", id="padding"),
        pytest.param(lambda: Mask.window(-1, 0), ValueError, "left", id="negative"),
        pytest.param(lambda: Mask.segments(normal(1, B, T), normal(1, B, S)), TypeError, "integer",
                     id="segments"),
        pytest.param(lambda: Mask.dense(jnp.ones((1,) * 5, bool)), ValueError, r"\[B, N, T, S\]",
                     id="rank"),
        pytest.param(lambda: Mask.causal() & jnp.ones((T, S), bool), TypeError, "unsupported",
                     id="array"),
    ],
)  # fmt: skip
def test_wrong_masks_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
