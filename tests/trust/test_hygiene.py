"""Compile hygiene: what is data traces once; the switches by which people look for faults.

The table is face x derivative x feature x implementation; by default one row in 80 is run.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_params, x64
from hygiene import FACES, FEATURES, OF_THE_FUNCTION, Traced, arguments_of, nothing_compiled

import flax_mha.nnx
from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)

IMPLEMENTATIONS = ("reference", "blockwise")
WAYS = ("call", "grad")


def served(face, way, feature, implementation):
    if feature in OF_THE_FUNCTION and face != "function":
        return False
    if feature == "int8 weights" and way == "grad":  # weights that are not trained
        return False
    return feature != "scores" or implementation == "reference"


def rows(every):
    """The table; of it one row in `every` runs by default."""
    table = [
        row for row in itertools.product(FACES, WAYS, FEATURES, IMPLEMENTATIONS) if served(*row)
    ]
    marks = lambda i: pytest.mark.slow if i % every else ()
    return [pytest.param(*row, marks=marks(i)) for i, row in enumerate(table)]


@pytest.mark.parametrize(("face", "way", "feature", "implementation"), rows(80))
def test_changed_data_and_equal_configs_trace_once(face, way, feature, implementation):
    own = FACES[face]
    traced = Traced(getattr(own, way), own.jit, **own.options)
    traced.run(*arguments_of(face, feature, implementation, 1))
    for seed in (2, 3):
        arguments = arguments_of(face, feature, implementation, seed)
        with nothing_compiled():
            traced.run(*arguments)
    assert traced.count == 1


@pytest.mark.parametrize(("face", "way", "feature", "implementation"), rows(80))
def test_without_a_jit_of_the_user_nothing_is_compiled_again(face, way, feature, implementation):
    run = getattr(FACES[face], way)
    run(*arguments_of(face, feature, implementation, 1))
    for seed in (2, 3):
        arguments = arguments_of(face, feature, implementation, seed)
        with nothing_compiled():
            run(*arguments)


CONFIG = MultiHeadAttentionConfig(num_heads=2, key_dim=4, dropout=0.5)
X = normal(0, 2, 16, 8)
PARAMS = random_params(param_shapes(CONFIG, X.shape))
FLIPS = {
    "function": lambda training, key: multi_head_attention(
        PARAMS, X, X, config=CONFIG, dropout_key=key if training else None
    ),
    "linen": lambda training, key: MultiHeadAttention.from_config(CONFIG).apply(
        {"params": PARAMS}, X, X, training=training, rngs={"dropout": key}
    ),
    "nnx": lambda training, key: flax_mha.nnx.MultiHeadAttention.from_params(PARAMS, CONFIG)(
        X, X, training=training, rngs=key
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["call", "grad"])
@pytest.mark.parametrize("face", FLIPS)
def test_training_flips_trace_twice_in_all(face, way):
    run = FLIPS[face]
    if way == "grad":
        run = lambda training, key: jax.grad(lambda c: (FLIPS[face](training, key) * c).sum())(1.0)
    traced = Traced(run, static_argnums=0)
    for seed in range(6):
        traced.run(seed % 3 == 0, jax.random.key(seed))
    assert traced.count == 2


LINE = MultiHeadAttentionConfig(num_heads=2, key_dim=4, position="rotary")
RING = LINE.replace(sliding_window=5)
CACHES = {
    "line": lambda params, x: (LINE, init_cache(LINE, 2, 16)),
    "ring": lambda params, x: (RING, init_cache(RING, 2, 16, slack=2)),
    "int8": lambda params, x: (LINE, init_cache(LINE, 2, 16, "int8")),
    "cross": lambda params, x: (LINE, init_cross_cache(params, x, config=LINE)),
}


def decoder(name):
    """One step, and what it takes: parameters, one token, the cache."""
    params = random_params(param_shapes(LINE, X.shape))
    config, cache = CACHES[name](params, X)

    def step(params, x, cache):
        value = None if name == "cross" else x
        return multi_head_attention(params, x, value, config=config, cache=cache)

    return step, params, cache


@pytest.mark.parametrize(
    "name", ["line", *(pytest.param(x, marks=pytest.mark.slow) for x in list(CACHES)[1:])]
)
def test_a_decoding_loop_traces_once_on_the_device_in_donated_buffers(name):
    """No transfer from the host or to it, no leak, no warning that a buffer could not be used.

    Not under `debug_nans`, where JAX donates nothing.
    """
    step, params, cache = decoder(name)
    traced = Traced(step, donate_argnums=2)
    tokens = [normal(t, 2, 1, 8) for t in range(8)]
    with jax.transfer_guard("disallow"), jax.checking_leaks():
        for token in tokens:
            before, pointer = cache, cache.key.unsafe_buffer_pointer()
            output, cache = traced.run(params, token, cache)
            assert before.key.is_deleted()
            assert cache.key.unsafe_buffer_pointer() == pointer
    assert traced.count == 1
    assert cache.length.tolist() == [8, 8]
    fresh = decoder(name)[2]
    for token in tokens:
        expected, fresh = step(params, token, fresh)
    assert_close(output, expected, "float32")


def test_donated_parameters_are_written_over():
    def update(params, x):
        loss = lambda params: multi_head_attention(params, x, x, config=CONFIG).sum()
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    traced, params = Traced(update, donate_argnums=0), jax.tree.map(jnp.copy, PARAMS)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    for seed in range(3):
        old, params = params, traced.run(params, normal(seed, *X.shape))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)} == pointers
    assert traced.count == 1


@dataclasses.dataclass(frozen=True)
class Switch:
    """One of JAX's, and whether the call is compiled by the user under it."""

    on: object
    jit: bool = True


SWITCHES = {
    "checking_leaks": Switch(jax.checking_leaks),
    "debug_nans": Switch(lambda: jax.debug_nans(True)),
    "debug_key_reuse": Switch(lambda: jax.debug_key_reuse(True), jit=False),
    "x64": Switch(x64),
    "disable_jit": Switch(jax.disable_jit, jit=False),
    "transfer_guard": Switch(lambda: jax.transfer_guard("disallow")),
}
# Promotion of dtypes and of ranks is refused in every test: see tests/conftest.py.
SWITCHED = [
    pytest.param(*row, marks=pytest.mark.slow if i % 357 else ())
    for i, row in enumerate(itertools.product(SWITCHES, FACES, ("call", "grad"), FEATURES))
    if served(*row[1:], "reference")
]


@pytest.mark.parametrize(("switch", "face", "way", "feature"), SWITCHED)
def test_switches_change_nothing_and_find_nothing(switch, face, way, feature):
    run, own = getattr(FACES[face], way), FACES[face]
    arguments = arguments_of(face, feature, "reference", 1)
    expected = run(*arguments)
    arguments = arguments_of(face, feature, "reference", 1)  # with a PRNG key of its own
    with SWITCHES[switch].on():
        run = own.jit(run, **own.options) if SWITCHES[switch].jit else run
        results = run(*arguments)
    # By the largest entry of all: a key bias's gradient is the rounding error of large terms.
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for result, plain in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert result.dtype == plain.dtype
        assert_close(result, plain, "float32", scale=scale)


@pytest.mark.parametrize("switch", ["debug_nans", "debug_key_reuse", "transfer_guard"])
def test_each_switch_finds_the_fault_that_it_is_for(switch):
    key = jax.random.key(0)
    faults = {
        "debug_nans": lambda: jnp.log(-X).sum(),
        "debug_key_reuse": lambda: [FLIPS["function"](True, key) for _ in range(2)],
        "transfer_guard": lambda: X * np.float32(2),
    }
    with SWITCHES[switch].on(), pytest.raises(Exception, match=r"nan|consumed|reuse|Disallowed"):
        faults[switch]()
