"""Tokens one by one, in ragged chunks, and in one pass: the same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, pairwise, random_params
from thinning import half

from flax_mha import (
    CrossCache,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    init_cache,
    init_cross_cache,
    init_params,
    multi_head_attention,
    param_shapes,
)
from flax_mha.positions import RelativeBias

B, T, D, H, V = 3, 13, 17, 6, 5
LENGTHS = np.array([13, 5, 9])
X = normal(0, B, T, D)
AXES = {
    "position": [None, "rotary", "alibi", RelativeBias(8, 16, bidirectional=False)],
    "num_kv_heads": [4, 2, 1],
    "sliding_window": [None, 1, 4, 40],
    "qk_norm": [None, "rms", "l2"],
    "use_sinks": [False, True],
    "use_gate": [False, True],
    "soft_cap": [None, 2.0],
}
ROWS = pairwise(AXES)


def name_of(row):
    position = row["position"]
    kind = position if isinstance(position, str | None) else "t5"
    return f"{kind}-kv{row['num_kv_heads']}-window{row['sliding_window']}-{row['qk_norm']}"


def layer_of(row):
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, value_dim=V, **row)
    return config, random_params(param_shapes(config, X.shape))


def one_pass(params, config, x=X):
    return multi_head_attention(params, x, x, config=config, use_causal_mask=True)


def chunks(params, config, pieces, capacity=T):
    """The outputs of every example's real tokens, fed in ragged pieces, padding taken out."""
    cache = init_cache(config, B, capacity)
    taken, outputs = np.zeros(B, int), [[] for _ in range(B)]
    step = jax.jit(
        lambda x, real, cache: multi_head_attention(
            params, x, x, config=config, cache=cache, value_mask=real, use_causal_mask=True
        )
    )
    for counts in pieces:
        width = max(counts)
        x = np.full((B, width, D), np.nan, np.float32)  # padding may hold anything
        for b, count in enumerate(counts):
            x[b, :count] = X[b, taken[b] : taken[b] + count]
        real = np.arange(width) < np.array(counts)[:, None]
        output, cache = step(jnp.asarray(x), jnp.asarray(real), cache)
        for b, count in enumerate(counts):
            outputs[b].append(np.asarray(output)[b, :count])
        taken += counts
        np.testing.assert_array_equal(cache.length, taken)
    return [np.concatenate(parts) for parts in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] if i > 5 else [], id=name_of(row))
        for i, row in enumerate(ROWS)
    ],
)
def test_ragged_chunks_are_one_pass(row):
    config, params = layer_of(row)
    expected = np.asarray(one_pass(params, config))
    # A prompt of other length for each example, then a chunk, then tokens one by one.
    pieces = [(5, 1, 3), (3, 0, 2), (1, 1, 1), (1, 1, 0), (1, 1, 1), (2, 1, 2)]
    assert (np.sum(pieces, 0) == LENGTHS).all()
    for b, output in enumerate(chunks(params, config, pieces)):
        assert_close(output, expected[b, : LENGTHS[b]], "float32", f"example {b}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("position", "kv", "window"),
    half(AXES["position"], AXES["num_kv_heads"], AXES["sliding_window"]),
    ids=str,
)
def test_every_two_in_chunks_and_token_by_token(position, kv, window):
    config, params = layer_of(dict(position=position, num_kv_heads=kv, sliding_window=window))
    expected = np.asarray(one_pass(params, config))
    for pieces in ([(4, 2, 7), (9, 3, 2)], [(1, 1, 1)] * 5):
        for b, output in enumerate(chunks(params, config, pieces)):
            assert_close(output, expected[b, : len(output)], "float32", f"example {b}")


@pytest.mark.slow
@pytest.mark.parametrize("row", [ROWS[1], ROWS[4]], ids=name_of)
def test_scan_and_vmap(row):
    """A scan over tokens, with a cache of one sequence under vmap."""
    config, params = layer_of(row)

    def decode(x):
        def step(cache, token):
            output, cache = multi_head_attention(
                params, token[None], token[None], config=config, cache=cache, use_causal_mask=True
            )
            return cache, output[0]

        return jax.lax.scan(step, init_cache(config, (), T), x)[1]

    assert_close(jax.jit(jax.vmap(decode))(X), one_pass(params, config), "float32")


@pytest.mark.slow
def test_pmap_and_donation():
    config, params = layer_of(ROWS[2])
    x = normal(1, 2, B, T, D)
    caches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), init_cache(config, B, T))
    step = lambda x, cache: multi_head_attention(
        params, x, x, config=config, cache=cache, use_causal_mask=True
    )
    output, caches = jax.pmap(step)(x, caches)
    for device in range(2):
        assert_close(output[device], one_pass(params, config, x[device]), "float32")

    donating = jax.jit(step, donate_argnums=1)
    cache = init_cache(config, B, T)
    held = cache.key
    donating(x[0, :, :2], cache)
    assert held.is_deleted()


def test_one_step_is_traced_once_for_all_positions():
    config, params = layer_of({"position": "rotary"})
    traces = []

    @jax.jit
    def step(x, cache):
        traces.append(x.shape)
        return multi_head_attention(params, x, x, config=config, cache=cache, use_causal_mask=True)

    cache = init_cache(config, B, T)
    for t in range(T):
        _, cache = step(X[:, t : t + 1], cache)
    assert traces == [(B, 1, D)]


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 4])
def test_a_decoder_s_own_tokens_are_in_causal_order_without_being_told(window):
    config, params = layer_of({"position": "rotary", "sliding_window": window})
    cache, outputs = init_cache(config, B, T), []
    for piece in (X[:, :5], X[:, 5:6], X[:, 6:]):
        output, cache = multi_head_attention(params, piece, piece, config=config, cache=cache)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), one_pass(params, config), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_where_a_cache_says_so_a_chunk_sees_itself_and_the_past(position):
    config, params = layer_of({"position": position})
    cache = init_cache(config, B, T, is_causal=False)
    call = dict(config=config)
    first, cache = multi_head_attention(params, X[:, :4], X[:, :4], cache=cache, **call)
    assert_close(first, multi_head_attention(params, X[:, :4], X[:, :4], **call), "float32")
    second, cache = multi_head_attention(params, X[:, 4:9], X[:, 4:9], cache=cache, **call)
    both = multi_head_attention(params, X[:, :9], X[:, :9], **call)
    assert_close(second, both[:, 4:], "float32")
    # A prefix that sees itself, and then causal order, as a mask says it.
    causal, _ = multi_head_attention(
        params, X[:, 9:], X[:, 9:], cache=cache, use_causal_mask=True, **call
    )
    mask = np.tril(np.ones((T, T), bool))
    mask[:9, :9] = True
    expected = multi_head_attention(params, X, X, attention_mask=mask, **call)
    assert_close(causal, expected[:, 9:], "float32")


@pytest.mark.slow
def test_scores_over_the_cache_s_slots():
    config, params = layer_of({"position": "rotary"})
    call = dict(config=config, use_causal_mask=True, return_attention_scores=True)
    _, expected = multi_head_attention(params, X, X, **call)
    cache = init_cache(config, B, T)
    _, _, cache = multi_head_attention(params, X[:, :4], X[:, :4], cache=cache, **call)
    _, scores, cache = multi_head_attention(params, X[:, 4:6], X[:, 4:6], cache=cache, **call)
    assert scores.shape == (B, 4, 2, T)
    assert_close(scores, expected[:, :, 4:6], "float32")


def test_memory_of_windows_and_of_grouped_heads():
    config = MultiHeadAttentionConfig(num_heads=8, key_dim=H, value_dim=V)
    size = lambda cache: cache.key.nbytes + cache.value.nbytes
    full = size(init_cache(config, B, 1000))
    assert full == B * 8 * 1000 * (H + V) * 4
    assert size(init_cache(config.replace(num_kv_heads=2), B, 1000)) == full // 4
    windowed = config.replace(sliding_window=10)
    assert (
        size(init_cache(windowed, B, 1000)) == size(init_cache(windowed, B, 10**6)) == full // 100
    )
    half = init_cache(config, B, 1000, dtype="bfloat16")
    assert size(half) == full // 2


# --- beams, modules, encoders -------------------------------------------------------------------


@pytest.mark.slow
def test_reorder_for_beam_search():
    config, params = layer_of({"position": "rotary", "num_kv_heads": 2})
    step = lambda x, cache: multi_head_attention(
        params, x, x, config=config, cache=cache, use_causal_mask=True
    )
    _, cache = step(X[:, :5], init_cache(config, B, T))
    rows = jnp.array([2, 2, 0])
    output, _ = step(X[:, 5:6], cache.reorder(rows))
    continued = jnp.concatenate([X[rows, :5], X[:, 5:6]], 1)
    assert_close(output[:, 0], one_pass(params, config, continued)[:, 5], "float32")


@pytest.mark.slow
def test_the_linen_module_decodes():
    config, params = layer_of({"position": "rotary", "use_sinks": True, "qk_norm": "rms"})
    module = MultiHeadAttention.from_config(config)
    variables = module.init(jax.random.key(0), X, X)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    cache, outputs = init_cache(config, B, T), []
    for piece in (X[:, :5], X[:, 5:6], X[:, 6:]):
        output, cache = module.apply(
            {"params": params}, piece, piece, cache=cache, use_causal_mask=True
        )
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), one_pass(params, config), "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"position": "rotary"},
        {"position": "alibi", "use_sinks": True},
        {"position": RelativeBias(8, 16)},
        {"sliding_window": 3},
        {"sliding_window": 4, "position": "rotary", "num_kv_heads": 2},
    ],
    ids=["none", "rotary", "alibi", "t5", "window", "window-rotary"],
)
@pytest.mark.parametrize("use_causal_mask", [False, True])
def test_queries_beside_an_encoder_stand_where_the_cache_counts(fields, use_causal_mask):
    """In one pass, step by step, and in ragged chunks under jit: S is smaller than T."""
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, value_dim=V, **fields)
    encoded = normal(2, B, 7, 19)
    params = random_params(param_shapes(config, X.shape, encoded.shape))
    call = dict(config=config, use_causal_mask=use_causal_mask)
    expected = multi_head_attention(params, X, encoded, **call)
    fresh = init_cross_cache(params, encoded, config=config, max_queries=T)

    @jax.jit
    def read(x, cache, real=None):
        return multi_head_attention(params, x, None, cache=cache, query_mask=real, **call)

    assert_close(read(X, fresh)[0], expected, "float32", "one pass")
    cache, outputs = fresh, []
    for t in range(T):
        output, cache = read(X[:, t : t + 1], cache)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), expected, "float32", "steps")
    np.testing.assert_array_equal(cache.length, [T] * B)

    taken, cache = np.zeros(B, int), fresh
    for counts in ((5, 1, 3), (3, 0, 2), (5, 4, 4)):
        x = np.full((B, max(counts), D), np.nan, "float32")
        for b, count in enumerate(counts):
            x[b, :count] = X[b, taken[b] : taken[b] + count]
        real = jnp.asarray(np.arange(max(counts)) < np.array(counts)[:, None])
        output, cache = read(jnp.asarray(x), cache, real)
        for b, count in enumerate(counts):
            rows = np.asarray(expected)[b, taken[b] : taken[b] + count]
            assert_close(output[b, :count], rows, "float32", f"example {b}")
        taken += counts
        np.testing.assert_array_equal(cache.length, taken)


@pytest.mark.slow
def test_padding_in_front_of_a_query_counts_as_it_does_in_one_pass():
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, position="rotary")
    params = random_params(param_shapes(config, X.shape))
    real = np.arange(T) >= np.array([0, 3, 2])[:, None]
    expected = multi_head_attention(params, X, X, config=config, query_mask=real)
    cache, outputs = init_cross_cache(params, X, config=config), []
    for piece in (slice(0, 5), slice(5, 6), slice(6, T)):
        output, cache = multi_head_attention(
            params, X[:, piece], None, config=config, query_mask=real[:, piece], cache=cache
        )
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), expected, "float32")


def test_positions_that_are_told_go_before_those_that_are_counted():
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, position="rotary")
    params = random_params(param_shapes(config, X.shape))
    expected = multi_head_attention(params, X, X, config=config)
    cache = init_cross_cache(params, X, config=config)
    call = dict(config=config, cache=cache)
    told = jnp.full((B, 1), 5)
    output, after = multi_head_attention(params, X[:, 5:6], None, positions=told, **call)
    assert_close(output, expected[:, 5:6], "float32")
    assert after.length.tolist() == [1] * B
    with pytest.raises(ValueError, match=r"those of the queries alone, \[B, T\].*tuple"):
        multi_head_attention(params, X[:, 5:6], None, positions=(told, told), **call)
    ids = (told, jnp.zeros((B, T), int))
    with pytest.raises(ValueError, match="not anew in each segment"):
        multi_head_attention(params, X[:, 5:6], None, segment_ids=ids, **call)


@pytest.mark.slow
def test_beams_over_an_encoder_scan_and_vmap():
    """Every example becomes two beams; a scan carries the cache of each sequence under vmap."""
    config = MultiHeadAttentionConfig(num_heads=4, key_dim=H, position="rotary")
    encoded = normal(2, B, 7, D)
    params = random_params(param_shapes(config, X.shape))
    real = np.arange(7) < np.array([7, 2, 5])[:, None]
    cache = init_cross_cache(params, encoded, config=config, value_mask=real)
    rows = jnp.repeat(jnp.arange(B), 2)

    def decode(x, cache):
        def step(cache, token):
            call = dict(config=config, cache=cache)
            output, cache = multi_head_attention(params, token[None], None, **call)
            return cache, output[0]

        return jax.lax.scan(step, cache, x)[1]

    output = jax.jit(jax.vmap(decode))(X[rows], cache.reorder(rows))
    expected = multi_head_attention(params, X, encoded, config=config, value_mask=real)
    assert_close(output, expected[rows], "float32")


@pytest.mark.parametrize("position", [None, "rotary", RelativeBias(8, 16)])
def test_an_encoder_is_projected_once(position):
    config = MultiHeadAttentionConfig(
        num_heads=4, key_dim=H, value_dim=V, num_kv_heads=2, position=position
    )
    encoded, keys = normal(2, B, 7, 19), normal(3, B, 7, 11)
    params = random_params(param_shapes(config, X.shape, encoded.shape, keys.shape))
    real = np.arange(7) < np.array([7, 2, 5])[:, None]
    call = dict(config=config, value_mask=real, max_queries=T)
    cache = init_cross_cache(params, encoded, keys, **call)
    assert isinstance(cache, CrossCache)
    output, read = multi_head_attention(params, X, None, config=config, cache=cache)
    expected = multi_head_attention(params, X, encoded, keys, config=config, value_mask=real)
    assert_close(output, expected, "float32")
    assert read.length.tolist() == [T] * B
    module = MultiHeadAttention.from_config(config)
    output, _ = module.apply({"params": params}, X, None, cache=cache)
    assert_close(output, expected, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("B", [1, 3])
def test_a_step_copies_no_cache(B):
    """Donated, the cache is written in place: what a step needs besides is far smaller.

    XLA of jax 0.7.2, 0.8.1 and 0.9.0 needs three arrays of its size, and may not need more.
    """
    config = MultiHeadAttentionConfig(2, 16)
    x = normal(0, B, 1, 32)
    params = init_params(jax.random.key(1), config, x.shape)
    cache = init_cache(config, B, 1024)

    def step(x, cache):
        return multi_head_attention(params, x, x, config=config, cache=cache, use_causal_mask=True)

    compiled = jax.jit(step, donate_argnums=1).lower(x, cache).compile()
    arrays = compiled.memory_analysis().temp_size_in_bytes / cache.key.nbytes
    assert arrays < (0.25 if jax.__version_info__ >= (0, 10) else 3.01)
