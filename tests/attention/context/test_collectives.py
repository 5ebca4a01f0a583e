"""What the compiled programs send: each strategy the collectives that are intended, and no more.

Also the work that each device has of a causal sequence, in tiles.
"""

import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ahead_of_time import steps_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import QUICKLY

from flax_mha import ContextAxis, Mask, dot_product_attention
from flax_mha.attention.blockwise.tiles import Tiling, key_spans, query_spans
from flax_mha.attention.context.axis import Devices
from flax_mha.attention.context.hop import pairs
from flax_mha.attention.contract import Inputs

n, T, N, H, BLOCK = 8, 4096, 4, 16, 64
ROWS = T // n * N * H * 4  # bytes of a device's queries
TILE = BLOCK * BLOCK * N * 4
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def mesh_of_all():
    return jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,))


def compiled(strategy, layout="contiguous", K=N, packed=False, gradient=True, N=N, **call):
    """A call with its gradient over eight devices, or the call alone."""
    mesh, axis = mesh_of_all(), ContextAxis("context", strategy, layout)
    call = dict(is_causal=True, block_sizes=(BLOCK, BLOCK), context_axis=axis) | call

    def attend(query, key, value, real=None, ids=None):
        mask = None if real is None else Mask.padding(real, real) & Mask.segments(ids, ids)
        return dot_product_attention(query, key, value, mask=mask, **call)

    def loss(heads, *masks):
        return (attend(*heads, *masks) ** 2).sum()

    cut = NamedSharding(mesh, P(None, "context"))
    shape = lambda *sizes, dtype="float32": jax.ShapeDtypeStruct(sizes, dtype, sharding=cut)
    heads = [shape(1, T, heads, H) for heads in (N, K, K)]
    masks = [shape(1, T, dtype=dtype) for dtype in ("bool", "int32")] if packed else []
    run = jax.grad(loss) if gradient else lambda heads, *masks: attend(*heads, *masks)
    with jax.set_mesh(mesh):
        return jax.jit(run, compiler_options=QUICKLY).lower(heads, *masks).compile()


def sent(program):
    """{(kind of collective, whether it is in a loop): how often}."""
    entry = re.search(r"^ENTRY %?([\w.\-]+)", program.as_text(), re.MULTILINE)[1]
    found = [(re.match(f"({KINDS})(-start)?$", x.opcode), x.computation) for x in steps_of(program)]
    return Counter((kind[1], where != entry) for kind, where in found if kind)


def kinds(program):
    return {kind for kind, _ in sent(program)}


def permutes_by_loop(program):
    """How many permutes each loop has."""
    steps = [x for x in steps_of(program) if re.match("collective-permute(-start)?$", x.opcode)]
    entry = re.search(r"^ENTRY %?([\w.\-]+)", program.as_text(), re.MULTILINE)[1]
    return sorted(Counter(x.computation for x in steps if x.computation != entry).values())


def hops(program):
    """How often the loops around permutes run."""
    loops = {x.computation for x in steps_of(program) if x.opcode.startswith("collective-permute")}
    counts = []
    for line in program.as_text().splitlines():
        body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
        if body and body[1] in loops:
            counts.append(int(re.search(r'"known_trip_count":\{"n":"(\d+)"', line)[1]))
    return counts


def largest(program):
    return max(x.bytes for x in steps_of(program))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_a_ring_permutes_and_does_nothing_else(layout, packed):
    """A loop sends each array that travels once a hop; none is as long as the sequence is."""
    program = compiled("ring", layout, K=2, packed=packed)
    assert kinds(program) == {"collective-permute"}
    forward, more = (4, [3]) if packed else (2, [])  # of padding: which keys are finite
    assert permutes_by_loop(program) == [*more, forward, forward + 2]
    assert set(hops(program)) == {n}
    # Once home the gradients of keys and values have been everywhere.
    assert sent(program)["collective-permute", False] == 2
    # Which queries meet broken keys is found by [T / n, S / n] booleans a hop.
    booleans = (T // n // (2 if layout == "zigzag" else 1)) ** 2 if packed else 0
    assert largest(program) <= max(ROWS, TILE, booleans) < T // n * T // n * 4


@pytest.mark.slow
@pytest.mark.parametrize(("window", "count"), [(1, 2), (512, 2), (513, 3), (4000, n)], ids=str)
def test_a_window_makes_the_ring_shorter(window, count):
    """A device has 512 queries; the first of them looks back as far as the window."""
    program = compiled("ring", local_window_size=window, gradient=False)
    assert hops(program) == [count]
    assert kinds(program) == {"collective-permute"}


@pytest.mark.slow
def test_a_window_of_both_sides_begins_with_keys_from_behind():
    program = compiled("ring", is_causal=False, local_window_size=(100, 600))
    assert set(hops(program)) == {4}  # one before, itself, two behind
    assert kinds(program) == {"collective-permute"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_all_gather_gathers_keys_and_scatters_their_gradients(layout):
    forward = compiled("all_gather", layout, K=2, packed=True, gradient=False)
    assert sent(forward) == {("all-gather", False): 4}  # keys, values, padding, ids
    backward = compiled("all_gather", layout, K=2)
    assert kinds(backward) == {"all-gather", "reduce-scatter"}
    assert sent(backward)["reduce-scatter", False] == 2
    # All keys of the fewer heads; the queries stay where they are.
    assert ROWS < T * 2 * H * 4 <= largest(backward) <= max(T * 2 * H * 4, 2 * TILE)


@pytest.mark.slow
def test_all_to_all_exchanges_and_does_nothing_else():
    program = compiled("all_to_all", "contiguous", K=n, N=n)
    assert kinds(program) == {"all-to-all"}


def visited(layout, spans_of, count):
    """How many tiles each device visits of a causal sequence, `[n]`."""
    axis = ContextAxis("context", "ring", layout)

    def on_device(x_BTNH):
        devices = Devices.on(axis)
        inputs = Inputs(query_BTNH=x_BTNH, key_BSKH=x_BTNH, value_BSKV=x_BTNH, mask=Mask.causal())
        total = jnp.int32(0)
        for source in range(n):
            for call in itertools.chain(*pairs(devices, inputs, jnp.int32(source))):
                length = call.query_BTNH.shape[1]
                tiling = Tiling(B=1, K=1, G=1, T=length, S=length, b=1, k=1, t=BLOCK, s=BLOCK)
                for i in range(getattr(tiling, count)):
                    spans = spans_of(tiling, call.mask, jnp.int32(0), jnp.int32(i))
                    total += sum(span.stop - span.start for span in spans)
        return total[None]

    cut = P(None, "context")
    run = jax.shard_map(on_device, mesh=mesh_of_all(), in_specs=cut, out_specs=P("context"))
    return np.asarray(jax.jit(run, compiler_options=QUICKLY)(jnp.zeros((1, T, 1, 1))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spans_of", "count"),
    [(key_spans, "query_blocks"), (query_spans, "key_blocks")],
    ids=["forward", "backward"],
)
def test_in_zigzag_order_all_devices_have_the_same_work(spans_of, count):
    """In the contiguous one the last has 2 n - 1 = 15 times that of the first, in tiles 14."""
    zigzag, contiguous = (visited(layout, spans_of, count) for layout in ("zigzag", "contiguous"))
    blocks = T // BLOCK
    assert zigzag.sum() == contiguous.sum() == blocks * (blocks + 1) // 2
    np.testing.assert_array_equal(zigzag, zigzag.mean())
    whole = blocks // n
    np.testing.assert_array_equal(
        contiguous, whole * whole * np.arange(n) + whole * (whole + 1) // 2
    )
    assert 12 < contiguous[-1] / contiguous[0] <= 2 * n - 1
