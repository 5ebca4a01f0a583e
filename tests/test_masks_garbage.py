"""NaN, Inf and huge numbers in padded places reach neither an output nor a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, C, D, H, M, N, S, T, V, normal, random_params

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes

CONFIGS = {
    "plain": MultiHeadAttentionConfig(N, H, V),
    "gate": MultiHeadAttentionConfig(N, H, V, use_gate=True),
}
QUERY, VALUE, KEY = normal(1, B, T, D), normal(2, B, S, M), normal(3, B, S, C)
COTANGENT = normal(4, B, T, D)
DARK = jnp.ones((B, T, S), bool).at[0, 2].set(False).at[1, 4].set(False)


def layer(config, query=QUERY, value=VALUE, key=KEY, **call):
    """(output, scores, every gradient) of the layer."""
    params = random_params(param_shapes(config, QUERY.shape, VALUE.shape, KEY.shape))

    def loss(params, query, value, key):
        results = multi_head_attention(
            params, query, value, key, config=config, return_attention_scores=True, **call
        )
        return (results[0] * COTANGENT).sum(), results

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    grads, results = gradient(params, query, value, key)
    return *results, grads


def padding(length):
    """The last two places of every example, and in the second a whole hole, are padding."""
    return jnp.arange(length)[None] < jnp.array([[length - 2], [length - 3]])


REAL_QUERIES, REAL_KEYS = padding(T), padding(S)
SEGMENTS = (jnp.ones((B, T), "int32"), jnp.where(REAL_KEYS, 1, 2))
LONE_SEGMENTS = (jnp.where(REAL_QUERIES, 1, 3), jnp.where(REAL_KEYS, 1, 2))
HIDDEN = {  # the call, and the arrays with garbage
    "value_mask": ({"value_mask": REAL_KEYS}, ("value", "key")),
    "key_mask": ({"key_mask": REAL_KEYS}, ("value", "key")),
    "value_mask-value": ({"value_mask": REAL_KEYS, "use_causal_mask": True}, ("value",)),
    "key_mask-key": ({"key_mask": REAL_KEYS, "attention_mask": DARK}, ("key",)),
    "query_mask": ({"query_mask": REAL_QUERIES}, ("query",)),
    "all-masks": ({"query_mask": REAL_QUERIES, "value_mask": REAL_KEYS, "key_mask": REAL_KEYS},
                  ("query", "value", "key")),
    "segments": ({"segment_ids": SEGMENTS}, ("value", "key")),
    "segments-query": ({"segment_ids": LONE_SEGMENTS}, ("value", "key")),
    "segments-and-query_mask": ({"segment_ids": LONE_SEGMENTS, "query_mask": REAL_QUERIES},
                                ("query", "value", "key")),
}  # fmt: skip


def with_garbage(names, garbage):
    """(query, value, key) whose padded places hold `garbage` in the arrays named."""
    arrays = {"query": QUERY, "value": VALUE, "key": KEY}
    for name in names:
        real = REAL_QUERIES if name == "query" else REAL_KEYS
        arrays[name] = jnp.where(real[:, :, None], arrays[name], garbage)
    return tuple(arrays.values())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("call", "names"), HIDDEN.values(), ids=list(HIDDEN))
def test_garbage_in_padding_reaches_nothing(call, names, config):
    """Not the output, not the scores, no gradient: all equal those of zeros there, bit by bit."""
    clean = jax.tree.leaves(layer(config, *with_garbage(names, 0.0), **call))
    assert all(jnp.isfinite(leaf).all() for leaf in clean)
    for garbage in (np.nan, np.inf, -np.inf, 1e30):
        dirty = jax.tree.leaves(layer(config, *with_garbage(names, garbage), **call))
        for ours, expected in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(ours, expected, err_msg=str(garbage))


@pytest.mark.slow
def test_garbage_that_is_attended_is_seen():
    """The control: the same NaN, one place earlier, does reach the output."""
    output, _, _ = layer(CONFIGS["plain"], value=VALUE.at[0, 0].set(np.nan), value_mask=REAL_KEYS)
    assert jnp.isnan(output[0]).all()
    assert jnp.isfinite(output[1]).all()
