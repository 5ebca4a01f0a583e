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
    with pytest.raises(ValueError, match="right padding"):
        attend(config, params, X[:, :3], cache, value_mask=holes)
    run = jax.jit(lambda holes: attend(config, params, X[:, :3], cache, value_mask=holes)[0])
    output = np.asarray(run(holes))
    assert np.isnan(output[0]).all()
    assert np.isfinite(output[1:, :2]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(attention_mask=jnp.ones((3, 4), bool)), NotImplementedError, "`attention_mask` cannot"),
        (dict(query_mask=jnp.ones((B, 3), bool)), NotImplementedError, "value_mask="),
        (dict(cache=init_cache(MultiHeadAttentionConfig(4, H), 2, 9)), ValueError, r"\(3, 4, 9, 6\).*\(2, "),
        (dict(cache=init_cache(MultiHeadAttentionConfig(2, H), B, 9)), ValueError, r"cache.key.*\(3, 2, 9"),
        (dict(cache=init_cache(MultiHeadAttentionConfig(4, H), B, 9, "bfloat16")), TypeError, "compute dtype float32.*bfloat16"),
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
    with pytest.raises(ValueError, match="needs `use_causal_mask=True`"):
        attend(config, params, X[:, :2], cache, use_causal_mask=False)
    with pytest.raises(ValueError, match="needs a ring of that size"):
        attend(config, params, X[:, :2], init_cache(config.replace(sliding_window=None), B, 9))
    with pytest.raises(ValueError, match="same new tokens: T == S"):
        multi_head_attention(
            params, X[:, :2], X[:, :3], config=config, cache=cache, use_causal_mask=True
        )
    with pytest.raises(ValueError, match="`capacity` must be a positive integer"):
        init_cache(config, B, 0)
    with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype"):
        init_cache(config, B, 4, "int8")
    with pytest.raises(ValueError, match="read by rotary embedding alone"):
        multi_head_attention(params, X, X, config=config, positions=jnp.zeros((B, T), int))
    encoder = init_cross_cache(params, X, config=config)
    with pytest.raises(ValueError, match="pass `value=None`"):
        multi_head_attention(params, X, X, config=config, cache=encoder)
