"""Meshes, who holds what on them, and the rows of the table that run on several devices."""

import contextlib
import math

import jax
import numpy as np
from helpers import normal
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from transformed_layer import N, both, forward, gradient, half_squares, plain

# What is sharded: over "data" the batch, over "model" the heads.
MESHES = {"batch": {"data": 4}, "heads": {"model": 2}, "both": {"data": 2, "model": 2}}


def make_mesh(shape, explicit=False):
    """A mesh of the first devices; `jax.make_mesh` makes explicit ones, `Mesh` automatic ones."""
    names, sizes = tuple(shape), tuple(shape.values())
    devices = jax.devices()[: math.prod(sizes)]
    if explicit:
        types = (AxisType.Explicit,) * len(names)
        return jax.make_mesh(sizes, names, axis_types=types, devices=devices)
    return Mesh(np.array(devices).reshape(sizes), names)


def used(mesh):
    """The context that a program of explicit axes is written for; none for automatic ones."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def specs_of(mesh, params):
    """The specs of (params, x, value_mask): kernels along N and K, arrays along B."""
    data, model = (name if name in mesh.axis_names else None for name in ("data", "model"))
    into = {"kernel": PartitionSpec(None, model, None), "bias": PartitionSpec(model, None)}
    out = {"kernel": PartitionSpec(model, None, None), "bias": PartitionSpec(None)}
    of_params = {
        name: {leaf: (out if name == "attention_output" else into)[leaf] for leaf in maps}
        for name, maps in params.items()
    }
    return of_params, PartitionSpec(data), PartitionSpec(data)


def placed(mesh, arrays):
    """The arrays of a call on the mesh."""
    specs = specs_of(mesh, arrays[0])
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    params = jax.tree.map(place, arrays[0], specs[0])
    return params, *(None if a is None else place(a, s) for a, s in zip(arrays[1:], specs[1:]))


def on_mesh(what, explicit, ask=both, is_set=True):
    def run(call, arrays):
        mesh = make_mesh(MESHES[what], explicit)
        with used(mesh) if is_set else contextlib.nullcontext():
            return jax.jit(ask(call))(*placed(mesh, arrays)), plain(ask, call)

    return run


def eagerly(call, arrays):
    """Without jit, on explicit axes; the output without `jax.set_mesh` too."""
    mesh = make_mesh(MESHES["batch"], explicit=True)
    sharded = placed(mesh, arrays)
    output = call(*sharded)
    with used(mesh):
        return (output, gradient(call)(*sharded)), plain(both, call)


# --- shard_map ------------------------------------------------------------------------------------


def local(mesh, call):
    """The call of one device: its examples, its heads; the parts of the output are summed."""
    call = call.of_heads(mesh.shape.get("model", 1))

    def run(*arrays):
        return summed(mesh, "model", call(*arrays))

    return run


def summed(mesh, axis, array):
    return jax.lax.psum(array, axis) if axis in mesh.axis_names else array


def mapped(mesh, function, arrays, out_specs, check_vma):
    specs = specs_of(mesh, arrays[0])
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma
    )


def shard_map_forward(what, check_vma):
    def run(call, arrays):
        mesh = make_mesh(MESHES[what])
        out = specs_of(mesh, arrays[0])[1]
        function = mapped(mesh, local(mesh, call), arrays, out, check_vma)
        return jax.jit(function)(*arrays), plain(forward, call)

    return run


def gradient_outside(what, check_vma):
    """The gradient of a function that holds a shard_map."""

    def run(call, arrays):
        mesh = make_mesh(MESHES[what])
        out = specs_of(mesh, arrays[0])[1]
        function = mapped(mesh, local(mesh, call), arrays, out, check_vma)
        loss = lambda *arrays: half_squares(function(*arrays))
        return jax.jit(jax.grad(loss, (0, 1)))(*arrays), plain(gradient, call)

    return run


def gradient_inside(what, check_vma):
    """Each device takes the gradient of its own examples and heads."""

    def run(call, arrays):
        mesh = make_mesh(MESHES[what])
        out = specs_of(mesh, arrays[0])[:2]
        own = checked_gradient(mesh, call) if check_vma else summed_gradient(mesh, call)
        function = mapped(mesh, own, arrays, out, check_vma)
        return jax.jit(function)(*arrays), plain(gradient, call)

    return run


def checked_gradient(mesh, call):
    """With check_vma JAX sums the gradients of what is replicated."""
    return jax.grad(lambda *arrays: half_squares(local(mesh, call)(*arrays)), (0, 1))


def summed_gradient(mesh, call):
    """Without check_vma the caller sums them."""
    call = call.of_heads(mesh.shape.get("model", 1))

    def run(params, x, value_mask):
        part, transposed = jax.vjp(lambda *at: call(*at, value_mask), params, x)
        of_params, of_x = transposed(summed(mesh, "model", part))
        of_params = jax.tree.map(lambda a: summed(mesh, "data", a), of_params)
        return of_params, summed(mesh, "model", of_x)

    return run


def derivative_inside(ask, check_vma):
    """A derivative of another kind that each device takes of its own examples' outputs."""

    def run(call, arrays):
        mesh = make_mesh(MESHES["batch"])
        specs = specs_of(mesh, arrays[0])
        function = mapped(mesh, ask(call), arrays, (specs[1], specs[1]), check_vma)
        return jax.jit(function)(*arrays), plain(ask, call)

    return run


def some_axes(call, arrays):
    """The batch by shard_map, the heads by the compiler: one axis of the mesh is manual.

    In 16 bits the output alone: at the gradient of two plain einsums there, XLA's CPU aborts the
    process ("Invalid binary instruction opcode copy"; jax 0.7.2, 0.10.2 and 0.12.0.1).
    """
    mesh = make_mesh(MESHES["both"])
    data, whole = PartitionSpec("data"), PartitionSpec()
    function = jax.shard_map(
        call, mesh=mesh, in_specs=(whole, data, data), out_specs=data, axis_names={"data"}
    )
    if call.dtype == "bfloat16":
        return jax.jit(function)(*placed(mesh, arrays)), plain(forward, call)
    loss = lambda *arrays: half_squares(function(*arrays))
    return jax.jit(jax.grad(loss, (0, 1)))(*placed(mesh, arrays)), plain(gradient, call)


def replicated_bias(check_vma):
    """A bias that all devices share beside examples that each has of its own, and its gradient."""

    def run(call, arrays):
        params, x, _ = arrays
        bias = normal(5, 1, N, call.T, call.T).astype(call.dtype)
        mesh = make_mesh(MESHES["batch"])
        data, whole = PartitionSpec("data"), PartitionSpec()
        layer = lambda params, x, bias: call(params, x, bias=bias)
        sharded = jax.shard_map(
            layer, mesh=mesh, in_specs=(whole, data, whole), out_specs=data, check_vma=check_vma
        )
        right = lambda params, x, bias: call.plain.loss(params, x, bias=bias)
        got = jax.jit(jax.grad(lambda *at: half_squares(sharded(*at)), (0, 1, 2)))(params, x, bias)
        params, x, _ = call.plain.arrays
        return got, jax.jit(jax.grad(right, (0, 1, 2)))(params, x, bias.astype("float32"))

    return run
