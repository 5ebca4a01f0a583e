"""Live layers of Keras whose projections have adapters (`enable_lora`) or are quantized.

Keras's adapter of a kernel [D, N, H] is a [D, N, r] and b [r, H], one of rank r for each head. The
same product is ours of rank N r: a [D, N r], and b [N r, N, H] that is zero between heads.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Params, Shape
from flax_mha.interop.adapters import AttentionAdapter, with_one_scale
from flax_mha.interop.keras.arrays import params_from
from flax_mha.interop.keras.config import MHA
from flax_mha.interop.keras.layers import SPELLINGS, Layer
from flax_mha.interop.keras.places import Told, check_ordinary, placed
from flax_mha.interop.keras.quantized import MODES, REMEDY, SCALE
from flax_mha.interop.keras.tree import Stored
from flax_mha.params.quantized import has_quantized
from flax_mha.params.tree import INPUT_RANK

A, B = "lora_kernel_a", "lora_kernel_b"
Weights = dict[str, np.ndarray]  # of one projection, by Keras's names


def parts_of(layer: Any) -> dict[str, Any]:
    """The layer's projections, by our names, in Keras's order."""
    spelled = {name: [x for x in names if hasattr(layer, x)] for name, names in SPELLINGS.items()}
    found = {name: getattr(layer, names[0]) for name, names in spelled.items() if names}
    return {name: part for name, part in found.items() if part is not None}


def adapted(layer: Any) -> list[str]:
    """The projections that have adapters."""
    return [name for name, part in parts_of(layer).items() if getattr(part, "lora_enabled", False)]


def is_changed(layer: Any) -> bool:
    """Whether `get_weights()` has more than kernels and biases of floats."""
    modes = [getattr(part, "quantization_mode", None) for part in parts_of(layer).values()]
    return bool(adapted(layer)) or any(mode is not None for mode in modes)


def params_of(layer: Any, config: MultiHeadAttentionConfig, adapters: str | None) -> Params:
    """The parameters, quantized kernels as such; with the adapters as the caller said."""
    names = adapted(layer)
    if names and adapters is None:
        rule = "`adapters` must be said of a layer that has some: 'apart' or 'merged'."
        remedy = "'apart' leaves them out, and `from_keras_adapters` gives them."
        checks.fail(ValueError, rule, f"adapters of {names}, not merged", remedy)
    record = _as_in_a_file(layer)
    check_ordinary(record)
    places = placed(record, config, Told(is_keras_s=True))
    params = params_from({place: x.read() for place, x in places.items()}, config)
    return _merged(layer, params) if names and adapters == "merged" else params


def adapters_of(layer: Any) -> AttentionAdapter:
    """All adapters of a layer beside each other, with one scale."""
    name, parts = str(layer.name), {name: parts_of(layer)[name] for name in adapted(layer)}
    if not parts:
        rule = "`from_keras_adapters` is of layers that have adapters."
        remedy = "A file that Keras saved has them in its kernels: load it as any other."
        checks.fail(ValueError, rule, f"{name!r}, which has none", remedy)
    lora = {projection: _pair(projection, part) for projection, part in parts.items()}
    scales = {name: _scale(part) for name, part in parts.items()}
    lora, scale = with_one_scale(name, jax.tree.map(jnp.asarray, lora), scales)
    return AttentionAdapter(lora, scale)


def _as_in_a_file(layer: Any) -> Layer:
    """The layer's arrays by the names of a file's; its adapters left out."""
    record = Layer(layer.name, layer.name, MHA, {}, {}, set())
    for projection, part in parts_of(layer).items():
        _known_mode(projection, part)
        for name, array in _weights(part).items():
            leaf = SCALE if name == "kernel_scale" else name
            if name not in (A, B):
                stored = Stored(array, array.shape, array.dtype)
                record.arrays[projection, leaf] = (f"{projection}/{name}", stored)
    return record


def _known_mode(projection: str, part: Any) -> None:
    mode = part.quantization_mode
    if mode not in (None, *MODES):
        rule = f"{projection!r} must be quantized in a mode that is known: {', '.join(MODES)}."
        checks.fail(ValueError, rule, f"{mode!r}", REMEDY)


def _weights(part: Any) -> Weights:
    return {x.name: np.asarray(x) for x in part.weights}


def _scale(part: Any) -> float:
    return float(part.lora_alpha / part.lora_rank)


def _merged(layer: Any, params: Params) -> Params:
    """With Keras's adapters in the kernels, as `layer.query_dense.kernel` has them."""
    if has_quantized(params):
        rule = "Adapters of a quantized layer must stay apart: a sum would be rounded anew."
        remedy = "adapters='apart'; or a file that Keras saves, which has rounded it."
        checks.fail(ValueError, rule, "adapters='merged'", remedy)
    merged: dict[str, Any] = dict(params)
    for name in adapted(layer):
        part, kernel = parts_of(layer)[name], merged[name]["kernel"]
        weights, wide = _weights(part), wide_dtype(kernel.dtype)
        a, b = (jnp.asarray(weights[x]).astype(wide) for x in (A, B))
        total = kernel.astype(wide) + _scale(part) * jnp.tensordot(a, b, 1)
        merged[name] = {**merged[name], "kernel": total.astype(kernel.dtype)}
    return merged


def _pair(name: str, part: Any) -> Weights:
    """One adapter of all heads, from one of each."""
    weights = _weights(part)
    a, b, inputs = weights[A], weights[B], INPUT_RANK[name]
    middle, (rank, last) = a.shape[inputs:-1], b.shape
    heads = math.prod(middle)
    _check_rank(name, a.shape[:inputs], (*middle, last), rank)
    blocks = np.zeros((heads, rank, heads, last), b.dtype)
    blocks[np.arange(heads), :, np.arange(heads)] = b
    return {
        "a": a.reshape(*a.shape[:inputs], heads * rank),
        "b": blocks.reshape(heads * rank, *middle, last),
    }


def _check_rank(name: str, inputs: Shape, outputs: Shape, rank: int) -> None:
    heads = math.prod(outputs[:-1])
    most = min(math.prod(inputs), math.prod(outputs)) // heads
    if rank > most:
        rule = f"The rank of Keras's adapter of {name!r} must be at most {most}, for here all "
        rule += f"{heads} heads have one, of rank {heads} r: its kernel has no more."
        remedy = "from_keras_layer(layer, adapters='merged')."
        checks.fail(ValueError, rule, f"rank {rank}", remedy)
