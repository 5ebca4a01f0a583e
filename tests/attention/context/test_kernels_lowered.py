"""Which programs of a TPU hold the kernels along a context axis, lowered on any machine."""

import jax
import pytest
from context_cases import axis_of, mesh_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import context_parallel_attention, dot_product_attention

KERNELS = ["flax_mha_forward", "flax_mha_backward"]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def kernels_in(attend, mesh, spec):
    """Those in the gradient of a call of 2,048 tokens."""
    x = jax.ShapeDtypeStruct((2, 2048, 2, 128), "bfloat16", sharding=NamedSharding(mesh, spec))
    run = jax.grad(lambda *heads: attend(*heads).astype("float32").sum(), (0, 1, 2))
    with jax.set_mesh(mesh):
        text = jax.jit(run).trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
    return [name for name in KERNELS if f'"{name}"' in text]


def opened(strategy):
    """The layer's way: the call opens the `shard_map` itself."""
    call = dict(is_causal=True, context_axis=axis_of(strategy))
    return lambda *heads: dot_product_attention(*heads, **call)


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize(
    ("sizes", "kind", "expected"),
    [
        ((1, 1, 8), AUTO, KERNELS),  # nothing is left to cut, but two axes to be taken by hand
        ((2, 1, 4), AUTO, []),
        ((2, 2, 2), EXPLICIT, KERNELS),
        ((1, 1, 8), EXPLICIT, KERNELS),
    ],
    ids=["no other axis", "examples left", "explicit", "explicit, no other axis"],
)
def test_kernels_where_nothing_is_left_to_xla(sizes, kind, expected, strategy):
    spec = P("data" if sizes[0] > 1 else None, "context", "heads" if sizes[1] > 1 else None)
    assert kernels_in(opened(strategy), mesh_of(sizes, kind), spec) == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_in_a_shard_map_over_some_axes(strategy):
    """JAX takes no kernel beside an automatic axis, though one device is on it: blocks run."""
    mesh, cut = mesh_of((1, 1, 8)), P(None, "context")

    def attend(names, implementation=None):
        call = dict(axis_name="context", strategy=strategy, implementation=implementation)
        part = lambda *heads: context_parallel_attention(*heads, is_causal=True, **call)
        return jax.shard_map(part, in_specs=(cut,) * 3, out_specs=cut, axis_names=names)

    every = set(mesh.axis_names)
    assert kernels_in(attend(every), mesh, cut) == KERNELS
    assert kernels_in(attend({"context"}), mesh, cut) == []
    with pytest.raises(NotImplementedError, match=r"(?s)cannot cut.*left to XLA.*over all axes"):
        kernels_in(attend({"context"}, "pallas_tpu"), mesh, cut)
