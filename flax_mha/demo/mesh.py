"""The devices of a run: `[mesh]` as a mesh of JAX, and what lies where on it.

    data       cuts the batch: every device has examples of its own
    heads      cuts the heads of every attention layer, their weights and the optimizer's moments
    context    cuts the sequence inside the attention

What no axis cuts lies whole on every device. The axes are automatic: XLA puts in the sums, the
model knows nothing of them, and the numbers are those of one device.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import param_specs
from flax_mha.demo.settings import DemoError, MeshSettings, Settings
from flax_mha.demo.tasks.contract import Batch, Task

DATA, HEADS, CONTEXT = AXES = tuple(field.name for field in dataclasses.fields(MeshSettings))


def make_mesh(settings: MeshSettings) -> Mesh:
    """The first devices, as many as the sizes need; over several processes all there are.

    Raises:
        DemoError: there are fewer, or a process would have no part in the mesh.
    """
    sizes, devices = dataclasses.astuple(settings), jax.devices()
    needed, processes = math.prod(sizes), jax.process_count()
    if needed > len(devices) or (needed != len(devices) and processes > 1):
        rule = "must be the number of devices" if processes > 1 else "must not exceed the devices"
        received = f"{describe(settings)} = {needed}, and {len(devices)} devices"
        remedy = "Set them by `--set mesh.data=N`, or `--virtual-devices N` for more on the CPU"
        if processes > 1:
            received += f" of {processes} processes"
        raise DemoError(f"[mesh] data * heads * context {rule}. Received: {received}. {remedy}.")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices[:needed])


def describe(settings: MeshSettings) -> str:
    """As "2 data x 1 heads x 1 context"."""
    return " x ".join(f"{size} {name}" for name, size in dataclasses.asdict(settings).items())


def check_mesh(settings: Settings) -> None:
    """Refuses what the axes do not divide, before any device is asked for.

    Raises:
        DemoError: an axis of the mesh does not divide what it cuts.
    """
    mesh = settings.mesh
    for name, size, what, count in (
        (DATA, mesh.data, "train.batch_size", settings.train.batch_size),
        (HEADS, mesh.heads, "attention.num_heads", settings.attention.num_heads),
    ):
        if count % size:
            received = f"mesh.{name} = {size}, {what} = {count}"
            raise DemoError(f"mesh.{name} must divide {what}. Received: {received}.")


def layout(mesh: Mesh, task: Task, state: Any) -> Any:
    """The sharding of every array of a state; a moment of the optimizer lies as its parameter.

    They are known by the names of their dicts: `("block_0", "attention", "query", "kernel")`.
    """
    specs: Any = param_specs(task.settings.attention, {"heads": HEADS}, mesh=mesh)
    found = {
        (*path, name, leaf): spec
        for path in task.attention_paths
        for name, leaves in specs.items()
        for leaf, spec in leaves.items()
    }

    def sharding(path: Any, _: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, found.get(names, P()))

    return jax.tree_util.tree_map_with_path(sharding, state)


def on_mesh(task: Task) -> Task:
    """The task whose attention layers cut the sequence: they do so inside a mesh alone."""
    settings = task.settings
    if settings.mesh.context == 1:
        return task
    attention = settings.attention.replace(context_axis=CONTEXT)
    return type(task)(dataclasses.replace(settings, attention=attention))


def place(state: Any, shardings: Any) -> Any:
    """The state where the layout wants it: each process hands over its part of the same arrays."""
    return jax.tree.map(_placed, state, shardings)


def cut_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Every process has made the whole batch; each device is given its examples."""
    return jax.tree.map(lambda array: _placed(array, NamedSharding(mesh, P(DATA))), batch)


def gathered(tree: Any) -> Any:
    """The whole arrays, on a device of this process: to look at, and to judge by."""
    return jax.tree.map(jnp.asarray, multihost_utils.process_allgather(tree, tiled=True))


def _placed(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
