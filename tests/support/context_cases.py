"""Attention along a context axis: the calls, and how a device's tokens are stored and put back."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from helpers import booleans, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import QUICKLY, arrays_of, compare, distances, split, with_gradients

from flax_mha import ContextAxis, Mask, zigzag_order

B, T, N, H, V = 8, 48, 8, 8, 6
STRATEGIES = ("ring", "all_gather", "all_to_all")
# data x heads x context, every one of 8 devices.
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]
KEY = jax.random.key(4)
REAL = jnp.arange(T)[None] < jnp.array([[48], [31], [17], [48], [3], [48], [0], [40]])
IDS = jnp.arange(T)[None] // jnp.array([[5], [7], [9], [48], [13], [48], [25], [1]])
PACKED = Mask.padding(REAL, REAL) & Mask.segments(IDS, IDS)


@dataclasses.dataclass(frozen=True)
class Feature:
    """Options of a call, and the sizes in which it differs; `S` None = T."""

    call: dict
    T: int = T
    S: int | None = None
    K: int = N

    def arrays(self, dtype="float32"):
        return arrays_of(self.T, self.S or self.T, B, N, self.K, H, V, dtype=dtype)


FEATURES = {
    "plain": Feature({}),
    "causal": Feature(dict(is_causal=True)),
    "window": Feature(dict(is_causal=True, local_window_size=5)),
    "both sides": Feature(dict(local_window_size=(7, 13))),
    "padding": Feature(dict(mask=Mask.padding(REAL, REAL))),
    "segments": Feature(dict(mask=PACKED, is_causal=True)),
    "grouped heads": Feature(dict(is_causal=True), K=2),
    "ALiBi": Feature(dict(distance_bias=distances(6, N, 2 * T - 1, 1 - T), is_causal=True)),
    "offsets": Feature(
        dict(
            mask=Mask.causal(jnp.arange(B) * 3 - 7),
            distance_bias=distances(7, N, 40, -20, jnp.arange(B) * 2),
        )
    ),
    "bias": Feature(dict(bias=normal(3, 1, N, T, T), is_causal=True)),
    "dense masks": Feature(
        dict(
            mask=Mask.dense(booleans(8, B, 1, T, T)) & Mask.dense(booleans(9, 1, N, 1, T)),
            bias=normal(4, B, 1, T, 1),
        )
    ),
    "dropout": Feature(dict(dropout_rate=0.3, dropout_key=KEY, is_causal=True)),
    "broadcast dropout": Feature(
        dict(
            dropout_rate=0.3,
            dropout_key=KEY,
            broadcast_dropout=True,
            dropout_start=(3, 1, 37, 5),
        )
    ),
    "sinks": Feature(dict(sinks=normal(7, N), soft_cap=3.0, is_causal=True)),
    "cross": Feature(dict(bias=normal(5, 1, N, 1, 16), dropout_rate=0.2, dropout_key=KEY), S=16),
    "ragged": Feature(dict(is_causal=True, bias=normal(3, 1, 1, 37, 29)), T=37, S=29),
}


@functools.cache
def expected(feature, dtype="float32"):
    """One device's results, of the reference in float32 for numbers rounded to `dtype`."""
    one = FEATURES[feature]
    arrays = {name: x.astype("float32") for name, x in one.arrays(dtype).items()}
    return beside(arrays, "reference", one.call)


def beside(arrays, implementation, call):
    arrays, call = split(arrays, call)
    return jax.jit(lambda arrays: with_gradients(arrays, implementation, **call))(arrays)


def mesh_of(sizes, kind=AxisType.Auto):
    devices = jax.devices()[: math.prod(sizes)]
    names = ("data", "heads", "context")
    return jax.make_mesh(sizes, names, axis_types=(kind,) * 3, devices=devices)


def along(sizes, axis, feature, implementation=None, kind=AxisType.Auto, dtype="float32"):
    """The results over a mesh, in the sequence's order."""
    one, mesh = FEATURES[feature], mesh_of(sizes, kind)
    run, arrays = program(sizes, axis, one, mesh, implementation, dtype)
    with jax.set_mesh(mesh):
        results = jax.jit(run, compiler_options=QUICKLY)(arrays)
    n = sizes[-1] if axis.layout == "zigzag" else 0
    return in_order(results, n, one.T, one.S or one.T)


def program(sizes, axis, one, mesh, implementation=None, dtype="float32"):
    """(the function of the results, the arrays on the mesh)."""
    arrays, call = split(one.arrays(dtype), one.call)
    n = sizes[-1] if axis.layout == "zigzag" else 0
    arrays, call = stored(arrays, n, one), stored(call, n, one)
    call |= dict(context_axis=axis, order=zigzag_order(one.T, n) if n else None)
    run = lambda arrays: with_gradients(arrays, implementation, **call)
    return run, placed(arrays, mesh, sizes)


def placed(arrays, mesh, sizes):
    """By examples, length and heads, as far as the sizes divide."""
    names = ("data", "context", "heads")
    counts = dict(zip(("data", "heads", "context"), sizes))

    def put(name, x):
        if name not in ("query", "key", "value"):
            return jax.device_put(x, NamedSharding(mesh, P()))
        axes = (name if size % counts[name] == 0 else None for size, name in zip(x.shape, names))
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    return {name: put(name, x) for name, x in arrays.items()}


def stored(tree, n, one):
    """Arrays and masks with their tokens in zigzag order over n devices; n = 0 as they are."""
    if not n:
        return tree
    rows, columns = zigzag_order(one.T, n), zigzag_order(one.S or one.T, n)
    take = lambda x, order, axis: x if x.shape[axis] == 1 else jnp.take(x, order, axis)
    orders = {"query": rows, "key": columns, "value": columns}

    def of(name, x):
        if name in orders:
            return take(x, orders[name], 1)
        if name == "bias":
            return take(take(x, rows, 2), columns, 3)
        if name == "mask":
            return dataclasses.replace(
                x,
                query_padding=None if x.query_padding is None else x.query_padding[:, rows],
                key_padding=None if x.key_padding is None else x.key_padding[:, columns],
                segment_ids=tuple((q[:, rows], k[:, columns]) for q, k in x.segment_ids),
                dense_masks=tuple(take(take(d, rows, 2), columns, 3) for d in x.dense_masks),
            )
        return x

    return {name: of(name, x) for name, x in tree.items()}


LENGTHS = {"context": (1, 0), "row_max": (2, 0), "row_sum": (2, 0), "d_query": (1, 0)} | {
    name: (1, 1) for name in ("d_key", "d_value")
}


def in_order(results, n, T, S):
    """The inverse of `stored`, of results."""
    results = {name: np.asarray(x) for name, x in results.items()}
    if not n:
        return results
    back = [np.argsort(zigzag_order(length, n)) for length in (T, S)]
    for name, (axis, side) in LENGTHS.items():
        results[name] = np.take(results[name], back[side], axis)
    if "d_bias" in results:
        for axis, order in zip((2, 3), back):
            if results["d_bias"].shape[axis] > 1:
                results["d_bias"] = np.take(results["d_bias"], order, axis)
    return results


def assert_alike(sizes, axis, feature, **how):
    compare(along(sizes, axis, feature, **how), expected(feature), 1e-5)


def axis_of(strategy, layout="contiguous"):
    return ContextAxis("context", strategy, layout)
