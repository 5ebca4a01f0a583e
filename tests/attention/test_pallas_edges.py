"""The TPU kernel where numbers or sizes are extreme, and within other transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, x64
from kernel_cases import QUICKLY, arrays_of, assert_beside, attend, compare, results

from flax_mha import Mask, dot_product_attention
from flax_mha.attention import DistanceBias

KERNEL = "pallas_interpreted"
SMALL = dict(block_sizes=(128, 128))
LEAST = float(np.finfo("float32").min)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [jnp.nan, pytest.param(jnp.inf, marks=pytest.mark.slow)])
def test_what_removed_positions_hold_goes_nowhere(broken):
    arrays = arrays_of(150, 140)
    queries = jnp.arange(150)[None] < jnp.array([[150], [131]])
    keys = jnp.arange(140)[None] < jnp.array([[129], [20]])
    removed = {"query": ~queries, "key": ~keys, "value": ~keys}
    filled = lambda fill: {
        name: jnp.where(removed[name][..., None, None], fill, x) for name, x in arrays.items()
    }
    call = dict(mask=Mask.padding(queries, keys), **SMALL)
    expected = results(filled(0.0), "reference", **call)
    compare(results(filled(broken), KERNEL, **call), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bfloat16", 1e3), *(pytest.param("float32", x, marks=pytest.mark.slow) for x in (1e2, 1e4))],
)
def test_weights_sum_to_one_whatever_the_logits(dtype, size):
    """Logits of 1e4 to 1e8: a row's maximum is what it is shifted by, forward and backward."""
    arrays = arrays_of(200, 260, dtype=dtype)
    arrays |= {name: arrays[name] * jnp.asarray(size, dtype) for name in ("query", "key")}
    arrays["value"] = jnp.ones_like(arrays["value"])
    function = lambda arrays: attend(arrays, KERNEL, **SMALL)

    def run(arrays):
        (context, row_max, _), back = jax.vjp(function, arrays)
        ones, zeros = jnp.ones_like(context), jnp.zeros_like(row_max)
        return context, row_max, back((ones, zeros, zeros))[0]

    context, row_max, gradient = jax.jit(run, compiler_options=QUICKLY)(arrays)
    assert row_max.max() > 10 * size
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(context.astype("float32"), 1, rtol=tolerance)
    total = gradient["value"].astype("float32").sum((1, 2))
    np.testing.assert_allclose(total, 200 * 4, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("fill", [-jnp.inf, LEAST, LEAST / 2, -1e30])
def test_a_bias_that_hides_keys_or_whole_rows(fill):
    """-inf hides them; of a row of equal finite numbers, however low, the softmax is even."""
    bias = jnp.where(normal(1, 2, 4, 150, 260) > 0.5, fill, normal(2, 2, 4, 150, 260))
    bias = bias.at[:, :, 7].set(fill).at[:, :, 20, :200].set(fill)
    assert_beside(arrays_of(150, 260), bias=bias, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("fill", [-jnp.inf, LEAST])
def test_a_bias_of_low_numbers_under_a_mask(fill):
    bias = jnp.where(jnp.arange(150)[:, None] % 3 == 0, fill, jnp.zeros((1, 1, 150, 260)))
    call = dict(mask=Mask.window(3, 200), sinks=jnp.array([0.0, -1.0, LEAST, 2.0]))
    assert_beside(arrays_of(150, 260), bias=jnp.broadcast_to(bias, (1, 4, 150, 260)), **call)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, pytest.param(-3.0, marks=pytest.mark.slow), 1e-9])
def test_distances_as_large_as_numbers_are(scale):
    """They are divided by a factor of the scale, and none of the quotients overflows."""
    values = jnp.asarray([[LEAST, LEAST, -LEAST, -LEAST, 0.5 * LEAST, -jnp.inf, 1.0, 2.0]] * 4)
    arrays = arrays_of(150, 140, H=11, dtype="bfloat16")
    call = dict(distance_bias=DistanceBias(values, first=-4), scale=scale, **SMALL)
    context, *rows = attend(arrays, KERNEL, **call)
    expected, *expected_rows = attend(arrays, "reference", **call)
    assert_close(context, expected, "bfloat16", "context")
    for row, expected_row in zip(rows, expected_rows):
        np.testing.assert_allclose(row, expected_row, rtol=1e-5)


@pytest.mark.parametrize("sizes", [dict(T=0), dict(S=0), dict(B=0), dict(N=0, K=1)], ids=str)
def test_nothing(sizes):
    arrays = arrays_of(**(dict(T=130, S=130) | sizes))
    if "N" in sizes:
        arrays["key"], arrays["value"] = arrays["key"][:, :, :0], arrays["value"][:, :, :0]
    outcomes = []
    for name in (KERNEL, "reference"):
        try:
            outcomes.append(results(arrays, name, is_causal=True))
        except (ValueError, TypeError) as error:
            outcomes.append(str(error))
    ours, expected = outcomes
    if isinstance(expected, str):
        assert ours == expected
    else:
        compare(ours, expected, 0.0)


@pytest.mark.slow
def test_float32_in_x64():
    """Indices and constants are of 64 bits there, but for those that say what they are."""
    with x64():
        call = dict(is_causal=True, dropout_rate=0.3, dropout_key=jax.random.key(0))
        ids = jnp.arange(150)[None] // 60 + (jnp.arange(150)[None] // 100 << 40)
        call["mask"] = Mask.segments(ids, ids)
        assert ids.dtype == "int64"
        bias = normal(3, 1, 4, 1, 150)
        assert_beside(arrays_of(150, 150), bias=bias, dropout_start=(0, 0, 5, 0), **call, **SMALL)


@pytest.mark.slow
def test_no_nan_arises_on_the_way():
    """Of rows that may attend nowhere, and of tiles without a pair."""
    with jax.debug_nans(True):
        mask = Mask.causal(jnp.array([-140, 0])) & Mask.padding(None, jnp.arange(150)[None] > 20)
        assert_beside(arrays_of(150, 150), mask=mask, soft_cap=2.0, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["second", "jvp", "checkpoint", "scan"])
def test_other_transformations(transform):
    arrays = arrays_of(140, 130, B=1, N=2, K=1, H=8, V=8) | {"bias": normal(6, 1, 2, 140, 130)}

    def loss(name, arrays):
        context = attend(arrays, name, is_causal=True, soft_cap=3.0)[0]
        return (context**2).sum()

    def directional(name, arrays):
        gradient = jax.grad(functools.partial(loss, name))(arrays)
        return sum((x * jnp.cos(x)).sum() for x in jax.tree.leaves(gradient))

    def scanned(name, arrays):
        step = lambda total, scale: (
            total + loss(name, {n: x * scale for n, x in arrays.items()}),
            0,
        )
        return jax.lax.scan(step, jnp.float32(0), jnp.array([1.0, 0.5]))[0]

    functions = {
        "second": lambda name: jax.grad(functools.partial(directional, name)),
        "jvp": lambda name: lambda x: jax.jvp(functools.partial(loss, name), (x,), (x,))[1],
        "checkpoint": lambda name: jax.grad(jax.checkpoint(functools.partial(loss, name))),
        "scan": lambda name: jax.grad(functools.partial(scanned, name)),
    }
    run = lambda name: jax.jit(functions[transform](name), compiler_options=QUICKLY)(arrays)
    for ours, one in zip(*(jax.tree.leaves(run(name)) for name in (KERNEL, "reference"))):
        np.testing.assert_allclose(ours, one, atol=1e-5 * np.abs(one).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_other_batch_axes(batch):
    x = normal(0, *batch, 130, 2, 8)
    call = lambda name: dot_product_attention(x, x, x, is_causal=True, implementation=name)
    np.testing.assert_allclose(call(KERNEL), call("reference"), atol=1e-6)
