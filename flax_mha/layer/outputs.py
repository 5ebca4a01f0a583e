"""How the results of a call are sharded on a mesh with explicit axes, told from its operands.

An output is placed as the query, its features as those of the output kernel; heads as the kernels'
heads; a cache as it came. A mesh axis that would stand in a result twice stays with the first.
"""

import math
from typing import Any

import jax

from flax_mha.attention.cut import Cut, cut_along, cut_of
from flax_mha.core.folding import Folding
from flax_mha.core.meshes import axes_of, explicit_mesh, spec, spec_of
from flax_mha.core.typing import ParamsLike
from flax_mha.layer.arguments import Arrays
from flax_mha.layer.caches import CrossCache, KVCache
from flax_mha.layer.call import checked_folding
from flax_mha.params.quantized import QuantizedKernel


def leading_axes(x: Any, others: list[Any], folding: Folding) -> tuple[Any, ...]:
    """Of `[leading axes, D]`: each attended axis as in x, each batch axis as in the first array
    that has it at its full size.
    """
    axes = list(axes_of(x)[:-1])
    batch = [axis for axis in range(len(axes)) if axis not in folding.attended]
    for axis, size in zip(batch, folding.batch):
        full = (y for y in (x, *others) if y is not None and y.shape[axis] == size)
        axes[axis] = axes_of(next(full, x))[axis]
    return tuple(axes)


def output_spec(params: ParamsLike, arrays: Arrays, folding: Folding) -> Any:
    query, value, key = arrays
    leading = leading_axes(query, [value, key], folding)
    return spec(*leading, *kernel_axes(params["attention_output"]["kernel"])[2:])


def scores_spec(
    params: ParamsLike,
    arrays: Arrays,
    cache: KVCache | CrossCache | None,
    folding: Folding,
    rows: Any = None,
) -> Any:
    """Keras's order `[*batch, N, *targets, *sources]`; with a cache, the slots as they came.

    Of chosen `rows` `[R]`, R is the only axis of targets.
    """
    query, value, key = arrays
    leading = leading_axes(query, [value, key], folding)
    batch = [axes for axis, axes in enumerate(leading) if axis not in folding.attended]
    targets = [leading[axis] for axis in folding.attended]
    targets = targets if rows is None else list(axes_of(rows))
    if cache is None:
        sources = [axes_of(value)[axis] for axis in folding.attended]
    else:  # many tokens of a ring see its slots and each other, on an axis that no operand has
        sources = [None if _is_ring(cache) else axes_of(cache.key)[-2]]
    return spec(*batch, kernel_axes(params["query"]["kernel"])[1], *targets, *sources)


def projection_specs(params: ParamsLike, arrays: Arrays, folding: Folding) -> dict[str, Any]:
    """query, key, value and gate: the leading axes of their input, and their kernel's heads."""
    inputs = dict(zip(("query", "value", "key"), arrays), gate=arrays[0])
    there = {name: kernel_axes(params[name]["kernel"])[1:] for name in inputs if name in params}
    leading = {name: leading_axes(inputs[name], list(arrays), folding) for name in there}
    return {name: spec(*leading[name], *there[name]) for name in there}


def attention_axes(params: ParamsLike, arrays: Arrays, config: Any) -> Cut | None:
    """How the attention inside is cut: examples as the inputs, heads as the kernels, the sequence
    along the context axis.
    """
    mesh, axis = explicit_mesh((params, arrays)), config.context_axis
    cut = None
    if mesh is not None:
        folding = checked_folding(params, arrays, config, None)
        leading = leading_axes(arrays[0], [*arrays[1:]], folding)
        batch = [axes for axis, axes in enumerate(leading) if axis not in folding.attended]
        key, lengths = params["key"]["kernel"], () if axis is None else (axis.name,)
        sizes = math.prod(folding.batch), key.shape[1]
        cut = cut_of(mesh, batch, kernel_axes(key)[1], *sizes, lengths)
    return cut if axis is None else cut_along(mesh, axis, cut)


def kernel_axes(kernel: Any) -> tuple[Any, ...]:
    return axes_of(kernel.value if isinstance(kernel, QuantizedKernel) else kernel)


def cache_spec(cache: KVCache | CrossCache | None) -> Any:
    """Exactly as it came in, so that a loop may carry it."""
    return jax.tree.map(spec_of, cache)


def cross_cache_spec(
    params: ParamsLike, value: Any, key: Any, mask: Any, as_int8: bool
) -> CrossCache:
    """An encoder's keys and values where its outputs are, their heads where the kernels' are."""
    *batch, S, _ = axes_of(value)
    K = H = V = None  # of latents, which are not cut
    if "latent" not in params:
        K, H = kernel_axes(params["key"]["kernel"])[1:]
        _, V = kernel_axes(params["value"]["kernel"])[1:]
    keys: Any = spec(*batch, K, axes_of(key)[-2], H)
    values: Any = spec(*batch, K, S, V)
    scales: list[Any] = [spec(*batch, K, axes_of(key)[-2]), spec(*batch, K, S)]
    lengths: Any = spec(*batch)
    real: Any = None if mask is None else spec(*batch, S)
    key_scale, value_scale = scales if as_int8 else (None, None)
    return CrossCache(keys, values, lengths, real, None, key_scale, value_scale)


def _is_ring(cache: KVCache | CrossCache) -> bool:
    return isinstance(cache, KVCache) and cache.is_ring
