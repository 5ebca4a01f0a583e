"""Keys in two parts, merged, are the keys in one: forward and gradient, in any split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal, x64

from flax_mha import Mask, dot_product_attention
from flax_mha.attention import merge

B, T, S, N, K, H, V = 2, 5, 7, 6, 2, 11, 13
ARRAYS = normal(0, B, T, N, H), normal(1, B, S, K, H), normal(2, B, S, K, V)
# Query 1 may attend to the first keys alone, query 2 to the last alone, query 3 to none.
DENSE = np.ones((T, S), bool)
DENSE[1, 2:] = DENSE[2, :5] = DENSE[3] = False


def whole(query, key, value):
    return dot_product_attention(query, key, value, mask=Mask.dense(DENSE), return_residuals=True)


def merged(query, key, value, *, split, implementation="reference"):
    def part(keys):
        return dot_product_attention(
            query,
            key[:, keys],
            value[:, keys],
            mask=Mask.dense(DENSE[:, keys]),
            return_residuals=True,
            implementation=implementation,
        )

    return merge(part(slice(0, split)), part(slice(split, S)))


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("split", [0, 3, 5, S])
def test_two_parts_are_the_whole(split, implementation):
    context, residuals = merged(*ARRAYS, split=split, implementation=implementation)
    expected, (row_max, row_sum) = whole(*ARRAYS)
    assert_close(context, expected, "float32")
    assert (np.asarray(context)[:, 3] == 0).all()
    assert (jnp.isneginf(residuals.row_max_BNT) == jnp.isneginf(row_max)).all()
    finite = lambda x: jnp.where(jnp.isneginf(x), 0, x)
    assert_close(finite(residuals.row_max_BNT), finite(row_max), "float32")
    assert_close(residuals.row_sum_BNT, row_sum, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_the_gradient_passes_through_both_parts(implementation):
    with x64():
        arrays = tuple(x.astype("float64") for x in ARRAYS)
        probe = normal(3, B, T, N, V, dtype="float64")
        loss = lambda run: lambda arrays: (run(*arrays)[0] * probe).sum()
        ours = lambda *arrays: merged(*arrays, split=3, implementation=implementation)
        gradient = jax.jit(jax.grad(loss(ours)))(arrays)
        assert_trees_close(gradient, jax.jit(jax.grad(loss(whole)))(arrays), "float64")


@pytest.mark.slow
def test_large_logits_and_16_bits_merge_in_float32():
    query, key, value = (x.astype("bfloat16") for x in ARRAYS)
    both = merged(query * 100, key, value, split=4)
    assert both[0].dtype == jnp.bfloat16
    assert both[1].row_sum_BNT.dtype == jnp.float32
    expected = dot_product_attention(query * 100, key, value, mask=Mask.dense(DENSE))
    assert_close(both[0], expected, "bfloat16")
