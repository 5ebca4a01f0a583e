"""JAX's transformations of the layer give what a plain call or a Python loop gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    B,
    D,
    H,
    M,
    N,
    S,
    T,
    V,
    assert_close,
    assert_trees_close,
    booleans,
    normal,
    random_params,
    x64,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes

CONFIG = MultiHeadAttentionConfig(N, H, V, use_gate=True, dropout=0.4)
PARAMS = random_params(param_shapes(CONFIG, (B, T, D), (B, S, M)))
QUERY, VALUE = normal(1, B, T, D), normal(2, B, S, M)
MASKS = {"attention_mask": booleans(3, B, T, S), "value_mask": booleans(4, B, S)}
SQUARE = MultiHeadAttentionConfig(N, H, use_gate=True)  # D in, D out: layers that can be stacked
DEVICES = 8


def layer(params, query, value, config=CONFIG, **call):
    return multi_head_attention(params, query, value, config=config, **call)


def square(params, x, config=SQUARE):
    return x + layer(params, x, x, config, use_causal_mask=True)


def stacked_params(count, config=SQUARE, shape=(B, T, D)):
    """`count` parameter trees as a list, and as one tree of stacked leaves."""
    shapes = param_shapes(config, shape)
    trees = [random_params(shapes, seed=i) for i in range(count)]
    return trees, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_eight_devices():
    assert jax.device_count() == DEVICES


@pytest.mark.slow
@pytest.mark.parametrize("call", [{}, MASKS], ids=["plain", "masked"])
def test_jit_equals_eager(call):
    call = {**call, "dropout_key": jax.random.key(1), "return_attention_scores": True}
    with jax.disable_jit():
        eager = layer(PARAMS, QUERY, VALUE, **call)
    compiled = jax.jit(lambda p, q, v: layer(p, q, v, **call))(PARAMS, QUERY, VALUE)
    assert_trees_close(compiled, eager, "float32")
    assert_trees_close(layer(PARAMS, QUERY, VALUE, **call), eager, "float32")


def test_vmap_over_the_batch():
    def one(query, value, attention_mask, value_mask):
        return layer(PARAMS, query, value, attention_mask=attention_mask, value_mask=value_mask)

    mapped = jax.vmap(one)(QUERY, VALUE, MASKS["attention_mask"], MASKS["value_mask"])
    assert_close(mapped, layer(PARAMS, QUERY, VALUE, **MASKS), "float32")


def test_vmap_over_a_batch_of_grids_with_negative_axes():
    config = SQUARE.replace(attention_axes=(-3, -2))
    x = normal(1, B, T, 4, D)
    (params,), _ = stacked_params(1, config, x.shape)
    one = functools.partial(square, params, config=config)
    assert_close(jax.vmap(one)(x), one(x), "float32")


def test_vmap_over_stacked_params():
    trees, stacked = stacked_params(3)
    mapped = jax.vmap(square, in_axes=(0, None))(stacked, QUERY)
    for tree, output in zip(trees, mapped, strict=True):
        assert_close(output, square(tree, QUERY), "float32")


@pytest.mark.slow
def test_vmap_over_the_heads_of_params():
    """Without biases, a layer is the sum of its heads, each a layer of its own."""
    config = CONFIG.replace(use_bias=False)
    kernels = {name: {"kernel": maps["kernel"]} for name, maps in PARAMS.items()}
    head_axis = {name: {"kernel": 0 if name == "attention_output" else 1} for name in kernels}

    def one(head):
        params = jax.tree.map(jnp.expand_dims, head, head_axis)
        return layer(params, QUERY, VALUE, config.replace(num_heads=1), **MASKS)

    heads = jax.vmap(one, in_axes=(head_axis,))(kernels)
    assert_close(heads.sum(0), layer(kernels, QUERY, VALUE, config, **MASKS), "float32")


@pytest.mark.slow
def test_vmap_over_dropout_keys():
    keys = jax.random.split(jax.random.key(7), 4)

    def one(dropout_key):
        return layer(PARAMS, QUERY, VALUE, dropout_key=dropout_key)

    mapped = jax.vmap(one)(keys)
    for dropout_key, output in zip(keys, mapped, strict=True):
        assert_close(output, one(dropout_key), "float32")
    assert np.abs(mapped[0] - mapped[1]).max() > 0.1


@pytest.mark.parametrize(("call", "order"), [("masked", 2), ("dropout", 1)])
@pytest.mark.slow
def test_gradients_by_finite_differences(call, order):
    """Forward and reverse mode, with respect to params and inputs."""
    with x64():
        arrays = jax.tree.map(lambda x: x.astype("float64"), (PARAMS, QUERY, VALUE))
        keywords = MASKS if call == "masked" else {"dropout_key": jax.random.key(0)}

        def loss(*arrays):
            return (layer(*arrays, **keywords) ** 2).mean()

        check_grads(jax.jit(loss), arrays, order, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_scan_over_layers():
    trees, stacked = stacked_params(3)
    scanned, _ = jax.lax.scan(lambda x, params: (square(params, x), None), QUERY, stacked)
    looped = functools.reduce(lambda x, params: square(params, x), trees, QUERY)
    assert_close(scanned, looped, "float32")


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable])
@pytest.mark.slow
def test_remat_gives_the_same_gradients(policy):
    def loss(function, params, x):
        dropout_key = jax.random.key(3)
        return (function(params, x, x, dropout_key=dropout_key) ** 2).sum()

    config = SQUARE.replace(dropout=0.3)
    (params,), _ = stacked_params(1, config)
    plain = functools.partial(layer, config=config)
    saved = jax.checkpoint(plain, policy=policy)
    gradients = [
        jax.grad(functools.partial(loss, f), argnums=(0, 1))(params, QUERY) for f in (plain, saved)
    ]
    assert_trees_close(gradients[1], gradients[0], "float32")


def test_eval_shape():
    call = {**MASKS, "return_attention_scores": True}
    shapes = jax.eval_shape(lambda *arrays: layer(*arrays, **call), PARAMS, QUERY, VALUE)
    results = layer(PARAMS, QUERY, VALUE, **call)
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in results]
    assert [x.shape for x in shapes] == [(B, T, D), (B, N, T, S)]


@pytest.mark.slow
def test_pmap_over_devices():
    query, value = normal(5, DEVICES, B, T, D), normal(6, DEVICES, B, S, M)
    value_mask = booleans(7, DEVICES, B, S)

    def one(params, query, value, value_mask):
        return layer(params, query, value, value_mask=value_mask)

    mapped = jax.pmap(one, in_axes=(None, 0, 0, 0))(PARAMS, query, value, value_mask)
    assert len(mapped.sharding.device_set) == DEVICES
    for i in range(DEVICES):
        assert_close(mapped[i], one(PARAMS, query[i], value[i], value_mask[i]), "float32")


@pytest.mark.slow
def test_pmap_with_a_mean_of_gradients():
    """Data-parallel training: the mean over devices is the gradient of the mean."""
    query, value = normal(5, DEVICES, B, T, D), normal(6, DEVICES, B, S, M)

    def loss(params, query, value):
        return (layer(params, query, value) ** 2).mean()

    def mean_gradient(params, query, value):
        return jax.lax.pmean(jax.grad(loss)(params, query, value), "devices")

    mapped = jax.pmap(mean_gradient, axis_name="devices", in_axes=(None, 0, 0))
    gradient = jax.tree.map(lambda x: x[0], mapped(PARAMS, query, value))
    whole = query.reshape(-1, T, D), value.reshape(-1, S, M)
    assert_trees_close(gradient, jax.grad(loss)(PARAMS, *whole), "float32")


@pytest.mark.slow
def test_jit_with_named_sharding():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    query, value = normal(5, DEVICES, T, D), normal(6, DEVICES, S, M)
    value_mask = booleans(7, DEVICES, S)
    dropout_key = jax.random.key(2)

    def call(params, query, value, value_mask):
        return layer(params, query, value, value_mask=value_mask, dropout_key=dropout_key)

    placed = [jax.device_put(x, rows) for x in (query, value, value_mask)]
    sharded = jax.jit(call, out_shardings=rows)(jax.device_put(PARAMS, everywhere), *placed)
    assert sharded.sharding == rows
    assert_close(sharded, call(PARAMS, query, value, value_mask), "float32")


class Traces:
    """The layer under jit with a static config, counting how often Python runs it."""

    def __init__(self):
        self.count = 0
        self.call = jax.jit(self._call, static_argnames=("config",))

    def _call(self, config, params, query, value, masks, dropout_key):
        self.count += 1
        return layer(params, query, value, config, **masks, dropout_key=dropout_key)


def changed_masks(seed):
    return {
        "attention_mask": booleans(seed, B, T, S),
        "value_mask": booleans(seed + 1, B, S),
        "query_mask": booleans(seed + 2, B, T),
        "bias": normal(seed, B, N, T, S),
        "segment_ids": (jnp.full((B, T), seed), jnp.full((B, S), seed)),
    }


@pytest.mark.slow
def test_one_trace_for_equal_configs_and_changed_data():
    traces = Traces()
    for i in range(3):
        config = MultiHeadAttentionConfig.from_dict(CONFIG.to_dict())
        assert config is not CONFIG
        params = jax.tree.map(lambda x, i=i: x + i, PARAMS)
        traces.call(config, params, QUERY + i, VALUE, changed_masks(i), jax.random.key(i))
    assert traces.count == 1


@pytest.mark.slow
def test_another_config_or_shape_traces_again():
    """The control of the test before: the counter does count."""
    traces = Traces()
    masks, dropout_key = changed_masks(0), jax.random.key(0)
    traces.call(CONFIG, PARAMS, QUERY, VALUE, masks, dropout_key)
    traces.call(CONFIG.replace(dropout=0.1), PARAMS, QUERY, VALUE, masks, dropout_key)
    assert traces.count == 2
    traces.call(CONFIG, PARAMS, QUERY, VALUE, {**masks, "bias": masks["bias"][:1]}, dropout_key)
    assert traces.count == 3
