"""Laws of masks: what is masked has no influence at all, and a wrong mask is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import (
    B,
    C,
    D,
    H,
    M,
    N,
    S,
    T,
    V,
    assert_close,
    booleans,
    normal,
    random_params,
)

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes

CONFIG = MultiHeadAttentionConfig(N, H, V, use_gate=True)
PARAMS = random_params(param_shapes(CONFIG, (B, T, D), (B, S, M), (B, S, C)))
QUERY, VALUE, KEY = normal(1, B, T, D), normal(2, B, S, M), normal(3, B, S, C)
COTANGENT = normal(4, B, T, D)
BIAS = PARAMS["attention_output"]["bias"]


def layer(query=QUERY, value=VALUE, key=KEY, params=PARAMS, config=CONFIG, **call):
    return multi_head_attention(params, query, value, key, config=config, **call)


def gradients(query=QUERY, value=VALUE, key=KEY, **call):
    """The gradient with respect to (params, query, value, key)."""

    def loss(params, query, value, key):
        return (layer(query, value, key, params, **call) * COTANGENT).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3))(PARAMS, query, value, key)


def results(query=QUERY, value=VALUE, key=KEY, **call):
    """(output, scores, every gradient)."""
    output, scores = layer(query, value, key, return_attention_scores=True, **call)
    return output, scores, gradients(query, value, key, **call)


def assert_identical(actual, expected):
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- queries that may attend nowhere ------------------------------------------------------------


DARK = jnp.ones((B, T, S), bool).at[0, 2].set(False).at[1, 4].set(False)
EMPTY_ROWS = {
    "attention_mask": ({"attention_mask": DARK}, [(0, 2), (1, 4)]),
    "all-heads": ({"attention_mask": jnp.broadcast_to(DARK[:, None], (B, N, T, S))}, [(0, 2)]),
    "query_mask": ({"query_mask": jnp.ones((B, T), bool).at[1, 3].set(False)}, [(1, 3)]),
    "value_mask": ({"value_mask": jnp.ones((B, S), bool).at[0].set(False)}, [(0, 0), (0, 4)]),
    "causal": ({"value_mask": jnp.arange(S)[None] > 1, "use_causal_mask": True}, [(0, 0), (1, 1)]),
    "segments": ({"segment_ids": (jnp.full((B, T), 9).at[0, 1].set(5), jnp.full((B, S), 9))},
                 [(0, 1)]),
    "between": ({"query_mask": jnp.arange(T)[None] > 0, "attention_mask": DARK}, [(0, 0), (0, 2)]),
}  # fmt: skip
EVERY_EMPTY_ROW = pytest.mark.parametrize(
    ("call", "rows"), EMPTY_ROWS.values(), ids=list(EMPTY_ROWS)
)


@EVERY_EMPTY_ROW
def test_empty_rows_have_zero_context_and_weights(call, rows):
    output, scores = layer(**call, return_attention_scores=True)
    for b, t in rows:
        assert_identical(output[b, t], BIAS)
        assert_identical(scores[b, :, t], jnp.zeros((N, S)))
    assert np.abs(scores).sum() > 0


@pytest.mark.slow
@EVERY_EMPTY_ROW
def test_empty_rows_have_finite_gradients_and_pass_none_to_their_query(call, rows):
    every = gradients(**call)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(every))
    for b, t in rows:
        assert_identical(every[1][b, t], jnp.zeros(D))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_empty_row_of_large_logits_is_still_empty(dtype):
    """Keras 3.5 in float16 let such logits through its additive mask."""
    config = CONFIG.replace(dtype=dtype)
    output, scores = layer(
        query=QUERY * 100, attention_mask=DARK, config=config, return_attention_scores=True
    )
    assert_identical(output[0, 2], BIAS.astype(dtype))
    assert_identical(scores[0, :, 2], jnp.zeros((N, S), dtype))
    assert jnp.isfinite(output).all()


# --- laws ---------------------------------------------------------------------------------------


def test_keys_may_be_permuted():
    order = jnp.asarray(np.random.default_rng(1).permutation(S))
    mask, value_mask, bias = booleans(1, B, N, T, S), booleans(2, B, S), normal(3, B, N, T, S)
    call = {"attention_mask": mask, "value_mask": value_mask, "bias": bias}
    turned = {"attention_mask": mask[..., order], "value_mask": value_mask[:, order],
              "bias": bias[..., order]}  # fmt: skip
    output, scores = layer(**call, return_attention_scores=True)
    output_2, scores_2 = layer(
        value=VALUE[:, order], key=KEY[:, order], **turned, return_attention_scores=True
    )
    assert_close(output_2, output, "float32")
    assert_close(scores_2, scores[..., order], "float32")


@pytest.mark.parametrize("window", [None, 2])
def test_causal_outputs_do_not_depend_on_the_future(window):
    config = CONFIG.replace(sliding_window=window)
    changed = (x.at[:, 3:].set(-5.0) for x in (QUERY, VALUE, KEY))
    prefix = layer(config=config, use_causal_mask=True)[:, :3]
    assert_identical(layer(*changed, config=config, use_causal_mask=True)[:, :3], prefix)
    short = layer(QUERY[:, :3], VALUE[:, :3], KEY[:, :3], config=config, use_causal_mask=True)
    assert_close(short, prefix, "float32")
    assert np.abs(layer(QUERY, VALUE, KEY, config=config)[:, :3] - prefix).max() > 0.01


@pytest.mark.slow
def test_causal_gradient_of_the_future_is_exactly_zero():
    jacobian = jax.jacobian(
        lambda value, key: layer(value=value, key=key, use_causal_mask=True)[0]
    )(VALUE, KEY)  # [T, D, B, S, M]
    for t in range(T):
        assert_identical(jacobian[t, :, 0, t + 1 :], jnp.zeros((D, S - t - 1, M)))
        assert (np.abs(jacobian[t, :, 0, : t + 1]).max((0, 2)) > 0).all()
    assert_identical(jacobian[:, :, 1], jnp.zeros((T, D, S, M)))


@pytest.mark.slow
def test_masked_gradients_are_exactly_zero():
    """A key that no query may attend, a query that may attend no key: no gradient reaches them."""
    mask = booleans(1, B, N, T, S).at[:, :, :, 4].set(False).at[:, :, 2].set(False)
    _, query, value, key = gradients(attention_mask=mask)
    assert_identical(value[:, 4], jnp.zeros((B, M)))
    assert_identical(key[:, 4], jnp.zeros((B, C)))
    assert_identical(query[:, 2], jnp.zeros((B, D)))
    for gradient, count in ((query, T), (value, S), (key, S)):
        assert (np.abs(gradient).max((0, 2)) > 0).sum() == count - 1


def test_masks_are_one_whichever_way_they_are_given():
    """Padding, causal order and window as arguments, or merged into one dense mask."""
    config = CONFIG.replace(sliding_window=3)
    dense = booleans(1, B, N, T, S)
    query_mask, value_mask, key_mask = booleans(2, B, T), booleans(3, B, S), booleans(4, B, S)
    given = layer(
        config=config,
        attention_mask=dense,
        query_mask=query_mask,
        value_mask=value_mask,
        key_mask=key_mask,
        use_causal_mask=True,
    )
    rows, columns = np.indices((T, S))
    band = (columns <= rows) & (np.abs(rows - columns) < 3)
    keys = np.asarray(value_mask & key_mask)[:, None, None]
    merged = np.asarray(dense) & np.asarray(query_mask)[:, None, :, None] & keys & band
    assert_close(layer(attention_mask=jnp.asarray(merged)), given, "float32")


# --- masks that fit by accident -----------------------------------------------------------------


@pytest.mark.parametrize("heads", [N, B], ids=["B!=N", "B==N"])
def test_padding_beside_a_mask_of_rank_four(heads):
    """Keras aligns B of the padding with N of the mask, and errs in silence where B == N."""
    config = CONFIG.replace(num_heads=heads)
    params = random_params(param_shapes(config, QUERY.shape, VALUE.shape, KEY.shape))
    call = {
        "attention_mask": booleans(1, B, heads, T, S),
        "value_mask": booleans(2, B, S),
        "query_mask": booleans(3, B, T),
    }
    output = layer(params=params, config=config, **call)
    expected, _ = oracles.layer(params, QUERY, VALUE, KEY, **call)
    assert_close(output, expected, "float32")


def test_rank_three_mask_where_B_equals_N():
    """(B, T, S) is a mask of examples, whatever the number of heads."""
    config = CONFIG.replace(num_heads=B)
    params = random_params(param_shapes(config, QUERY.shape, VALUE.shape, KEY.shape))
    mask = booleans(1, B, T, S)
    wide = jnp.broadcast_to(mask[:, None], (B, B, T, S))
    output = layer(params=params, config=config, attention_mask=mask)
    assert_identical(layer(params=params, config=config, attention_mask=wide), output)
    by_head = jnp.broadcast_to(mask[None], (B, B, T, S))
    assert np.abs(layer(params=params, config=config, attention_mask=by_head) - output).max() > 0.1


SQUARE_CALLS = [  # batch, T, S
    pytest.param(T, T, T, id="B==T==S"),
    pytest.param(T, T, S, id="B==T"),
]


@pytest.mark.parametrize(("batch", "length", "source"), SQUARE_CALLS)
def test_a_rank_two_mask_is_refused_where_B_equals_T(batch, length, source):
    query, value = normal(1, batch, length, D), normal(2, batch, source, M)
    key = normal(3, batch, source, C)
    mask = booleans(4, length, source)
    with pytest.raises(ValueError, match=r"`attention_mask`.*ambiguous.*value_mask"):
        layer(query, value, key, attention_mask=mask)
    clear = layer(query, value, key, attention_mask=mask[None])
    expected, _ = oracles.layer(PARAMS, query, value, key, attention_mask=mask[None])
    assert_close(clear, expected, "float32")


REFUSED = {
    "float": ({"attention_mask": jnp.ones((B, T, S))}, TypeError, "attention_mask.*`bias="),
    "additive": ({"attention_mask": jnp.full((B, T, S), -1e9)}, TypeError, "`bias="),
    "float-padding": ({"value_mask": jnp.ones((B, S))}, TypeError, "value_mask.*`bias="),
    "integers": ({"attention_mask": jnp.full((B, T, S), 2)}, ValueError, "0/1"),
    "padding": ({"attention_mask": jnp.ones((B, S), bool)}, ValueError, "`value_mask="),
    "swapped": ({"attention_mask": jnp.ones((B, S, T), bool)}, ValueError, "swap T and S"),
    "swapped-rank-2": ({"attention_mask": jnp.ones((S, T), bool)}, ValueError, "swap T and S"),
    "swapped-rank-4": ({"attention_mask": jnp.ones((B, N, S, T), bool)}, ValueError, "swap T and"),
    "heads-first": (
        {"attention_mask": jnp.ones((N, B, T, S), bool)},
        ValueError,
        r"\[B, N, T, S\]",
    ),
    "rank-1": ({"attention_mask": jnp.ones((S,), bool)}, ValueError, r"\(7,\)"),
    "rank-5": ({"attention_mask": jnp.ones((1, B, N, T, S), bool)}, ValueError, r"\(1, 2, 3, 5, 7"),
    "query_mask": ({"query_mask": jnp.ones((B, S), bool)}, ValueError, r"query_mask.*T.*\(2, 7\)"),
    "value_mask": ({"value_mask": jnp.ones((B, T), bool)}, ValueError, r"value_mask.*S.*\(2, 5\)"),
    "key_mask": ({"key_mask": jnp.ones((S, B), bool)}, ValueError, r"key_mask.*S.*\(7, 2\)"),
    "segments": ({"segment_ids": jnp.ones((B, T), int)}, ValueError, "segment_ids.*pair"),
    "bias": ({"bias": jnp.ones((B, S, T))}, ValueError, "bias.*swap T and S"),
    "boolean-bias": ({"bias": jnp.ones((B, T, S), bool)}, TypeError, "`bias`.*float"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_wrong_masks_are_refused(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        layer(**call)
