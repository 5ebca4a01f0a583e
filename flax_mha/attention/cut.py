"""One attention call cut over the devices of a mesh: by examples, by heads, along the sequence.

XLA cannot cut a kernel by itself. Where the arrays' types say how they are sharded, that is on a
mesh with explicit axes, the call runs in a `jax.shard_map`: every device is then one device, for
which kernels and blocks are chosen as for any other. A length is whole on each of them, but along a
context axis, which is told: there the parts of the sequence meet by a strategy of `context`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_mha.attention.allowed import Allowed
from flax_mha.attention.context.axis import ContextAxis, size_of_bound
from flax_mha.attention.context.fill import filled, trimmed
from flax_mha.attention.contract import Inputs, Options, Output, Residuals
from flax_mha.attention.distance import DistanceBias
from flax_mha.core import checks
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.typing import Array
from flax_mha.masks import Mask

Names = tuple[str, ...]


class Cut(NamedTuple):
    """The axes of a mesh: those that cut examples, heads and lengths, and all that are manual."""

    examples: Names
    heads: Names
    every: Names
    context: ContextAxis | None = None
    devices: int = 1  # along the context axis

    @property
    def lengths(self) -> Any:
        return None if self.context is None else self.context.name


def cut_along(mesh: Any, axis: ContextAxis, cut: Cut | None) -> Cut | None:
    """The cut along a context axis; by examples and heads too, as `cut` says.

    Of the mesh of the arrays' types, or else that of the context, whose other axes are left as they
    are, for XLA to cut by; not those of one device, beside which no kernel may run. Where the
    caller's `jax.shard_map` has made the cut there is None, and along one device nothing is cut.
    """
    if size_of_bound(axis.name) is not None:
        return None
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if axis.name not in mesh.axis_names:
        rule = f"`context_axis={axis.name!r}` must be an axis of the mesh."
        evidence = f"a mesh of {mesh.axis_names}" if mesh.axis_names else "no mesh"
        remedy = "Call it under `with jax.set_mesh(mesh):`, or inside a `jax.shard_map` over it."
        checks.fail(ValueError, rule, evidence, remedy)
    if mesh.shape[axis.name] == 1:
        return cut
    cut = Cut((), (), (axis.name, *_of_one_device(mesh, axis.name))) if cut is None else cut
    return cut._replace(context=axis, devices=mesh.shape[axis.name])


def _of_one_device(mesh: Any, besides: str) -> Names:
    kinds = zip(mesh.axis_names, mesh.axis_types or ())
    ones = (name for name, kind in kinds if kind != AxisType.Manual and mesh.shape[name] == 1)
    return tuple(name for name in ones if name != besides)


def cut_of(mesh: Any, batch: Any, heads: Any, B: Any, K: int, lengths: Names = ()) -> Cut | None:
    """The cut of B examples and K key/value heads over the axes that their arrays name.

    None where there is nothing to cut: no mesh of explicit axes alone, sizes that the devices do
    not divide, or devices to spare, which do the same as others: so it is under a `jax.vmap` over a
    sharded axis, which takes that axis out of the mesh. `lengths` are cut by otherwise.
    """
    if mesh is None or not all(kind == AxisType.Explicit for kind in mesh.axis_types):
        return None
    outer, *inner = batch or (None,)
    outer = tuple(name for name in _names(outer) if name not in lengths)
    examples = () if any(_names(axes) for axes in inner) else _dividing(mesh, outer, B)
    # An axis that cuts the examples cannot cut the heads as well.
    free = tuple(name for name in _names(heads) if name not in (*examples, *lengths))
    cut = Cut(examples, _dividing(mesh, free, K), tuple(mesh.axis_names))
    used = (*cut.examples, *cut.heads, *lengths)
    spare = math.prod(size for name, size in mesh.shape.items() if name not in used)
    return cut if used and spare == 1 else None


def run_cut(
    cut: Cut | None, run: Callable[[Inputs, Options], Output], inputs: Inputs, options: Options
) -> Output:
    """`run(inputs, options)`, on every device its part."""
    if cut is None:
        return run(inputs, options)
    T, S = inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1]
    if cut.context is not None:
        inputs = filled(inputs, cut.context, cut.devices)
    starts_at_zero = inputs.dropout_start_4 is None
    options = dataclasses.replace(options, draws_aligned=options.draws_aligned or starts_at_zero)

    def part(inputs: Inputs) -> Output:
        context, weights, residuals = run(_with_start(cut, inputs), options)
        asked = weights if options.return_weights else None
        return Output(context, asked, residuals if options.return_residuals else None)

    mapped = jax.shard_map(
        part,
        in_specs=(_input_specs(cut, inputs),),
        out_specs=_output_specs(cut, options),
        axis_names=set(cut.every),
        check_vma=not _has_calls(inputs),
    )
    return trimmed(mapped(inputs), T, S)


def _has_calls(inputs: Inputs) -> bool:
    """Whether a function has loops, or derivatives of its own, inside.

    They were traced of numbers that vary over no axis, and JAX checks that they get no others.
    """
    functions = [one.pairs for one in inputs.where]
    functions += [] if inputs.score is None else [inputs.score]
    return any(function.expression.has_calls for function in functions)


def _names(axes: Any) -> Names:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _dividing(mesh: Any, axes: Any, size: Any) -> Names:
    devices = math.prod(mesh.shape[name] for name in _names(axes))
    return _names(axes) if devices > 1 and isinstance(size, int) and size % devices == 0 else ()


def _with_start(cut: Cut, inputs: Inputs) -> Inputs:
    """Each device's examples and heads draw their own bits."""
    if inputs.dropout_word_2 is None:
        return inputs
    (B, _, N, _), start_4 = inputs.query_BTNH.shape, inputs.dropout_start_4
    index = lambda names: jax.lax.axis_index(names).astype("uint32") if names else jnp.uint32(0)  # noqa: E731
    here_4 = jnp.stack(
        [index(cut.examples) * B, index(cut.heads) * N, jnp.uint32(0), jnp.uint32(0)]
    )
    start_4 = here_4 if start_4 is None else start_4 + here_4
    return dataclasses.replace(inputs, dropout_start_4=start_4)


def _input_specs(cut: Cut, inputs: Inputs) -> Inputs:
    """The axes of every array of a call; what all examples or heads share is whole."""
    b, c, n = cut.examples or None, cut.lengths, cut.heads or None
    whole: Any = P()
    heads: Any = P(n)
    rows: Any = P(b, c, n)

    def of(x: Array | None, *axes: Any) -> Any:
        if x is None:
            return None
        return P(*(None if size == 1 else names for size, names in zip(jnp.shape(x), axes)))

    def pairs(function: Separated) -> Any:
        operands = tuple(of(x, b, n, c, None) for x in function.operands)
        tables = (whole,) * len(function.tables)
        return dataclasses.replace(function, operands=operands, tables=tables)

    mask, bias = inputs.mask, inputs.distance_bias
    return Inputs(
        query_BTNH=rows,
        key_BSKH=rows,
        value_BSKV=rows,
        mask=Mask(
            band=mask.band,
            query_offset=of(mask.query_offset, b),
            query_padding=of(mask.query_padding, b, c),
            key_padding=of(mask.key_padding, b, c),
            segment_ids=tuple((of(q, b, c), of(k, b, c)) for q, k in mask.segment_ids),
            dense_masks=tuple(of(x, b, n, c, None) for x in mask.dense_masks),
        ),
        where=tuple(
            Allowed(pairs(one.pairs), jax.tree.map(lambda x: of(x, b, n), one.blocks))
            for one in inputs.where
        ),
        score=None if inputs.score is None else pairs(inputs.score),
        bias_bnts=of(inputs.bias_bnts, b, n, c, None),
        distance_bias=None
        if bias is None
        else DistanceBias(heads, of(bias.query_offset, b), bias.first),
        sinks_N=None if inputs.sinks_N is None else heads,
        dropout_word_2=None if inputs.dropout_word_2 is None else whole,
        dropout_start_4=None if inputs.dropout_start_4 is None else whole,
    )


def _output_specs(cut: Cut, options: Options) -> Any:
    b, c, n = cut.examples or None, cut.lengths, cut.heads or None
    rows: Any = P(b, n, c)
    context: Any = P(b, c, n)
    residuals = Residuals(rows, rows) if options.return_residuals else None
    return Output(context, rows if options.return_weights else None, residuals)
