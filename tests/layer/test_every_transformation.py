"""One table: transformation x implementation x length x dtype, against the plain call.

By default a thin slice is run, of the blockwise implementation alone.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from every_transformation import POLICIES, TABLE, call_of
from jax import export
from transformed_layer import (
    B,
    Call,
    assert_equal,
    forward,
    half_squares,
    jvp,
    plain,
    tolerance_of,
)

# What is run by default: a row in float32 and of one block, at that length.
DEFAULT = {
    "jvp_masked": 300,
    "reverse_over_reverse": 128,
    "export[b, t]": 128,
    "explicit_both": 300,
    "shard_map_grad_inside_both_vma=True": 300,
    "shard_map_bias_vma=True": 128,
}


def columns(i, name):
    """Several blocks, none of them whole, and one block; 16 bits; the reference, without blocks.

    The lengths of the last three go around the rows: one block is short, whole or filled up.
    """
    yield "blockwise", 600, "float32"
    yield "blockwise", DEFAULT.get(name, (16, 128, 300)[i % 3]), "float32"
    yield "blockwise", (300, 128)[i % 2], "bfloat16"
    yield "reference", (16, 600)[i % 2], "float32"


def cases():
    for i, name in enumerate(TABLE):
        yield from ((name, *column) for column in columns(i, name))


def param(name, implementation, T, dtype):
    chosen = (implementation, dtype) == ("blockwise", "float32") and DEFAULT.get(name) == T
    marks = () if chosen else pytest.mark.slow
    return pytest.param(name, implementation, T, dtype, marks=marks)


@pytest.mark.parametrize(
    ("name", "implementation", "T", "dtype"), [param(*case) for case in cases()]
)
def test_equals_the_plain_call(name, implementation, T, dtype):
    call = call_of(name, implementation, T, dtype)
    got, expected = TABLE[name].run(call, call.arrays)
    assert_equal(got, expected, tolerance_of(TABLE[name].order, dtype))


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_names_are_saved(implementation):
    """A policy of names keeps what bears them: fewer products are computed again."""
    call = Call(implementation, T=128)

    def computed(policy):
        kept = jax.checkpoint(lambda *arrays: call(*arrays), policy=policy)
        program = jax.make_jaxpr(jax.grad(lambda *arrays: half_squares(kept(*arrays)), (0, 1)))
        text = str(program(*call.arrays))
        return text.count("dot_general") + text.count("program=Forward(")

    assert computed(POLICIES["named"]) < computed(POLICIES["nothing"])


def products(call, platform):
    """The [512, 512] products of a program for that platform, with the axes before them."""
    arrays = jax.eval_shape(lambda: call.arrays)
    program = export.export(jax.jit(call), platforms=[platform])(*arrays)
    found = re.findall(r"dot_general.*-> tensor<(.*)x512x512xf32>", program.mlir_module())
    return {axes for axes in found if "x" in axes}


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_tiles_are_those_of_the_platform(platform):
    """Not of the machine that traces: a GPU's hold every example and head, the others' few."""
    call = Call("blockwise", T=512, causal=False, B=16, N=8, K=8, D=16, H=64)
    assert (products(call, platform) == {"16x8"}) == (platform == "cuda")
    assert products(call, platform)


@pytest.mark.slow
def test_the_tolerance_sees_one_block():
    """The control: one query that forgets one key is seen by the output and by each derivative."""
    call = Call("reference", T=16)
    params, x, _ = call.arrays
    forgets = jnp.ones((B, 16, 16), bool).at[1, 10, 7].set(False)
    broken = lambda *arrays: call(*arrays, attention_mask=forgets)
    for ask, order in ((forward, 0), (jvp, 1)):
        right = plain(ask, call)
        with pytest.raises(AssertionError, match="of the largest"):
            assert_equal(jax.jit(ask(broken))(params, x), right, tolerance_of(order, "float32"))
