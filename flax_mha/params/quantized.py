"""Kernels of small numbers with a scale an output channel: W = value scale.

    {"query": {"kernel": {"value": int8 [D, N, H], "scale": [N, H]}, "bias": [N, H]}, ...}

A tree of them is called, saved and sharded as any other; in a call each such kernel is a
`QuantizedKernel`, whose product comes first and whose scale comes after.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.core import boxes, checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.interception import refuse_interception
from flax_mha.core.quantization import DTYPES, largest, quantized, small_dtype
from flax_mha.core.typing import Array, DType, Params, ParamsLike, Shape
from flax_mha.params.tree import INPUT_RANK, LETTERS


def quantize_params(params: ParamsLike, dtype: Any = "int8") -> Params:
    """The parameters with every kernel in small numbers: a quarter of its bytes in int8.

    x . W = (x . value) scale, in the compute dtype. Biases, norms and all else stay as they are.
    Adapters stand beside such kernels as beside any (`lora=`), and are trained there; the kernels
    themselves have no gradient.

    Args:
        params: the layer's parameters.
        dtype: "int8", "int4" or "float8_e4m3fn".

    Returns:
        A tree as `params`, whose kernels are `{"value": dtype [*inputs, *outputs], "scale":
        [*outputs]}`, the scale in the kernel's own dtype.

    Raises:
        ValueError: another dtype.
        TypeError: kernels that are quantized already, or boxes.

    Memory: the kernel's numbers in `dtype`, and one number an output. An entry is off by at most
    half a step: of int8 1/254 of the largest of its column, of int4 1/14. Where a backend reads no
    small numbers in a product, XLA widens one kernel at a time.

    Guide: `python -m flax_mha guide quantization`.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> small = flax_mha.quantize_params(params)
        >>> jax.tree.map(lambda x: (x.shape, x.dtype.name), small["query"]["kernel"])
        {'scale': ((2, 16), 'float32'), 'value': ((32, 2, 16), 'int8')}
        >>> y = flax_mha.multi_head_attention(params, x, x, config=config)
        >>> near = flax_mha.multi_head_attention(small, x, x, config=config)
        >>> bool(abs(near - y).max() < 0.01 * abs(y).max())
        True
    """
    checks.mapping("params", params)
    boxes.refuse(params, "params")
    checks.floating_params(params)
    dtype = small_dtype("dtype", dtype)
    return {name: _with_kernel(name, leaves, dtype) for name, leaves in params.items()}


def dequantize_params(params: ParamsLike) -> Params:
    """The parameters in floats again, those that the small numbers stand for: for files, merging.

    Args:
        params: what `quantize_params` returned.

    Returns:
        The tree with kernels in their scales' dtype; those that are floats stay as they are.

    Raises:
        TypeError: a value or a scale of another dtype.
        ValueError: scales that do not fit their values.

    Memory: the kernels in floats.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (8, 32))
        >>> back = flax_mha.dequantize_params(flax_mha.quantize_params(params))
        >>> kernels = back["query"]["kernel"], params["query"]["kernel"]
        >>> bool(abs(kernels[0] - kernels[1]).max() <= abs(kernels[1]).max() / 254)
        True
    """
    checks.mapping("params", params)
    for name, leaves in params.items():
        checks.mapping(f"params[{name!r}]", leaves)
    read = read_kernels(params)

    def plain(x: Any) -> Any:
        return x.astype(x.dtype) if isinstance(x, QuantizedKernel) else x

    return {name: {n: plain(x) for n, x in read[name].items()} for name in read}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedKernel:
    """A kernel of small numbers in a call: of the shape of its values, the dtype of its scales."""

    value: Array  # [*inputs, *outputs]
    scale: Array  # [*outputs]

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> DType:
        return self.scale.dtype

    def reshape(self, shape: Shape) -> QuantizedKernel:
        """With other axes of outputs; those of inputs stay."""
        inputs = self.value.ndim - self.scale.ndim
        return QuantizedKernel(self.value.reshape(shape), self.scale.reshape(shape[inputs:]))

    def astype(self, dtype: DType) -> Array:
        """What it stands for, as an array."""
        return self.scaled(self.values(wide_dtype(dtype)), dtype)

    def values(self, dtype: DType) -> Array:
        """The values by a power of two, below 1: sums of the numbers themselves leave float16."""
        return self.value.astype(dtype) * self._unit

    def scaled(self, y: Array, dtype: DType) -> Array:
        """y, which is `values` or a product with them, times what each output stands for."""
        wide = wide_dtype(dtype)
        scale = self.scale.astype(wide) / self._unit
        return (y.astype(wide) * jax.lax.broadcast_to_rank(scale, y.ndim)).astype(dtype)

    @property
    def _unit(self) -> float:
        return 2.0 ** -math.frexp(largest(self.value.dtype))[1]


def read_kernels(params: ParamsLike) -> ParamsLike:
    """The parameters with a `QuantizedKernel` for each that is one; all else must be floats.

    `{"value", "scale"}` are ours; qwix's `QArray`s of one scale an output channel are taken, its
    interception is refused, which would pass over the layer.
    """
    refuse_interception()
    if not isinstance(params, Mapping):
        return params  # whose shapes are checked, and named, elsewhere
    found = {name: leaves["kernel"] for name, leaves in params.items() if is_quantized(leaves)}
    if not found:
        checks.floating_params(params)
        return params
    read = {name: _read(name, kernel) for name, kernel in found.items()}
    checks.floating_params(_with(params, {name: kernel.scale for name, kernel in read.items()}))
    return _with(params, read)


def _with(params: ParamsLike, kernels: Mapping[str, Any]) -> Any:
    own = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return {name: {**leaves, **own.get(name, {})} for name, leaves in params.items()}


def has_quantized(params: Any) -> bool:
    """Whether any kernel of a tree is quantized."""
    return isinstance(params, Mapping) and any(map(is_quantized, params.values()))


def is_quantized(leaves: Any) -> bool:
    """Whether the kernel of one projection is."""
    kernel = leaves.get("kernel") if isinstance(leaves, Mapping) else None
    return isinstance(kernel, Mapping) or _is_qwix(kernel)


def _is_qwix(kernel: Any) -> bool:
    return hasattr(type(kernel), "__dataclass_fields__") and hasattr(kernel, "qvalue")


def _read(name: str, kernel: Any) -> QuantizedKernel:
    where = f"params[{name!r}]['kernel']"
    if _is_qwix(kernel):
        return _of_qwix(where, name, kernel)
    if set(kernel) != {"value", "scale"}:
        rule = f"A quantized `{where}` must hold value and scale."
        checks.fail(ValueError, rule, f"{[*kernel]}", "Make it by `quantize_params`.")
    return _checked(where, name, kernel["value"], kernel["scale"])


def _checked(where: str, name: str, value: Any, scale: Any) -> QuantizedKernel:
    for part, x in (("value", value), ("scale", scale)):
        if not checks.is_array(x):
            rule = f"The {part} of a quantized `{where}` must be an array."
            checks.fail(TypeError, rule, f"{type(x).__name__}")
    if str(value.dtype) not in DTYPES:
        rule = f"The value of a quantized `{where}` must be one of {', '.join(DTYPES)}."
        checks.fail(TypeError, rule, f"dtype {value.dtype}")
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        rule = f"The scale of a quantized `{where}` must be floats."
        checks.fail(TypeError, rule, f"dtype {scale.dtype}")
    outputs = tuple(value.shape[INPUT_RANK.get(name, 1) :])
    if tuple(scale.shape) != outputs:
        spelled = ", ".join(LETTERS.get(name, {}).get("bias", ""))
        rule = f"The scale of a quantized `{where}` must be [{spelled}] = {outputs}."
        checks.fail(ValueError, rule, f"shape {tuple(scale.shape)}")
    return QuantizedKernel(value, scale)


def _of_qwix(where: str, name: str, kernel: Any) -> QuantizedKernel:
    value, scale, inputs = kernel.qvalue, kernel.scale, INPUT_RANK.get(name, 1)
    outputs = value.shape[inputs:]
    whole = scale.shape[:inputs] == (1,) * inputs and all(
        n in (1, size) for n, size in zip(scale.shape[inputs:], outputs, strict=True)
    )
    if kernel.zero_point is not None or not whole:
        rule = f"qwix's `{where}` must have one scale an output channel, and no zero point."
        evidence = f"values {tuple(value.shape)}, scales {tuple(scale.shape)}"
        remedy = "Quantize by `flax_mha.quantize_params`, or `qwix.dequantize` it."
        checks.fail(NotImplementedError, rule, evidence, remedy)
    scale = jnp.broadcast_to(scale.reshape(scale.shape[inputs:]), outputs)
    return _checked(where, name, value, scale)


def _with_kernel(name: str, leaves: Any, dtype: str) -> Any:
    if "kernel" not in leaves:
        return leaves
    kernel = leaves["kernel"]
    value, scale = quantized(kernel, tuple(range(INPUT_RANK[name])), dtype, kernel.dtype)
    return {**leaves, "kernel": {"value": value, "scale": scale}}
