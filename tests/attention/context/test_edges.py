"""Where a ring might go wrong: broken tokens, few tokens, other transformations, other axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import axis_of, mesh_of
from helpers import normal, x64
from jax.sharding import PartitionSpec as P
from kernel_cases import unchecked

from flax_mha import (
    ContextAxis,
    Mask,
    context_parallel_attention,
    dot_product_attention,
    explain,
    zigzag_inverse,
    zigzag_order,
)
from flax_mha.attention import DistanceBias
from flax_mha.attention.context.axis import STRATEGIES as STRATEGY_NAMES
from flax_mha.attention.context.strategies import MODULES

T = 16
X = [normal(i, 2, T, 4, 8) for i in range(3)]
STRATEGIES = ["ring", "all_gather", "all_to_all"]
MESH = (2, 1, 4)


def on_mesh(function, *args, sizes=MESH):
    with jax.set_mesh(mesh_of(sizes)):
        return jax.jit(function)(*args)


def close(actual, expected):
    """To 1e-5 of the largest entry, and NaN at the same places."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = max(1.0, np.nanmax(np.abs(expected), initial=0.0))
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "T"),
    [
        *[(strategy, 0) for strategy in STRATEGIES],
        *[("ring", 1), ("ring", 9), ("all_gather", 3), ("all_to_all", 3)],
    ],
)
def test_fewer_tokens_than_devices(strategy, T):
    """What is filled up is removed again, of residuals as well; nothing to do is no error."""
    query, key, value = (x[:, :T] for x in X)
    attend = functools.partial(
        dot_product_attention, query, key, value, is_causal=True, return_residuals=True
    )
    context, residuals = on_mesh(lambda: attend(context_axis=axis_of(strategy)))
    one, expected = attend()
    close(context, one)
    close(residuals.row_sum_BNT, expected.row_sum_BNT)
    assert context.shape == query.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        ("ring", "zigzag"),
        pytest.param("ring", "contiguous", marks=pytest.mark.slow),
        pytest.param("all_gather", "zigzag", marks=pytest.mark.slow),
        pytest.param("all_to_all", "contiguous", marks=pytest.mark.slow),
    ],
)
def test_a_broken_document_breaks_itself_alone(strategy, layout):
    """NaN of a token on one device reaches its document's queries on every other, and no more."""
    order = np.arange(T) if layout == "contiguous" else zigzag_order(T, 4)
    back = np.argsort(order)
    ids = jnp.array([[0] * 6 + [1] * 8 + [2] * 2])
    query, key, value = X
    key = key.at[0, 7].set(jnp.nan)
    real = jnp.ones((1, T), bool).at[0, 3].set(False)

    def loss(query, key, value, axis=None, order=slice(None)):
        mask = Mask.segments(ids[:, order], ids[:, order]) & Mask.padding(key=real[:, order])
        context = dot_product_attention(query, key, value, mask=mask, context_axis=axis)
        return jnp.where(jnp.isnan(context), 0, context).sum(), context

    run = jax.grad(loss, (0, 1, 2), has_aux=True)
    expected, one = run(query, key, value)
    stored = [x[:, order] for x in (query, key, value)]
    along = functools.partial(run, axis=axis_of(strategy, layout), order=order)
    gradients, context = on_mesh(along, *stored)
    context = context[:, back]
    assert np.isnan(context[0, 6:14]).all()
    np.testing.assert_array_equal(np.isnan(context), np.isnan(one))
    close(context, one)
    for actual, wanted in zip(gradients, expected):
        close(actual[:, back], wanted)


@pytest.mark.slow
def test_many_more_tokens_than_int16_counts():
    """Positions are whole ones: a window at the end of a long sequence."""
    T, H = 40_000, 4
    query, key, value = (normal(i, 1, T, 1, H) for i in range(3))
    attend = functools.partial(
        dot_product_attention, query, key, value, is_causal=True, local_window_size=3
    )
    context = on_mesh(lambda: attend(context_axis=axis_of("ring")))
    close(context, attend(implementation="blockwise"))


# --- transformations ----------------------------------------------------------------------------


def assert_second_derivatives(strategy, name=None, sizes=MESH):
    def loss(query, key, value, axis=None):
        call = dict(context_axis=axis, implementation=name) if axis else {}
        return (dot_product_attention(query, key, value, **call) ** 2).sum()

    def squares(*args, axis=None):
        gradients = jax.grad(functools.partial(loss, axis=axis), (0, 1, 2))(*args)
        return sum((x**2).sum() for x in gradients)

    along = functools.partial(squares, axis=axis_of(strategy))
    actual = on_mesh(jax.grad(along, (0, 1, 2)), *X, sizes=sizes)
    for one, other in zip(actual, jax.grad(squares, (0, 1, 2))(*X)):
        close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivatives_in_reverse(strategy):
    assert_second_derivatives(strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivatives_of_an_interpreted_kernel(strategy, monkeypatch):
    """What a ring's hop knows is the softmax of all keys, and not of those that are there."""
    monkeypatch.setattr(jax, "shard_map", unchecked(jax.shard_map))
    assert_second_derivatives(strategy, "pallas_interpreted", (1, 1, 2))


def tangents(strategy):
    attend = lambda *x: dot_product_attention(*x, context_axis=axis_of(strategy))
    return on_mesh(lambda *x: jax.jvp(attend, x, x)[1], *X)


@pytest.mark.slow
def test_forward_mode():
    close(tangents("all_gather"), jax.jvp(dot_product_attention, X, X)[1])
    with pytest.raises(TypeError, match=r"forward-mode .*\(jvp\) to a custom_vjp"):
        tangents("ring")


@pytest.mark.slow
def test_a_checkpoint_and_a_scan_over_layers():
    """Beside float64: in float32 one device is as far from it as a ring, to the other side."""

    def layers(x, axis=None):
        @jax.checkpoint
        def layer(x, _):
            return x + dot_product_attention(x, x, x, is_causal=True, context_axis=axis), None

        return (jax.lax.scan(layer, x, None, length=3)[0] ** 2).sum()

    actual = on_mesh(jax.grad(functools.partial(layers, axis=axis_of("ring"))), X[0])
    with x64():
        close(actual, jax.grad(layers)(X[0].astype("float64")))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_over_examples_by_vmap(strategy):
    attend = lambda *x, axis=None: dot_product_attention(*x, is_causal=True, context_axis=axis)
    actual = on_mesh(jax.vmap(functools.partial(attend, axis=axis_of(strategy))), *X)
    close(actual, attend(*X))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_an_axis_of_vmap_is_an_axis(strategy, layout):
    """Devices that are none: one machine plays them all, with the same collectives."""
    n, order = 4, np.arange(T) if layout == "contiguous" else zigzag_order(T, 4)
    cut = lambda x: jnp.stack(jnp.split(x[:, order], n, axis=1))
    attend = functools.partial(
        context_parallel_attention,
        axis_name="devices",
        strategy=strategy,
        layout=layout,
        is_causal=True,
    )
    parts = jax.vmap(attend, axis_name="devices")(*map(cut, X))
    whole = jnp.concatenate(list(parts), 1)[:, np.argsort(order)]
    close(whole, dot_product_attention(*X, is_causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", pytest.param("all_gather", marks=pytest.mark.slow)])
def test_an_axis_of_pmap_is_an_axis(strategy):
    n = 4
    cut = lambda x: jnp.stack(jnp.split(x, n, axis=1))
    attend = functools.partial(
        context_parallel_attention, axis_name="devices", strategy=strategy, is_causal=True
    )
    loss = lambda *x: (attend(*x) ** 2).sum()
    parts = jax.pmap(attend, axis_name="devices")(*map(cut, X))
    close(jnp.concatenate(list(parts), 1), dot_product_attention(*X, is_causal=True))
    (gradient,) = jax.pmap(lambda *x: (jax.grad(loss)(*x),), axis_name="devices")(*map(cut, X))
    whole = lambda query: (dot_product_attention(query, *X[1:], is_causal=True) ** 2).sum()
    close(jnp.concatenate(list(gradient), 1), jax.grad(whole)(X[0]))


@pytest.mark.slow
def test_in_a_shard_map_of_the_caller():
    """Inside, arrays are a device's own; a bias has their rows, and the columns of all keys."""
    mesh, bias = mesh_of(MESH), normal(5, 1, 4, T, T)
    attend = functools.partial(dot_product_attention, context_axis="context", is_causal=True)
    cut, rows = P("data", "context"), P(None, None, "context")
    sharded = jax.shard_map(
        lambda query, key, value, bias: attend(query, key, value, bias=bias),
        mesh=mesh,
        in_specs=(cut, cut, cut, rows),
        out_specs=cut,
    )
    close(jax.jit(sharded)(*X, bias), dot_product_attention(*X, bias=bias, is_causal=True))


def test_in_a_shard_map_over_another_axis():
    """Which leaves the context axis automatic: the call opens it.

    jax 0.7 cannot lower `jax.lax.axis_index` in a `shard_map` within another.
    """
    mesh = mesh_of(MESH)
    attend = functools.partial(dot_product_attention, context_axis="context", is_causal=True)
    cut = P("data")
    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=cut, out_specs=cut, axis_names={"data", "heads"}
    )
    if jax.__version_info__ < (0, 8):
        with pytest.raises(ValueError, match="verifier errors"):
            jax.jit(sharded)(*X)
        return
    close(jax.jit(sharded)(*X), dot_product_attention(*X, is_causal=True))


@pytest.mark.parametrize(
    ("strategy", "layout"), [("all_gather", "zigzag"), ("all_to_all", "contiguous")]
)
def test_weights_are_returned_where_they_can_be(strategy, layout):
    order = np.arange(T) if layout == "contiguous" else zigzag_order(T, 4)
    call = dict(is_causal=True, return_weights=True)
    stored, back = [x[:, order] for x in X], np.argsort(order)
    axis = axis_of(strategy, layout)
    _, weights = on_mesh(lambda *x: dot_product_attention(*x, **call, context_axis=axis), *stored)
    close(weights[:, :, back][..., back], dot_product_attention(*X, **call)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["all_gather", *(pytest.param(x, marks=pytest.mark.slow) for x in STRATEGIES)]
)
@pytest.mark.parametrize("opens", [True, False], ids=["opened", "the caller's"])
def test_gradients_of_sixteen_bits_that_devices_share(strategy, opens):
    """Summed over the devices in float32: of a sum of bfloat16 XLA's CPU dies, with the process."""
    shared = {
        "sinks": normal(5, 4),
        "bias": normal(6, 1, 4, 1, T),
        "distances": normal(7, 4, 2 * T - 1),
    }
    arrays = [x.astype("bfloat16") for x in (*X, *shared.values())]

    def attend(query, key, value, sinks, bias, distances, axis=None):
        call = dict(sinks=sinks, bias=bias, distance_bias=DistanceBias(distances, first=1 - T))
        return dot_product_attention(query, key, value, **call, context_axis=axis)

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
    actual = on_mesh(lambda *arrays: gradients(along, arrays), *arrays)
    for one, other in zip(actual, expected):
        assert one.dtype == "bfloat16"
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one.astype("float32") / scale, other / scale, atol=2e-2)


def test_the_strategies_have_one_list_of_names():
    assert tuple(MODULES) == STRATEGY_NAMES


# --- order of the tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_zigzag_is_a_permutation_of_equal_work(n):
    order = zigzag_order(T, n)
    np.testing.assert_array_equal(np.sort(order), np.arange(T))
    np.testing.assert_array_equal(order[zigzag_inverse(T, n)], np.arange(T))
    keys_seen = (order + 1).reshape(n, -1).sum(1)
    assert (keys_seen == keys_seen[0]).all()


# --- what is refused ----------------------------------------------------------------------------

AXIS = "context"


def zigzag(T, n):
    query = X[0][:, :T]
    return lambda: on_mesh(
        lambda: dot_product_attention(query, query, query, context_axis=axis_of("ring", "zigzag"))
    )


REFUSED = {
    "no mesh": (
        lambda: dot_product_attention(*X, context_axis=AXIS),
        (ValueError, r"`context_axis='context'` must be an axis of the mesh\..*no mesh.*set_mesh"),
    ),
    "another mesh": (
        lambda: on_mesh(lambda: dot_product_attention(*X, context_axis="ctx")),
        (ValueError, r"'ctx'` must be an axis.*\('data', 'heads', 'context'\)"),
    ),
    "no shard_map": (
        lambda: context_parallel_attention(*X, axis_name=AXIS),
        (ValueError, r"context axis 'context' must be one of a mesh around.*shard_map"),
    ),
    "an unknown strategy": (
        lambda: ContextAxis(AXIS, "rong"),
        (ValueError, r"`strategy` must be one of \['ring', 'all_gather', 'all_to_all'\].*'rong'"),
    ),
    "an unknown layout": (
        lambda: ContextAxis(AXIS, layout="striped"),
        (ValueError, r"`layout` must be one of \['contiguous', 'zigzag'\].*'striped'"),
    ),
    "no name": (
        lambda: dot_product_attention(*X, context_axis=2),
        (TypeError, r"`context_axis` must be the name of a mesh axis, or a ContextAxis.*2"),
    ),
    "zigzag of odd lengths": (
        zigzag(12, 4),
        (ValueError, r"multiples of 2 n = 8, and cannot be filled.*T = 12, S = 12, n = 4.*Pad"),
    ),
    "weights of a ring": (
        lambda: on_mesh(
            lambda: dot_product_attention(*X, context_axis=axis_of("ring"), return_weights=True)
        ),
        (NotImplementedError, r"strategy='ring' cannot.*return_weights.*\['all_gather', 'all_to"),
    ),
    "a ring of the reference": (
        lambda: on_mesh(
            lambda: dot_product_attention(
                *X, context_axis=axis_of("ring"), implementation="reference"
            )
        ),
        (NotImplementedError, r"merges parts of a softmax, and reference has no gradient of a p"),
    ),
    "fewer heads than devices": (
        lambda: on_mesh(
            lambda: dot_product_attention(
                *(x[:, :, :2] for x in X), context_axis=axis_of("all_to_all")
            )
        ),
        (NotImplementedError, r"each of the 4 devices of 'context' as many heads.*there are 2"),
    ),
    "an unknown implementation": (
        lambda: on_mesh(
            lambda: dot_product_attention(*X, context_axis=AXIS, implementation="flash")
        ),
        (ValueError, r"`implementation` must be one of"),
    ),
    "a mask of a device's keys": (
        lambda: jax.vmap(
            lambda x: context_parallel_attention(
                x, x, x, axis_name=AXIS, mask=jnp.ones((T // 4, T // 4), bool)
            ),
            axis_name=AXIS,
        )(jnp.stack(jnp.split(X[0], 4, 1))),
        (ValueError, r"`mask` must broadcast to \[\.\.\., N, T, S\] = \(2, 4, 4, 16\)"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_is_sent(name):
    call, (error, text) = REFUSED[name]
    with pytest.raises(error, match=text):
        call()


# --- explain ------------------------------------------------------------------------------------


def test_explain_tells_strategies_and_what_a_device_runs():
    x = jax.ShapeDtypeStruct((2, 4096, 6, 64), jnp.bfloat16)
    with jax.set_mesh(mesh_of(MESH)):
        told = explain(x, x, x, context_axis="context", is_causal=True)
        gathers = explain(x, x, x, context_axis="context", return_weights=True)
        on_tpu = explain(x, x, x, context_axis="context", platform="tpu")
    assert told["ring"] == "ok, and None chooses it: the first that can"
    assert told["all_gather"] == "ok"
    assert "4 devices of 'context'" in told["all_to_all"]
    assert told["blockwise"].startswith("ok, and None chooses it")
    assert "no gradient of a part" in told["reference"]
    assert gathers["all_gather"].startswith("ok, and None chooses it")
    assert gathers["reference"].startswith("ok, and None chooses it")
    assert "cannot cut a kernel over ['data']" in on_tpu["pallas_tpu"]


def test_explain_without_other_axes_gives_the_kernel():
    x = jax.ShapeDtypeStruct((2, 4096, 6, 64), jnp.bfloat16)
    with jax.set_mesh(mesh_of((1, 1, 8))):
        told = explain(x, x, x, context_axis="context", platform="tpu")
    assert told["pallas_tpu"].startswith("ok, and None chooses it")
