"""Derivatives of every order over blocks are those of the reference, which JAX derives by itself.

In float64, where the two agree to 1e-10 and an error of order would show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES
from helpers import assert_close, normal, x64

from flax_mha import Mask, dot_product_attention

EXTRAS = ("bias", "sinks", "distance_bias")


def arrays_of(case, dtype):
    """Everything that has a derivative; of a distance bias, the values."""
    arrays = {name: jnp.asarray(x, dtype) for name, x in case.arrays().items()}
    for name in set(EXTRAS) & set(case.call):
        arrays[name] = jnp.asarray(getattr(case.call[name], "values", case.call[name]), dtype)
    return arrays


def function_of(case, blocks, with_residuals=False):
    """arrays -> the context, and the row sums too where asked for."""
    implementation = "reference" if blocks is None else "blockwise"
    options = dict(implementation=implementation, block_sizes=blocks)
    call = {name: x for name, x in case.call.items() if name not in EXTRAS}

    def run(arrays):
        given = dict(arrays)
        if "distance_bias" in given:
            bias = case.call["distance_bias"]
            given["distance_bias"] = dataclasses.replace(bias, values=given["distance_bias"])
        result = dot_product_attention(**given, **call, **options, return_residuals=with_residuals)
        return (result[0], result[1].row_sum_BNT) if with_residuals else result

    return run


def loss_of(function):
    """A scalar that is not linear in the result."""
    return lambda arrays: sum((jnp.sin(x) * x).sum() for x in jax.tree.leaves(function(arrays)))


def directions(arrays, seed):
    return {
        name: jnp.asarray(normal(seed + i, *x.shape), x.dtype)
        for i, (name, x) in enumerate(sorted(arrays.items()))
    }


def along(gradient, direction):
    return sum((gradient[name] * x).sum() for name, x in direction.items())


def jvp(f, x, d, _):
    return jax.jvp(f, (x,), (d,))[1]


def linearized(f, x, d, _):
    return jax.linearize(f, x)[1](d)


def gradient(f, x, *_):
    return jax.grad(loss_of(f))(x)


def forward_over_reverse(f, x, d, _):
    return jax.jvp(jax.grad(loss_of(f)), (x,), (d,))[1]


def reverse_over_forward(f, x, d, _):
    return jax.grad(lambda x: jax.jvp(loss_of(f), (x,), (d,))[1])(x)


def reverse_over_reverse(f, x, d, _):
    return jax.grad(lambda x: along(jax.grad(loss_of(f))(x), d))(x)


def forward_over_forward(f, x, d, e):
    return jax.jvp(lambda x: jax.jvp(f, (x,), (d,))[1], (x,), (e,))[1]


def third_order(f, x, d, e):
    return jax.grad(lambda x: along(reverse_over_reverse(f, x, d, None), e))(x)


def third_order_forward(f, x, d, e):
    return jax.jvp(lambda x: forward_over_reverse(f, x, d, None), (x,), (e,))[1]


DERIVATIVES = {
    f.__name__: f
    for f in (
        jvp,
        linearized,
        gradient,
        forward_over_reverse,
        reverse_over_forward,
        reverse_over_reverse,
        forward_over_forward,
        third_order,
        third_order_forward,
    )
}


def check(derivative, case, blocks=(8, 4), with_residuals=False):
    with x64():
        x = arrays_of(case, "float64")
        d, e = directions(x, 40), directions(x, 60)
        run = jax.jit(derivative, static_argnums=0)
        functions = [function_of(case, sizes, with_residuals) for sizes in (blocks, None)]
        got, expected = (run(f, x, d, e) for f in functions)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * (1 + np.abs(b).max(initial=0)))


# Of these every derivative; of the others by turns a forward one, and one that is transposed twice.
EVERY = ("all masks", "everything else")
TURNS = ("jvp", "reverse_over_reverse")
TABLE = [
    (name, derivative)
    for i, name in enumerate(CASES)
    for derivative in (DERIVATIVES if name in EVERY else TURNS[i % 2 :][:1])
]


@pytest.mark.parametrize(("name", "derivative"), TABLE)
def test_each_order_of_each_case(name, derivative):
    check(DERIVATIVES[derivative], CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["jvp", "gradient", "reverse_over_reverse"])
@pytest.mark.parametrize("name", ["long causal", "all masks", "sinks"])
def test_of_the_residuals_too(name, derivative):
    check(DERIVATIVES[derivative], CASES[name], with_residuals=True)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e9, np.finfo("float32").min / 2], ids=str)
def test_a_shift_of_a_row_s_logits_moves_no_derivative(shift):
    """Beside a row_max of 1e9 float32 has no digit left for a sum: both say the same of it."""
    x, d = normal(0, 2, 40, 2, 8), normal(1, 2, 40, 2, 8)
    bias = jnp.full((1, 1, 40, 1), shift, "float32")

    def attend(name, blocks):
        call = dict(bias=bias, is_causal=True, implementation=name, block_sizes=blocks)
        return lambda x: dot_product_attention(x, x, x, **call)

    assert_alike(attend, x, d)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding", "segments"])
def test_garbage_reaches_no_derivative(kind):
    """NaN at removed positions, in the arrays and in the direction."""
    good, T = 24, 40
    x, d = (normal(i, 2, T, 2, 8).at[:, good:].set(jnp.nan) for i in range(2))
    ids = (jnp.arange(T)[None] >= good).astype("int32").repeat(2, axis=0)
    mask = Mask.padding(ids == 0, ids == 0) if kind == "padding" else Mask.segments(ids, ids)

    def attend(name, blocks):
        call = dict(mask=mask, implementation=name, block_sizes=blocks)
        return lambda x: dot_product_attention(x, x, x, **call)[:, :good]

    assert_alike(attend, x, d)


def assert_alike(attend, x, d):
    """Blocks against the reference, in float32; finite."""
    for derivative in (jvp, forward_over_reverse, reverse_over_reverse):
        f, g = attend("blockwise", (16, 8)), attend("reference", None)
        run = jax.jit(derivative, static_argnums=0)
        got, expected = (run(lambda x, f=f: f(x["x"]), {"x": x}, {"x": d}, None) for f in (f, g))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert np.isfinite(a).all(), derivative
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["query", "value", "bias"])
def test_of_one_array_alone(name):
    """What is not asked for is not moved, and has no gradient."""
    case, blocks = CASES["bias"], (8, 4)
    with x64():
        arrays = arrays_of(case, "float64")

        def hessian_product(sizes):
            f = function_of(case, sizes)
            one = lambda x: loss_of(f)({**arrays, name: x})
            direction = directions(arrays, 40)[name]
            forward = jax.jvp(one, (arrays[name],), (direction,))[1]
            return forward, jax.jvp(jax.grad(one), (arrays[name],), (direction,))[1]

        got, expected = hessian_product(blocks), hessian_product(None)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", ["query", "all but the value", "direction"])
def test_vmap_of_a_hessian_product(mapped):
    """Arrays that all examples share, and those that they do not, in any derivative."""
    case = CASES["distance bias"]
    with x64():
        x = arrays_of(case, "float64")
        names = {"query": ["query"], "all but the value": [n for n in x if n != "value"]}
        moved = names.get(mapped, [])
        stacked = {n: jnp.stack([y, 0.3 * y, y - 1]) if n in moved else y for n, y in x.items()}
        axes = {n: 0 if n in moved else None for n in x}
        d = directions(x, 40)
        ds = {n: jnp.stack([y, -y, 2 * y]) if mapped == "direction" else y for n, y in d.items()}
        d_axes = 0 if mapped == "direction" else None

        def run(sizes):
            f = function_of(case, sizes)
            one = functools.partial(third_order_forward, f)
            return jax.jit(
                jax.vmap(lambda x, d: one(x, d, d), in_axes=(axes, d_axes))
            )(stacked, ds)  # fmt: skip

        got, expected = run((8, 4)), run(None)
    for name in x:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("derivative", ["jvp", "forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype, derivative):
    """Computed in float32, rounded to 16 bits at the end: as near as the inputs' own rounding."""
    case = CASES["long causal"]
    half = {name: x.astype(dtype) for name, x in arrays_of(case, "float32").items()}
    d, e = directions(half, 40), directions(half, 60)
    got = DERIVATIVES[derivative](function_of(case, (8, 4)), half, d, e)
    wide = jax.tree.map(lambda x: x.astype("float32"), (half, d, e))
    expected = DERIVATIVES[derivative](function_of(case, None), *wide)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            a.astype("float32"), b, atol=0.03 * float(np.abs(b).max()), err_msg=derivative
        )


@pytest.mark.slow
def test_jacobians():
    case = CASES["causal"]
    arrays = arrays_of(case, "float32")
    scaled = lambda f: lambda w: f({**arrays, "query": arrays["query"] * w[None, None, :, None]})
    heads = jnp.asarray([1.0, 0.5, 2.0])
    functions = [scaled(function_of(case, sizes)) for sizes in ((8, 4), None)]
    for jacobian in (jax.jacfwd, jax.jacrev, lambda f: jax.hessian(lambda w: (f(w) ** 2).sum())):
        got, expected = (jacobian(f)(heads) for f in functions)
        assert_close(got, expected, "float32")


def test_a_policy_keeps_the_context_by_its_name():
    """Without the name the backward pass would run the forward one again."""
    case = CASES["long causal"]
    arrays = arrays_of(case, "float32")
    f = function_of(case, (8, 4))
    names = jax.checkpoint_policies.save_only_these_names("flax_mha_context", "flax_mha_residuals")

    def forwards(policy):
        loss = lambda x: loss_of(jax.checkpoint(f, policy=policy))(x)
        text = str(jax.make_jaxpr(jax.grad(loss))(arrays))
        return text.count("Forward(")

    assert forwards(jax.checkpoint_policies.nothing_saveable) == 2
    assert forwards(names) == 1
