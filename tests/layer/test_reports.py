"""What people report against other attention layers, and what holds here: kept so."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal, random_params

from flax_mha import (
    Mask,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    dot_product_attention,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
from flax_mha.interop.keras import from_keras_weights
from flax_mha.interop.torch import from_torch_state_dict

CONFIG = MultiHeadAttentionConfig(num_heads=2, key_dim=4)
X = normal(0, 2, 12, 8)
PARAMS = random_params(param_shapes(CONFIG, X.shape))
LARGE = normal(1, 2, 100, 8)  # blocks from 96 x 96 on


def attend(params, x, **call):
    return multi_head_attention(params, x, x, config=CONFIG, **call)


@pytest.mark.parametrize("bytes_off", [0, 4, 60])
def test_parameters_do_not_follow_the_arrays_that_they_were_made_of(bytes_off):
    """jnp.asarray may share an aligned NumPy array's memory; a checkpoint is closed or reused."""

    def at_an_offset(x):
        raw = np.zeros(x.nbytes + 128, np.uint8)
        start = -raw.ctypes.data % 64 + bytes_off
        array = raw[start : start + x.nbytes].view(np.float32).reshape(x.shape)
        array[...] = x
        return array

    sizes = {"in_proj_weight": (24, 8), "in_proj_bias": (24,), "out_proj.weight": (8, 8)}
    sizes["out_proj.bias"] = (8,)
    draw = np.random.default_rng(0).standard_normal
    state = {name: at_an_offset(draw(shape, "float32")) for name, shape in sizes.items()}
    projections = ("query", "key", "value", "attention_output")
    arrays = [PARAMS[name][leaf] for name in projections for leaf in ("kernel", "bias")]
    weights = [at_an_offset(np.asarray(x)) for x in arrays]
    trees = [from_torch_state_dict(state, CONFIG), from_keras_weights(weights, CONFIG)]
    before = jax.tree.map(lambda x: np.array(x), trees)
    for array in (*state.values(), *weights):
        array[...] = 0
    for tree, kept in zip(trees, before):
        jax.tree.map(np.testing.assert_array_equal, tree, kept)


@pytest.mark.slow
@pytest.mark.parametrize("T", [pytest.param(12, marks=pytest.mark.slow), 100])
def test_a_bias_that_vmap_maps_has_the_gradient_of_each(T):
    x, biases = normal(0, 1, T, 2, 4), normal(1, 3, T, T)
    loss = lambda bias, x: (dot_product_attention(x, x, x, bias=bias) ** 2).sum()
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), in_axes=(0, None)))(biases, x)
    for i, bias in enumerate(biases):
        alone = jax.jit(jax.grad(loss, (0, 1)))(bias, x)
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], mapped), alone, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "x", [pytest.param(X, marks=pytest.mark.slow), LARGE], ids=["small", "blocks"]
)
def test_stacked_layers_under_scan_remat_and_map(x):
    stacked = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p, -p]), PARAMS)
    layers = [jax.tree.map(lambda p, i=i: p[i], stacked) for i in range(3)]

    def scanned(stacked, policy):
        layer = jax.checkpoint(lambda x, params: (x + attend(params, x), None), policy=policy)
        return jax.lax.scan(layer, x, stacked)[0]

    def looped(stacked):
        y = x
        for i in range(3):
            y = y + attend(jax.tree.map(lambda p, i=i: p[i], stacked), y)
        return y

    assert_close(jax.lax.map(lambda p: attend(p, x), stacked)[1], attend(layers[1], x), "float32")
    expected = jax.jit(jax.grad(lambda s: (looped(s) ** 2).mean()))(stacked)
    policy = jax.checkpoint_policies.dots_saveable
    gradient = jax.jit(jax.grad(lambda s: (scanned(s, policy) ** 2).mean()))(stacked)
    assert_trees_close(gradient, expected, "float32")


@pytest.mark.slow
def test_16_bit_computation_keeps_float32_gradients():
    config = CONFIG.replace(dtype="bfloat16")
    loss = lambda p: multi_head_attention(p, X, X, config=config).astype("float32").sum()
    gradient = jax.grad(loss)(PARAMS)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    expected = jax.grad(lambda p: attend(p, X).sum())(PARAMS)
    assert_trees_close(gradient, expected, "bfloat16")


def test_a_matmul_precision_for_all_changes_nothing_on_a_cpu():
    expected = attend(PARAMS, LARGE)
    for precision in ("bfloat16", "float32", "highest"):
        with jax.default_matmul_precision(precision):
            assert_close(attend(PARAMS, LARGE), expected, "float32")


THINGS = {
    "config": lambda: CONFIG,
    "linen": lambda: MultiHeadAttention.from_config(CONFIG),
    "mask": lambda: Mask.causal() & Mask.padding(key=np.arange(12)[None] < 7),
    "cache": lambda: init_cache(CONFIG, 2, 16),
    "cross cache": lambda: init_cross_cache(PARAMS, X, config=CONFIG),
}


@pytest.mark.parametrize("name", THINGS)
def test_what_people_hold_survives_pickle_and_copies(name):
    thing = THINGS[name]()
    for other in (pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing), copy.copy(thing)):
        assert type(other) is type(thing)
        if name in ("config", "linen"):
            assert other == thing
            continue
        assert jax.tree.structure(other) == jax.tree.structure(thing)
        jax.tree.map(np.testing.assert_array_equal, other, thing)


@pytest.mark.slow
@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}], ids=["plain", "causal"])
@pytest.mark.parametrize("sizes", [(0, 12, 12), (2, 0, 12), (2, 12, 0)], ids=str)
def test_nothing_to_attend_to(sizes, call):
    """No examples, no queries, no keys: shapes as ever, gradients finite."""
    B, T, S = sizes
    query, value = jnp.ones((B, T, 8)), jnp.ones((B, S, 8))

    def loss(params):
        output = multi_head_attention(params, query, value, config=CONFIG, **call)
        return output.sum(), output

    gradient, output = jax.grad(loss, has_aux=True)(PARAMS)
    assert output.shape == (B, T, 8)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((gradient, output)))
    if S == 0:
        bias = jnp.broadcast_to(PARAMS["attention_output"]["bias"], output.shape)
        np.testing.assert_array_equal(output, bias)
