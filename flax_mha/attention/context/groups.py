"""Heads in groups, one after another: what a ring's gradient holds beside its results.

Backward a ring holds the keys at hand and those that arrive, their gradients twice in float32, and
what a hop adds to each. Of some heads at a time that is as much less, and what is sent, computed
and hidden is the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.forward import Softmax
from flax_mha.attention.context.hop import Moving, moving_of
from flax_mha.attention.context.over_pairs import over_operands
from flax_mha.attention.contract import Inputs
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.meshes import free_axes
from flax_mha.core.sizes import is_known
from flax_mha.core.typing import Array
from flax_mha.core.varying import full

# Float32 numbers of the keys of a group: 4 MiB.
GROUP = 1 << 20
SHARED = -1  # in the place of an axis


def groups_of(inputs: Inputs) -> int:
    """Into how many groups the heads fall.

    One where `[T, S]` numbers are given as they are, and where XLA may have cut the heads itself.
    """
    B, S, K, H = inputs.key_BSKH.shape
    dense = inputs.bias_bnts is not None or inputs.mask.dense_masks
    if dense or free_axes() or not is_known(B, S):
        return 1
    fitting = (m for m in range(1, K + 1) if K % m == 0 and B * S * (K // m) * H <= GROUP)
    return next(fitting, K)


def by_groups(
    gradient: Callable[[Inputs, Softmax, Softmax], Moving],
    inputs: Inputs,
    softmax: Softmax,
    cotangents: Softmax,
) -> Moving:
    """The gradient of all heads, from that of each group of them."""
    groups = groups_of(inputs)
    if groups == 1:
        return gradient(inputs, softmax, cotangents)

    def one(found: Moving, g: Array) -> tuple[Moving, None]:
        parts = (_rows_of(x, g, groups) for x in (softmax, cotangents))
        d = gradient(_inputs_of(inputs, g, groups), *parts)
        put = lambda x, part, axis: _put(x, part, g, axis)  # noqa: E731
        return jax.tree.map(put, found, d, axes), None

    moving = moving_of(inputs)
    axes = _axes_of(moving)
    zeros = jax.tree.map(_zeros, moving, axes)
    found, _ = jax.lax.scan(one, zeros, jnp.arange(groups, dtype="int32"))
    return found


def _axes_of(moving: Moving) -> Any:
    """The axis of the heads in each array; `SHARED` where they have one together."""
    own = lambda name, x: name.startswith("operand") and x.shape[1] > 1  # noqa: E731
    score = {name: 1 if own(name, x) else SHARED for name, x in moving.score.items()}
    # A bias has one group alone.
    bias, distances = moving.bias, moving.distances
    others = (None if bias is None else SHARED, None if distances is None else 0)
    axes: Any = (2, 2, 2, *others, score)
    return Moving(*axes)


def _inputs_of(inputs: Inputs, g: Array, groups: int) -> Inputs:
    bias, start_4, N = inputs.distance_bias, inputs.dropout_start_4, inputs.query_BTNH.shape[2]
    if bias is not None:
        bias = dataclasses.replace(bias, values=_part(bias.values, g, groups, 0))
    if inputs.dropout_word_2 is not None:
        first = (g * (N // groups)).astype("uint32")
        here_4 = first * jnp.array([0, 1, 0, 0], "uint32")
        start_4 = here_4 if start_4 is None else start_4 + here_4
    of = lambda x: _part(x, g, groups, 2)  # noqa: E731
    inputs = dataclasses.replace(
        inputs,
        query_BTNH=of(inputs.query_BTNH),
        key_BSKH=of(inputs.key_BSKH),
        value_BSKV=of(inputs.value_BSKV),
        distance_bias=bias,
        dropout_start_4=start_4,
    )
    return over_operands(inputs, lambda x: x if x.shape[1] == 1 else _part(x, g, groups, 1))


def _rows_of(softmax: Softmax, g: Array, groups: int) -> Softmax:
    axes = Softmax(2, 1, 1)  # type: ignore[arg-type]
    return jax.tree.map(lambda x, axis: _part(x, g, groups, axis), softmax, axes)


def _part(x: Any, g: Array, groups: int, axis: int) -> Any:
    size = x.shape[axis] // groups
    return jax.lax.dynamic_slice_in_dim(x, g * size, size, axis=axis)


def _zeros(x: Array, axis: int) -> Array:
    """In float32 at least where groups are summed."""
    return full(x, x.shape, 0, wide_dtype(x.dtype) if axis == SHARED else x.dtype)


def _put(x: Array, part: Array, g: Array, axis: int) -> Array:
    """With a group's part in its place, or added where there is one for all heads."""
    if axis == SHARED:
        return x + part.astype(x.dtype)
    start = g * part.shape[axis]
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis=axis)
