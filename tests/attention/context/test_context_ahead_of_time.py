"""A context axis compiled for chips that are not here: memory, the kernels, and what overlaps.

Compiled by libtpu: nothing is said of numbers or of time.
"""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu", reason="libtpu: not installed: pip install 'jax[tpu]'")
from ahead_of_time import beyond_arguments, compile, devices_of, steps_of

from flax_mha import ContextAxis, dot_product_attention

pytestmark = pytest.mark.slow

N, H = 8, 128
LONG = 32768
FOUR, SIXTEEN = "v5e:2x2", "v5e:4x4"
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def gradient(axis=None):
    def loss(query, key, value):
        context = dot_product_attention(query, key, value, is_causal=True, context_axis=axis)
        return context.astype("float32").sum()

    return jax.grad(loss, (0, 1, 2))


@functools.cache
def ring(T, topology, sizes, kind, layout, B=1):
    """Forward and backward, causal, over a mesh of data x heads x context."""
    names = ("data", "heads", "context")
    chips = np.array(devices_of(topology)).reshape(sizes)
    mesh = Mesh(chips, names, axis_types=(kind,) * 3)
    used = (name if size > 1 else None for name, size in zip(names, sizes))
    examples, heads, length = used
    sharding = NamedSharding(mesh, P(examples, length, heads))
    x = jax.ShapeDtypeStruct((B, T, N, H), "bfloat16", sharding=sharding)
    with jax.set_mesh(mesh):
        return jax.jit(gradient(ContextAxis("context", "ring", layout))).lower(x, x, x).compile()


@functools.cache
def one_chip():
    x = jax.ShapeDtypeStruct((1, LONG, N, H), "bfloat16")
    return compile(gradient(), (x, x, x))


def peak(program):
    return program.memory_analysis().peak_memory_in_bytes


def kernels(program):
    return [x for x in ("forward", "backward") if f"flax_mha_{x}" in program.as_text()]


def loops(program):
    """Of each loop that sends: its starts, kernels and ends of sending, in the order they run."""
    orders = {}
    for step in steps_of(program):
        sends = re.match("collective-permute-(start|done)$", step.opcode)
        name = sends[1] if sends else "kernel" if step.name.startswith("flax_mha_") else None
        if name:
            orders.setdefault(step.computation, []).append(name)
    return [order for order in orders.values() if {"start", "kernel"} <= set(order)]


@pytest.mark.parametrize(
    ("kind", "layout"), [(AUTO, "zigzag"), (EXPLICIT, "contiguous")], ids=["zigzag", "contiguous"]
)
def test_each_of_four_chips_needs_a_third_of_one_s_memory(kind, layout):
    four, one = ring(LONG, FOUR, (1, 1, 4), kind, layout), one_chip()
    for name, of in (("peak", peak), ("beyond the arguments", beyond_arguments)):
        print(f"{layout}, {name}: {of(four) >> 20} MiB a chip of four, {of(one) >> 20} MiB of one")
        assert of(four) <= of(one) / 3


def test_memory_of_sixteen_chips_is_linear():
    few, many = (ring(T, SIXTEEN, (1, 1, 16), AUTO, "contiguous") for T in (65536, 131072))
    for name, of in (("peak", peak), ("beyond the arguments", beyond_arguments)):
        print(f"{name}: {of(few) >> 20} MiB at 65,536, {of(many) >> 20} MiB at 131,072")
        assert of(many) <= 2.1 * of(few)
    assert max(x.bytes for x in steps_of(many)) <= 131072 // 16 * N * H * 4


def test_the_kernels_run_while_keys_and_gradients_travel():
    """A loop's sends begin before its kernels and end behind them."""
    program = ring(LONG, FOUR, (1, 1, 4), AUTO, "zigzag")
    assert kernels(program) == ["forward", "backward"]
    forward, backward = sorted(loops(program), key=len)
    assert forward == ["start"] * 2 + ["kernel"] * 4 + ["done"] * 2
    assert backward == ["start"] * 4 + ["kernel"] * 4 + ["done"] * 4


def test_examples_and_heads_are_cut_as_well_on_explicit_axes():
    program = ring(4096, FOUR, (1, 2, 2), EXPLICIT, "contiguous", B=2)
    assert kernels(program) == ["forward", "backward"]
    assert max(x.bytes for x in steps_of(program)) <= 2 * 4096 // 2 * N // 2 * H * 4
