"""dot_product_attention: every implementation against the oracle, and the choice among them."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, B, H, N, S, T, V
from helpers import assert_close, normal, x64
from implementations import ELSEWHERE, HERE, SLOW

from flax_mha import IMPLEMENTATIONS, Mask, dot_product_attention, explain
from flax_mha.attention import explanation, implementations
from flax_mha.attention.canonical import canonical
from flax_mha.attention.contract import Output

# implementation -> {what it must refuse: the regex of its reason}; an unexpected success fails.
REFUSALS: dict[str, dict[str, tuple[type[Exception], str]]] = {
    "reference": {},
    "blockwise": {
        "weights": (NotImplementedError, "never holds the weights"),
    },
    "pallas_interpreted": {
        "weights": (NotImplementedError, "never holds the weights"),
    },
}
# Blocks below, above and beside the lengths of the table: t > s, t < s, equal, no divisors, larger.
BLOCKS = {
    "reference": [None],
    "blockwise": [(8, 4), None, (4, 10), (12, 3), (16, 16), (64, 128)],
    "pallas_interpreted": [None],
}


def rows():
    """(implementation, blocks, name of a case). Of the last four blocks two, in turns.

    Most cases have 5 queries and 7 keys: two of the four part them, and two do not.
    """
    for name in HERE:
        for i, blocks in enumerate(BLOCKS[name]):
            marks = [pytest.mark.slow] if i > 1 or name in SLOW else []
            for j, case in enumerate(CASES):
                if i < 2 or (i + j) % 2 == 0 or max(CASES[case].sizes[1:3]) > 16:
                    yield pytest.param(
                        name, blocks, case, marks=marks, id=f"{name}-{blocks}-{case}"
                    )


def served(name, feature, run):
    """The result of `run`, or None where the table says that this is refused, and it was."""
    if feature not in REFUSALS[name]:
        return run()
    error, message = REFUSALS[name][feature]
    with pytest.raises(error, match=message):
        run()
    return None


# The interpreted kernel has tables of its own for what is more than the forward pass.
@pytest.fixture(params=[name for name in HERE if name not in SLOW])
def implementation(request):
    return request.param


def attend(arrays, call, **options):
    return dot_product_attention(**arrays, **call, **options)


@pytest.mark.parametrize(("implementation", "block_sizes", "name"), [*rows()])
def test_forward_is_the_oracle_s(name, implementation, block_sizes):
    case = CASES[name]
    arrays = case.arrays()
    context, weights = case.expected(arrays)
    call = {**case.call, "block_sizes": block_sizes}
    assert_close(attend(arrays, call, implementation=implementation), context, "float32")
    if block_sizes is not None:
        return
    both = lambda: attend(arrays, case.call, implementation=implementation, return_weights=True)
    if (result := served(implementation, "weights", both)) is not None:
        assert_close(result[1], weights, "float32", "weights")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["long causal", "all masks", "bias", "dropout", "grouped heads"])
def test_16_bits(name, dtype, implementation):
    case = CASES[name]
    arrays = case.arrays(dtype)
    result = attend(arrays, case.call, implementation=implementation)
    assert result.dtype == dtype
    assert_close(result, case.expected(arrays)[0], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["long causal", "soft cap", "grouped heads", "dropout"])
def test_16_bit_gradients(name, dtype, implementation):
    """Those of the same numbers in float32, which the oracle's slopes vouch for."""
    case = CASES[name]
    arrays = case.arrays(dtype)
    wide = {name: x.astype("float32") for name, x in arrays.items()}

    def loss(arrays):
        context = attend(arrays, case.call, implementation=implementation)
        return (context.astype("float32") ** 2).sum()

    gradients, expected = jax.jit(jax.grad(loss))(arrays), jax.jit(jax.grad(loss))(wide)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(gradient, expected[name], dtype, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long causal", "all masks", "grouped heads", "dropout"])
def test_float64(name, implementation):
    case = CASES[name]
    with x64():
        arrays = {name: jnp.asarray(x, "float64") for name, x in case.arrays().items()}
        result = attend(arrays, case.call, implementation=implementation)
        assert result.dtype == "float64"
        assert_close(result, case.expected(arrays)[0], "float64")


def with_values(arrays, case):
    """The arrays, with the values of a distance bias back in their place."""
    if "distance_bias" not in arrays:
        return arrays
    bias = dataclasses.replace(case.call["distance_bias"], values=arrays["distance_bias"])
    return {**arrays, "distance_bias": bias}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("implementation", "block_sizes"), [("reference", None), ("blockwise", (8, 4))], ids=str
)
def test_gradients_are_the_oracle_s_slopes(case, implementation, block_sizes):
    """Along one random direction of each array, in float64; bias too where there is one."""
    with x64():
        arrays = {name: jnp.asarray(x, "float64") for name, x in case.arrays().items()}
        call = {**case.call, "block_sizes": block_sizes}
        for extra in {"bias", "sinks", "distance_bias"} & set(call):
            # Of a distance bias, the values are the array.
            array = getattr(call.pop(extra), "values", case.call[extra])
            arrays[extra] = jnp.asarray(array, "float64")
        probe = np.random.default_rng(3).normal(size=case.expected(arrays)[0].shape)

        def scalar(arrays):
            given = with_values(arrays, case)
            return (attend(given, call, implementation=implementation) * probe).sum()

        gradients = jax.jit(jax.grad(scalar))(arrays)

    def oracle(arrays):
        moved = type(case)({**case.call, **with_values(arrays, case)}, case.allowed, case.sizes)
        return (moved.expected(arrays)[0] * probe).sum()

    for seed, name in enumerate(arrays):
        x = np.asarray(arrays[name])
        direction, step = np.random.default_rng(seed).normal(size=x.shape), 1e-5
        slope = oracle({**arrays, name: x + step * direction})
        slope = (slope - oracle({**arrays, name: x - step * direction})) / (2 * step)
        gradient = (np.asarray(gradients[name]) * direction).sum()
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all masks", "bias", "grouped heads"])
def test_jvp_is_the_gradient_s_transpose(name, implementation):
    case = CASES[name]
    arrays = case.arrays()
    tangents = {name: normal(20 + i, *x.shape) for i, (name, x) in enumerate(arrays.items())}
    function = lambda arrays: attend(arrays, case.call, implementation=implementation)
    forward = lambda: jax.jvp(function, (arrays,), (tangents,))
    if (result := served(implementation, "jvp", forward)) is None:
        return
    cotangent = normal(30, *result[1].shape)
    (back,) = jax.vjp(function, arrays)[1](cotangent)
    left = (np.asarray(result[1], np.float64) * np.asarray(cotangent)).sum()
    right = sum((np.asarray(back[x], np.float64) * np.asarray(tangents[x])).sum() for x in back)
    np.testing.assert_allclose(left, right, rtol=1e-4)


@pytest.mark.parametrize("name", ["all masks", "nobody may attend", "no keys", "long causal"])
def test_residuals_are_the_softmax_s(name, implementation):
    case = CASES[name]
    arrays = case.arrays()
    _, (row_max, row_sum) = attend(
        arrays, case.call, implementation=implementation, return_residuals=True
    )
    b, t, s, n = case.sizes[:4]
    assert row_max.shape == row_sum.shape == (b, n, t)
    logits = np.einsum("btnh,bsnh->bnts", *(np.asarray(arrays[x], float) for x in ("query", "key")))
    logits = np.where(
        np.broadcast_to(case.allowed, (b, n, t, s)), logits / np.sqrt(case.sizes[5]), -np.inf
    )
    total = np.exp(logits).sum(-1)
    empty = total == 0
    assert (np.isneginf(row_max) == empty).all()
    assert (np.asarray(row_sum)[empty] == 0).all()
    assert_close(
        np.where(empty, 0, np.exp(np.where(empty, 0, row_max)) * row_sum), total, "float32"
    )


def test_huge_logits_stay_finite(implementation):
    """The maximum and the exponent must see one rounding of a logit: beyond 2^24 one is not 0."""
    x = 3e5 * normal(0, 1, 40, 2, 11)

    def loss(x):
        context = dot_product_attention(x, x, x, implementation=implementation)
        return context.sum(), context

    gradient, context = jax.jit(jax.grad(loss, has_aux=True))(x)
    heads = np.asarray(x[0]).swapaxes(0, 1)
    likest = (heads @ heads.swapaxes(1, 2)).argmax(-1)  # the one key that a query sees
    expected = np.take_along_axis(heads, likest[..., None], 1).swapaxes(0, 1)
    np.testing.assert_array_equal(context[0], expected)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_queries_are_scaled_in_float32(dtype, implementation):
    """1 / sqrt(11) is no power of two: a query scaled in its own dtype would be rounded again."""
    query, key = normal(0, 1, 5, 2, 11).astype(dtype), normal(1, 1, 1, 2, 11).astype(dtype)
    call = dict(implementation=implementation, return_residuals=True)
    _, residuals = dot_product_attention(query, key, key, **call)
    exact = np.einsum("btnh,bsnh->bnt", *(np.asarray(x).astype(np.float64) for x in (query, key)))
    np.testing.assert_allclose(residuals.row_max_BNT, exact / np.sqrt(11), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_axes(batch, implementation):
    query, key, value = (
        normal(0, *batch, T, N, H),
        normal(1, *batch, S, N, H),
        normal(2, *batch, S, N, V),
    )
    mask, bias = normal(3, *batch, N, T, S) > 0, normal(4, *batch, 1, T, S)
    call = dict(mask=mask, bias=bias, implementation=implementation)
    result = dot_product_attention(query, key, value, **call)
    assert result.shape == (*batch, T, N, V)
    flat = lambda x: x.reshape(-1, *x.shape[len(batch) :])
    call = dict(mask=flat(mask), bias=flat(bias), implementation=implementation)
    expected = dot_product_attention(flat(query), flat(key), flat(value), **call)
    assert_close(result, expected.reshape(result.shape), "float32")


def test_return_order(implementation):
    arrays = CASES["plain"].arrays()
    if "weights" in REFUSALS[implementation]:
        return
    call = dict(implementation=implementation, return_weights=True, return_residuals=True)
    context, weights, residuals = attend(arrays, call)
    assert [x.shape for x in (context, weights, *residuals)] == [
        (B, T, N, V), (B, N, T, S), (B, N, T), (B, N, T),
    ]  # fmt: skip


def test_precision_reaches_both_products():
    """On CPU precision changes no number, so the compiler's input must show it."""
    arrays = CASES["plain"].arrays()
    attend_highest = lambda arrays: attend(
        arrays, {}, precision="highest", implementation="reference"
    )
    text = str(jax.make_jaxpr(attend_highest)(arrays))
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_needs_another_machine_refuses_here(name):
    """None of the tables runs it; an unexpected success fails."""
    arrays = CASES["plain"].arrays("bfloat16")
    with pytest.raises(NotImplementedError, match=ELSEWHERE[name]):
        attend(arrays, {}, implementation=name)


# --- the choice ---------------------------------------------------------------------------------


class Picky:
    """A stand-in that cannot do causal attention, and marks what it serves."""

    @staticmethod
    def unsupported(inputs, options, platform):
        return "it knows no causal order" if inputs.mask.band != (None, None) else None

    @staticmethod
    def attend(inputs, options):
        context = jnp.full_like(inputs.query_BTNH, 7)
        return Output(context)


@pytest.fixture
def picky(monkeypatch):
    table = {"picky": Picky, **IMPLEMENTATIONS}
    for module in (explanation, implementations):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", table)


def test_named_means_named(picky):
    x = normal(0, B, T, N, H)
    assert (dot_product_attention(x, x, x, implementation="picky") == 7).all()
    assert (dot_product_attention(x, x, x, implementation="reference") != 7).all()
    received = r"query \[2, 5, 3, 11\], key \[2, 5, 3, 11\], soft_cap=5.0\."
    refusal = rf"'picky' cannot .*no causal order.*{received}.*\['reference'"
    with pytest.raises(NotImplementedError, match=refusal):
        dot_product_attention(x, x, x, implementation="picky", is_causal=True, soft_cap=5)


def test_explain_gives_every_reason_without_computing(picky):
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    assert explain(x, x, x)["picky"] == "ok"
    assert explain(x, x, x)["reference"].startswith("ok, and None chooses it: blockwise from T x S")
    reasons = explain(x, x, x, is_causal=True, implementation="picky")
    assert reasons["picky"] == "it knows no causal order"
    assert reasons["reference"].startswith("ok")
    mask = Mask.padding(key=jnp.ones((B, T), bool))
    key = jax.random.key(0)
    call = dict(mask=mask, bias=jnp.zeros((T, T)), dropout_rate=0.1, dropout_key=key)
    assert explain(x, x, x, **call)["reference"].startswith("ok")
    alone = explain(x, x, x, is_causal=True, return_weights=True)["reference"]
    assert alone == "ok, and None chooses it: no other can"


def test_explain_sees_the_values_of_a_mask():
    x = normal(0, B, T, N, H)
    zeros_and_ones = np.tri(T, dtype="int32")
    assert explain(x, x, x, mask=zeros_and_ones)["blockwise"].startswith("ok")
    with pytest.raises(ValueError, match="integer 0/1"):
        explain(x, x, x, mask=-10000 * zeros_and_ones)


def test_explain_takes_the_arguments_of_the_function():
    takes = inspect.signature(dot_product_attention).parameters
    own = inspect.signature(canonical).parameters
    assert {*takes, "axis", "scales"} == {*own, "implementation", "context_axis"}
    assert all(own[name].default is inspect.Parameter.empty for name in own)  # they stand once
    with pytest.raises(TypeError, match="casual"):
        explain(*[normal(0, B, T, N, H)] * 3, casual=True)
