"""Masks and scores as functions of pairs, of a sequence that is cut over devices.

`EVERY_ROW=1 python -m pytest -m ""` runs each strategy in both layouts, opened by the call and by
the caller.
"""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import STRATEGIES, axis_of
from helpers import normal
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from pair_context import RAGGED, SIZES, assert_alike, mesh_of
from pair_examples import JOINED

from flax_mha import (
    Mask,
    block_mask,
    context_parallel_attention,
    dot_product_attention,
    zigzag_order,
)
from flax_mha.attention.context import groups
from flax_mha.attention.context.axis import Devices
from flax_mha.attention.context.exchange import call_of
from flax_mha.attention.contract import Inputs

EVERY_ROW = "EVERY_ROW" in os.environ
NAMES = [
    "mask, sliding window",
    "mask, document",
    "mask, widths of heads",
    "mask, table of distances",
    "mask, table of pairs",
    *(f"joined, {name}" for name in (JOINED if EVERY_ROW else list(JOINED)[::4])),
    "score, ALiBi",
    "score, relative table",
    "score, query and key biases",
    "score, decay by example",
    "score, forgetting",
    "score, T5",
    "score, table of pairs",
    "score, DeBERTa",
    "score, branches",
]
SHARED = ["mask, widths of heads", "score, query and key biases"]
LAYOUTS = ["contiguous", "zigzag"]
OPENED, CALLERS = True, False
T = 16
X = [normal(i, 2, T, 4, 8) for i in range(3)]


def slowly(rows, *quick):
    """The quick ones by default, and all of them as slow tests."""
    rest = [row for row in rows if row not in quick]
    return [*quick, *(pytest.param(*row, marks=pytest.mark.slow) for row in rest)]


def rows():
    """Of each name and strategy one layout and one opener, in turns; or all of them."""
    every = itertools.product(*map(enumerate, (NAMES, STRATEGIES, LAYOUTS, (OPENED, CALLERS))))
    turn = lambda row: (row[0][0] + row[1][0] + row[2][0] + 2 * row[3][0]) % 4 == 0
    kept = [row for row in every if EVERY_ROW or turn(row)]
    return [tuple(x for _, x in row) for row in kept]


def close(actual, expected):
    actual, expected = np.asarray(actual, "float32"), np.asarray(expected, "float32")
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy", "layout", "opens"),
    slowly(
        rows(),
        ("joined, nested", "ring", "zigzag", CALLERS),
        ("joined, nested", "all_gather", "zigzag", OPENED),
        ("score, query and key biases", "ring", "zigzag", OPENED),
        ("score, query and key biases", "all_to_all", "zigzag", CALLERS),
        ("score, relative table", "ring", "contiguous", CALLERS),
    ),
)
def test_numbers_of_one_device(name, strategy, layout, opens):
    assert_alike(name, axis_of(strategy, layout), mesh_of(), opens=opens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"),
    slowly(
        itertools.product(
            ["mask, document", "joined, nested", "score, forgetting", "score, relative table"],
            STRATEGIES,
        ),
        ("score, forgetting", "ring"),
    ),
)
def test_lengths_that_the_devices_do_not_divide(name, strategy):
    assert_alike(name, axis_of(strategy), mesh_of(), RAGGED)


@pytest.mark.parametrize(
    ("name", "strategy", "sizes"),
    slowly(
        itertools.product(
            [*SHARED, "joined, prefix-LM", "score, decay by example", "score, table of pairs"],
            STRATEGIES,
            [(2, 1, 4), (2, 2, 2)],
        ),
        ("score, query and key biases", "all_to_all", (2, 2, 2)),
        ("joined, prefix-LM", "ring", (2, 2, 2)),
    ),
)
def test_examples_and_heads_keep_their_numbers(name, strategy, sizes):
    """On explicit axes these are cut too: b and n are those of the whole call."""
    assert_alike(name, axis_of(strategy), mesh_of(*sizes, kind=AxisType.Explicit))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joined, nested", "score, query and key biases"])
def test_the_reference_by_name(name):
    axis = axis_of("all_gather", "zigzag")
    assert_alike(name, axis, mesh_of(), opens=CALLERS, implementation="reference")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mask, document", "joined, prefix-LM", "score, ALiBi"])
def test_an_interpreted_kernel(name, layout, monkeypatch):
    """Pallas's interpreter does not know types that say what varies over a mesh."""
    unchecked = lambda *args, **how: shard_map(*args, **how | {"check_vma": False})
    shard_map = jax.shard_map
    monkeypatch.setattr(jax, "shard_map", unchecked)
    mesh = mesh_of(context=2)
    assert_alike(name, axis_of("ring", layout), mesh, implementation="pallas_interpreted")


# --- a ring's gradient, of some heads at a time -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    slowly(
        itertools.product(
            [*SHARED, "score, ALiBi", "score, T5", "score, relative table", "score, one number"],
            LAYOUTS,
        ),
        ("score, query and key biases", "contiguous"),
        ("score, relative table", "zigzag"),
    ),
)
def test_heads_in_groups(name, layout, monkeypatch):
    """What a group has of its own is put in its place; what heads share is summed."""
    seen, groups_of = [], groups.groups_of
    monkeypatch.setattr(groups, "GROUP", 0)
    monkeypatch.setattr(groups, "groups_of", lambda x: seen.append(groups_of(x)) or seen[-1])
    assert_alike(name, axis_of("ring", layout), mesh_of())
    assert set(seen) == {SIZES.K}


# --- blocks that were found before --------------------------------------------------------------


def far(table, b, n, t, s):
    return table[s - t + T] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "layout"),
    slowly(itertools.product(STRATEGIES, LAYOUTS), ("all_to_all", "zigzag")),
)
def test_given_blocks_change_nothing(strategy, layout):
    """They are of the whole sequence: kept where a device has all of it, and else found anew."""
    order = zigzag_order(T, 4) if layout == "zigzag" else np.arange(T)
    table = jnp.asarray(np.arange(2 * T) < T - 6)
    given = functools.partial(far, table.astype("int32"))
    blocks = block_mask(given, T, T, block_size=4)
    assert 0 < blocks.visited < 0.5
    mask = Mask.function(given, blocks=blocks)
    with jax.set_mesh(mesh_of()):
        attend = lambda *x: dot_product_attention(
            *x, mask=mask, context_axis=axis_of(strategy, layout), block_sizes=(4, 4)
        )
        result = jax.jit(attend)(*(x[:, order] for x in X))
    close(result[:, np.argsort(order)], dot_product_attention(*X, mask=mask))


def test_the_blocks_of_a_device_s_heads():
    """The exchange keeps them: an array of 4 heads is one of a head on each of 4 devices."""
    found = {}

    def device(query, key, value):
        axis = axis_of("all_to_all")
        mask = Mask.function(lambda b, n, t, s: s <= t + n, blocks=blocks)
        inputs, _ = canonical_of(query, key, value, mask, axis)
        found["blocks"] = call_of(Devices.on(axis), inputs).where[0].blocks.some.shape
        return query

    blocks = block_mask(lambda b, n, t, s: s <= t + n, T, T, N=4, block_size=4)
    cut = P(None, "context")
    mapped = jax.shard_map(device, mesh=mesh_of(), in_specs=(cut,) * 3, out_specs=cut)
    jax.eval_shape(mapped, *X)
    assert blocks.some.shape == (1, 4, 4, 4)
    assert found["blocks"] == (1, 1, 4, 4)


def canonical_of(query, key, value, mask, axis) -> tuple[Inputs, object]:
    from flax_mha.attention.canonical import canonical
    from flax_mha.attention.dispatch import bound

    data, static, _, _ = bound(query, key, value, {"mask": mask})
    return canonical(**data, **static, axis=axis, scales=None)


# --- what a device has little of ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "of"),
    slowly(itertools.product(STRATEGIES, ["a bias", "a function"]), ("all_to_all", "a bias")),
)
def test_one_query_a_device(strategy, of):
    """An array of one row is then this query's own: it is not that of all queries."""
    query, key, value = (x[:, :4] for x in X)
    bias = normal(9, 1, 1, 4, 4)
    given = (
        {"bias": bias} if of == "a bias" else {"score": lambda x, b, n, t, s: x + bias[0, 0, t, s]}
    )
    if of == "a function":
        given["mask"] = Mask.function(lambda b, n, t, s: s <= t)
    with jax.set_mesh(mesh_of()):
        attend = functools.partial(dot_product_attention, context_axis=axis_of(strategy), **given)
        result = jax.jit(attend)(query, key, value)
    close(result, dot_product_attention(query, key, value, **given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "layout"),
    slowly(itertools.product(STRATEGIES, LAYOUTS), ("ring", "zigzag")),
)
def test_an_axis_of_vmap_is_an_axis(strategy, layout):
    """Each lane has positions of its own, which vmap sees as numbers that differ by lane."""
    order = zigzag_order(T, 4) if layout == "zigzag" else np.arange(T)
    cut = lambda x: jnp.stack(jnp.split(x[:, order], 4, axis=1))
    decay, ids = normal(8, 4), jnp.arange(T) // 5
    call = dict(
        score=lambda x, b, n, t, s: x + decay[n] * (t - s).astype(x.dtype),
        mask=Mask.function(lambda b, n, t, s: (ids[t] == ids[s]) | (s < 2)),
    )
    attend = functools.partial(
        context_parallel_attention, axis_name="devices", strategy=strategy, layout=layout, **call
    )
    parts = jax.vmap(attend, axis_name="devices")(*map(cut, X))
    whole = jnp.concatenate(list(parts), 1)[:, np.argsort(order)]
    close(whole, dot_product_attention(*X, **call))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "opens"),
    slowly(itertools.product(STRATEGIES, (OPENED, CALLERS)), ("all_gather", OPENED)),
)
def test_gradients_of_sixteen_bits_that_devices_share(strategy, opens):
    """Summed in float32: of a sum of bfloat16 XLA's CPU dies, with the process."""
    shared = [normal(5, 4), normal(6, 4, T), normal(7, 2 * T)]
    arrays = [x.astype("bfloat16") for x in (*X, *shared)]

    def attend(query, key, value, slopes, gains, table, axis=None):
        def score(x, b, n, t, s):
            of = lambda number: number.astype(x.dtype)
            moved = of(slopes[n]) * of(t - s) + of(gains[n, t]) + of(gains[n, s])
            return x + moved + of(table[t - s + T])

        return dot_product_attention(query, key, value, score=score, context_axis=axis)

    along = functools.partial(attend, axis=axis_of(strategy))
    if not opens:
        cut = P(None, "context")
        along = jax.shard_map(
            along, in_specs=(cut,) * 3 + (P(),) * 3, out_specs=cut, axis_names={"context"}
        )

    def gradients(attend, arrays):
        loss = lambda *arrays: (attend(*arrays).astype("float32") ** 2).sum()
        return jax.grad(loss, tuple(range(6)))(*arrays)

    expected = gradients(attend, [x.astype("float32") for x in arrays])
    with jax.set_mesh(mesh_of()):
        actual = jax.jit(lambda *arrays: gradients(along, arrays))(*arrays)
    for one, other in zip(actual, expected):
        assert one.dtype == "bfloat16"
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one.astype("float32") / scale, other / scale, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivatives_in_reverse(strategy):
    decay = normal(8, 4)

    def loss(query, decay, axis=None):
        score = lambda x, b, n, t, s: x * jnp.cos(decay[n] * (t - s).astype(x.dtype))
        return (dot_product_attention(query, *X[1:], score=score, context_axis=axis) ** 2).sum()

    def squares(*args, axis=None):
        gradients = jax.grad(functools.partial(loss, axis=axis), (0, 1))(*args)
        return sum((x**2).sum() for x in gradients)

    expected = jax.grad(squares, (0, 1))(X[0], decay)
    with jax.set_mesh(mesh_of()):
        along = functools.partial(squares, axis=axis_of(strategy))
        actual = jax.jit(jax.grad(along, (0, 1)))(X[0], decay)
    for one, other in zip(actual, expected):
        close(one, other)


# --- what cannot be -----------------------------------------------------------------------------


def test_an_array_of_the_device_s_own_is_too_short():
    """t and s are positions of the whole sequence: what they look up is whole on every device."""
    cut, ids = P(None, "context"), jnp.zeros((2, T), "int32")

    def device(query, key, value, ids):
        mask = Mask.function(lambda b, n, t, s: ids[b, t] == 0)
        return dot_product_attention(query, key, value, mask=mask, context_axis="context")

    mapped = jax.shard_map(device, mesh=mesh_of(), in_specs=(cut,) * 4, out_specs=cut)
    with pytest.raises(ValueError, match=r"by `t` needs T entries\. .*\(2, 4\).* T = 16"):
        jax.eval_shape(mapped, *X, ids)


@pytest.mark.slow
def test_a_derivative_of_its_own():
    """What the call opens serves it; a caller's `jax.shard_map` must not check what varies."""
    score = lambda x, b, n, t, s: jax.nn.relu(x) + (t < s).astype(x.dtype)
    attend = functools.partial(dot_product_attention, score=score, context_axis="context")
    cut, mesh = P(None, "context"), mesh_of()
    mapped = functools.partial(jax.shard_map, attend, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut)
    with pytest.raises(NotImplementedError, match=r"must do without custom_jvp_call.*check_vma"):
        jax.eval_shape(mapped(), *X)
    with jax.set_mesh(mesh):
        results = [jax.jit(f)(*X) for f in (attend, mapped(check_vma=False))]
    for result in results:
        close(result, dot_product_attention(*X, score=score))
