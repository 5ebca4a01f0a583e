"""The same key and numbers give the same bits: again, compiled anew, under load, elsewhere.

Across implementations, block sizes and meshes sums have other orders, so results agree within the
dtype's tolerance; which weights dropout drops is the same everywhere, exactly. Run as a program,
this file prints digests of results, for a test that compares two processes.
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import (
    ContextAxis,
    MultiHeadAttentionConfig,
    dot_product_attention,
    init_params,
    multi_head_attention,
)
from flax_mha.attention.dropout import keep_mask, words_of

HERE = ("reference", "blockwise", "pallas_interpreted")  # what runs on a CPU
B, T, S, N, K, H = 2, 131, 157, 4, 2, 16
RATE, KEY = 0.25, jax.random.key(3)
DROPOUT = {"dropout_rate": RATE, "dropout_key": KEY}
LENGTH, HEADS = 67, 8  # of the arrays from which a mask is read


def slowly(names):
    """The names as parameters: what is interpreted takes long."""
    marked = lambda x: pytest.param(x, marks=pytest.mark.slow)
    return [marked(x) if "interpreted" in x else x for x in names]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def arrays(T=T, S=S):
    sizes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, H)}
    sizes |= {"bias": (1, N, T, S), "sinks": (N,)}
    return {name: normal(i, *size) for i, (name, size) in enumerate(sizes.items())}


def attend(name, **call):
    """A new function of arrays: everything that a call has, forward and in every gradient."""
    call = {"is_causal": True, "implementation": name, "dropout_rate": RATE, **call}

    def both(arrays, dropout_key=KEY):
        run = lambda x: dot_product_attention(**x, **call, dropout_key=dropout_key)
        context, pull = jax.vjp(run, arrays)
        return {"context": context, **pull(jnp.cos(context))[0]}

    return jax.jit(both)


def layer(name):
    """The same of the layer and its parameters."""
    config = MultiHeadAttentionConfig(
        num_heads=N, key_dim=H, num_kv_heads=K, dropout=RATE, implementation=name
    )
    x = normal(9, B, T, 24)
    params = init_params(jax.random.key(1), config, x.shape)

    def both(arrays):
        def run(params):
            return multi_head_attention(params, x, x, config=config, dropout_key=KEY)

        output, pull = jax.vjp(run, arrays)
        return {"output": output, **pull(jnp.cos(output))[0]}

    return jax.jit(both), params


def digest(results):
    """One hash of all bits."""
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(results)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", slowly(HERE))
def test_a_program_gives_the_same_bits_again_and_under_load(name):
    """Alone, and while two threads run it at once and a third one keeps the cores busy."""
    run, given = attend(name), arrays()
    first = digest(run(given, KEY))
    assert digest(run(given, KEY)) == first
    busy = jax.jit(lambda x: (x @ x) / 1e3)
    work = busy(normal(0, 256, 256))
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        load = threads.submit(lambda: [busy(work).block_until_ready() for _ in range(30)])
        runs = [threads.submit(lambda: digest(run(given, KEY))) for _ in range(8)]
        assert {one.result() for one in runs} == {first}
        load.result()
    assert digest(run(given, jax.random.key(4))) != first


def digests():
    """Of all implementations and of the layer."""
    runs = {name: (attend(name), arrays()) for name in HERE} | {"layer": layer("blockwise")}
    return {name: digest(run(given)) for name, (run, given) in runs.items()}


@pytest.mark.slow
def test_another_process_that_compiles_anew_gives_the_same_bits():
    """Without the cache of compiled programs that this one has."""
    uncached = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    here = [sys.executable, __file__]
    other = subprocess.run(here, env=uncached, capture_output=True, text=True)
    assert not other.returncode, other.stderr
    assert json.loads(other.stdout) == digests()


# --- the mask of dropout ------------------------------------------------------------------------


def readable():
    """Arrays whose context is the weights that stay, and so is the gradient of the values."""
    query, key = normal(1, 8, LENGTH, HEADS, 4), normal(2, 8, LENGTH, HEADS, 4)
    one_hot = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (8, LENGTH, HEADS, LENGTH))
    return query, key, one_hot


def masks_of(**call):
    """What is kept, `[B, N, T, S]`: forward, and as the backward pass drew it."""

    def both(query, key, value):
        attend = lambda value: dot_product_attention(query, key, value, **DROPOUT, **call)
        context, pull = jax.vjp(attend, value)
        return context, pull(value)[0]

    return lambda *arrays: kept(*jax.jit(both)(*arrays))


def kept(context, d_value):
    forward = np.asarray(context).transpose(0, 2, 1, 3) != 0
    return forward, np.asarray(d_value).transpose(0, 2, 3, 1) != 0


@functools.cache
def drawn(shared=False):
    return np.asarray(keep_mask(words_of(KEY), RATE, (8, HEADS, LENGTH, LENGTH), shared=shared))


def assert_drawn(found, shared=False):
    for mask in found:
        np.testing.assert_array_equal(mask, drawn(shared))


BLOCKS = [None, (4, 3), (32, 64), (64, 32), (50, 7), (1, 67), (67, 1), (128, 128)]
WAYS = [("reference", None), *(("blockwise", x) for x in BLOCKS), ("pallas_interpreted", None)]


def ways():
    for name, blocks in WAYS:
        slow = name == "pallas_interpreted" or (name, blocks) != ("blockwise", (50, 7))
        yield pytest.param(name, blocks, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks"), list(ways()), ids=str)
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_implementation_and_block_size_drops_the_same_weights(name, blocks, shared):
    call = {"implementation": name, "block_sizes": blocks, "broadcast_dropout": shared}
    assert_drawn(masks_of(**call)(*readable()), shared)


MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
STRATEGIES = ["ring", "all_gather", "all_to_all"]


def placed(mesh, spec, tree=None):
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    place = lambda x: jax.device_put(x, sharding)
    return jax.tree.map(place, readable() if tree is None else tree)


def made(kind, sizes, names):
    devices = jax.devices()[: math.prod(sizes)]
    types = (getattr(jax.sharding.AxisType, kind),) * len(sizes)
    return jax.make_mesh(sizes, names, types, devices=devices)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.slow
def test_every_mesh_drops_the_same_weights(sizes, kind, name):
    mesh = made(kind, sizes, ("data", "model"))
    with jax.set_mesh(mesh):
        spec = ("data", None, "model")
        assert_drawn(masks_of(implementation=name)(*placed(mesh, spec)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.slow
def test_every_strategy_along_a_context_axis_drops_the_same_weights(strategy, devices):
    mesh = made("Auto", (devices,), ("context",))
    with jax.set_mesh(mesh):
        call = {"context_axis": ContextAxis("context", strategy)}
        assert_drawn(masks_of(**call)(*placed(mesh, ())))


# --- numbers ------------------------------------------------------------------------------------


@functools.cache
def of_reference(T=T, S=S):
    return attend("reference")(arrays(T, S))


def assert_same_numbers(found, expected):
    for name, x in expected.items():
        bound = 1e-5 * max(1.0, np.abs(x).max())
        np.testing.assert_allclose(found[name], x, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize(("name", "blocks"), list(ways())[1:], ids=str)
@pytest.mark.slow
def test_block_sizes_and_implementations_agree_within_the_tolerance(name, blocks):
    """Dropout, bias, sinks and causal order; lengths that no block divides; every gradient."""
    assert_same_numbers(attend(name, block_sizes=blocks)(arrays()), of_reference())


@pytest.mark.parametrize("name", ["reference", "blockwise"])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.slow
def test_meshes_agree_within_the_tolerance(kind, sizes, name):
    mesh, heads = made(kind, sizes, ("data", "model")), ("data", None, "model")
    specs = {x: heads for x in ("query", "key", "value")} | {"bias": (None, "model"), "sinks": ()}
    with jax.set_mesh(mesh):
        given = {x: placed(mesh, specs[x], array) for x, array in arrays().items()}
        assert_same_numbers(attend(name)(given), of_reference())


# The third cuts heads, which must be as many as devices.
@pytest.mark.parametrize(
    ("devices", "strategy"),
    [*itertools.product([2], STRATEGIES), *itertools.product([4], STRATEGIES[:2])],
)
@pytest.mark.slow
def test_strategies_along_a_context_axis_agree_within_the_tolerance(devices, strategy):
    mesh = made("Auto", (devices,), ("context",))
    with jax.set_mesh(mesh):
        given, call = placed(mesh, (), arrays(128, 128)), ContextAxis("context", strategy)
        assert_same_numbers(attend(None, context_axis=call)(given), of_reference(128, 128))


if __name__ == "__main__":
    print(json.dumps(digests()))
