"""`jax.pmap` trains: several steps of an optimizer over 8 devices are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_trees_close, normal

from flax_mha import MultiHeadAttentionConfig, init_params, multi_head_attention
from flax_mha.linen import MultiHeadAttention

DEVICES, EACH, T, D, STEPS = 8, 2, 5, 16, 4
CONFIG = MultiHeadAttentionConfig(num_heads=4, key_dim=4, dropout=0.25)
OPTIMIZER = optax.sgd(0.5, momentum=0.9)


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax multiplies by Python numbers."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def loss(params, x, target, dropout_key, first=0):
    """`first` is the number of the first example: so the mask is that of the whole batch."""
    drop = {"dropout_key": dropout_key, "dropout_start": (first, 0, 0, 0)}
    output = multi_head_attention(params, x, x, config=CONFIG, use_causal_mask=True, **drop)
    return jnp.mean((output - target) ** 2)


def updated(params, state, gradient):
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def step(params, state, x, target, dropout_key, aligned=True):
    """Of one device of many."""
    first = jax.lax.axis_index("data") * EACH if aligned else 0
    value, gradient = jax.value_and_grad(loss)(params, x, target, dropout_key, first)
    value, gradient = jax.lax.pmean((value, gradient), "data")
    return *updated(params, state, gradient), value


def on_one_device(params, state, x, target, dropout_key):
    value, gradient = jax.value_and_grad(loss)(params, x, target, dropout_key)
    return *updated(params, state, gradient), value


def trained(take, params, arrays):
    """The parameters after some steps and the losses on the way."""
    state, losses = OPTIMIZER.init(params), []
    for i in range(STEPS):
        params, state, value = take(params, state, *arrays, jax.random.key(i))
        losses.append(float(value.reshape(-1)[0]))
    return params, losses


def everywhere(tree):
    return jax.tree.map(lambda a: jnp.stack([a] * DEVICES), tree)


@pytest.fixture
def params():
    return init_params(jax.random.key(0), CONFIG, (1, T, D))


@pytest.fixture
def batch():
    return normal(1, DEVICES * EACH, T, D), normal(2, DEVICES * EACH, T, D)


def mapped(params, arrays, **how):
    """Parameters and optimizer on every device, as pmap wants them; the batch cut."""
    in_axes = (0, 0, 0, 0, None)
    take = jax.pmap(functools.partial(step, **how), "data", in_axes=in_axes, donate_argnums=(0, 1))
    state, losses = everywhere((params, OPTIMIZER.init(params))), []
    cut = [a.reshape(DEVICES, EACH, T, D) for a in arrays]
    for i in range(STEPS):
        *state, value = take(*state, *cut, jax.random.key(i))
        losses.append(float(value[0]))
    return state[0], losses


@pytest.mark.slow
def test_training_by_pmap_is_training_on_one_device(params, batch):
    right, losses = trained(jax.jit(on_one_device), params, batch)
    found, by_pmap = mapped(params, batch)
    np.testing.assert_allclose(by_pmap, losses, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    for i in (0, DEVICES - 1):
        assert_trees_close(jax.tree.map(lambda a, i=i: a[i], found), right, "float32")


@pytest.mark.slow
def test_without_its_place_a_device_drops_what_the_first_one_does(params, batch):
    """So the test above sees the masks."""
    _, losses = trained(jax.jit(on_one_device), params, batch)
    _, by_pmap = mapped(params, batch, aligned=False)
    assert np.abs(np.subtract(by_pmap, losses)).max() > 1e-4


def test_the_module_under_pmap(batch):
    """linen's layer, its parameters not repeated but handed to all by `in_axes=None`."""
    layer = MultiHeadAttention.from_config(CONFIG)
    variables = layer.init(jax.random.key(0), batch[0], batch[0])
    apply = jax.pmap(lambda v, x: layer.apply(v, x, x), in_axes=(None, 0))
    output = apply(variables, batch[0].reshape(DEVICES, EACH, T, D))
    assert_close(output.reshape(-1, T, D), layer.apply(variables, batch[0], batch[0]), "float32")
