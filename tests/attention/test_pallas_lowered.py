"""What a program for a TPU holds, lowered on any machine: the kernels or blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, x64
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import arrays_of, attend, distances, split

from flax_mha import Mask

KERNELS = ("flax_mha_forward", "flax_mha_backward", "flax_mha_bias", "flax_mha_distances")
OF_SCORES = "flax_mha_score"


def text_of(function, *args, **jit):
    """The program of a TPU."""
    return jax.jit(function, **jit).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def kernels_in(text):
    return {name for name in (*KERNELS, OF_SCORES) if f'"{name}"' in text}


def loss(arrays, implementation=None, **call):
    return attend(arrays, implementation, **call)[0].astype("float32").sum()


CALLS = {
    "plain": (dict(is_causal=True), set()),
    "bias": (dict(bias=normal(3, 1, 4, 130, 130)), {"flax_mha_bias"}),
    "distances": (dict(distance_bias=distances(4, 4, 60, -30)), {"flax_mha_distances"}),
    "much": (
        dict(
            bias=normal(3, 2, 1, 1, 130),
            distance_bias=distances(4, 4, 60, -30, jnp.array([3, 5])),
            mask=Mask.causal(jnp.array([-3, 50])) & Mask.dense(jnp.ones((2, 4, 130, 1), bool)),
            dropout_rate=0.1,
            dropout_key=jax.random.key(0),
            dropout_start=(0, 0, 3, 0),
            sinks=normal(8, 4),
            soft_cap=3.0,
        ),
        {"flax_mha_bias", "flax_mha_distances"},
    ),
}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_none_takes_the_kernels(name, dtype):
    call, more = CALLS[name]
    arrays, call = split(arrays_of(130, 130, dtype=dtype), call)
    assert kernels_in(text_of(lambda x: loss(x, **call), arrays)) == {"flax_mha_forward"}
    gradient = text_of(jax.grad(lambda x: loss(x, **call)), arrays)
    assert kernels_in(gradient) == {"flax_mha_forward", "flax_mha_backward"} | more


@pytest.mark.slow
def test_a_program_of_x64():
    with x64():
        arrays, call = split(arrays_of(130, 130), CALLS["much"][0])
        gradient = text_of(jax.grad(lambda x: loss(x, **call)), arrays)
    assert kernels_in(gradient) == set(KERNELS)


@pytest.mark.slow
def test_other_derivatives_run_by_blocks():
    arrays = arrays_of(130, 130)
    text = text_of(lambda x: jax.jvp(loss, (x,), (x,)), arrays)
    assert kernels_in(text) == {"flax_mha_forward"}
    assert "while" in text
    second = jax.grad(lambda x: sum(y.sum() for y in jax.tree.leaves(jax.grad(loss)(x))))
    assert "flax_mha_forward" in kernels_in(text_of(second, arrays))


@pytest.mark.parametrize(
    "transform",
    ["vmap", *(pytest.param(x, marks=pytest.mark.slow) for x in ("checkpoint", "scan"))],
)
def test_none_takes_the_kernels_within_transformations(transform):
    arrays = arrays_of(130, 130)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    functions = {
        "vmap": (jax.vmap(jax.grad(loss)), stacked),
        "checkpoint": (jax.grad(jax.checkpoint(loss)), arrays),
        "scan": (
            jax.grad(lambda x: jax.lax.scan(lambda c, y: (c + loss(y), None), 0.0, x)[0]),
            stacked,
        ),
    }
    assert kernels_in(text_of(*functions[transform])) == {"flax_mha_forward", "flax_mha_backward"}


def test_without_a_kernel_for_the_call_none_takes_blocks():
    arrays = arrays_of(130, 130, dtype="float16")
    assert "tpu_custom_call" not in text_of(loss, arrays)
    assert "tpu_custom_call" not in text_of(loss, arrays_of(64, 64))


@pytest.mark.slow
def test_over_devices_that_xla_cuts():
    """Named it is refused, for XLA cannot cut a kernel; None takes blocks."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P("data")), arrays_of())
    arrays = arrays_of(130, 130)
    assert "tpu_custom_call" not in text_of(loss, arrays, in_shardings=(shardings,))
    assert "tpu_custom_call" in text_of(loss, arrays)
    with pytest.raises(
        NotImplementedError, match=r"(?s)cannot cut.*program of 2 devices.*shard_map"
    ):
        text_of(lambda x: loss(x, "pallas_tpu"), arrays, in_shardings=(shardings,))
    one = jax.shard_map(
        lambda x: jax.lax.psum(loss(x, "pallas_tpu"), "data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    gradient = text_of(jax.grad(one), arrays)
    assert kernels_in(gradient) == {"flax_mha_forward", "flax_mha_backward"}


@pytest.mark.slow
def test_functions_of_pairs_over_the_devices_of_a_shard_map():
    """What varies over devices, and what is the same on all and gets a gradient of their sum."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    arrays, slopes = arrays_of(130, 130), normal(3, 4)

    def one(arrays, slopes):
        score = lambda x, b, n, t, s: x - slopes[n] * (t - s).astype(x.dtype)
        mask = Mask.function(lambda b, n, t, s: (s <= t) & (t - s < 90))
        return jax.lax.psum(loss(arrays, "pallas_tpu", mask=mask, score=score), "data")

    specs = dict(mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    gradient = jax.grad(jax.shard_map(one, **specs), (0, 1))
    kernels = {"flax_mha_forward", "flax_mha_backward", OF_SCORES}
    assert kernels_in(text_of(gradient, arrays, slopes)) == kernels
