"""Blocks compiled for an H100: the linen module's training step holds nothing of [T, S].

Compiled by XLA's GPU compiler for a card that is not here: nothing is said of numbers or of time.
"""

import functools

import jax
import pytest
from ahead_of_time import H100, beyond_arguments, compile, missing, steps_of
from training_steps import KINDS, H, N, shape, training_step

from flax_mha import dot_product_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing(H100) is not None, reason=str(missing(H100))),
]

LENGTHS = (4096, 8192, 16384)
TILE = 4 * N * 2048**2  # bytes of the float32 logits of one


@functools.cache
def program_of(kind, T, implementation=None):
    step, types = training_step(kind, implementation)
    return compile(step, types(T), H100)


def test_memory_is_linear_in_the_length():
    """A tile's own memory aside, which every length needs: twice the length adds twice as much."""
    few, more, many = (beyond_arguments(program_of("causal", T)) for T in LENGTHS)
    print(f"beyond the arguments {few >> 20}, {more >> 20} and {many >> 20} MiB")
    assert 0 < many - more <= 2.2 * (more - few)
    assert many <= 1 << 30  # of an einsum 24 GiB


def test_the_control_is_quadratic():
    few, more, many = (beyond_arguments(program_of("causal", T, "reference")) for T in LENGTHS)
    assert many - more > 3.5 * (more - few)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_holds_nothing_quadratic(kind):
    """Not one byte for each of [T, S]."""
    T = LENGTHS[-1]
    program = program_of(kind, T)
    steps = steps_of(program)
    assert any(step.opcode == "while" for step in steps)
    assert max(step.bytes for step in steps) == TILE < T * T
    assert "custom-call" not in {step.opcode for step in steps}  # no kernel but the compiler's own


LAUNCH, BANDWIDTH = 3e-6, 3.35e12  # seconds, bytes a second


def tiles(program, logits):
    """(seconds of its launches, of its bytes) of the loops' bodies that hold such logits.

    The bytes are those that one kernel of a body leaves for another: written once and read once.
    """
    steps = steps_of(program)
    for name in {step.computation for step in steps if step.bytes == logits}:
        body = [step for step in steps if step.computation == name]
        kernels = [step for step in body if step.opcode in ("fusion", "copy")]
        left = [step for step in kernels if "update" not in step.name]  # which is in place
        yield LAUNCH * len(kernels), 2 * sum(step.bytes for step in left) / BANDWIDTH


@pytest.mark.parametrize(("block_sizes", "are_worth"), [(None, True), ((512, 512), False)])
def test_tiles_of_few_heads_are_worth_their_launches(block_sizes, are_worth):
    """By arithmetic: a launch at 3 us, its bytes at 3.35 TB/s. Tiles of 512 x 512 are not."""
    x = shape(1, 16384, N, H)
    call = dict(is_causal=True, block_sizes=block_sizes)
    loss = lambda q, k, v: dot_product_attention(q, k, v, **call).astype("float32").sum()
    program = compile(jax.grad(loss, (0, 1, 2)), (x, x, x), H100)
    found = list(tiles(program, 4 * N * 512**2 if block_sizes else TILE))
    assert len(found) == 4, found  # masked and whole ones, forward and backward
    launches, moved = map(sum, zip(*found))
    assert (launches < moved / 4) == are_worth, found
    assert (launches > moved) != are_worth, found
