"""The band of a mask function that closes over no arrays: never too narrow, known when traced."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import Mask, block_mask, dot_product_attention
from flax_mha.attention.blockwise.tile_sizes import tiling_of
from flax_mha.attention.canonical import canonical
from flax_mha.attention.static_band import FINEST, static_band
from flax_mha.core.pairs.function import mask_function
from flax_mha.core.platform import Place

B, N, T, S = 2, 3, 100, 130
IDS = jnp.zeros((B, S), "int32")
FUNCTIONS = {
    "window": lambda b, n, t, s: (s <= t) & (t - s < 20),
    "both sides": lambda b, n, t, s: abs(t - s) <= 7,
    "far": lambda b, n, t, s: (t - s > 30) & (t - s < 50),
    "after": lambda b, n, t, s: (s > t + 10) & (s < t + 21),
    "by head": lambda b, n, t, s: abs(t - s) <= 8 * n + 3,
    "by example": lambda b, n, t, s: s <= t + 10 * b,
    "rows and columns": lambda b, n, t, s: (
        (abs(t // 10 - s // 10) <= 1) & (abs(t % 10 - s % 10) <= 1)
    ),
    "causal": lambda b, n, t, s: s <= t,
    "prefix": lambda b, n, t, s: s < 9,
    "everything": lambda b, n, t, s: True,
    "nothing": lambda b, n, t, s: s < 0,
    "periodic": lambda b, n, t, s: (t - s) % 7 == 0,
}


def pairs(function):
    """(t - s) of every pair that may attend."""
    b, n, t, s = (jnp.asarray(x, "int32") for x in np.indices((B, N, T, S)))
    for _ in range(4):
        function = jax.vmap(function)
    return np.asarray(t - s)[np.asarray(function(b, n, t, s))]


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_pair_lies_beyond(name):
    """And it is two blocks wider than it must be at most, where the distance is what counts."""
    left, right = static_band(mask_function(FUNCTIONS[name]), B, N, T, S)
    apart = pairs(FUNCTIONS[name])
    assert left is None or apart.max(initial=-S) <= left
    assert right is None or (-apart).max(initial=-T) <= right
    if name in ("window", "both sides", "by head"):
        assert left <= apart.max() + 2 * FINEST
        assert right <= (-apart).max() + 2 * FINEST
    if name in ("everything", "periodic"):
        assert (left, right) == (None, None)


def test_what_is_known_only_when_it_runs_has_none():
    """Arrays are data, though these here could be read: else the program would depend on them."""
    function = mask_function(lambda b, n, t, s: (IDS[b, t] == IDS[b, s]) & (abs(t - s) < 5))
    assert static_band(function, B, N, T, S) == (None, None)
    looked_up = mask_function(lambda b, n, t, s: jnp.exp(1.0 * abs(t - s).astype("float32")) < 5)
    assert static_band(looked_up, B, N, T, S) == (None, None)


def test_under_a_trace_it_is_the_same():
    """What is traced then is not: the band is found beside it."""
    function = mask_function(lambda b, n, t, s: abs(t - s) <= 13)
    found = []
    jax.jit(lambda x: found.append(static_band(function, B, N, T, S)) or x)(1.0)
    assert found == [static_band(function, B, N, T, S)]
    assert found[0][0] >= 13


def test_blocks_are_as_large_as_suits_the_band():
    """As for the built-in window; without one they would be four times as large, and half empty."""
    length, width = 4096, 256
    x = jax.ShapeDtypeStruct((1, length, 2, 64), "float32")
    empty = dict.fromkeys(inspect.signature(canonical).parameters)
    flags = ("is_causal", "broadcast_dropout", "return_weights", "return_residuals")
    given = empty | dict.fromkeys(flags, False) | {"dropout_rate": 0.0}

    def tiling(mask):
        found = []

        def trace(query):
            arrays = dict.fromkeys(("query", "key", "value"), query)
            inputs, _ = canonical(**given | arrays | {"mask": mask, "scales": None})
            found.append(tiling_of(inputs, None, Place("cpu", 1)))

        jax.eval_shape(trace, x)
        return found[0]

    own = Mask.function(lambda b, n, t, s: (s <= t) & (t - s < width))
    assert tiling(own) == tiling(Mask.window(width - 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "far", "after", "rows and columns", "nothing"])
def test_the_numbers_are_those_of_the_reference(name):
    x = jax.random.normal(jax.random.key(0), (B, T, N, 8))
    mask = Mask.function(FUNCTIONS[name])
    run = lambda **call: dot_product_attention(x, x, x, mask=mask, **call)
    wanted = run(implementation="reference")
    result = run(implementation="blockwise", block_sizes=(16, 24))
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_with_a_band_from_elsewhere_it_is_left_alone():
    """The plain part counts from its own offset; a band of the function's would be shifted too."""
    x = jax.random.normal(jax.random.key(0), (1, 40, 1, 8))
    mask = Mask.causal(jnp.array([25])) & Mask.function(lambda b, n, t, s: abs(t - s) <= 2)
    run = lambda implementation: dot_product_attention(
        x, x, x, mask=mask, implementation=implementation
    )
    np.testing.assert_allclose(run("blockwise"), run("reference"), rtol=1e-5, atol=1e-5)
    assert block_mask(lambda b, n, t, s: abs(t - s) <= 2, 40, 40, block_size=8).visited < 0.6
