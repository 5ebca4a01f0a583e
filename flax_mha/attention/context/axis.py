"""The axis of a mesh along which a sequence is cut, and the devices on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array

LAYOUTS = ("contiguous", "zigzag")
STRATEGIES = ("ring", "all_gather", "all_to_all")


@dataclasses.dataclass(frozen=True)
class ContextAxis:
    """The mesh axis along which the sequence is cut, and how its parts meet.

    Attributes:
        name: an axis of the mesh.
        strategy: "ring", keys and values travel from device to device while they are attended to;
            "all_gather", each device gets all of them; "all_to_all", the devices exchange lengths
            for heads; None, the first of these that serves the call.
        layout: "contiguous", device i has the i-th part of the sequence; or "zigzag", of 2 n parts
            the i-th and the (2 n - 1 - i)-th, so that all have the same work in causal order. The
            tokens then stand in the order of `zigzag_order`.

    Raises:
        ValueError: an unknown strategy or layout.
        TypeError: a name that is no string.

    Guide: `python -m flax_mha guide context`.

    Example:
        >>> from flax_mha import ContextAxis
        >>> ContextAxis("context", layout="zigzag").strategy is None
        True
    """

    name: str
    strategy: str | None = None
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            rule = "`context_axis` must be the name of a mesh axis, or a ContextAxis."
            checks.fail(TypeError, rule, repr(self.name))
        if self.strategy is not None:
            checks.one_of("strategy", self.strategy, STRATEGIES)
        checks.one_of("layout", self.layout, LAYOUTS)


def context_axis_of(value: Any) -> ContextAxis:
    """A `ContextAxis`, or one of that name, or of the fields that a config's dict has."""
    if isinstance(value, ContextAxis):
        return value
    if not isinstance(value, Mapping):
        return ContextAxis(value)
    fields = [field.name for field in dataclasses.fields(ContextAxis)]
    checks.known_names("A field of ContextAxis", value, fields)
    return ContextAxis(**{"name": None, **value})


def size_of_bound(name: str) -> int | None:
    """How many devices are on an axis of a `shard_map` or a `pmap` around this; None = not one."""
    try:
        return jax.lax.axis_size(name)
    except NameError:
        return None


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices along a manual axis; n of them, static."""

    name: str
    n: int
    layout: str

    @classmethod
    def on(cls, axis: ContextAxis) -> Devices:
        size = size_of_bound(axis.name)
        if size is None:
            rule = f"The context axis {axis.name!r} must be one of a mesh around the call."
            remedy = (
                "Call inside `jax.shard_map` over a mesh that has it; or, with the layer's or "
                "`dot_product_attention`'s `context_axis=`, under `with jax.set_mesh(mesh):`."
            )
            checks.fail(ValueError, rule, "no such axis", remedy)
        return cls(axis.name, size, axis.layout)

    def check_lengths(self, T: int, S: int) -> None:
        """Refuses lengths that do not fall into pieces."""
        if self.pieces > 1 and (T % 2 or S % 2):
            rule = "In zigzag order a device has two parts of one length."
            checks.fail(ValueError, rule, f"T = {T}, S = {S} on a device", "Pad the tokens.")

    @property
    def pieces(self) -> int:
        """How many stretches of the sequence a device has."""
        return 2 if self.layout == "zigzag" else 1

    def index(self) -> Array:
        return jax.lax.axis_index(self.name).astype("int32")

    def starts(self, device: Array, length: int) -> list[Array]:
        """Where the pieces of a device stand in the sequence, of which it has `length` entries."""
        if self.layout == "contiguous":
            return [device * length]
        piece = length // 2
        return [device * piece, (2 * self.n - 1 - device) * piece]

    def shift(self, tree: Any, by: int) -> Any:
        """Every device's arrays, moved on by so many devices."""
        if by % self.n == 0:
            return tree
        pairs = [(i, (i + by) % self.n) for i in range(self.n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.name, pairs), tree)

    def gather(self, x: Array, axis: int) -> Array:
        """All devices' entries along an axis, in the sequence's order."""
        return self.in_order(_gathered(x, self.name, axis), axis)

    def in_order(self, x: Array, axis: int) -> Array:
        """Entries that stand device by device, put into the sequence's order."""
        if self.layout == "contiguous":
            return x
        split = x.reshape(*x.shape[:axis], self.n, 2, -1, *x.shape[axis + 1 :])
        first, second = (jax.lax.index_in_dim(split, i, axis + 1, False) for i in range(2))
        both = jnp.concatenate([first, jnp.flip(second, axis)], axis)
        return both.reshape(x.shape)

    def as_stored(self, x: Array, axis: int) -> Array:
        """The inverse of `in_order`."""
        if self.layout == "contiguous":
            return x
        split = x.reshape(*x.shape[:axis], 2, self.n, -1, *x.shape[axis + 1 :])
        first, second = (jax.lax.index_in_dim(split, i, axis, False) for i in range(2))
        both = jnp.stack([first, jnp.flip(second, axis)], axis + 1)
        return both.reshape(x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _gathered(x: Array, name: str, axis: int) -> Array:
    return jax.lax.all_gather(x, name, axis=axis, tiled=True)


@_gathered.defjvp
def _tangent(name: str, axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """In float32 at least, in which its transpose then sums: see `core.varying`."""
    (x,), (d_x,) = primals, tangents
    if not jnp.issubdtype(x.dtype, jnp.floating):
        whole = _gathered(x, name, axis)
        return whole, np.zeros(whole.shape, jax.dtypes.float0)  # type: ignore[return-value]
    d_whole = jax.lax.all_gather(d_x.astype(wide_dtype(x.dtype)), name, axis=axis, tiled=True)
    return _gathered(x, name, axis), d_whole.astype(x.dtype)
