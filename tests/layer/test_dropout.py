"""Dropout of the layer: unbiased, of the stated rate, and only with a key."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import B, D, H, M, N, S, T, assert_close, assert_trees_close, normal, random_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import flax_mha.nnx
from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    attention_scores,
    dot_product_attention,
    forward,
    init_cache,
    init_params,
    multi_head_attention,
    param_shapes,
)

RATE = 0.3
CONFIG = MultiHeadAttentionConfig(N, H, dropout=RATE)
PARAMS = random_params(param_shapes(CONFIG, (B, T, D), (B, S, M)))
QUERY, VALUE = normal(1, B, T, D), normal(2, B, S, M)


def layer(config=CONFIG, params=PARAMS, query=QUERY, value=VALUE, **call):
    return multi_head_attention(params, query, value, config=config, **call)


def revealed(dropout_key, rate=RATE, query=None, key=None):
    """(weights after dropout, weights before): each value is one-hot, so context is weights."""
    query = normal(3, B, T, N, H) if query is None else query
    key = normal(4, B, S, N, H) if key is None else key
    value = jnp.broadcast_to(jnp.eye(S)[None, :, None, :], (B, S, N, S))
    context, weights = dot_product_attention(
        query, key, value, dropout_rate=rate, dropout_key=dropout_key, return_weights=True
    )
    return np.asarray(context).transpose(0, 2, 1, 3), np.asarray(weights)


@pytest.mark.slow
def test_kept_weights_are_divided_and_others_are_zero():
    dropped, weights = revealed(jax.random.key(0))
    kept = dropped != 0
    assert 0 < kept.mean() < 1
    assert_close(dropped, np.where(kept, weights / (1 - RATE), 0), "float32")


@pytest.mark.slow
def test_layer_equals_the_oracle_for_the_revealed_mask():
    """The layer drops what `dot_product_attention` drops for the same key, and nothing else."""
    dropout_key = jax.random.key(5)
    keep = revealed(dropout_key)[0] != 0
    output, scores = layer(dropout_key=dropout_key, return_attention_scores=True)
    expected, weights = oracles.layer(PARAMS, QUERY, VALUE, keep=keep, rate=RATE)
    assert_close(output, expected, "float32")
    assert_close(scores, weights, "float32", "scores are the weights before dropout")


@pytest.mark.slow
def test_share_of_kept_weights():
    keys = jax.random.split(jax.random.key(1), 64)
    kept = np.stack([revealed(dropout_key)[0] for dropout_key in keys]) != 0
    deviation = np.sqrt(RATE * (1 - RATE) / kept.size)
    assert abs(kept.mean() - (1 - RATE)) < 5 * deviation
    assert kept.reshape(64, -1).std(0).min() > 0, "every weight is dropped under some key"
    assert (kept[:, 0] != kept[:, 1]).any(), "examples differ"
    assert (kept[:, :, 0] != kept[:, :, 1]).any(), "heads differ"


@pytest.mark.slow
def test_mean_is_unbiased():
    keys = jax.random.split(jax.random.key(2), 2000)
    outputs = np.asarray(jax.vmap(lambda dropout_key: layer(dropout_key=dropout_key))(keys))
    error = outputs.mean(0, dtype="float64") - np.asarray(layer())
    deviation = outputs.std(0, dtype="float64") / np.sqrt(len(keys))
    assert (np.abs(error) < 6 * deviation + 1e-6).all()
    assert outputs.std(0).min() > 0


@pytest.mark.slow
def test_same_mask_under_vmap_and_jit():
    keys = jax.random.split(jax.random.key(3), 4)
    mapped = jax.vmap(lambda dropout_key: layer(dropout_key=dropout_key))(keys)
    compiled = jax.jit(lambda dropout_key: layer(dropout_key=dropout_key))
    for dropout_key, output in zip(keys, mapped, strict=True):
        plain = layer(dropout_key=dropout_key)
        assert_close(output, plain, "float32")
        assert_close(compiled(dropout_key), plain, "float32")
        with jax.disable_jit():
            assert_close(layer(dropout_key=dropout_key), plain, "float32")


@pytest.mark.slow
def test_rate_one_gives_zeros():
    """The context is zero, so the output is its bias; and no gradient is NaN."""
    config = CONFIG.replace(dropout=1.0)
    dropout_key = jax.random.key(0)
    output, scores = layer(config, dropout_key=dropout_key, return_attention_scores=True)
    bias = jnp.broadcast_to(PARAMS["attention_output"]["bias"], output.shape)
    np.testing.assert_array_equal(output, bias)
    assert_close(scores.sum(-1), np.ones((B, N, T)), "float32")

    def loss(params):
        return (layer(config, params, dropout_key=dropout_key) ** 2).sum()

    gradient = jax.grad(loss)(PARAMS)
    assert np.abs(gradient["attention_output"].pop("bias")).max() > 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_no_key_is_no_dropout(rate):
    plain = layer(CONFIG.replace(dropout=0.0))
    np.testing.assert_array_equal(layer(CONFIG.replace(dropout=rate)), plain)


def test_rate_zero_ignores_the_key():
    config = CONFIG.replace(dropout=0.0)
    np.testing.assert_array_equal(layer(config, dropout_key=jax.random.key(0)), layer(config))


def test_mask_depends_on_the_position_and_the_key_alone():
    """Other inputs and weights leave the bits where they were; another key moves them."""
    one, _ = revealed(jax.random.key(0))
    other, _ = revealed(jax.random.key(0), query=normal(8, B, T, N, H), key=normal(9, B, S, N, H))
    np.testing.assert_array_equal(one != 0, other != 0)
    moved, _ = revealed(jax.random.key(1))
    assert ((one != 0) != (moved != 0)).any()
    longer, _ = revealed(jax.random.key(0), query=normal(8, B, T + 4, N, H))
    np.testing.assert_array_equal(longer[:, :, :T] != 0, one != 0)


# --- a shard of a whole -------------------------------------------------------------------------

WHOLE = MultiHeadAttentionConfig(8, 4, dropout=RATE, use_bias=False)
WHOLE_PARAMS = init_params(jax.random.key(1), WHOLE, (8, 6, D))
LETTERS = {"query": P(None, "model"), "key": P(None, "model"), "value": P(None, "model")}
HEADS = {name: {"kernel": LETTERS.get(name, P("model"))} for name in WHOLE_PARAMS}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 2), (8, 1), (2, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_shard_map_over_batch_and_heads_gives_the_whole_s_output(sizes, check_vma):
    """Forward and gradient; each shard knows its own examples and heads alone."""
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("data", "model"))
    local, x = WHOLE.replace(num_heads=8 // sizes[1]), normal(1, 8, 6, D)
    dropout_key = jax.random.key(5)

    def shard(params, x):
        places = [jax.lax.axis_index(axis) for axis in ("data", "model")]
        start = (places[0] * x.shape[0], places[1] * local.num_heads, 0, 0)
        call = dict(config=local, dropout_key=dropout_key, dropout_start=start)
        return jax.lax.psum(multi_head_attention(params, x, x, **call), "model")

    of_shards = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(HEADS, P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    whole = lambda p, x: multi_head_attention(p, x, x, config=WHOLE, dropout_key=dropout_key)
    both = lambda f: jax.jit(
        lambda *args: (f(*args), jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1))(*args))
    )
    assert_trees_close(both(of_shards)(WHOLE_PARAMS, x), both(whole)(WHOLE_PARAMS, x), "float32")


@pytest.mark.slow
def test_every_face_takes_a_start():
    """The second half of a batch: rows of the whole call's output."""
    x, key = normal(1, 8, 6, D), jax.random.key(5)
    half, call = x[4:], {"dropout_start": (4, 0, 0, 0)}
    whole = multi_head_attention(WHOLE_PARAMS, x, x, config=WHOLE, dropout_key=key)
    plain = dict(config=WHOLE, dropout_key=key, **call)
    outputs = [
        multi_head_attention(WHOLE_PARAMS, half, half, **plain),
        forward(WHOLE_PARAMS, half, half, **plain).output,
        jax.jit(
            lambda b: multi_head_attention(
                WHOLE_PARAMS, half, half, config=WHOLE, dropout_key=key, dropout_start=(b, 0, 0, 0)
            )
        )(4),
    ]
    for output in outputs:
        assert_close(output, whole[4:], "float32")
    linen = MultiHeadAttention.from_config(WHOLE)
    run = lambda x, **call: linen.apply(
        {"params": WHOLE_PARAMS}, x, x, training=True, rngs={"dropout": key}, **call
    )
    assert_close(run(half, **call), run(x)[4:], "float32")
    module = flax_mha.nnx.MultiHeadAttention.from_params(WHOLE_PARAMS, WHOLE)
    started = module(half, half, training=True, rngs=key, **call)
    assert_close(started, module(x, x, training=True, rngs=key)[4:], "float32")


@pytest.mark.slow
def test_with_a_cache_t_counts_the_queries_of_the_call():
    """So steps that say where they stand drop what one call would."""
    x, key = normal(1, 2, 6, D), jax.random.key(5)
    call = dict(config=WHOLE, dropout_key=key, use_causal_mask=True)
    whole = multi_head_attention(WHOLE_PARAMS, x, x, **call)
    cache = init_cache(WHOLE, 2, 6)
    for first, last in ((0, 3), (3, 5), (5, 6)):
        part = x[:, first:last]
        here = dict(cache=cache, dropout_start=(0, 0, first, 0))
        output, cache = multi_head_attention(WHOLE_PARAMS, part, part, **call, **here)
        assert_close(output, whole[:, first:last], "float32")


def test_starts_that_nothing_reads_are_refused():
    x = normal(1, 2, 6, D)
    with pytest.raises(ValueError, match="Received: -1 in dropout_start"):
        multi_head_attention(WHOLE_PARAMS, x, x, config=WHOLE, dropout_start=(-1, 0, 0, 0))
    with pytest.raises(TypeError, match="the weights before dropout: it takes no `dropout_start`"):
        attention_scores(
            WHOLE_PARAMS, x, x, config=WHOLE, query_rows=jnp.array([1]), dropout_start=(0, 0, 0, 0)
        )
