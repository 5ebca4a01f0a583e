"""Constraints hold after every optimizer update, and touch nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from helpers import B, D, H, N, T, assert_trees_close, normal, random_params, relaxed
from keras_bridge import keras_layer, list_of, tree_of

from flax_mha import (
    MultiHeadAttentionConfig,
    apply_constraints,
    constrain,
    multi_head_attention,
    param_shapes,
)

CONSTRAINTS = {
    "kernel": {"kernel_constraint": "unit_norm"},
    "bias": {"bias_constraint": "non_neg"},
    "both": {
        "kernel_constraint": {
            "class_name": "MaxNorm",
            "config": {"max_value": 0.5, "axis": [0, 1]},
        },
        "bias_constraint": {
            "class_name": "MinMaxNorm",
            "config": {"min_value": 0.5, "max_value": 0.75, "rate": 0.5, "axis": 0},
        },
    },
    "callable": {"kernel_constraint": jnp.tanh},
}


def made(arguments):
    config = MultiHeadAttentionConfig(N, H, **arguments)
    return config, random_params(param_shapes(config, (B, T, D)))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_apply_is_what_keras_applies_to_each_variable(arguments):
    config, params = made(arguments)
    if callable(arguments.get("kernel_constraint")):
        expected = jax.tree.map(lambda x: jnp.tanh(x) if x.ndim == 3 else x, params)
    else:
        layer = keras_layer({"num_heads": N, "key_dim": H, **arguments}, ((B, T, D), (B, T, D)))
        with relaxed():
            held = [
                np.asarray(v.constraint(x)) if v.constraint else x
                for v, x in zip(layer.weights, list_of(layer, params), strict=True)
            ]
        expected = tree_of(layer, held)
    assert_trees_close(apply_constraints(params, config), expected, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", CONSTRAINTS.values(), ids=CONSTRAINTS)
@pytest.mark.parametrize("optimizer", [optax.sgd(0.5), optax.adam(0.1)], ids=["sgd", "adam"])
def test_the_constraint_holds_after_every_update(arguments, optimizer):
    config, params = made(arguments)
    x = normal(0, B, T, D)
    loss = lambda params: (multi_head_attention(params, x, x, config=config) ** 2).mean()
    optimizer = optax.chain(optimizer, constrain(config))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    with relaxed():  # optax's own Adam promotes
        state = optimizer.init(params)
        for _ in range(3):
            free = jax.tree.map(lambda x, g: x - 0.5 * g, params, jax.grad(loss)(params))
            params, state = step(params, state)
            if not jax.tree.leaves(state):  # plain descent: the result is known
                assert_trees_close(params, apply_constraints(free, config), "float32")
    kernels = [leaf["kernel"] for leaf in params.values()]
    biases = [leaf["bias"] for leaf in params.values()]
    if arguments == CONSTRAINTS["kernel"]:
        for kernel in kernels:
            np.testing.assert_allclose(jnp.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
    if arguments == CONSTRAINTS["bias"]:
        assert all((bias >= 0).all() for bias in biases)
        assert any((kernel < 0).any() for kernel in kernels)
    if arguments == CONSTRAINTS["both"]:
        assert all((jnp.sqrt((k**2).sum((0, 1))) <= 0.5 + 1e-6).all() for k in kernels)


@pytest.mark.parametrize("form", [dict, FrozenDict])
def test_only_the_layer_at_the_path_is_constrained(form):
    config, params = made(CONSTRAINTS["bias"])
    tree = form({"encoder": {"attention": params, "other": params}})
    updates = jax.tree.map(lambda x: -jnp.ones_like(x), tree)
    transformation = constrain(config, ("encoder", "attention"))
    held, _ = transformation.update(updates, transformation.init(tree), tree)
    moved = optax.apply_updates(tree, held)
    assert all((leaf["bias"] >= 0).all() for leaf in moved["encoder"]["attention"].values())
    free = jax.tree.map(lambda x: x - 1, params)
    assert_trees_close(moved["encoder"]["other"], form(free), "float32")


def test_misuse_is_named():
    config, params = made(CONSTRAINTS["bias"])
    with pytest.raises(ValueError, match=r"optimizer\.update\(grads, state, params\)"):
        constrain(config).update(params, optax.EmptyState())
    with pytest.raises(ValueError, match=r"path=\('attn',\) must lead.*\['attention_output'"):
        constrain(config, ("attn",)).update(params, optax.EmptyState(), params)
