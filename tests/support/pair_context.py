"""Functions of pairs along a context axis: the examples of `pair_examples`, stored and put back.

What a function closes over is asked by positions of the whole sequence, in any layout; the arrays
of a `Mask` stand as the tokens do.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import QUICKLY
from pair_examples import CASES, assert_all_close
from pair_oracles import NAMES, Sizes, expected, probe_of, split, with_gradients

from flax_mha import dot_product_attention, zigzag_order

# Of 4 devices: lengths that zigzag order divides, and some that no layout does.
SIZES, RAGGED = Sizes(16, 24, K=4), Sizes(19, 23, K=4)
LENGTHS = {"query": 0, "key": 1, "value": 1}


def mesh_of(data=1, heads=1, context=4, kind=AxisType.Auto):
    sizes = (data, heads, context)
    devices = jax.devices()[: np.prod(sizes)]
    return jax.make_mesh(
        sizes, ("data", "heads", "context"), axis_types=(kind,) * 3, devices=devices
    )


def along(name, axis, mesh, sizes=SIZES, opens=True, **options):
    """{context, and each gradient} of one of the examples, in the sequence's order.

    `opens`: whether the call opens the `jax.shard_map`; or else the caller does, over all axes.
    """
    example, options = CASES[name], {"context_axis": axis, **options}
    n = mesh.shape["context"] if axis is not None and axis.layout == "zigzag" else 0
    orders = [zigzag_order(length, n) if n else np.arange(length) for length in (sizes.T, sizes.S)]
    call = Call(example, sizes, orders, mesh, options)
    probe = probe_of(sizes).astype("float32")[:, orders[0]]
    with jax.set_mesh(mesh):
        attend = call.opened if opens else call.of_the_caller
        run = jax.jit(
            lambda arrays: with_gradients(attend, arrays, probe), compiler_options=QUICKLY
        )
        results = run(call.arrays())
    back = {f"d_{name}": np.argsort(orders[side]) for name, side in LENGTHS.items()}
    back["context"] = back["d_query"]
    results = {name: np.asarray(x) for name, x in results.items()}
    return {name: x[:, back[name]] if name in back else x for name, x in results.items()}


@dataclasses.dataclass(frozen=True)
class Call:
    """An example on a mesh, its tokens in the given orders."""

    example: object
    sizes: Sizes
    orders: list
    mesh: object
    options: dict

    def arrays(self):
        """Tokens by examples, length and heads; what is closed over on every device."""

        def put(name, x):
            axes = P()
            if name in NAMES:
                x = x[:, self.orders[LENGTHS[name]]]
                even = x.shape[1] % self.mesh.shape["context"] == 0
                axes = P("data", "context" if even else None, "heads")
            return jax.device_put(x, NamedSharding(self.mesh, axes))

        return {name: put(name, x) for name, x in self.example.all_arrays(sizes=self.sizes).items()}

    def opened(self, arrays):
        qkv, closed = split(arrays)
        call = self.example.call(self.sizes, closed)
        if self.example.kind == "mask":
            call = {"mask": stored(call["mask"], *self.orders)}
        return dot_product_attention(*qkv, **call, **self.options)

    def of_the_caller(self, arrays):
        qkv, closed = split(arrays)
        given = ()
        if self.example.kind == "mask":
            given = (stored(self.example.call(self.sizes, closed)["mask"], *self.orders),)

        def device(query, key, value, closed, given):
            call = {"mask": given[0]} if given else self.example.call(self.sizes, closed)
            return dot_product_attention(query, key, value, **call, **self.options)

        tokens = P("data", "context")
        specs = (*[tokens] * 3, {x: P() for x in closed}, tuple(map(specs_of, given)))
        mapped = jax.shard_map(device, mesh=self.mesh, in_specs=specs, out_specs=tokens)
        return mapped(*qkv, closed, given)


def changed(mask, rows, columns, dense, other):
    """A mask with each of its arrays changed, in unions and complements too."""
    of = lambda part: changed(part, rows, columns, dense, other)
    return dataclasses.replace(
        mask,
        query_offset=jax.tree.map(other, mask.query_offset),
        query_padding=jax.tree.map(rows, mask.query_padding),
        key_padding=jax.tree.map(columns, mask.key_padding),
        segment_ids=tuple((rows(query), columns(key)) for query, key in mask.segment_ids),
        dense_masks=tuple(map(dense, mask.dense_masks)),
        functions=jax.tree.map(other, mask.functions),
        prefix_lengths=jax.tree.map(other, mask.prefix_lengths),
        unions=tuple(tuple(map(of, union)) for union in mask.unions),
        complements=tuple(map(of, mask.complements)),
    )


def stored(mask, rows, columns):
    """The mask of tokens that stand in these orders."""
    take = lambda x, order, axis: x if x.shape[axis] == 1 else x[(slice(None),) * axis + (order,)]
    return changed(
        mask,
        lambda x: x[:, rows],
        lambda x: x[:, columns],
        lambda x: take(take(x, rows, 2), columns, 3),
        lambda x: x,
    )


def specs_of(mask):
    """How a caller's `jax.shard_map` cuts the arrays of a mask along the context axis."""
    tokens = lambda x: P("data" if x.shape[0] > 1 else None, "context")
    dense = lambda x: P(
        "data" if x.shape[0] > 1 else None, None, "context" if x.shape[2] > 1 else None
    )
    return changed(mask, tokens, tokens, dense, lambda x: P())


def assert_alike(name, axis, mesh, sizes=SIZES, opens=True, **options):
    results = along(name, axis, mesh, sizes, opens, **options)
    assert_all_close(results, expected(CASES[name], sizes=sizes), "float32", name)
