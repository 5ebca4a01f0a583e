"""A kernel of attention beside the reference: context, residuals and every gradient.

The expected values are those of float32 arrays, which hold the same numbers: so bfloat16 is
measured by what it should be, not by another rounding of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from helpers import normal

from flax_mha import dot_product_attention
from flax_mha.attention import DistanceBias

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
# An interpreted kernel is compiled for the one time that it runs.
QUICKLY = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # gone from later versions of XLA
    QUICKLY["xla_cpu_use_fusion_emitters"] = False


def unchecked(shard_map):
    """`jax.shard_map` without types that say what varies, whatever its caller asks for."""

    def without_types(f, **how):
        return shard_map(f, **how | {"check_vma": False})

    return without_types


def arrays_of(T=300, S=300, B=2, N=4, K=2, H=16, V=24, dtype="float32"):
    sizes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, V)}
    return {name: normal(i, *size, dtype=dtype) for i, (name, size) in enumerate(sizes.items())}


def split(arrays, call):
    """What has a gradient, and the rest; of a distance bias the values have one."""
    arrays, call = dict(arrays), dict(call)
    for name in ("bias", "sinks"):
        if name in call:
            arrays[name] = call.pop(name)
    if "distance_bias" in call:
        arrays["distances"] = call["distance_bias"].values
    return arrays, call


def attend(arrays, implementation, **call):
    """(context, row_max, row_sum) of arrays under the names of `split`."""
    arrays = dict(arrays)
    if "distances" in arrays:
        values = arrays.pop("distances")
        call["distance_bias"] = dataclasses.replace(call["distance_bias"], values=values)
    if implementation == "reference":
        call.pop("block_sizes", None)
    context, residuals = dot_product_attention(
        **arrays, implementation=implementation, return_residuals=True, **call
    )
    return context, *residuals


def with_gradients(arrays, implementation, order=None, **call):
    """{name: context, row_max, row_sum, and the gradient of each array}, of one probe.

    Where the queries stand in another order, so does the probe.
    """

    def loss(arrays):
        context, row_max, row_sum = attend(arrays, implementation, **call)
        probe = normal(99, *context.shape)
        probe = probe if order is None else probe[:, order]
        total = (context.astype("float32") * probe).sum() + jnp.log1p(row_sum).sum()
        return total, {"context": context, "row_max": row_max, "row_sum": row_sum}

    gradients, outputs = jax.grad(loss, has_aux=True)(arrays)
    return outputs | {f"d_{name}": x for name, x in gradients.items()}


def results(arrays, implementation, **call):
    """The same, compiled."""
    compiler = None if implementation == "reference" else QUICKLY
    run = lambda arrays: with_gradients(arrays, implementation, **call)
    return jax.jit(run, compiler_options=compiler)(arrays)


def assert_beside(arrays, implementation="pallas_interpreted", tolerance=None, **call):
    """Each result equals the reference's, relative to its largest entry."""
    arrays, call = split(arrays, call)
    dtype = str(arrays["query"].dtype)
    wide = {name: x.astype("float32") for name, x in arrays.items()}
    expected = results(wide, "reference", **call)
    actual = results(arrays, implementation, **call)
    assert actual["context"].dtype == arrays["value"].dtype
    for name, x in arrays.items():
        assert (actual[f"d_{name}"].dtype, actual[f"d_{name}"].shape) == (x.dtype, x.shape)
    compare(actual, expected, TOLERANCES[dtype] if tolerance is None else tolerance)


def compare(actual, expected, tolerance):
    """Entries of -inf stand at the same places."""
    assert actual.keys() == expected.keys()
    for name, one in expected.items():
        one, ours = (np.asarray(x).astype(np.float64) for x in (one, actual[name]))
        nowhere = np.isneginf(one)
        np.testing.assert_array_equal(np.isneginf(ours), nowhere, name)
        one, ours = (np.where(nowhere, 0, x) for x in (one, ours))
        assert np.isfinite(ours).all(), f"{name}: not finite"
        scale = vanishing(name, expected) or np.abs(one).max(initial=0.0)
        error = np.abs(ours - one).max(initial=0.0)
        assert error <= tolerance * scale, f"{name}: error {error:.3g} of {scale:.3g}"


def vanishing(name, expected):
    """Of a gradient that is 0 but for rounding the size of the terms; 0 of any other.

    A row of d_logits sums to 0, and of one key it is one entry: what is summed over the rows of
    d_context . value, of about 10, leaves their rounding.
    """
    bias, (_, S, *_) = expected.get("d_bias"), expected["d_key"].shape
    if name == "d_bias" and bias.shape[-1] == 1:
        return 10 * (expected["row_sum"].size / bias.size) ** 0.5
    return 10.0 if S == 1 and name.startswith("d_") and name != "d_value" else 0.0


def distances(seed, N, L, first, offset=None):
    return DistanceBias(normal(seed, N, L), offset, first)
