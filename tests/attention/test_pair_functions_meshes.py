"""Masks and scores as functions of pairs over meshes without a context axis, and under `vmap`."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pair_examples import CASES, PLAIN, assert_all_close
from pair_oracles import NAMES, Sizes, attend, expected, probe_of, with_gradients

from flax_mha import Mask, dot_product_attention, explain

CUT = P("data", None, "model")


def results(name, kind, implementation, blocks):
    """{context, and each gradient}: examples cut over "data", heads over "model"."""
    example, sizes = CASES[name], Sizes(19, 23)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    probe = probe_of(sizes).astype("float32")

    def put(name, x):
        return jax.device_put(x, NamedSharding(mesh, CUT if name in NAMES else P()))

    options = {"implementation": implementation, "block_sizes": blocks}
    function = lambda arrays: attend(example, sizes, arrays, **options)
    with jax.set_mesh(mesh):
        arrays = {x: put(x, array) for x, array in example.all_arrays(sizes=sizes).items()}
        run = jax.jit(lambda arrays: with_gradients(function, arrays, probe))
        return run(arrays)


FUNCTIONS = [
    "mask, document",
    "mask, widths of heads",
    "joined, prefix-LM",
    "score, ALiBi",
    "score, relative table",
    "score, features",
]


@pytest.mark.slow
@PLAIN
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_and_heads_over_a_mesh(name, kind, implementation, blocks):
    """b and n are those of the whole call on every device, and gradients are sums over all."""
    wanted = expected(CASES[name], sizes=Sizes(19, 23))
    assert_all_close(results(name, kind, implementation, blocks), wanted, "float32", name)


# --- where a call has a part of the caller's arrays, its indices count that part -----------------

SIZES = Sizes(19, 23, B=4)
LENGTHS = jnp.array([2, 9, 5, 14])


def arrays():
    all_arrays = CASES["mask, causal"].all_arrays(sizes=SIZES)
    return [jnp.asarray(all_arrays[name]) for name in NAMES]


def attend_to_first(query, key, value, lengths, slopes):
    """Keys before a length of each example, with a slope for each head."""
    mask = Mask.causal() | Mask.function(lambda b, n, t, s: s < lengths[b])
    score = lambda x, b, n, t, s: x + slopes[n] * (t - s).astype(x.dtype)
    return dot_product_attention(query, key, value, mask=mask, score=score)


SLOPES = jnp.array([0.1, -0.2, 0.3, -0.4])


def gradients(function, *arguments):
    """Of the loss of all results, to each array of floats."""
    loss = lambda *moving: (function(*moving[:3], LENGTHS, moving[3]) ** 2).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments)


def close(results, wanted):
    for one, other in zip(results, wanted):
        assert_close(one, other, "float32")


@pytest.mark.slow
def test_a_shard_map_of_the_caller_s():
    """An array that is cut like the tokens is looked up by the device's own b and n."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = (CUT, CUT, CUT, P("data"), P("model"))
    cut = jax.shard_map(attend_to_first, mesh=mesh, in_specs=specs, out_specs=CUT)
    close(gradients(cut, *arrays(), SLOPES), gradients(attend_to_first, *arrays(), SLOPES))


@pytest.mark.slow
def test_a_shard_map_of_the_caller_s_with_whole_arrays():
    """One that is whole needs the number of the device's first example: b begins at 0 on each."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def part(query, key, value, lengths, slopes):
        first = jax.lax.axis_index("data")
        here = jax.lax.dynamic_slice_in_dim(lengths, first, 1)
        return attend_to_first(query, key, value, here, slopes)

    rows = P("data")
    cut = jax.shard_map(part, mesh=mesh, in_specs=(rows,) * 3 + (P(), P()), out_specs=rows)
    close(gradients(cut, *arrays(), SLOPES), gradients(attend_to_first, *arrays(), SLOPES))


@pytest.mark.slow
def test_a_band_is_found_within_a_shard_map():
    """Of a function that closes over nothing, by a program that runs while the call is traced."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mask = Mask.function(lambda b, n, t, s: jnp.abs(t - s) < 5)
    attend = lambda query, key, value: dot_product_attention(query, key, value, mask=mask)
    rows = P("data")
    with jax.set_mesh(mesh):
        cut = jax.shard_map(attend, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)
        result = jax.jit(cut)(*arrays())
    assert_close(result, attend(*arrays()), "float32")


@pytest.mark.parametrize("cut", ["examples", "heads"])
def test_under_vmap_indices_are_those_of_one_call(cut):
    """b is 0 of one example; an array that the map cuts has that call's entries."""
    if cut == "examples":
        one = lambda query, key, value, length, slopes: attend_to_first(
            query, key, value, length[None], slopes
        )
        mapped = jax.vmap(one, (0, 0, 0, 0, None))
    else:
        heads = lambda x: x.reshape(*x.shape[:2], 2, -1, x.shape[-1])
        one = jax.vmap(attend_to_first, (2, 2, 2, None, 0), 2)
        mapped = lambda query, key, value, lengths, slopes: one(
            *map(heads, (query, key, value)), lengths, slopes.reshape(2, -1)
        ).reshape(*query.shape[:3], -1)
    close(gradients(mapped, *arrays(), SLOPES), gradients(attend_to_first, *arrays(), SLOPES))


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_shard_map_the_kernel_serves_the_same_scores(check_vma):
    """There JAX writes steps into a derivative that say where a number is, and do nothing."""
    score = lambda x, b, n, t, s: x + SLOPES[n] * (t - s).astype(x.dtype)
    mesh, told = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), []

    def part(query, key, value):
        told.append(explain(query, key, value, score=score, platform="tpu")["pallas_tpu"])
        return query

    mapped = jax.shard_map(
        part, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    jax.eval_shape(mapped, *arrays())
    assert told[0].startswith("ok")
