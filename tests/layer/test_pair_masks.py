"""A `Mask` as the layer's `attention_mask=`: functions, unions, complements, and plain ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import B, D, N, T, assert_close, assert_trees_close, normal, random_params

import flax_mha
import flax_mha.nnx
from flax_mha import (
    Mask,
    MultiHeadAttentionConfig,
    attention_scores,
    forward,
    multi_head_attention,
    param_shapes,
)

CONFIG = MultiHeadAttentionConfig(N, 8)
PARAMS = random_params(param_shapes(CONFIG, (T, D)))
X = normal(0, B, T, D)
IDS = jnp.array([[7, 7, 9, 9, 7], [1, 2, 2, 2, 1]])
LENGTHS = jnp.array([1, 3])


def same_id(b, n, t, s):
    return IDS[b, t] == IDS[b, s]


def by_head(b, n, t, s):
    return (s <= t + n) & (s != n)


# name: (the mask, whether query t of example b and head n may attend to key s)
MASKS = {
    "function": (lambda: Mask.function(same_id), lambda b, n, t, s: IDS[b, t] == IDS[b, s]),
    "of the head": (lambda: Mask.function(by_head), lambda b, n, t, s: s <= t + n and s != n),
    "prefix": (
        lambda: Mask.causal() | Mask.prefix(LENGTHS),
        lambda b, n, t, s: s <= t or s < LENGTHS[b],
    ),
    "complement": (lambda: ~Mask.window(1, 0), lambda b, n, t, s: not t - 1 <= s <= t),
    "joined": (
        lambda: Mask.function(same_id) & Mask.window(2, 1) & ~Mask.function(by_head),
        lambda b, n, t, s: (
            IDS[b, t] == IDS[b, s] and -2 <= s - t <= 1 and not (s <= t + n and s != n)
        ),
    ),
    "plain": (
        lambda: Mask.window(2, 1) & Mask.segments(IDS, IDS),
        lambda b, n, t, s: IDS[b, t] == IDS[b, s] and -2 <= s - t <= 1,
    ),
    "dense": (
        lambda: Mask.dense(np.arange(T * T).reshape(T, T) % 3 > 0),
        lambda b, n, t, s: (t * T + s) % 3 > 0,
    ),
}


def dense(rule, *sizes):
    """The array `[B, N, T, S]`, asked pair by pair."""
    entries = [bool(rule(*pair)) for pair in itertools.product(*map(range, sizes))]
    return np.array(entries).reshape(sizes)


def attend(mask, config=CONFIG, params=PARAMS, x=X, **call):
    return multi_head_attention(params, x, x, config=config, attention_mask=mask, **call)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_its_array(name, implementation):
    """Output and gradients, and the caller's other restrictions hold besides."""
    make, rule = MASKS[name]
    config = CONFIG.replace(implementation=implementation)
    array, mask = dense(rule, B, N, T, T), make()
    for call in ({}, {"value_mask": np.arange(T) < 4, "use_causal_mask": True}):
        assert_close(attend(mask, config, **call), attend(array, config, **call), "float32")
    loss = lambda mask, params, x: (attend(mask, config, params, x) ** 2).sum()
    gradient = jax.jit(jax.grad(loss, (1, 2)))
    assert_trees_close(gradient(mask, PARAMS, X), gradient(array, PARAMS, X), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_scores_of_all_and_of_chosen_queries(name):
    make, rule = MASKS[name]
    _, scores = attend(make(), return_attention_scores=True)
    _, expected = attend(dense(rule, B, N, T, T), return_attention_scores=True)
    assert_close(scores, expected, "float32")
    rows = jnp.array([3, 0, 4])
    some = attention_scores(
        PARAMS, X, X, config=CONFIG, query_rows=rows, attention_mask=make(), use_causal_mask=False
    )
    assert_close(some, expected[:, :, rows], "float32")


@pytest.mark.slow
def test_every_face_takes_it():
    mask = Mask.function(same_id) | Mask.prefix(1)
    expected = attend(mask)
    layer = flax_mha.MultiHeadAttention(N, 8)
    assert_close(layer.apply({"params": PARAMS}, X, X, attention_mask=mask), expected, "float32")
    module = flax_mha.nnx.MultiHeadAttention.from_params(PARAMS, CONFIG)
    assert_close(nnx.jit(lambda m, x: m(x, x, attention_mask=mask))(module, X), expected, "float32")
    activations = forward(PARAMS, X, X, config=CONFIG, attention_mask=mask)
    assert_close(activations.output, expected, "float32")


@pytest.mark.slow
def test_several_attended_axes_count_in_raster_order_and_all_batch_axes_as_one():
    """[2, 3, F, 4]: axes 1 and 3 attend; the others are examples 0 to 2 F - 1."""
    F = 3
    x = normal(1, 2, 3, F, 4, D)
    config = CONFIG.replace(attention_axes=(1, 3))
    keep = jnp.asarray(np.random.default_rng(2).random((2 * F, 12)) < 0.6)

    def rule(b, n, t, s):
        """Of a row of 4: its own row, or what `keep` says of the example."""
        return (t // 4 == s // 4) | keep[b, s]

    array = dense(rule, 2 * F, 1, 12, 12).reshape(2, F, 1, 3, 4, 3, 4)
    result = attend(Mask.function(rule), config, x=x)
    assert_close(result, attend(array, config, x=x), "float32")
    assert abs(np.asarray(attend(None, config, x=x) - result)).max() > 0.01


@pytest.mark.slow
def test_queries_and_keys_of_other_lengths():
    config = CONFIG.replace(num_kv_heads=1)
    query, value = normal(3, B, 4, D), normal(4, B, 7, 9)
    params = random_params(param_shapes(config, query.shape, value.shape))
    f = lambda b, n, t, s: (s + t + b) % 3 != n
    call = functools.partial(multi_head_attention, params, query, value, config=config)
    expected = call(attention_mask=dense(f, B, N, 4, 7))
    assert_close(call(attention_mask=Mask.function(f)), expected, "float32")


def test_one_trace_while_the_arrays_change():
    traces = []

    @jax.jit
    def step(x, ids):
        traces.append(ids.shape)
        return attend(Mask.function(lambda b, n, t, s: ids[b, t] == ids[b, s]), x=x)

    before = flax_mha.layer.equation.layer._cache_size()
    for ids in (IDS, IDS[::-1], IDS * 0):
        expected = attend(ids[:, None, :, None] == ids[:, None, None, :])
        assert_close(step(X, ids), expected, "float32")
    assert len(traces) == 1
    for ids in (IDS, IDS[::-1], IDS * 0):
        attend(Mask.function(lambda b, n, t, s, ids=ids: ids[b, t] <= ids[b, s]))
    assert flax_mha.layer.equation.layer._cache_size() <= before + 2  # an array's, a function's


@pytest.mark.slow
def test_under_vmap_remat_and_a_rank_of_two():
    """Examples one by one: each has its own array, and is example 0."""

    def one(x, ids):
        mask = Mask.function(lambda b, n, t, s: ids[t] == ids[s])
        return attend(mask, x=x)

    expected = attend(Mask.function(same_id))
    assert_close(jax.vmap(one)(X, IDS), expected, "float32")
    loss = lambda x: (jax.checkpoint(jax.vmap(one))(x, IDS) ** 2).sum()
    plain = lambda x: (attend(Mask.function(same_id), x=x) ** 2).sum()
    assert_close(jax.jit(jax.grad(loss))(X), jax.grad(plain)(X), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits(dtype):
    x = X.astype(dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    mask, array = (MASKS["joined"][0](), dense(MASKS["joined"][1], B, N, T, T))
    result = attend(mask, params=params, x=x)
    assert result.dtype == dtype
    assert_close(result, attend(array, params=params, x=x), dtype)


@pytest.mark.slow
def test_dropout_has_the_same_bits():
    config = CONFIG.replace(dropout=0.4)
    key = jax.random.key(3)
    mask, rule = MASKS["function"]
    result = attend(mask(), config, dropout_key=key)
    assert_close(result, attend(dense(rule, B, N, T, T), config, dropout_key=key), "float32")


@pytest.mark.slow
def test_padding_of_a_mask_removes_and_within_a_union_forbids():
    real = jnp.asarray(np.arange(T) < np.array([[5], [3]]))
    filled = jnp.where(real[..., None], X, jnp.nan)
    mask = Mask.padding(key=real, query=real) & Mask.function(lambda b, n, t, s: s != t)
    loss = lambda x: (jnp.where(real[..., None], attend(mask, x=x), 0) ** 2).sum()
    assert_close(jax.grad(loss)(filled), jax.grad(loss)(jnp.nan_to_num(filled)), "float32")
    within = Mask.padding(key=real) | Mask.window(0, 0)
    array = np.asarray(real)[:, None, None] | np.eye(T, dtype=bool)
    assert_close(attend(within), attend(array), "float32")


def test_what_is_no_mask_is_refused():
    with pytest.raises(TypeError, match=r"`attention_mask`.*`Mask.function\(f\)`"):
        attend(same_id)
    with pytest.raises(TypeError, match=r"`query_mask` must be an array; a Mask"):
        multi_head_attention(PARAMS, X, X, config=CONFIG, query_mask=Mask.causal())


WRONG = [
    (Mask.padding(key=np.ones((B, 4), bool)), r"`mask.key_padding`.*\(2, 5\).*\(2, 4\)"),
    (Mask.padding(query=np.ones((3, T), bool)), r"`mask.query_padding`.*\(3,\)"),
    (Mask.dense(np.ones((4, T, T), bool)), r"`mask` must broadcast.*\[B, N, T, S\]"),
    (Mask.dense(np.ones((T + 2, T), bool)), r"`mask` must broadcast.*\[B, N, T, S\]"),
    (~Mask.dense(np.ones((T, 4), bool)), r"`mask` must broadcast.*\[B, N, T, S\]"),
    (Mask.causal() | Mask.segments(IDS[:, :4], IDS), r"`mask.segment_ids\[0\]`.*\[B, T\]"),
    (Mask.causal() | Mask.prefix([1, 2, 3]), r"`mask.prefix_lengths`.*\[B\]"),
]


def test_a_mask_of_other_sizes_is_refused():
    """Before it is joined to the others, and before the rows of chosen queries are taken."""
    for mask, message in WRONG:
        with pytest.raises(ValueError, match=message):
            attend(mask, query_mask=np.ones((B, T), bool))
        call = dict(config=CONFIG, query_rows=jnp.array([1]), attention_mask=mask)
        with pytest.raises(ValueError, match=message):
            attention_scores(PARAMS, X, X, **call)
