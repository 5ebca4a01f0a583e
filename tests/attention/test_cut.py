"""A call cut over the devices of a mesh of explicit axes: the numbers of one device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import QUICKLY, attend, compare, distances, split, unchecked

from flax_mha import Mask, dot_product_attention
from flax_mha.attention.cut import Cut, cut_of

B, T, S, N, K, H, V = 4, 34, 27, 4, 4, 8, 9
KEY = jax.random.key(4)
LENGTHS = jnp.array([[27], [20], [9], [3]])
PAD = jnp.arange(S)[None] < LENGTHS
QUERIES = jnp.arange(T)[None] < jnp.array([[34], [34], [20], [1]])
IDS = jnp.arange(T)[None] // jnp.array([[5], [7], [9], [34]])
FULL = dict(
    mask=Mask.causal(jnp.array([0, -3, 5, 11]))
    & Mask.padding(QUERIES, PAD)
    & Mask.segments(IDS, IDS[:, :S])
    & Mask.dense(normal(11, B, 1, T, S) < 1.5)
    & Mask.dense(normal(12, 1, N, 1, S) < 1.5),
    bias=normal(3, 1, N, T, S),
    distance_bias=distances(6, N, 30, -15, jnp.array([0, 2, 4, 6])),
    sinks=normal(7, N),
    soft_cap=3.0,
    dropout_rate=0.3,
    dropout_key=KEY,
)
CALLS = {
    "plain": dict(is_causal=True),
    "full": FULL,
    "start": FULL | dict(dropout_start=(3, 1, 37, 5)),
    "shared": dict(
        dropout_rate=0.3, dropout_key=KEY, broadcast_dropout=True, bias=normal(3, B, 1, 1, S)
    ),
}
MESHES = {"2x2": (2, 2), "4x1": (4, 1), "1x4": (1, 4)}
CUT = P("data", None, "model")


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def arrays_of(*batch, T=T, S=S, N=N, K=K, H=H, V=V):
    sizes = {"query": (T, N, H), "key": (S, K, H), "value": (S, K, V)}
    return {name: normal(i, *batch, *size) for i, (name, size) in enumerate(sizes.items())}


def put(arrays, mesh, axes=CUT):
    """Query, key and value along the axes; a bias by heads, and what else there is as a whole."""
    own = {"query": axes, "key": axes, "value": axes}
    return {
        name: jax.device_put(x, NamedSharding(mesh, own.get(name, P())))
        for name, x in arrays.items()
    }


def run(arrays, implementation, **call):
    """Results and gradients of a loss that is no sum over devices by its own form."""

    def loss(arrays):
        context, row_max, row_sum = attend(arrays, implementation, **call)
        return (context.astype("float32") ** 2).sum() + 0.01 * jnp.sin(row_sum).sum(), {
            "context": context,
            "row_max": row_max,
            "row_sum": row_sum,
        }

    jitted = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)
    gradients, outputs = jitted(arrays)
    return outputs | {f"d_{name}": x for name, x in gradients.items()}


def assert_cut_alike(sizes, implementation, arrays, axes=CUT, **call):
    arrays, call = split(arrays, call)
    expected = run(arrays, "reference", **call)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        actual = run(put(arrays, mesh, axes), implementation, **call)
    compare(actual, expected, 1e-5)
    return actual


# By default what differs most; as slow tests every one of them.
FEW = [("2x2", "start", "blockwise"), ("4x1", "shared", "reference"), ("1x4", "plain", "blockwise")]
EVERY = itertools.product(MESHES, CALLS, ["reference", "blockwise"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "name", "implementation"),
    FEW + [pytest.param(*row, marks=pytest.mark.slow) for row in EVERY if row not in FEW],
)
def test_numbers_of_one_device(sizes, name, implementation):
    assert_cut_alike(MESHES[sizes], implementation, arrays_of(B), **CALLS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "start"])
def test_an_interpreted_kernel(name, monkeypatch):
    """Pallas's interpreter does not know types that say what varies over a mesh."""
    monkeypatch.setattr(jax, "shard_map", unchecked(jax.shard_map))
    assert_cut_alike((2, 2), "pallas_interpreted", arrays_of(B), **CALLS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation", ["blockwise", pytest.param("reference", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("batch", "axes"),
    [
        ((4, 3), P("data", None, None, "model")),
        ((2, 4), P(None, "data", None, "model")),
        ((2, 2), P("data", "model")),
        ((), P(None, "model")),
    ],
    ids=str,
)
def test_other_batch_axes(batch, axes, implementation):
    """Where an inner axis is cut the call is not: XLA cuts what it computes."""
    call = dict(is_causal=True, dropout_rate=0.3, dropout_key=KEY)
    assert_cut_alike((2, 2), implementation, arrays_of(*batch), axes, **call)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_heads_that_the_devices_do_not_divide_are_whole(implementation):
    """One key/value head on two devices: the query's four could be cut, and are not."""
    arrays = arrays_of(B, K=1)
    mesh = mesh_of(2, 2)
    placed = {n: jax.device_put(x, NamedSharding(mesh, P("data"))) for n, x in arrays.items()}
    placed["query"] = jax.device_put(arrays["query"], NamedSharding(mesh, CUT))
    expected = run(arrays, "reference", is_causal=True)
    with jax.set_mesh(mesh):
        compare(run(placed, implementation, is_causal=True), expected, 1e-5)


@pytest.mark.parametrize(
    ("batch", "heads", "B", "K", "expected"),
    [
        (("data",), "model", 4, 4, Cut(("data",), ("model",), ("data", "model"))),
        (("data",), "model", 4, 3, None),  # two devices would do the same
        (("data",), "model", 3, 4, None),
        (("data",), None, 3, 4, None),
        ((("data", "model"),), None, 8, 4, Cut(("data", "model"), (), ("data", "model"))),
        ((("data", "model"),), None, 2, 4, None),
        ((("data", "model"),), "model", 8, 4, Cut(("data", "model"), (), ("data", "model"))),
        ((None, "data"), "model", 4, 4, None),
        ((), ("model", "data"), 1, 4, Cut((), ("model", "data"), ("data", "model"))),
        (("data",), "model", 0, 4, Cut(("data",), ("model",), ("data", "model"))),
    ],
    ids=str,
)
def test_the_axes_that_cut(batch, heads, B, K, expected):
    assert cut_of(mesh_of(2, 2).abstract_mesh, batch, heads, B, K) == expected


def test_no_cut_without_explicit_axes_alone():
    mixed = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    assert cut_of(None, ("data",), None, 4, 4) is None
    assert cut_of(mixed.abstract_mesh, ("data",), None, 4, 4) is None
    assert cut_of(mesh_of(1, 4).abstract_mesh, ("data",), None, 4, 4) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["full", *(pytest.param(x, marks=pytest.mark.slow) for x in ("plain", "start"))]
)
def test_the_kernel_is_in_the_program_of_a_tpu(name):
    arrays, call = split(arrays_of(B, T=130, S=130), _long(CALLS[name]))
    mesh = mesh_of(2, 2)
    loss = lambda x: (attend(x, None, **call)[0] ** 2).sum()
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(put(arrays, mesh))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for kernel in ("flax_mha_forward", "flax_mha_backward"):
        assert f'"{kernel}"' in text
    assert ('"flax_mha_bias"' in text) == ("bias" in arrays)
    assert ('"flax_mha_distances"' in text) == ("distances" in arrays)


def _long(call):
    """The same for 130 queries and keys."""
    if "mask" not in call:
        return call
    lengths = jnp.arange(130)[None] < 4 * LENGTHS
    mask = Mask.causal(jnp.array([0, -3, 5, 11])) & Mask.padding(lengths, lengths)
    return call | dict(mask=mask, bias=normal(3, 1, N, 130, 130))


@pytest.mark.slow
def test_weights_and_residuals_stand_where_the_query_s_do():
    arrays, mesh = arrays_of(B), mesh_of(2, 2)
    asked = dict(return_weights=True, return_residuals=True, **CALLS["plain"])
    call = lambda x: dot_product_attention(**x, **asked)
    expected = jax.jit(call)(arrays)
    with jax.set_mesh(mesh):
        actual = jax.jit(call)(put(arrays, mesh))
    for ours, one in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, one, atol=1e-6, rtol=1e-6)
    weights, residuals = actual[1:]
    for x in (weights, *residuals):
        assert jax.typeof(x).sharding.spec[:2] == ("data", "model")
