"""What a cache refuses: each message names the rule, what was received, and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_params

from flax_mha import (
    MultiHeadAttentionConfig,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)

B, T, D, H = 3, 13, 17, 6
X = normal(0, B, T, D)


def filled(capacity=4, **fields):
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, **fields)
    params = random_params(param_shapes(config, X.shape))
    return config, params, init_cache(config, B, capacity)


def attend(config, params, x, cache, **call):
    call = {"use_causal_mask": True, **call}
    return multi_head_attention(params, x, x, config=config, cache=cache, **call)


def test_a_full_cache_is_an_error_outside_jit():
    config, params, cache = filled(capacity=4)
    _, cache = attend(config, params, X[:, :3], cache)
    with pytest.raises(
        ValueError, match=r"full: it holds 4 tokens.*5 tokens.*larger one by `init_"
    ):
        attend(config, params, X[:, 3:5], cache)


@pytest.mark.slow
def test_inside_jit_what_does_not_fit_is_nan_and_overwrites_nothing():
    config, params, cache = filled(capacity=4)
    step = jax.jit(lambda x, cache: attend(config, params, x, cache))
    _, cache = step(X[:, :3], cache)
    output, after = step(X[:, 3:5], cache)
    assert_close(
        output[:, 0],
        multi_head_attention(params, X, X, config=config, use_causal_mask=True)[:, 3],
        "float32",
    )
    assert np.isnan(output[:, 1]).all()
    assert not cache.overflowed.any()
    assert after.overflowed.all()
    np.testing.assert_array_equal(after.key[:, :, :3], cache.key[:, :, :3])


def test_holes_in_the_padding():
    config, params, cache = filled()
    holes = jnp.array([[True, False, True]] + [[True, True, False]] * 2)
    with pytest.raises(ValueError, match=r"right padding.*jnp\.roll"):
        attend(config, params, X[:, :3], cache, value_mask=holes)
    run = jax.jit(lambda holes: attend(config, params, X[:, :3], cache, value_mask=holes)[0])
    output = np.asarray(run(holes))
    assert np.isnan(output[0]).all()
    assert np.isfinite(output[1:, :2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
def test_an_example_that_went_wrong_stays_so_and_alone(window):
    """Left padding under jit: flagged, NaN in all later outputs and scores, until begun anew."""
    config, params, cache = filled(capacity=9, position="rotary", sliding_window=window)
    scored = lambda x, k, m: attend(
        config, params, x, k, value_mask=m, return_attention_scores=True
    )
    read = jax.jit(scored)
    left = jnp.asarray(np.arange(5) >= np.array([[0], [2], [0]]))
    _, scores, cache = read(X[:, :5], cache, left)
    assert cache.spoiled.tolist() == [False, True, False]
    assert np.isnan(scores[1]).all()
    expected = multi_head_attention(params, X, X, config=config, use_causal_mask=True)
    for t in range(5, 9):
        output, scores, cache = read(X[:, t : t + 1], cache, jnp.ones((B, 1), bool))
        assert np.isnan(output[1]).all()
        assert np.isnan(scores[1]).all()
        assert_close(output[::2], expected[::2, t : t + 1], "float32")
    assert cache.spoiled.tolist() == [False, True, False]
    assert cache.length.tolist() == [9, -1, 9]
    with pytest.raises(ValueError, match=r"`spoiled` gives NaN.*\[\[1\]\].*rewind\(0\)"):
        attend(config, params, X[:, :1], cache)
    anew = cache.rewind(0)
    assert not anew.spoiled.any()
    assert_close(attend(config, params, X[:, :5], anew)[0], expected[:, :5], "float32")


def test_one_padding_for_all_examples():
    config, params, cache = filled(capacity=9)
    real = jnp.array([True, True, False])
    output, cache = attend(config, params, X[:, :3], cache, value_mask=real)
    assert cache.length.tolist() == [2] * B
    holes = jnp.array([[False, True, True]])
    run = jax.jit(lambda cache, m: attend(config, params, X[:, :3], cache, value_mask=m))
    output, cache = run(cache, holes)
    assert np.isnan(output).all()
    assert cache.spoiled.all()


# --- rows and lengths ---------------------------------------------------------------------------


def caches():
    config, params, cache = filled(capacity=9, position="rotary")
    _, own = attend(config, params, X[:, :5], cache)
    cross = init_cross_cache(params, X[:, :6], config=config, value_mask=jnp.ones(6, bool))
    call = dict(config=config, cache=cross)
    _, cross = multi_head_attention(params, X[:, :5], None, **call)
    step = lambda value: (
        lambda cache: multi_head_attention(params, X[:, 5:6], value, config=config, cache=cache)[0]
    )
    return {"own": (own, step(X[:, 5:6])), "cross": (cross, step(None))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "cross"])
def test_rows_that_do_not_exist(kind):
    cache, step = caches()[kind]
    for rows in ([0, 7, 1], [0, -1, 1]):
        with pytest.raises(ValueError, match=rf"rows.*in \[0, B\) = \[0, 3\).*\[{rows[1]}\]"):
            cache.reorder(jnp.array(rows))
        after = jax.jit(lambda rows: cache.reorder(rows))(jnp.array(rows))
        assert after.spoiled.tolist() == [False, True, False]
        assert after.length.tolist() == [5, -1, 5]
        output = jax.jit(step)(after)
        assert np.isnan(output[1]).all()
        assert_close(output[0], step(cache)[0], "float32")
    with pytest.raises(ValueError, match="4294967296"):
        cache.reorder(np.array([2**32, 0, 1]))  # 0 once JAX has cut it to 32 bits
    for rows, kind in (([0, 1, 2], "list"), (jnp.zeros(3), "float32"), (jnp.ones(3, bool), "bool")):
        with pytest.raises(TypeError, match=rf"rows.*Received: rows of {kind}.*jnp.array"):
            cache.reorder(rows)
    with pytest.raises(ValueError, match=r"rows.*shape \(\)"):
        cache.reorder(jnp.array(0))
    with pytest.raises(ValueError, match="without batch axes"):
        jax.tree.map(lambda x: x[0], cache).reorder(jnp.array([0]))


@pytest.mark.parametrize("kind", ["own", "cross"])
def test_lengths_that_were_never_reached(kind):
    cache, step = caches()[kind]
    for wrong in (6, -1, np.array([1, 6, 2]), 2**40):
        with pytest.raises(ValueError, match=r"length in \[0, length\].*of length \[5"):
            cache.rewind(wrong)
    with pytest.raises(ValueError, match=r"Received: \[6\] of examples of length \[5\]"):
        cache.rewind(jnp.array([5, 6, 0], "uint8"))
    after = jax.jit(lambda length: cache.rewind(length))(jnp.array([5, 6, -3]))
    assert after.spoiled.tolist() == [False, True, True]
    output = jax.jit(step)(after)
    assert np.isnan(output[1:]).all()
    assert_close(output[0], step(cache)[0], "float32")
    for wrong in (2.0, True, [1, 2, 3], jnp.ones(3)):
        with pytest.raises(TypeError, match="`length` must be an"):
            cache.rewind(wrong)
    with pytest.raises(ValueError, match=r"length.*\(3,\).*shape \(2,\)"):
        cache.rewind(jnp.array([1, 2]))


def test_queries_beyond_what_a_bias_of_distance_knows():
    config, params, _ = filled(position="alibi")
    with pytest.raises(ValueError, match=r"max_queries=None.*Pass `max_queries=`"):
        init_cross_cache(params, X, config=config)
    cache = init_cross_cache(params, X, config=config, max_queries=3)
    read = lambda x, cache: multi_head_attention(params, x, None, config=config, cache=cache)
    with pytest.raises(ValueError, match=r"at most max_queries=3.*T=4"):
        jax.jit(read)(X[:, :4], cache)
    _, cache = read(X[:, :2], cache)
    with pytest.raises(ValueError, match=r"at most max_queries=3.*4 queries with"):
        read(X[:, 2:4], cache)
    output, after = jax.jit(read)(X[:, 2:4], cache)
    assert after.overflowed.all()
    assert np.isnan(output[:, 1]).all()
    expected = multi_head_attention(params, X, X, config=config)
    assert_close(output[:, 0], expected[:, 2], "float32")
    assert not after.rewind(3).overflowed.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(attention_mask=jnp.ones((3, 4), bool)), NotImplementedError, "`attention_mask` cannot"),
        (dict(query_mask=jnp.ones((B, 3), bool)), NotImplementedError, "value_mask="),
        (dict(cache=init_cache(MultiHeadAttentionConfig(4, H), 2, 9)), ValueError, r"\(3, 4, 9, 6\).*\(2, "),
        (dict(cache=init_cache(MultiHeadAttentionConfig(2, H), B, 9)), ValueError, r"cache.key.*\(3, 2, 9"),
        (dict(cache=init_cache(MultiHeadAttentionConfig(4, H), B, 9, "bfloat16")), TypeError, "compute dtype float32.*bfloat16.*dtype='float32'"),
        (dict(cache="cache"), TypeError, "must be a KVCache"),
    ],
    ids=["mask", "query mask", "batch", "heads", "dtype", "type"],
)  # fmt: skip
def test_what_a_cache_cannot_honour(change, error, message):
    config, params, cache = filled()
    call = {"cache": cache, **change}
    with pytest.raises(error, match=message):
        attend(config, params, X[:, :3], **call)


def test_other_refusals():
    config, params, cache = filled(sliding_window=3)
    with pytest.raises(ValueError, match=r"is causal.*is_causal=False, sliding_window=3"):
        init_cache(config, B, 9, is_causal=False)
    with pytest.raises(ValueError, match=r"serve the window.*a ring for 3, sliding_window=4"):
        attend(config.replace(sliding_window=4), params, X[:, :2], cache)
    with pytest.raises(ValueError, match="needs a ring of that size"):
        attend(config, params, X[:, :2], init_cache(config.replace(sliding_window=None), B, 9))
    with pytest.raises(ValueError, match="same new tokens: T == S"):
        multi_head_attention(
            params, X[:, :2], X[:, :3], config=config, cache=cache, use_causal_mask=True
        )
    with pytest.raises(ValueError, match="`capacity` must be a positive integer"):
        init_cache(config, B, 0)
    with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype"):
        init_cache(config, B, 4, "int16")
    with pytest.raises(ValueError, match="read by rotary embedding,"):
        multi_head_attention(params, X, X, config=config, positions=jnp.zeros((B, T), int))
    encoder = init_cross_cache(params, X, config=config)
    with pytest.raises(ValueError, match="pass `value=None`"):
        multi_head_attention(params, X, X, config=config, cache=encoder)
