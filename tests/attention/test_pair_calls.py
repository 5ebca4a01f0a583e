"""Functions of pairs beside the other arguments of a call, and the algebra of masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, x64
from pair_examples import CASES, JOINED, MASKS, PLAIN, SCORES, assert_all_close, closed, run
from pair_oracles import (
    allowed_by_loops,
    attend,
    attention_by_loops,
    attention_by_vmap,
    expected,
    namespace,
    split,
    wide,
)  # fmt: skip

from flax_mha import Mask, dot_product_attention
from flax_mha.attention.dropout import keep_mask, words_of

X = {name: jnp.asarray(x) for name, x in MASKS["causal"].all_arrays().items()}
QKV = [X["query"], X["key"], X["value"]]
Z = MASKS["causal"].sizes()
DISTANCE = np.arange(Z.S) - np.arange(Z.T)[:, None]


@pytest.mark.slow
@PLAIN
def test_the_flags_of_the_call_join_the_function(implementation, blocks):
    mask = Mask.function(lambda b, n, t, s: (t + s) % 2 == 0)
    options = {"implementation": implementation, "block_sizes": blocks}
    call = {"is_causal": True, "local_window_size": 6}
    dense = ((np.arange(Z.T)[:, None] + np.arange(Z.S)) % 2 == 0) & (DISTANCE <= 0)
    result = dot_product_attention(*QKV, mask=mask, **call, **options)
    wanted = dot_product_attention(*QKV, mask=dense & (DISTANCE >= -6), implementation="reference")
    assert_close(result, wanted, "float32")


@pytest.mark.slow
@PLAIN
def test_the_score_comes_after_cap_and_biases_and_before_the_mask(implementation, blocks):
    """logits = score(cap(scale q.k) + bias), and a mask has the last word over a score."""
    bias, sinks = (np.asarray(x) for x in (normal(5, Z.N, Z.T, Z.S), normal(6, Z.N)))
    score = lambda x, b, n, t, s: jnp.where(s > t, 7.0, 0.5 * x + 0.1 * x**2)
    call = {"bias": bias, "soft_cap": 0.8, "scale": 0.6, "sinks": sinks, "is_causal": True}
    result = dot_product_attention(
        *QKV, score=score, implementation=implementation, block_sizes=blocks, **call
    )
    query, key, value = (np.asarray(x, np.float64) for x in QKV)
    key, value = key.repeat(2, axis=2), value.repeat(2, axis=2)
    x = 0.8 * np.tanh(0.6 * np.einsum("btnh,bsnh->bnts", query, key) / 0.8) + bias
    x = np.where(DISTANCE <= 0, 0.5 * x + 0.1 * x**2, -np.inf)
    powers = np.exp(x)
    weights = powers / (powers.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None])
    assert_close(result, np.einsum("bnts,bsnv->btnv", weights, value), "float32")


@PLAIN
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_score_of_another_float(dtype, implementation, blocks):
    """It is made a logit again: of a cast by hand, or of a table in float64."""
    options = {"implementation": implementation, "block_sizes": blocks}

    def gradients(*casts):
        def score(x, b, n, t, s):
            return functools.reduce(lambda x, dtype: x.astype(dtype), casts, 2 * x)

        def loss(*heads):
            return (dot_product_attention(*heads, score=score, **options) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*QKV)

    with x64():
        for ours, wanted in zip(gradients(dtype), gradients(dtype, "float32"), strict=True):
            np.testing.assert_array_equal(ours, wanted)


@pytest.mark.slow
@PLAIN
@pytest.mark.parametrize("name", ["ALiBi", "relative table", "forbids"])
def test_a_score_and_a_function_as_mask(name, implementation, blocks):
    example = SCORES[name]
    function = example.function(namespace(Z, closed(f"score, {name}")))
    ids = closed("mask, document")
    mask = Mask.function(MASKS["document"].function(namespace(Z, ids))) & Mask.causal()
    result = dot_product_attention(
        *QKV, mask=mask, score=function, implementation=implementation, block_sizes=blocks
    )
    allowed = allowed_by_loops(MASKS["document"], Z, split(MASKS["document"].all_arrays())[1])
    arrays = {name: jnp.asarray(x) for name, x in example.all_arrays().items()}
    arrays |= X
    wanted, _ = attention_by_vmap(example, Z, arrays, allowed & (DISTANCE <= 0))
    assert_close(result, wanted, "float32")


@PLAIN
def test_removed_keys_hold_anything(implementation, blocks):
    """Padding beside a function still quarantines; within `|` it forbids, and that is all."""
    real = jnp.asarray(np.arange(Z.S) < np.array([[Z.S], [11]]))
    mask = Mask.function(lambda b, n, t, s: (t + s) % 3 != 1) & Mask.padding(key=real)
    score = lambda x, b, n, t, s: x + 0.1 * (s - t).astype(x.dtype)

    def loss(query, key, value):
        call = {"mask": mask, "score": score, "implementation": implementation}
        context = dot_product_attention(query, key, value, block_sizes=blocks, **call)
        return (context**2).sum()

    filled = lambda fill: [QKV[0], *(jnp.where(real[..., None, None], x, fill) for x in QKV[1:])]
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    for one, other in zip(gradient(*filled(jnp.nan)), gradient(*filled(0.0))):
        assert_close(one, other, "float32")


@PLAIN
def test_what_a_forbidden_pair_scores_goes_nowhere(implementation, blocks):
    """A query and its own place, of distance 0: the score divides by it, and the mask forbids."""
    mask = Mask.function(lambda b, n, t, s: s != t)
    score = lambda x, b, n, t, s: x / (s - t).astype(x.dtype)
    call = {"implementation": implementation, "block_sizes": blocks}
    result = dot_product_attention(*QKV, mask=mask, score=score, **call)
    guarded = lambda x, b, n, t, s: x / jnp.where(s == t, 1, s - t).astype(x.dtype)
    assert_close(result, dot_product_attention(*QKV, mask=mask, score=guarded, **call), "float32")


@pytest.mark.slow
def test_the_same_weights_are_dropped():
    """One dropout key, whatever computes it, and the dense form with the bits of that key."""
    example = SCORES["ALiBi"]
    arrays = {name: jnp.asarray(x) for name, x in example.all_arrays().items()}
    key, rate = jax.random.key(7), 0.3
    drop = {"dropout_rate": rate, "dropout_key": key}
    keep = np.asarray(keep_mask(words_of(key), rate, (Z.B, Z.N, Z.T, Z.S)))
    _, weights = attention_by_loops(example, Z, arrays)
    value = np.asarray(arrays["value"], np.float64).repeat(2, axis=2)
    wanted = np.einsum("bnts,bsnv->btnv", weights * keep / (1 - rate), value)
    rows = [("reference", None), ("blockwise", (8, 4)), ("blockwise", (32, 16))]
    results = [run(example, name, blocks, **drop) for name, blocks in rows]
    for result in results:
        assert_close(result["context"], wanted, "float32")
        assert_all_close(result, results[0], "float32", "dropout")
    assert abs(wanted - expected(example)["context"]).max() > 0.1


@pytest.mark.parametrize("name", ["mask, flamingo", "joined, far and causal", "score, forbids"])
def test_the_reference_gives_the_weights(name):
    example = CASES[name]
    arrays = {name: jnp.asarray(x) for name, x in example.all_arrays().items()}
    sizes = example.sizes()
    _, weights = attend(example, sizes, arrays, implementation="reference", return_weights=True)
    assert_close(weights, attention_by_loops(example, sizes, arrays)[1], "float32", name)


@pytest.mark.parametrize("name", ["mask, widths of heads", "joined, nested", "mask, random blocks"])
def test_a_mask_shown_is_the_one_that_acts(name):
    example = CASES[name]
    sizes = example.sizes()
    arrays = {name: jnp.asarray(x) for name, x in example.all_arrays().items()}
    mask = example.call(sizes, split(arrays)[1])["mask"]
    shown = np.broadcast_to(
        mask.as_array(sizes.T, sizes.S, sizes.B, sizes.N), (sizes.B, sizes.N, sizes.T, sizes.S)
    )
    np.testing.assert_array_equal(shown, allowed_by_loops(example, sizes, split(wide(arrays))[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOINED)
def test_laws_of_the_algebra(name):
    """Beside causality: De Morgan, absorption; nothing is in a mask and in its complement."""
    example = JOINED[name]
    arrays = {x: jnp.asarray(array) for x, array in split(example.all_arrays())[1].items()}
    mask, causal = example.call(Z, arrays)["mask"], Mask.causal()
    shown = lambda mask: np.broadcast_to(mask.as_array(Z.T, Z.S, Z.B, Z.N), (Z.B, Z.N, Z.T, Z.S))
    np.testing.assert_array_equal(shown(~(mask | causal)), shown(~mask & ~causal), name)
    np.testing.assert_array_equal(shown(~(mask & causal)), shown(~mask | ~causal), name)
    np.testing.assert_array_equal(shown(mask & (mask | causal)), shown(mask), name)
    np.testing.assert_array_equal(shown(~~mask), shown(mask), name)
    assert not shown(mask & ~mask).any()
    assert shown(mask | ~mask).all()


STEEP = {
    "log": lambda x, gain: jnp.log(x) * gain,
    "root": lambda x, gain: jnp.sqrt(jnp.abs(x)) * gain,
    "inverse": lambda x, gain: gain / x,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "blocks"),
    [
        ("reference", None),
        ("blockwise", (8, 4)),
        pytest.param("pallas_interpreted", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", STEEP)
def test_a_slope_without_end_where_nothing_attends(name, implementation, blocks):
    """Of removed queries, and of what fills up tiles, the logits are 0: 0 times inf is NaN."""
    lengths = {"query": jnp.arange(Z.T) < Z.T - 4, "key": jnp.arange(Z.S) < Z.S - 3}
    near, sides = Mask.function(lambda b, n, t, s: s <= t + 3), ("query", "key", "key")
    heads, gains = [abs(x) for x in QKV], jnp.arange(1.0, Z.N + 1)
    real = [x[:, lengths[side]] for x, side in zip(heads, sides)]

    def gradients(heads, mask, **call):
        def loss(heads, gains):
            score = lambda x, b, n, t, s: STEEP[name](x, gains[n])
            return (dot_product_attention(*heads, mask=mask, score=score, **call) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(heads, gains)

    wanted, d_wanted = gradients(real, near, implementation="reference")
    call = {"implementation": implementation, "block_sizes": blocks}
    ours, d_gains = gradients(heads, near & Mask.padding(**lengths), **call)
    for side, x, y in zip(sides, ours, wanted):
        assert_close(x[:, lengths[side]], y, "float32", side)
        assert not x[:, ~lengths[side]].any(), f"a removed {side} has a gradient"
    assert_close(d_gains, d_wanted, "float32", "gains")
