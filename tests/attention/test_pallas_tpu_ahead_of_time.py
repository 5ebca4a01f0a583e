"""The linen module's training step compiled for TPUs: the kernels are in it, and no [T, S].

Compiled by libtpu for chips that are not here: nothing is said of numbers or of time.
"""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu", reason="libtpu: not installed: pip install 'jax[tpu]'")
from ahead_of_time import beyond_arguments, compile, devices_of, steps_of
from training_steps import KINDS, H, N, training_step

pytestmark = pytest.mark.slow

LENGTHS = (4096, 32768)
# Steps of a linear program: each array of it is at most as long as T times all features.
BYTES_A_TOKEN = 4 * N * H
TOPOLOGIES = ["v5p:2x2x1", "v6e:2x2"]


def largest(compiled):
    return max(step.bytes for step in steps_of(compiled))


def kernels(compiled):
    text = compiled.as_text()
    return [x for x in ("forward", "backward", "bias", "distances") if f"flax_mha_{x}" in text]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_holds_the_kernels_and_nothing_quadratic(kind):
    step, types = training_step(kind)
    T = LENGTHS[-1]
    program = compile(step, types(T))
    assert kernels(program) == ["forward", "backward", *(["bias"] if kind == "bias" else [])]
    assert largest(program) <= BYTES_A_TOKEN * T, largest(program)


def test_the_peak_is_linear_in_the_length():
    step, types = training_step("causal")
    few, many = (beyond_arguments(compile(step, types(T))) for T in LENGTHS)
    print(f"beyond the arguments {few >> 20} and {many >> 20} MiB")
    assert many <= 1.1 * few * LENGTHS[1] / LENGTHS[0]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_chip_takes_the_kernels_at_32768(topology):
    step, types = training_step("causal")
    program = compile(step, types(32768), topology)
    assert kernels(program) == ["forward", "backward"]
    assert largest(program) <= BYTES_A_TOKEN * 32768


def test_the_control_is_quadratic():
    step, types = training_step("causal", "reference")
    program = compile(step, types(4096))
    assert kernels(program) == []
    assert largest(program) > BYTES_A_TOKEN * 4096


@pytest.mark.parametrize(
    ("kind", "sizes"), [("padding", (4, 1)), ("causal", (1, 4)), ("dropout", (2, 2))], ids=str
)
def test_on_four_chips_each_has_examples_and_heads_of_its_own(kind, sizes):
    """A mesh of explicit axes: batch over the first, heads over the second."""
    chips = np.array(devices_of("v5e:2x2")).reshape(sizes)
    mesh = Mesh(chips, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    step, types = training_step(kind)
    params, x, bias, arrays = types(4096, B=4)

    def on(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))

    def of_param(path, x):
        name = jax.tree_util.keystr(path)
        is_output, is_kernel = "attention_output" in name, "kernel" in name
        if is_output:
            return on(x, "model") if is_kernel else on(x)
        return on(x, None, "model") if is_kernel else on(x, "model")

    params = jax.tree_util.tree_map_with_path(of_param, params)
    arrays = {n: on(x, "data") if n != "key" else on(x) for n, x in arrays.items()}
    with jax.set_mesh(mesh):
        program = jax.jit(step).lower(params, on(x, "data"), on(bias), arrays).compile()
    assert kernels(program) == ["forward", "backward"]
    per_chip = math.ceil(4 / sizes[0]) * 4096
    assert largest(program) <= BYTES_A_TOKEN * per_chip
