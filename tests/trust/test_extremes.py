"""Numbers at the edges of what floats hold: finite, and right beside float64 and jax.nn.

An error is relative to the largest entry of what is right. It may be as large as that of
`jax.nn.dot_product_attention` on the same numbers, or a few spacings of the dtype, of long sums
sqrt(S): what sums in another order may round another way. `tests/trust/errors.py` prints them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extreme_inputs import CASES, MAX, ONE_HEAD, shapes
from extreme_runs import STRATEGIES, compiled, computed, errors, expected
from implementations import HERE, SLOW

from flax_mha import MultiHeadAttentionConfig, dot_product_attention

STATED = {"float32": 16 * 2.0**-23, "bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}
HOWS = (*HERE, *(f"layer {name}" for name in HERE if name not in SLOW))
BY_DEFAULT = {  # the others are slow tests
    "logits 1e+21",
    "subnormal value",
    "equal logits",
    "one huge key",
    "sink and bias of -inf",
    "T = 3, S = 0",
    "float16, products 1e5",
}
# What is summed before it is divided leaves float32 where the sum does: loudly, as inf or NaN.
SUMMED_FIRST = {name for name in CASES if "near the largest" in name}


def rows():
    for name, case in CASES.items():
        for how in HOWS:
            tiles = "reference" not in how
            marks = []
            if name not in BY_DEFAULT or how not in ("reference", "blockwise"):
                marks.append(pytest.mark.slow)
            refused = case.dtype == "float16" and how == "pallas_interpreted"
            if not refused and not (name in SUMMED_FIRST and tiles):
                yield pytest.param(name, how, marks=marks)


@functools.cache
def of_jax_nn(case):
    """Nothing where it has no such argument, or refuses the dtype."""
    return errors(case, "jax.nn") if case.beside and case.dtype != "float16" else {}


@pytest.mark.parametrize(("name", "how"), list(rows()))
def test_extreme_numbers_are_computed_to_the_stated_error(name, how):
    """Forward and every gradient."""
    assert_right(CASES[name], how, name)


# Of each kind of call, and where parts of a softmax that are merged differ most.
CUT = ["logits 1e+21", "equal logits", "one huge key", "bias of finfo.min and max"]
CUT += ["bias of -inf", "sink finfo.max, bias of finfo.min", "sink and bias of -inf"]
CUT += ["sink 1e30, logits 1e30", "soft cap 1, logits 1e30", "dropout 1 - 1e-7", "dropout 0.999"]
CUT += ["131 x 257, causal", "bfloat16, products 1e5", "float16, cotangents 1e4"]
CUT += ["T = 1, S = 7", "T = 7, S = 1", "logits 1e+30, no ties"]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow
def test_so_they_are_along_a_context_axis(name, strategy):
    """Two devices share the lengths, odd ones too, or the heads."""
    B, T, S, N, _, H = CASES[name].sizes
    case = dataclasses.replace(CASES[name], sizes=(B, T, S, N, N, H))
    assert_right(case, strategy, f"{name}, K = N")


def assert_right(case, how, name):
    # The roundings of a sum go anywhere: of n terms as far as a random walk of n steps.
    spacings = max(1, math.sqrt(case.sizes[2]) / 16)
    for result, error in errors(case, how).items():
        stated = max(STATED[case.dtype] * spacings, of_jax_nn(case).get(result, 0.0))
        assert error <= stated, f"{name!r} by {how}: {result} {error:.2g} > {stated:.2g}"


@pytest.mark.parametrize("name", sorted(SUMMED_FIRST))
@pytest.mark.parametrize("how", [name for name in HERE if name != "reference"])
@pytest.mark.slow
def test_values_whose_sum_leaves_float32_are_never_quietly_wrong(name, how):
    """Blocks add values up before they divide: each entry is right, or it is inf or NaN."""
    found, exact = computed(CASES[name], how)["context"], expected(CASES[name])["context"]
    right = np.isclose(found, exact, rtol=0, atol=STATED["float32"] * MAX)
    assert (right | ~np.isfinite(found)).all()
    assert not right.all(), "it is right now: take it into the table above"


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_values_may_be_as_large_as_their_sum_allows(name):
    """S |value| up to finfo.max, whatever the logits."""
    zeros = np.zeros((1, 8, 1, 4), "float32")
    value = np.full(zeros.shape, MAX / 8, "float32")
    attend = jax.jit(functools.partial(dot_product_attention, implementation=name))
    np.testing.assert_allclose(attend(zeros[:, :3], zeros, value), value[:, :3], rtol=1e-6)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_a_product_beyond_float32_spoils_its_own_query_alone(name):
    """inf - inf: NaN, which is seen; the other queries know nothing of it."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, n, 1, 4)).astype("float32") for n in (3, 5, 5))
    attend = jax.jit(functools.partial(dot_product_attention, implementation=name))
    whole = np.asarray(attend(query, key, value))
    query[:, 1] = np.sign(key[:, 2]) * 3e38
    context = np.asarray(attend(query, key, value))
    assert np.isnan(context[:, 1]).all()
    np.testing.assert_array_equal(context[:, ::2], whole[:, ::2])
    assert np.isfinite(whole).all()


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_a_product_below_float32_is_a_key_that_is_not_attended(name):
    """-inf, as a bias of -inf is; the gradients stay finite."""
    query, key = np.full((1, 3, 1, 4), 1e20, "float32"), np.ones((1, 5, 1, 4), "float32")
    key[:, 1:3] = -1e20
    value = np.arange(20, dtype="float32").reshape(1, 5, 1, 4)

    @jax.jit
    def both(*arrays):
        attend = functools.partial(dot_product_attention, implementation=name)
        context, pull = jax.vjp(attend, *arrays)
        return context, *pull(jnp.ones_like(context))

    context, *gradients = map(np.asarray, both(query, key, value))
    expected = np.broadcast_to(value[:, [0, 3, 4]].mean(1, keepdims=True), context.shape)
    np.testing.assert_allclose(context, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[2][0, :, 0, 0], [1, 0, 0, 1, 1], rtol=1e-6)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("soft_cap", [1e-40, 9e-31, 2e30, 3e38, 1e39, 1e300])
def test_a_soft_cap_that_float32_cannot_divide_by_is_refused(soft_cap):
    """cap tanh(logits / cap): 0 / 0 below, inf x 0 above, and logits that XLA takes for 0."""
    x = jnp.ones((1, 3, 1, 4))
    message = r"`soft_cap` must be a number between 1e-30 and 1e30.*Received: soft_cap="
    with pytest.raises(ValueError, match=message):
        dot_product_attention(x, x, x, soft_cap=soft_cap)
    with pytest.raises(ValueError, match=message):
        MultiHeadAttentionConfig(num_heads=1, key_dim=4, soft_cap=soft_cap)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_huge_logits_have_weights_that_sum_to_1(name):
    """So do the residuals tell it, where there are no weights: row_sum is the number of ties."""
    call = {"return_residuals": True, "return_weights": name == "reference", "scale": 1.0}
    query, key = jnp.full((1, 2, 1, 4), 2.0**50), jnp.full((1, 6, 1, 4), 2.0**50)
    key = key.at[:, :3].set(-(2.0**50))
    *_, residuals = found = dot_product_attention(query, key, key, implementation=name, **call)
    np.testing.assert_array_equal(residuals.row_max_BNT, np.full((1, 1, 2), 2.0**102))
    np.testing.assert_array_equal(residuals.row_sum_BNT, np.full((1, 1, 2), 3.0))
    if name == "reference":
        np.testing.assert_allclose(found[1][0, 0], [[0, 0, 0, 1 / 3, 1 / 3, 1 / 3]] * 2, rtol=1e-6)


def test_many_keys_need_little_memory():
    """Forward and gradients of 2^10 + 1 queries and 2^16 + 1 keys, whose scores are 257 MiB."""
    sizes = (1, 2**10 + 1, *ONE_HEAD[2:])
    arrays = {name: jax.ShapeDtypeStruct(x, "float32") for name, x in shapes(sizes).items()}
    d_context = arrays.pop("d_context")
    program = compiled("blockwise", sizes, ()).lower(arrays, d_context).compile()
    kept = program.memory_analysis().temp_size_in_bytes
    assert kept < 32 << 20, f"{kept} bytes"


@pytest.mark.parametrize("size", [1e4, 1e15])
@pytest.mark.parametrize("name", [name for name in HERE if name != "reference"])
@pytest.mark.slow
def test_derivatives_of_every_order_shift_logits_by_their_own_largest(name, size):
    """Not by another program's: 1e8 that two of them compute differ by 8, and e^8 is no rounding.

    Of weights that are certain the context moves as the values do, and so does d_value.
    """
    rng = np.random.default_rng(0)
    sizes = {"query": size, "key": size, "value": 1.0}
    arrays = {x: rng.normal(size=(2, 9, 2, 4)).astype("float32") * n for x, n in sizes.items()}

    def derivatives(name):
        attend = lambda x: dot_product_attention(**x, implementation=name)
        d_loss = jax.grad(lambda x: jnp.sin(attend(x)).sum())
        moved = jax.jit(lambda x: [jax.jvp(f, (x,), (x,))[1] for f in (attend, d_loss)])(arrays)
        return moved[0], moved[1]["value"]

    for found, right in zip(derivatives(name), derivatives("reference")):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
