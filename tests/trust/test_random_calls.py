"""Calls that nobody wrote: `dot_product_attention` against a dense oracle in float64.

By default a few, the same on every run; `--hypothesis-profile=long` draws anew until it is stopped.
A failure prints the `Call(...)` of which `held(...)` is the runnable example.
"""

import dataclasses
import functools
import re

import dense_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from drawn_calls import NUMBERS_A_TILE, calls, fewer, held, in_dtype
from hypothesis import example, given, note
from hypothesis import strategies as st
from random_calls import Call

from flax_mha.attention.blockwise import tile_sizes
from flax_mha.attention.canonical import canonical
from flax_mha.attention.dispatch import bound
from flax_mha.core.platform import Place

OPTIMIZED = {"xla_backend_optimization_level": 3}
WAYS = st.sampled_from(["vjp", "vjp", "jvp"])


@pytest.fixture(autouse=True, scope="module")
def several_tiles_of_heads():
    """Small arrays fall into several tiles of examples, heads, queries and keys, some turned.

    One program serves all calls of one signature: those of other sizes are forgotten.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tile_sizes.NUMBERS_A_TILE, "cpu", NUMBERS_A_TILE)
        patch.setattr(tile_sizes, "FEWEST_TURNED", 16)
        jax.clear_caches()
        yield
    jax.clear_caches()


def check(call, way, jit):
    note(f"held({call!r}, way={way!r}, jit={jit})")
    held(call, way, jit)


@pytest.mark.slow
def test_small_calls_fall_into_several_tiles_of_heads():
    inputs, _ = canonical_of(GROUPED)
    tiling = tile_sizes.tiling_of(inputs, GROUPED.block_sizes, Place("cpu"))
    assert (tiling.k, tiling.K, tiling.G) == (2, 4, 3)
    assert min(tiling.query_blocks, tiling.key_blocks) > 2


def canonical_of(call):
    """What an implementation is given."""
    whole = call.whole(call.arrays())
    whole.pop("implementation")
    data, static, _, _ = bound(*(whole.pop(x) for x in ("query", "key", "value")), whole)
    return canonical(**data, **static, axis=None, scales=None)


# Grouped heads in several tiles; and several key blocks under a mask with offsets of examples.
GROUPED = Call((2,), 13, 11, 4, 3, 3, 2, block_sizes=(4, 4), is_causal=True)
MOVED = Call((3,), 17, 19, 2, mask=(("window", 5, 4),), offset="each", seed=3, block_sizes=(3, 4))
# Parts that only functions of pairs say, of no tokens.
JOINED = ("or", ("causal",), ("not", ("segments", 2, False, 0)))
NONE = Call((2,), 0, 3, mask=(JOINED, ("not", ("padding", True, True, True, 1))), score="table")
# Of its blocks some lie wholly within the window, and end where it does.
BANDED = Call((2,), 17, 19, 2, mask=(("window", 4, 3),), block_sizes=(3, 4))


@fewer(10)
@example(BANDED, "vjp", True)
@example(GROUPED, "vjp", True)
@example(MOVED, "vjp", True)
@example(NONE, "vjp", True)
@example(dataclasses.replace(NONE, T=3, S=0), "jvp", False)
@given(calls(), WAYS, st.booleans())
def test_blocks_of_any_call_give_the_oracle_s_numbers(call, way, jit):
    check(call, way, jit)


@fewer(10)
@given(calls(["reference", None]), WAYS, st.booleans())
def test_the_reference_and_the_choice_of_any_call_give_the_oracle_s_numbers(call, way, jit):
    check(call, way, jit)


@pytest.mark.slow
@fewer(10)
@given(calls(["pallas_interpreted"], st.integers(0, 13)), st.booleans())
def test_the_kernel_gives_the_oracle_s_numbers_or_names_its_reason(call, jit):
    with in_dtype(call):
        reason = call.refusal()
        if reason is not None:
            note(repr(call))
            with pytest.raises(NotImplementedError, match=re.escape(reason)):
                call.attend(call.arrays())
            return
    check(call, "vjp", jit)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["vjp", "jvp"])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("rate", [None, 0.3])
def test_a_key_that_has_all_of_a_row_passes_nothing_on(rate, implementation, way):
    """Logits of 1e30: their gradient is 0, and not a rounding error times a key of 1e15.

    As a user's program is compiled: without LLVM's optimization fewer products are rounded once.
    """
    call = Call((2,), 11, 19, 2, 2, 5, 7, rate=rate, implementation=implementation)
    if implementation == "blockwise":
        call = dataclasses.replace(call, block_sizes=(4, 8))
    arrays, compiled = call.arrays(), functools.partial(jax.jit, compiler_options=OPTIMIZED)
    huge = {name: 1e15 * x if name != "value" else x for name, x in arrays.items()}
    probe = jnp.asarray(call.normal("probe", 2, 11, 4, 7), "float32")
    if way == "vjp":
        found = compiled(lambda huge: jax.vjp(call.attend, huge)[1](probe)[0])(huge)
        assert found["value"].any()
        assert not found["query"].any()
        assert not found["key"].any()
    else:
        still = {**arrays, "value": jnp.zeros_like(arrays["value"])}
        pushed = compiled(lambda huge: jax.jvp(call.attend, (huge,), (still,))[1])
        assert not pushed(huge).any()


def small_problem():
    call = Call((2,), 3, 4, 2, 2, 3, 2, mask=(("dense", (True,) * 4, 0),), soft_cap=2.0, sinks=1.0)
    call = dataclasses.replace(
        call, bias=((True,) * 4, "normal", 1.0, False), rate=0.4, score="bent"
    )
    return call, {name: np.asarray(x, np.float64) for name, x in call.arrays().items()}


@pytest.mark.slow
def test_the_dense_oracle_is_the_one_of_loops():
    call, arrays = small_problem()
    call = dataclasses.replace(call, score=None)
    problem = call.problem({name: x for name, x in arrays.items() if name != "floats"})
    result = dense_oracle.attention(problem)
    for b, n in np.ndindex(2, 4):
        context, weights = oracles.attention(
            problem.query_BTNH[b, :, n], problem.key_BSKH[b, :, n // 2],
            problem.value_BSKV[b, :, n // 2], problem.allowed_BNTS[b, n],
            problem.bias_BNTS[b, n], problem.scale, problem.keep_BNTS[b, n], problem.rate,
            problem.soft_cap, problem.sinks_N[n],
        )  # fmt: skip
        np.testing.assert_allclose(result.context_BTNV[b, :, n], context, atol=1e-14)
        np.testing.assert_allclose(result.weights_BNTS[b, n], weights, atol=1e-14)


@pytest.mark.slow
def test_the_dense_oracle_s_gradients_are_central_differences():
    call, arrays = small_problem()
    random = np.random.default_rng(0)
    start = dense_oracle.attention(call.problem(arrays))
    probes = [random.normal(size=x.shape) for x in (start.context_BTNV, start.weights_BNTS)]
    probes.append(random.normal(size=start.row_sum_BNT.shape))
    found = call.gradients(call.problem(arrays), start, probes)

    def loss(arrays):
        result = dense_oracle.attention(call.problem(arrays))
        # As for the row_max of the start: the gradient is that of a softmax that does not move it.
        row_sum = result.row_sum_BNT * np.exp(result.row_max_BNT - start.row_max_BNT)
        results = (result.context_BTNV, result.weights_BNTS, row_sum)
        return sum((x * y).sum() for x, y in zip(results, probes))

    for name, x in arrays.items():
        direction = random.normal(size=x.shape)
        ahead, behind = (loss({**arrays, name: x + step * direction}) for step in (1e-5, -1e-5))
        assert abs((ahead - behind) / 2e-5 - (found[name] * direction).sum()) < 1e-7, name
