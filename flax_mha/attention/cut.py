"""One attention call cut over the devices of a mesh, each with examples and heads of its own.

XLA cannot cut a kernel by itself. Where the arrays' types say how they are sharded, that is on a
mesh with explicit axes, the call runs in a `jax.shard_map`: every device is then one device, for
which kernels and blocks are chosen as for any other. A length is whole on each of them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_mha.attention.contract import Inputs, Options, Output, Residuals
from flax_mha.attention.distance import DistanceBias
from flax_mha.core.typing import Array
from flax_mha.masks import Mask

Names = tuple[str, ...]


class Cut(NamedTuple):
    """The axes of a mesh: those that cut the examples, those that cut the heads, and all."""

    examples: Names
    heads: Names
    every: Names


def cut_of(mesh: Any, batch: Any, heads: Any, B: Any, K: int) -> Cut | None:
    """The cut of B examples and K key/value heads over the axes that their arrays name.

    None where there is nothing to cut: no mesh of explicit axes alone, sizes that the devices do
    not divide, or devices to spare, which do the same as others: so it is under a `jax.vmap` over a
    sharded axis, which takes that axis out of the mesh.
    """
    if mesh is None or not all(kind == AxisType.Explicit for kind in mesh.axis_types):
        return None
    outer, *inner = batch or (None,)
    examples = () if any(_names(axes) for axes in inner) else _dividing(mesh, outer, B)
    # An axis that cuts the examples cannot cut the heads as well.
    free = tuple(name for name in _names(heads) if name not in examples)
    cut = Cut(examples, _dividing(mesh, free, K), tuple(mesh.axis_names))
    used = (*cut.examples, *cut.heads)
    spare = math.prod(size for name, size in mesh.shape.items() if name not in used)
    return cut if used and spare == 1 else None


def run_cut(
    cut: Cut | None, run: Callable[[Inputs, Options], Output], inputs: Inputs, options: Options
) -> Output:
    """`run(inputs, options)`, on every device its part."""
    if cut is None:
        return run(inputs, options)
    starts_at_zero = inputs.dropout_start_4 is None
    options = dataclasses.replace(options, draws_aligned=options.draws_aligned or starts_at_zero)

    def part(inputs: Inputs) -> Output:
        context, weights, residuals = run(_with_start(cut, inputs), options)
        asked = weights if options.return_weights else None
        return Output(context, asked, residuals if options.return_residuals else None)

    specs = _input_specs(cut, inputs)
    mapped = jax.shard_map(
        part, in_specs=(specs,), out_specs=_output_specs(cut, options), axis_names=set(cut.every)
    )
    output: Output = mapped(inputs)
    return output


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
    b, n = cut.examples or None, cut.heads or None
    whole: Any = P()
    heads: Any = P(n)
    rows: Any = P(b, None, n)

    def of(x: Array | None, *axes: Any) -> Any:
        if x is None:
            return None
        return P(*(None if size == 1 else names for size, names in zip(jnp.shape(x), axes)))

    mask, bias = inputs.mask, inputs.distance_bias
    return Inputs(
        query_BTNH=rows,
        key_BSKH=rows,
        value_BSKV=rows,
        mask=Mask(
            band=mask.band,
            query_offset=of(mask.query_offset, b),
            query_padding=of(mask.query_padding, b, None),
            key_padding=of(mask.key_padding, b, None),
            segment_ids=tuple((of(q, b, None), of(k, b, None)) for q, k in mask.segment_ids),
            dense_masks=tuple(of(x, b, n, None, None) for x in mask.dense_masks),
        ),
        bias_bnts=of(inputs.bias_bnts, b, n, None, None),
        distance_bias=None
        if bias is None
        else DistanceBias(heads, of(bias.query_offset, b), bias.first),
        sinks_N=None if inputs.sinks_N is None else heads,
        dropout_word_2=None if inputs.dropout_word_2 is None else whole,
        dropout_start_4=None if inputs.dropout_start_4 is None else whole,
    )


def _output_specs(cut: Cut, options: Options) -> Any:
    b, n = cut.examples or None, cut.heads or None
    rows: Any = P(b, n)
    context: Any = P(b, None, n)
    residuals = Residuals(rows, rows) if options.return_residuals else None
    return Output(context, rows if options.return_weights else None, residuals)
