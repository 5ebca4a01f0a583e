"""What a cache does between calls: it goes back, and what it cannot do is seen; its dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_close, normal, random_params, x64

from flax_mha import (
    MultiHeadAttentionConfig,
    init_cache,
    init_params,
    multi_head_attention,
    param_shapes,
)

B, T, D, H = 2, 24, 17, 6
X = normal(0, B, T, D)
DRAFTS = normal(1, B, T, D)


def layer(window, **fields):
    fields = {"position": "rotary", **fields}
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, sliding_window=window, **fields)
    params = random_params(param_shapes(config, X.shape))
    expected = multi_head_attention(params, X, X, config=config, use_causal_mask=True)

    @jax.jit
    def read(x, cache):
        return multi_head_attention(params, x, x, config=config, cache=cache)

    return config, read, expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "slack", "position"),
    [(None, 0, "rotary"), (5, 0, "alibi"), (5, 3, "rotary"), (5, 3, "alibi"), (1, 2, "rotary")],
)
def test_drafts_are_dropped(window, slack, position):
    """Speculative decoding: drafts are read, some are kept, the true tokens go on, many times."""
    config, read, expected = layer(window, position=position)
    cache = init_cache(config, B, T, slack=slack)
    outputs, cache = read(X[:, :3], cache)
    assert_close(outputs, expected[:, :3], "float32", "prompt")
    drafts = slack + 1
    for n in range(3, T - drafts, 2):
        _, drafted = read(DRAFTS[:, n : n + drafts], cache)
        cache = drafted.rewind(n)  # outside jit: refused if it were not held
        assert cache.length.tolist() == [n] * B
        first, cache = read(X[:, n : n + 1], cache)
        second, cache = read(X[:, n + 1 : n + 2], cache)
        both = jnp.concatenate([first, second], 1)
        assert_close(both, expected[:, n : n + 2], "float32", f"after {n}")


@pytest.mark.slow
def test_each_example_keeps_as_many_drafts_as_are_right():
    """A line, a ring with room, under one jit; then a chunk, and a step."""
    for window, slack in ((None, 0), (4, 3)):
        config, read, expected = layer(window)
        _, cache = read(X[:, :12], init_cache(config, B, T, slack=slack))
        x = X[:, 12:16].at[1, 2:].set(DRAFTS[1, :2])  # of example 1 two drafts are wrong
        _, cache = read(x, cache)
        cache = jax.jit(lambda cache, n: cache.rewind(n))(cache, jnp.array([16, 14]))
        rest = jnp.stack([X[b, n : n + 4] for b, n in enumerate((16, 14))])
        chunk, cache = read(rest[:, :3], cache)
        step, cache = read(rest[:, 3:], cache)
        for b, n in enumerate((16, 14)):
            both = jnp.concatenate([chunk, step], 1)[b]
            assert_close(both, expected[b, n : n + 4], "float32", f"window {window}, {b}")


@pytest.mark.slow
@pytest.mark.parametrize("slack", [0, 2])
def test_a_ring_that_went_round_goes_back_no_farther_than_it_holds(slack):
    config, read, expected = layer(4)
    _, cache = read(X[:, :20], init_cache(config, B, T, slack=slack))
    assert cache.capacity == 4 + slack
    assert cache.start.tolist() == [16 - slack] * B
    nearest = 20 - slack - 1
    back = cache.rewind(nearest)
    assert_close(read(X[:, nearest:], back)[0], expected[:, nearest:], "float32")
    for wrong in (cache, back):  # what was lost stays lost, however many times one goes back
        with pytest.raises(
            ValueError, match=r"still held.*ring of \d slots.*before the drafts.*slack="
        ):
            wrong.rewind(nearest - 1)
    lost = jax.jit(lambda cache, n: cache.rewind(n))(cache, jnp.array([nearest, nearest - 1]))
    assert lost.spoiled.tolist() == [False, True]
    for t in range(nearest, T):
        output, lost = read(X[:, t : t + 1], lost)
        assert np.isnan(output[1]).all()
        assert_close(output[0], expected[0, t : t + 1], "float32")
    by_hand = dataclasses.replace(cache, length=jnp.array([10, nearest]))
    assert by_hand.spoiled.tolist() == [True, False]
    assert np.isnan(read(X[:, :6], by_hand)[0][0]).all()
    assert read(X[:, :6], by_hand)[1].length.tolist() == [-1, nearest + 6]


@pytest.mark.slow
def test_any_example_is_begun_anew():
    for window in (None, 4, 1):
        config, read, expected = layer(window)
        _, cache = read(X[:, :20], init_cache(config, B, T))
        cache = cache.rewind(jnp.array([0, 20]))
        for t in range(3):
            x = jnp.stack([X[0, t], X[1, 20 + t]])[:, None]
            output, cache = read(x, cache)
            right = jnp.stack([expected[0, t], expected[1, 20 + t]])[:, None]
            assert_close(output, right, "float32", f"window {window}")


@pytest.mark.slow
def test_an_overflowed_line_goes_back_to_what_it_holds():
    config, read, expected = layer(None)
    _, cache = read(X[:, :10], init_cache(config, B, 8))
    assert cache.overflowed.all()
    assert cache.rewind(9).overflowed.all()
    assert_close(read(X[:, 7:8], cache.rewind(7))[0], expected[:, 7:8], "float32")


@pytest.mark.slow
def test_one_sequence_under_vmap_goes_back():
    config, read, expected = layer(4)
    caches = jax.vmap(lambda x: read(x, init_cache(config, (), T, slack=1))[1])(X[:, :10])
    caches = jax.vmap(lambda cache, n: cache.rewind(n))(caches, jnp.array([8, 7]))
    assert caches.spoiled.tolist() == [False, True]
    output, _ = jax.vmap(read)(X[:, 8:9], caches)
    assert_close(output[0], expected[0, 8:9], "float32")
    assert np.isnan(output[1]).all()


@pytest.mark.slow
def test_vmap_over_caches_of_different_lengths():
    """From 96 x 96 on, where whole blocks are skipped by the length."""
    config, read, _ = layer(None, num_kv_heads=2)
    one = init_cache(config, (), 600)
    _, long = read(normal(3, 500, D), one)
    caches = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, long)
    output, _ = jax.vmap(read)(X, caches)
    for i, cache in enumerate((one, long)):
        assert_close(output[i], read(X[i], cache)[0], "float32")


@pytest.mark.parametrize("window", [None, 4])
def test_a_while_loop_carries_a_donated_cache(window):
    """Past the capacity of a line the outputs are NaN; a ring has none."""
    config, read, expected = layer(window)

    def decode(cache, outputs):
        def step(carry):
            t, cache, outputs = carry
            output, cache = read(jax.lax.dynamic_slice_in_dim(X, t, 1, 1), cache)
            return t + 1, cache, jax.lax.dynamic_update_slice_in_dim(outputs, output, t, 1)

        return jax.lax.while_loop(lambda carry: carry[0] < T, step, (0, cache, outputs))

    cache = init_cache(config, B, 20)
    _, after, outputs = jax.jit(decode, donate_argnums=0)(cache, jnp.zeros_like(expected))
    assert cache.key.is_deleted()
    fits = 20 if window is None else T
    assert_close(outputs[:, :fits], expected[:, :fits], "float32")
    assert np.isnan(outputs[:, fits:]).all()
    assert after.overflowed.tolist() == [window is None] * B


@pytest.mark.slow
def test_a_cache_in_a_variable_of_a_module():
    config, read, expected = layer(None)

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            cache = self.variable("cache", "own", init_cache, config, B, T)
            output, after = read(x, cache.value)
            if not self.is_initializing():
                cache.value = after
            return output

    variables = Decoder().init(jax.random.key(0), X[:, :5])
    step = jax.jit(lambda variables, x: Decoder().apply(variables, x, mutable=["cache"]))
    for piece in (slice(0, 5), slice(5, 6)):
        output, variables = step(variables, X[:, piece])
        assert_close(output, expected[:, piece], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_cache_is_of_its_layer_s_dtype_by_itself(dtype):
    with x64():
        config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, param_dtype=dtype)
        x = X.astype(dtype)
        params = init_params(jax.random.key(0), config, x.shape)
        call = dict(config=config, cache=init_cache(config, B, T))
        output, cache = multi_head_attention(params, x, x, **call)
        assert output.dtype == cache.key.dtype == dtype
    assert init_cache(config.replace(dtype="bfloat16"), B, T).key.dtype == "bfloat16"
    with pytest.raises(ValueError, match="`slack` must be a non-negative integer"):
        init_cache(config, B, T, slack=-1)
