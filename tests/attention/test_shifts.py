"""A softmax does not see what is added to a whole row: every case, shifted by any constant.

The numbers lie on a grid, so that a logit and its shift are rounded once and in one known way; the
oracle takes the rounded logits on in float64, forward and backward. Where a shift swallows the
logits, all allowed keys weigh the same.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES
from helpers import assert_close, normal, x64
from implementations import HERE, SLOW

from flax_mha import dot_product_attention
from flax_mha.attention import DistanceBias, merge
from flax_mha.attention.dropout import keep_mask, words_of

BLOCKS = {"blockwise": (8, 4)}
SCALE = 0.5
LEAST = float(np.finfo(np.float32).min)
# Exact on the grid, rounded to whole numbers and to eights, and swallowing all that is below.
SHIFTS = (0.0, 1e4, -(2.0**20), 1e7, -1e7, -1e8, 1e9, -1e9, 1e30, LEAST / 2, LEAST)
SWALLOWING = (1e9, -1e9, 1e30, LEAST / 2, LEAST)  # of a soft cap, whose tanh is on no grid
FULL = {name: case for name, case in CASES.items() if 0 not in case.sizes}


def gridded(x, step=0.5):
    return np.clip(np.round(np.asarray(x, np.float64) / step) * step, -4, 4)


@dataclasses.dataclass
class Problem:
    """A case on the grid: arrays that have gradients, and what is fixed."""

    arrays: dict
    fixed: dict
    allowed: np.ndarray
    sizes: tuple

    @classmethod
    def of(cls, case, dtype):
        fixed, arrays = dict(case.call), {}
        for name, x in case.arrays().items():
            arrays[name] = jnp.asarray(gridded(x), dtype)
        wide = "float64" if dtype == "float64" else "float32"
        arrays["bias"] = jnp.asarray(gridded(fixed.pop("bias", np.zeros((1, 1)))), wide)
        if "sinks" in fixed:
            arrays["sinks"] = jnp.asarray(gridded(fixed.pop("sinks")), wide)
        if "distance_bias" in fixed:
            bias = fixed.pop("distance_bias")
            arrays["values"] = jnp.asarray(gridded(bias.values), wide)
            fixed["distance"] = dict(query_offset=bias.query_offset, first=bias.first)
        fixed.pop("scale", None)
        b, t, s, n = case.sizes[:4]
        return cls(arrays, fixed, np.broadcast_to(case.allowed, (b, n, t, s)), case.sizes)

    def shifted(self, shift, by):
        """The arrays with the bias, or the values of distances, moved; and the sinks with them."""
        moved = {x: self.arrays[x] + shift for x in (by, "sinks") if x in self.arrays}
        return {**self.arrays, **moved}

    def loss(self, arrays, probes, options):
        """A number that every result has a part in; with the results themselves."""
        call, arrays = dict(self.fixed), dict(arrays)
        if "values" in arrays:
            call["distance_bias"] = DistanceBias(arrays.pop("values"), **call.pop("distance"))
        call |= dict(scale=SCALE, return_residuals=True, **options)
        context, residuals = dot_product_attention(**arrays, **call)
        total = (context * probes[0].astype(context.dtype)).sum(dtype=probes[0].dtype)
        return total + (residuals.row_sum_BNT * probes[1]).sum(), (context, residuals.row_sum_BNT)

    # --- the oracle -----------------------------------------------------------------------------

    def logits(self, arrays, rounded):
        """Logits as a machine rounds them, the soft cap's slope, and the sinks; float64."""
        query, key = (np.asarray(arrays[x], np.float64) for x in ("query", "key"))
        heads = query.shape[2] // key.shape[2]
        logits = SCALE * np.einsum("btnh,bsnh->bnts", query, np.repeat(key, heads, 2))
        slope, cap = 1.0, self.fixed.get("soft_cap")
        if cap is not None:
            slope = 1 - np.tanh(logits / cap) ** 2
            logits = cap * np.tanh(logits / cap)
        logits = rounded(logits + np.asarray(arrays["bias"], np.float64))
        if "values" in arrays:
            logits = rounded(logits + np.asarray(arrays["values"], np.float64)[self.entries()])
        return np.where(self.allowed, logits, -np.inf), slope

    def entries(self):
        """(head, entry) of the distance values that every pair of positions reads."""
        b, t, s, n = self.sizes[:4]
        distance, values = self.fixed["distance"], self.arrays["values"]
        offset = distance["query_offset"]
        offset = np.zeros(b, int) if offset is None else np.asarray(offset)
        B, N, T, S = np.indices((b, n, t, s))
        return N, np.clip(S - T - offset[B] - distance["first"], 0, values.shape[1] - 1)

    def expected(self, arrays, probes, rounded):
        """(context, row_sum, gradients by name, what the bias's gradient sums) in float64."""
        value = np.asarray(arrays["value"], np.float64)
        query, key = (np.asarray(arrays[x], np.float64) for x in ("query", "key"))
        group = query.shape[2] // key.shape[2]
        key, value = np.repeat(key, group, 2), np.repeat(value, group, 2)
        d_context, d_row_sum = (np.asarray(x, np.float64) for x in probes)
        logits, slope = self.logits(arrays, rounded)
        sinks = np.full(logits.shape[1], -np.inf)
        if "sinks" in arrays:
            sinks = np.asarray(arrays["sinks"], np.float64)
        sinks = np.broadcast_to(sinks[None, :, None, None], (*logits.shape[:3], 1))
        joined = np.concatenate([logits, sinks], -1)
        largest = joined.max(-1, keepdims=True)
        exp = np.exp(joined - np.where(np.isneginf(largest), 0, largest))
        row_sum = exp.sum(-1)
        weights = exp / np.where(row_sum == 0, 1, row_sum)[..., None]
        rate, keep = self.fixed.get("dropout_rate", 0.0), np.ones(logits.shape)
        if rate:
            keep = np.asarray(keep_mask(words_of(self.fixed["dropout_key"]), rate, logits.shape))
            keep = keep / (1 - rate) if rate < 1 else 0.0 * keep
        kept = weights[..., :-1] * keep
        context = np.einsum("bnts,bsnv->btnv", kept, value)
        d_weights = keep * np.einsum("btnv,bsnv->bnts", d_context, value)
        d_weights = np.concatenate([d_weights, np.zeros(sinks.shape)], -1)
        d_joined = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        d_joined = d_joined + exp * d_row_sum[..., None]
        d_logits = d_joined[..., :-1]
        d_product = SCALE * slope * d_logits
        fold = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)
        gradients = {
            "query": np.einsum("bnts,bsnh->btnh", d_product, key),
            "key": fold(np.einsum("bnts,btnh->bsnh", d_product, query)),
            "value": fold(np.einsum("bnts,btnv->bsnv", kept, d_context)),
            "bias": self.summed(d_logits, arrays["bias"].shape),
        }
        if "sinks" in arrays:
            gradients["sinks"] = d_joined[..., -1].sum((0, 2))
        if "values" in arrays:
            gradients["values"] = np.zeros(arrays["values"].shape)
            np.add.at(gradients["values"], self.entries(), d_logits)
        return context, row_sum, gradients, self.summed(abs(d_logits), arrays["bias"].shape).max()

    @staticmethod
    def summed(d_logits, shape):
        """The gradient of an array that was broadcast."""
        full = (1,) * (d_logits.ndim - len(shape)) + tuple(shape)
        axes = tuple(i for i, n in enumerate(full) if n == 1)
        return d_logits.sum(axes, keepdims=True).reshape(shape)


def check(name, implementation, dtype, shifts, jit=jax.jit, by="bias"):
    problem = Problem.of(FULL[name], dtype)
    b, t, _, n, _, _, v = problem.sizes
    wide = "float64" if dtype == "float64" else "float32"
    probes = (jnp.asarray(gridded(normal(31, b, t, n, v)), wide), normal(32, b, n, t).astype(wide))
    options = dict(implementation=implementation, block_sizes=BLOCKS.get(implementation))
    graded = jax.value_and_grad(problem.loss, has_aux=True)
    run = jit(lambda arrays: graded(arrays, probes, options))
    rounded = lambda x: x.astype(wide).astype(np.float64)
    for shift in shifts:
        arrays = problem.shifted(shift, by)
        (_, (context, row_sum)), gradients = run(arrays)
        expected_context, expected_row_sum, expected, terms = problem.expected(
            arrays, probes, rounded
        )
        what = f"{name}, shifted by {shift}: "
        assert_close(context, expected_context, dtype, what + "context")
        assert_close(row_sum, expected_row_sum, wide, what + "row_sum")
        for array, gradient in gradients.items():
            # A bias for all is the sum of terms that cancel: its rounding is that of the terms.
            scale = terms if array == "bias" else 0.0
            assert_close(gradient, expected[array], dtype, what + array, scale)


def shifts_of(name):
    return SWALLOWING if "soft_cap" in FULL[name].call else SHIFTS


QUICK = [name for name in HERE[::-1] if name not in SLOW]  # these have float16 and float64 too
# Of the TPU's kernel, which takes seconds a call when it is interpreted, and no float16.
OF_THE_KERNEL = ("all masks", "bias", "soft cap")


def table():
    """(name, dtype, implementation), slow ones marked; the two dtypes of 16 bits in turns."""
    for (i, name), dtype in itertools.product(enumerate(FULL), ("float32", "bfloat16", "float16")):
        for implementation in HERE:
            if implementation not in SLOW and dtype == ("bfloat16", "float16")[i % 2]:
                continue
            own = name in OF_THE_KERNEL and dtype != "float16"
            if implementation not in SLOW:
                yield pytest.param(name, dtype, implementation)
            elif own:
                yield pytest.param(name, dtype, implementation, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "dtype", "implementation"), [*table()])
def test_a_row_s_shift_changes_nothing(name, dtype, implementation):
    check(name, implementation, dtype, shifts_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, x in FULL.items() if "distance_bias" in x.call])
@pytest.mark.parametrize("implementation", QUICK)
def test_a_shift_of_all_distances_changes_nothing(name, implementation):
    check(name, implementation, "float32", shifts_of(name), by="values")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bias", "all masks", "sinks"])
@pytest.mark.parametrize("implementation", QUICK)
def test_in_float64_and_without_jit(name, implementation):
    with x64():
        check(name, implementation, "float64", (0.0, 1e12, -1e16, 1e300), jit=lambda f: f)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1e4, 1e7, -1e8, 1e30, LEAST])
@pytest.mark.parametrize("implementation", QUICK)
def test_merged_parts_do_not_see_it_either(shift, implementation):
    x, probe = normal(0, 1, 24, 2, 8), normal(1, 1, 24, 2, 8)
    grid = jnp.asarray(gridded(x))

    def part(value, keys):
        call = dict(bias=jnp.full((1, 1), shift), scale=SCALE, implementation=implementation)
        call |= dict(return_residuals=True)
        return dot_product_attention(grid, grid[:, keys], value[:, keys], **call)

    def parts(value):
        return (merge(part(value, slice(0, 9)), part(value, slice(9, 24)))[0] * probe).sum()

    def whole(value):
        logits = SCALE * jnp.einsum("btnh,bsnh->bnts", grid, grid) + shift
        weights = jax.nn.softmax(logits, -1)
        return (jnp.einsum("bnts,bsnv->btnv", weights, value) * probe).sum()

    result, expected = (jax.jit(jax.value_and_grad(f))(x) for f in (parts, whole))
    assert_close(result[0], expected[0], "float32")
    assert_close(result[1], expected[1], "float32")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("implementation", QUICK)
def test_the_least_number_of_a_dtype_as_a_mask(name, implementation):
    """What BERT, Flax and transformers hand over: padded queries see finfo.min everywhere."""
    x = normal(0, 1, 128, 2, 16)
    bias = jnp.zeros((1, 1, 128, 128), name).at[0, 0, 100:].set(jnp.finfo(name).min)
    bias = bias.at[..., 77:].set(jnp.finfo(name).min)  # padded keys as well
    loss = lambda v: dot_product_attention(x, x, v, bias=bias, implementation=implementation).sum()
    sums = jax.jit(jax.grad(loss))(x).sum(1)
    np.testing.assert_allclose(sums, 128, rtol=1e-5)  # the weights of each of 128 rows sum to 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [300.0, 3000.0, 1e4, 1e10])
@pytest.mark.parametrize("H", [48, 64, 128])
@pytest.mark.parametrize("implementation", QUICK)
def test_large_16_bit_logits_are_rounded_once(size, H, implementation):
    """1 / sqrt(48) and 1 / sqrt(128) are no powers of two: a fused factor rounds twice."""
    query = (size * normal(0, 1, 96, 2, H)).astype("bfloat16")
    ones = jnp.ones_like(query)

    def loss(query, value):
        context = dot_product_attention(query, query, value, implementation=implementation)
        return context.astype("float32").sum(), context

    gradient, context = jax.jit(jax.grad(loss, argnums=1, has_aux=True))(query, ones)
    assert (context == 1).all()
    np.testing.assert_array_equal(gradient.astype("float32").sum(1), 96)
