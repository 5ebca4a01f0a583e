"""Functions of pairs in a layer whose arrays lie on an explicit mesh: one device's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import (
    ContextAxis,
    Mask,
    MultiHeadAttentionConfig,
    init_cache,
    init_params,
    multi_head_attention,
    param_specs,
    zigzag_order,
)
from flax_mha.positions import Score

B, N, H, D, T = 8, 4, 8, 16, 12
KEY = jax.random.key(2)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, 2, (B, T)))
X = normal(0, B, T, D)


def explicit_mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def put(tree, specs, mesh):
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(place, tree, specs)


def rule(ids):
    return Mask.function(lambda b, n, t, s: (ids[b, t] == ids[b, s]) & ((t - s) % (n + 1) == 0))


class ByHead(Score):
    """Parameters that lie along the heads, and a number of each example that is closed over."""

    def param_sizes(self, num_heads):
        return {"slope": {"N": num_heads}, "table": {"X": T, "N": num_heads}}

    def initial(self, name, init_key, shape, dtype):
        return jax.random.normal(init_key, shape, dtype)

    def __call__(self, logits, b, n, t, s, slope, table):
        return logits * slope[n] + table[abs(t - s), n] * (1 + b % 3).astype(logits.dtype)


def config_of(implementation):
    fields = dict(dropout=0.2, implementation=implementation, score=ByHead())
    return MultiHeadAttentionConfig(N, H, **fields)


def output(config, params, x, ids, **call):
    mask = rule(ids) | Mask.window(1, 1)
    return multi_head_attention(params, x, x, config=config, attention_mask=mask, **call)


def one_and_cut(implementation):
    """(parameters, inputs and ids of one device; the same on the mesh; the config)."""
    mesh, config = explicit_mesh(), config_of(implementation)
    params = init_params(jax.random.key(1), config, (B, T, D))
    specs = param_specs(config, {"heads": "model"})
    assert specs["score"] == {"slope": P("model"), "table": P(None, "model")}
    x, ids = put((X, IDS), (P("data"), P()), mesh)
    return (params, X, IDS), (put(params, specs, mesh), x, ids), config


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_examples_and_heads_are_cut(implementation):
    """A device sees its own examples and heads; the function knows them by their whole indices."""
    one, cut, config = one_and_cut(implementation)
    call = jax.jit(functools.partial(output, config))
    result = call(*cut)
    assert_close(result, call(*one), "float32")
    assert jax.typeof(result).sharding.spec[0] == "data"


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_gradients_and_dropout(implementation):
    one, cut, config = one_and_cut(implementation)
    loss = lambda *data: (output(config, *data, dropout_key=KEY) ** 2).sum()
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    assert_trees_close(gradient(*cut), gradient(*one), "float32")


@pytest.mark.slow
def test_steps_with_a_cache():
    (params, _, _), (cut, x, ids), config = one_and_cut(None)
    cache = init_cache(config, B, T)
    heads = P("data", "model")
    cache = put(cache, type(cache)(heads, heads, P("data"), P("data")), explicit_mesh())
    call = dict(config=config, attention_mask=rule(IDS))
    expected = multi_head_attention(params, X, X, use_causal_mask=True, **call)
    outputs = []
    for first, last in ((0, 5), (5, 6), (6, T)):
        piece = x[:, first:last]
        call = dict(config=config, attention_mask=rule(ids), cache=cache)
        output, cache = multi_head_attention(cut, piece, piece, **call)
        outputs.append(np.asarray(output))
    assert_close(np.concatenate(outputs, 1), expected, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "layout"),
    [("ring", "zigzag"), ("all_gather", "contiguous"), ("all_to_all", "zigzag")],
)
def test_a_sequence_over_devices(strategy, layout):
    """t and s are positions of the whole sequence, wherever a token is stored."""
    config = config_of(None).replace(dropout=0.0)
    params = init_params(jax.random.key(1), config, (B, T, D))
    order = zigzag_order(T, 2) if layout == "zigzag" else np.arange(T)
    cut = config.replace(context_axis=ContextAxis("context", strategy, layout))
    loss = lambda config, params, x: (output(config, params, x, IDS) ** 2).sum()
    expected = jax.grad(loss, (1, 2))(config, params, X)
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)
        of_params, of_x = gradient(cut, params, X[:, order])
    assert_trees_close(of_params, expected[0], "float32")
    assert_close(of_x, expected[1][:, order], "float32")
