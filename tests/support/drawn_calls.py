"""What hypothesis draws of `random_calls.Call`, and how a call is held against the oracle.

held(Call(T=5, S=7), way="vjp", jit=True)
"""

import contextlib
import math

import dense_oracle
import jax
import jax.numpy as jnp
import numpy as np
from helpers import TOLERANCES, x64
from hypothesis import settings
from hypothesis import strategies as st
from random_calls import SCORES, Call
from random_masks import masks

# So many numbers that a tile of small arrays holds all, some or one of the heads.
NUMBERS_A_TILE = 300
BLOCKS = st.tuples(st.integers(1, 9), st.integers(1, 9))
LENGTHS = st.integers(0, 13) | st.sampled_from([16, 17, 23, 31, 32, 33, 37, 41])
SMALL = st.tuples(st.just("normal"), st.sampled_from([1e-30, 1e-6, 1.0, 10.0]))
CONSTANTS = st.floats(-(2.0**127), 2.0**127, width=32)
HUGE = (
    st.tuples(st.just("normal"), st.sampled_from([1e4, 1e7, 1e9, 1e20, 1e30, 3e38]))
    | st.tuples(st.just("constant"), CONSTANTS)
    | st.tuples(st.just("removed"), st.just(0.0))
)
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def fewer(count):
    """For a test whose examples are dear: one in so many of what the profile allows."""
    return settings(max_examples=max(1, settings().max_examples // count))


def bias_of(draw, call, kinds):
    full = tuple(draw(st.booleans()) for _ in range(len(call["batch"]) + 3))
    return (full, *draw(kinds), draw(st.booleans()))


def maybe(draw, strategy, one_in=3):
    """Of every so many calls one has it."""
    return draw(strategy) if draw(st.integers(1, one_in)) == 1 else None


def sizes_of(draw, lengths=LENGTHS):
    return dict(
        batch=draw(st.sampled_from([(), (1,), (2,), (3,), (2, 2)])),
        T=draw(lengths),
        S=draw(lengths),
        K=draw(st.sampled_from([1, 2, 3, 4])),
        G=draw(st.sampled_from([1, 1, 2, 3])),
        H=draw(st.integers(1, 5)),
        V=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )


def terms_of(draw, call):
    """What is added to logits, or becomes of them; beside a huge bias only what rounds nothing."""
    is_huge = draw(st.integers(1, 4)) == 1
    if is_huge:
        return dict(
            on_grid=True,
            bias=bias_of(draw, call, HUGE),
            scale=draw(st.sampled_from([0.25, 0.5, 1.0])),
            sinks=maybe(draw, st.sampled_from([1.0, 30.0])),
        )
    distances = st.tuples(
        st.integers(1, 20), st.integers(-20, 5), st.sampled_from([None, "one", "each"])
    )
    return dict(
        bias=None if draw(st.booleans()) else bias_of(draw, call, SMALL),
        distances=maybe(draw, distances),
        score=maybe(draw, st.sampled_from(SCORES), 5),
        sinks=maybe(draw, st.sampled_from([1e-3, 1.0, 30.0])),
        soft_cap=maybe(draw, st.sampled_from([0.5, 2.0, 30.0])),
        scale=maybe(draw, st.sampled_from([0.7, -0.5, 0.0, 2.0])),
    )


def dropout_of(draw):
    start = st.tuples(*[st.integers(0, 3)] * 2, st.integers(0, 70), st.integers(0, 9))
    return dict(
        rate=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        start=maybe(draw, start, 2),
        shared=draw(st.booleans()),
    )


@st.composite
def calls(draw, implementations=("blockwise",), lengths=LENGTHS, **fixed):
    """Any call that these implementations might serve; `fixed` fields are as they are given."""
    call = sizes_of(draw, lengths) | fixed
    call |= terms_of(draw, call)
    call |= dict(mask=draw(masks()), offset=draw(st.sampled_from([None, None, "one", "each"])))
    call |= dict(mask_as_array=draw(st.integers(1, 5)) == 1, is_causal=draw(st.booleans()))
    side = st.none() | st.integers(0, 12)
    call |= dict(window=maybe(draw, st.integers(0, 12) | st.tuples(side, side), 4))
    if draw(st.integers(1, 4)) == 1:
        call |= dropout_of(draw)
    name = draw(st.sampled_from(implementations))
    call |= dict(implementation=name, return_residuals=draw(st.booleans()))
    if name in ("reference", None):
        call |= dict(return_weights=draw(st.booleans()))
    else:
        call |= dict(block_sizes=draw(BLOCKS))
    return Call(**{**call, **fixed})


# --- against the oracle -------------------------------------------------------------------------


def in_dtype(call):
    """The context in which a call's dtype exists."""
    return x64() if call.dtype == "float64" else contextlib.nullcontext()


def assert_near(found, expected, dtype, what, scale=0.0):
    """To the tolerance of the project's table, and -inf and NaN in the same places."""
    found, expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, not {expected.shape}"
    endless = ~np.isfinite(expected)
    np.testing.assert_array_equal(found[endless], expected[endless], err_msg=what)
    found, expected = found[~endless], expected[~endless]
    largest = max(1.0, scale, np.abs(expected).max(initial=0.0))
    assert np.isfinite(found).all(), f"{what}: not finite"
    error = np.abs(found - expected).max(initial=0.0) / largest
    assert error <= TOLERANCES[dtype], f"{what}: error {error:.3g} of the largest, {largest:.3g}"


def probes_of(call, outputs):
    """Cotangents of every output, rounded as it is; also of row_max, which has no part."""
    random = call.random("probes")
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), outputs)


def by_name(call, outputs):
    """Context, weights, row_max, row_sum, flattened over the batch; those that were asked for."""
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    names = ["context"] + ["weights"] * call.return_weights + ["residuals"] * call.return_residuals
    named = dict(zip(names, outputs, strict=True))
    if "residuals" in named:
        named["row_max"], named["row_sum"] = named.pop("residuals")
    lead, B = len(call.batch), math.prod(call.batch)
    return {name: np.asarray(x).reshape(B, *x.shape[lead:]) for name, x in named.items()}


def derivative(call, way, jit):
    """(outputs, gradients) by "vjp"; (outputs, tangents of the outputs) by "jvp"."""

    def pulled(arrays, probes):
        outputs, pull = jax.vjp(call.attend, arrays)
        return outputs, pull(probes)[0]

    def pushed(arrays, directions):
        return jax.jvp(call.attend, (arrays,), (directions,))

    run = pulled if way == "vjp" else pushed
    return jax.jit(run) if jit else run


def compared(call, outputs, problem, result):
    named = by_name(call, outputs)
    assert_near(named["context"], result.context_BTNV, call.dtype, "context")
    if "weights" in named:
        assert_near(named["weights"], result.weights_BNTS, call.dtype, "weights")
    if "row_max" in named:
        assert_near(named["row_max"], result.row_max_BNT, call.wide, "row_max")
        assert_near(named["row_sum"], result.row_sum_BNT, call.wide, "row_sum")


def cotangents_of(call, probes):
    named = {name: x.astype(np.float64) for name, x in by_name(call, probes).items()}
    return named["context"], named.get("weights", 0.0), named.get("row_sum", 0.0)


def held(call, way="vjp", jit=True):
    """The call's outputs and every gradient, or their slope along a direction, are the oracle's."""
    with in_dtype(call):
        arrays = call.arrays()
        problem = call.problem(arrays)
        result = dense_oracle.attention(problem)
        probes = probes_of(call, jax.eval_shape(call.attend, arrays))
        expected = call.gradients(problem, result, cotangents_of(call, probes))
        assert expected.keys() == arrays.keys()
        if way == "vjp":
            outputs, found = derivative(call, way, jit)(arrays, probes)
            compared(call, outputs, problem, result)
            for name, x in found.items():
                assert_near(x, expected[name], call.dtype, f"gradient of {name}")
            return
        directions = probes_of(call, arrays)
        outputs, tangents = derivative(call, way, jit)(arrays, directions)
        compared(call, outputs, problem, result)
        along = {name: expected[name] * np.asarray(x, np.float64) for name, x in directions.items()}
        ours, theirs = by_name(call, tangents), by_name(call, probes)
        ours.pop("row_max", None)
        slope = sum((x.astype(np.float64) * theirs[name]).sum() for name, x in ours.items())
        size = math.sqrt(sum((x**2).sum() for x in along.values()))
        assert_near(slope, sum(x.sum() for x in along.values()), call.dtype, "slope", scale=size)
