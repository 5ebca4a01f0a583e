"""Blocks as a TPU's compiler makes them: cycles by its own estimates, and memory."""

import collections

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")

import ahead_of_time

from flax_mha import Mask, dot_product_attention
from flax_mha.attention.blockwise import backward, order, tile_sizes

N, H = 8, 128
# Bundles of jax's splash attention on v5e, a tile of 512 x 512 and head, at its best block sizes.
FORWARD, BACKWARD = 1146, 3280


def compiled(T, is_causal, implementation="blockwise"):
    """Forward and the gradient of query, key and value."""
    x = jax.ShapeDtypeStruct((1, T, N, H), jnp.bfloat16)
    call = dict(is_causal=is_causal, implementation=implementation)
    loss = lambda q, k, v: dot_product_attention(q, k, v, **call).astype("float32").sum()
    return ahead_of_time.compile(jax.grad(loss, (0, 1, 2)), (x, x, x))


def cycles_of_tiles(program, square=512 * 512):
    """Those of the loops' bodies that compute a tile, per 512 x 512 entries and head, falling.

    A tile's body is known by its float32 logits of 8 x 512 x 1024: nothing else is as large.
    """
    bodies = collections.defaultdict(list)
    for step in ahead_of_time.steps_of(program):
        bodies[step.computation].append(step)
    logits = 4 * N * 2 * square
    tiles = [x for x in bodies.values() if any(y.cycles and y.bytes == logits for y in x)]
    return sorted((sum(x.cycles for x in steps) / (2 * N) for steps in tiles), reverse=True)


def test_cycles_beside_splash():
    backward, forward = cycles_of_tiles(compiled(2048, is_causal=False))
    assert forward <= 2.5 * FORWARD, (forward, backward)
    assert forward + backward <= 1.8 * (FORWARD + BACKWARD), (forward, backward)


def test_tiles_that_are_not_turned_take_more(monkeypatch):
    """The control."""
    monkeypatch.setattr(tile_sizes, "LANES", 1 << 20)
    jax.clear_caches()  # what was lowered before was lowered with other tiles
    backward, forward = cycles_of_tiles(compiled(2048, is_causal=False))
    assert forward > 2.5 * FORWARD
    assert forward + backward > 1.8 * (FORWARD + BACKWARD)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_memory_is_linear_where_the_reference_is_not(implementation):
    """A token's share, beside arguments and results, at four times the length."""
    shares = []
    for T in (4096, 16384):
        memory = compiled(T, True, implementation).memory_analysis()
        io = memory.argument_size_in_bytes + memory.output_size_in_bytes
        shares.append((memory.peak_memory_in_bytes - io) / T)
    assert (shares[1] <= 1.2 * shares[0]) == (implementation == "blockwise"), shares


@pytest.mark.slow
def test_functions_of_pairs_compile_with_queries_along_lanes(monkeypatch):
    """A mask with holes, and a score with floats of every kind, forward and backward."""
    orders, of = set(), order.order_of
    spy = lambda tiling: orders.add(tiling.queries_last) or of(tiling)
    monkeypatch.setattr(backward, "order_of", spy)
    x = jax.ShapeDtypeStruct((1, 2048, N, H), jnp.bfloat16)
    floats = jax.ShapeDtypeStruct((N, 2048), jnp.float32)

    def loss(q, k, v, floats):
        def score(x, b, n, t, s):
            x = x - floats[n, 0] * jnp.abs(t - s).astype(x.dtype)
            return 30 * jnp.tanh((x + floats[n, t] - floats[n, s]) / 30)

        mask = Mask.function(lambda b, n, t, s: (s <= t) & ((t - s < 100) | (s % 512 < 8)))
        how = dict(mask=mask, score=score, implementation="blockwise")
        return dot_product_attention(q, k, v, **how).astype("float32").sum()

    program = ahead_of_time.compile(jax.grad(loss, (0, 1, 2, 3)), (x, x, x, floats))
    assert any(orders), "no tile of the program has its queries along the lanes"
    assert "tpu_custom_call" not in program.as_text()
