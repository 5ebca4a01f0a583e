"""attention_scores: the chosen rows of the whole matrix, which never exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, C, D, M, S, T, assert_close, booleans, normal, random_params

from flax_mha import (
    MultiHeadAttentionConfig,
    attention_scores,
    multi_head_attention,
    param_shapes,
)

QUERY, VALUE, KEY = normal(0, B, T, D), normal(1, B, S, M), normal(2, B, S, C)
CONFIG = MultiHeadAttentionConfig(num_heads=4, num_kv_heads=2, key_dim=11)
PARAMS = random_params(param_shapes(CONFIG, QUERY.shape, VALUE.shape, KEY.shape))
ROWS = jnp.array([3, 0, 3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "call"),
    [
        ({}, {}),
        ({}, {"use_causal_mask": True}),
        ({"sliding_window": 2}, {"query_mask": booleans(4, B, T), "value_mask": booleans(5, B, S)}),
        ({}, {"attention_mask": booleans(6, B, 4, T, S), "bias": normal(7, T, S)}),
        ({}, {"attention_mask": booleans(6, B, 1, 1, S), "bias": normal(7, B, 4, 1, S)}),
        ({}, {"segment_ids": (jnp.arange(B * T).reshape(B, T) // 3, jnp.zeros((B, S), "int32"))}),
    ],
    ids=["plain", "causal", "padding and window", "dense", "broadcast", "segments"],
)
def test_rows_of_the_whole(fields, call):
    config = CONFIG.replace(**fields)
    arrays = (PARAMS, QUERY, VALUE, KEY)
    _, whole = multi_head_attention(*arrays, config=config, return_attention_scores=True, **call)
    rows = attention_scores(*arrays, config=config, query_rows=ROWS, **call)
    assert_close(rows, whole[:, :, ROWS], "float32")
    assert rows.shape == (B, 4, 3, S)


@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(sliding_window=2, soft_cap=3.0)])
def test_no_rows(config):
    for rows in (jnp.zeros(0, int), np.zeros(0, "uint8")):
        call = dict(config=config, query_rows=rows, use_causal_mask=True)
        assert attention_scores(PARAMS, QUERY, VALUE, KEY, **call).shape == (B, 4, 0, S)
        run = jax.jit(lambda x, call=call: attention_scores(PARAMS, x, VALUE, KEY, **call))
        assert run(QUERY).shape == (B, 4, 0, S)


def test_rows_of_no_examples_and_over_no_keys():
    for batch, keys in ((0, S), (B, 0)):
        arrays = (jnp.zeros((batch, n, size)) for n, size in ((T, D), (keys, M), (keys, C)))
        rows = attention_scores(PARAMS, *arrays, config=CONFIG, query_rows=ROWS)
        assert rows.shape == (batch, 4, 3, keys)


def test_rows_in_raster_order_of_the_attended_axes():
    config = CONFIG.replace(attention_axes=(1, 2))
    x = normal(8, 2, 3, 4, D)
    params = random_params(param_shapes(config, x.shape))
    call = dict(config=config, use_causal_mask=True)
    _, whole = multi_head_attention(params, x, x, return_attention_scores=True, **call)
    rows = attention_scores(params, x, x, query_rows=ROWS, **call)
    assert_close(rows, whole.reshape(2, 4, 12, 3, 4)[:, :, ROWS], "float32")


def test_the_whole_matrix_never_exists():
    x = jax.ShapeDtypeStruct((1, 4096, D), "float32")
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=11)
    params = param_shapes(config, x.shape)

    def temporaries(function):
        compiled = jax.jit(function).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    some = lambda params, x: attention_scores(params, x, x, config=config, query_rows=ROWS)
    every = lambda params, x: multi_head_attention(
        params, x, x, config=config, return_attention_scores=True
    )
    matrix = 4 * 4096 * 4096 * 4
    assert temporaries(some) < matrix / 20
    assert temporaries(every) > matrix / 20


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (jnp.array([0, T]), ValueError, rf"in \[0, T\) = \[0, {T}\).*\[{T}\]"),
        (jnp.array([-1]), ValueError, r"\[-1\].*Count from the front"),
        (jnp.array([0.0]), TypeError, "must be integers"),
        (jnp.array(0), ValueError, r"integers \[R\].*shape \(\)"),
    ],
)
def test_rows_that_do_not_exist(rows, error, message):
    with pytest.raises(error, match=message):
        attention_scores(PARAMS, QUERY, VALUE, KEY, config=CONFIG, query_rows=rows)


def test_under_jit_a_row_that_does_not_exist_is_nan():
    run = jax.jit(
        lambda rows: attention_scores(PARAMS, QUERY, VALUE, KEY, config=CONFIG, query_rows=rows)
    )
    scores = np.asarray(run(jnp.array([1, T])))
    assert np.isfinite(scores[:, :, 0]).all()
    assert np.isnan(scores[:, :, 1]).all()
