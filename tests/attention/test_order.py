"""Tiles turned as a TPU computes them, on this machine: the numbers of tiles that are not.

`Turned` is the engine of plain blocks, told that it is lowered for a TPU;
`test_blockwise_ahead_of_time` shows what the TPU's compiler makes of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES
from helpers import assert_close, normal
from jax import export

from flax_mha import Mask, dot_product_attention
from flax_mha.attention import DistanceBias, implementations
from flax_mha.attention.blockwise import tile_sizes
from flax_mha.attention.blockwise.attend import attend_by, unsupported
from flax_mha.attention.blockwise.engine import Blocks
from flax_mha.attention.blockwise.tile_sizes import tiling_of
from flax_mha.core.platform import Place

TPU = Place("tpu")
GRADED = {name: case for name, case in CASES.items() if 0 not in case.sizes}


@dataclasses.dataclass(frozen=True)
class Turned:
    def at(self, place):
        return self

    def forward(self, call):
        return Blocks().forward(call._replace(place=TPU))

    def backward(self, call, softmax, cotangents):
        return Blocks().backward(call._replace(place=TPU), softmax, cotangents)


class Implementation:
    unsupported = staticmethod(unsupported)

    @staticmethod
    def attend(inputs, options):
        tiling = tiling_of(inputs, options.block_sizes, TPU)
        assert tiling.queries_last
        return attend_by(Turned(), inputs, options)


@pytest.fixture(autouse=True)
def turned(monkeypatch):
    """Under a name of its own, and for tiles of few queries, too."""
    monkeypatch.setattr(tile_sizes, "LANES", 1)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "turned", Implementation)


def run(implementation, arrays, call, dtype, block_sizes):
    """Context, row_max, row_sum, and the gradients of a number that each has a part in."""
    call = dict(call, implementation=implementation, block_sizes=block_sizes)
    bias = call.pop("distance_bias", None)
    biases = {name: call.pop(name) for name in ("bias", "sinks") if name in call}
    if bias is not None:
        biases["values"] = bias.values

    def loss(arrays, biases):
        biases = dict(biases)
        if bias is not None:
            call["distance_bias"] = dataclasses.replace(bias, values=biases.pop("values"))
        context, rows = dot_product_attention(**arrays, **biases, **call, return_residuals=True)
        sums = rows.row_sum_BNT * normal(1, *rows.row_sum_BNT.shape, dtype=rows.row_sum_BNT.dtype)
        weighed = context.astype("float32") * normal(2, *context.shape)
        return weighed.sum() + sums.sum(), (context, *rows)

    graded = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(graded)(arrays, biases)


def assert_same(call, arrays, dtype, block_sizes):
    (_, (context, row_max, row_sum)), gradients = run("turned", arrays, call, dtype, block_sizes)
    (_, expected), slopes = run("blockwise", arrays, call, dtype, block_sizes)
    assert_close(context, expected[0], dtype, "context")
    np.testing.assert_array_equal(jnp.isneginf(row_max), jnp.isneginf(expected[1]))
    assert_close(jnp.exp(row_max), jnp.exp(expected[1]), dtype, "row_max")
    assert_close(row_sum, expected[2], dtype, "row_sum")
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        name = jax.tree_util.keystr(path)
        ours = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
        assert_close(ours, slope, dtype, name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("everything else", "bfloat16")])
def test_a_case_forward_and_backward(name, dtype):
    test_every_case_forward_and_backward(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, ("float32", "bfloat16", "float16")[i % 3]) for i, name in enumerate(GRADED)],
)
def test_every_case_forward_and_backward(name, dtype):
    case = GRADED[name]
    assert_same(case.call, case.arrays(dtype), dtype, (4, 10))


def heads(dtype, T, S, N, K):
    shapes = {"query": (2, T, N, 8), "key": (2, S, K, 8), "value": (2, S, K, 5)}
    return {name: normal(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


T, S, N, K = 21, 30, 6, 2
SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("bfloat16", (1, 1, T, S)),
        ("float32", (1, N, T, 1)),
        pytest.param("float32", (1, 1, T, S), marks=SLOW),
        pytest.param("float32", (2, N, 1, S), marks=SLOW),
        pytest.param("float32", (2, 1, 1, 1), marks=SLOW),
        pytest.param("float32", None, marks=SLOW),
        pytest.param("bfloat16", None, marks=SLOW),
    ],
    ids=str,
)
def test_grouped_heads_that_share_masks_and_biases_or_do_not(dtype, shape):
    """A row of a tile is one of G heads' queries: each has its own part of what is not shared."""
    arrays = heads(dtype, T, S, N, K)
    ids_T, ids_S = (jnp.arange(n)[None] // 7 for n in (T, S))
    window = dataclasses.replace(Mask.window(12, 3), query_offset=jnp.array([9, 4]))
    mask = Mask.segments(ids_T, ids_S) & window
    mask &= Mask.dense(normal(5, 2, N, T, 1) < 1) & Mask.dense(normal(6, 1, 1, T, S) < 1)
    mask &= Mask.dense(normal(7, 1, N, 1, S) < 1) & Mask.dense(normal(8, 1, 1, 1, S) < 1)
    mask &= Mask.padding(normal(9, 2, T) < 1, normal(10, 2, S) < 1)
    if shape is None:
        call = {"distance_bias": DistanceBias(normal(12, N, T + S - 1), first=1 - T)}
    else:
        call = {"bias": normal(11, *shape)}
    assert_same({"mask": mask, **call}, arrays, dtype, (8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("shift", [pytest.param(0.0, marks=SLOW), 1e7, -1e8, 1e30])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=SLOW), "bfloat16"])
def test_a_row_s_shift_changes_nothing(shift, dtype):
    """On a grid, where a shift rounds the logits in one known way."""
    rounded = lambda x: jnp.clip(jnp.round(x), -2, 2)
    arrays = {name: rounded(x) for name, x in heads(dtype, 40, 40, 2, 2).items()}
    call = {"bias": jnp.full((1, 1), shift), "scale": 0.5, "is_causal": True}
    (_, (context, _, row_sum)), gradients = run("turned", arrays, call, dtype, (8, 16))
    (_, expected), slopes = run("reference", arrays, call, dtype, None)
    assert_close(context, expected[0], dtype)
    assert_close(row_sum, expected[2], dtype)
    for name, slope in slopes[0].items():
        assert_close(gradients[0][name], slope, dtype, name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weights_that_multiply_the_values_sum_to_one(dtype):
    """What is summed are the 16-bit numbers that are multiplied: the mean of ones is 1 exactly."""
    arrays = heads(dtype, 40, 40, 2, 2)
    arrays["value"] = jnp.ones_like(arrays["value"])
    call = dict(is_causal=True, block_sizes=(8, 16), implementation="turned")
    context, rows = dot_product_attention(**arrays, **call, return_residuals=True)
    np.testing.assert_array_equal(context, jnp.ones_like(context))
    exact = dot_product_attention(**arrays, is_causal=True, return_residuals=True)[1]
    assert_close(rows.row_sum_BNT, exact.row_sum_BNT, dtype)


@pytest.mark.slow
def test_garbage_that_padding_removes_reaches_nothing():
    real = jnp.arange(40)[None] < jnp.array([[24], [31]])
    arrays = heads("bfloat16", 40, 40, 2, 2)
    broken = {name: jnp.where(real[..., None, None], x, jnp.nan) for name, x in arrays.items()}
    call = {"mask": Mask.padding(real, real) & Mask.causal()}
    (_, got), gradients = run("turned", broken, call, "bfloat16", (8, 16))
    (_, clean), expected = run("turned", arrays, call, "bfloat16", (8, 16))
    for ours, theirs in zip(got, clean):
        np.testing.assert_array_equal(ours, theirs)
    for name, slope in expected[0].items():
        np.testing.assert_array_equal(gradients[0][name], slope)


@pytest.mark.parametrize("H", [48, 128])
def test_the_factor_of_a_16_bit_product_stands_alone_on_a_tpu(H):
    """Over a maximum nothing is fused into one rounding; a barrier would cost a pass over memory.

    1 / sqrt(48) and 1 / sqrt(128) are no powers of two.
    """
    x = jax.ShapeDtypeStruct((1, 256, 2, H), jnp.bfloat16)
    call = lambda x: dot_product_attention(x, x, x, implementation="blockwise")
    text = lambda platform: export.export(jax.jit(call), platforms=[platform])(x).mlir_module()
    tpu, gpu = text("tpu"), text("cuda")
    assert "optimization_barrier" not in tpu
    assert "optimization_barrier" in gpu
    assert tpu.count("stablehlo.maximum") == gpu.count("stablehlo.maximum") + 1
