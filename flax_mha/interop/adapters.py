"""Low-rank adapters as other frameworks give them: of one layer, with one scale."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.typing import Array, Params


class AttentionAdapter(NamedTuple):
    """One attention layer's: `multi_head_attention(..., lora=lora, lora_scale=scale)`.

    Attributes:
        lora: `{"query": {"a": [D, r], "b": [r, N, H]}, ...}`, as of `lora_params`.
        scale: alpha / rank, or alpha / sqrt(rank).

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=4)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        >>> lora = flax_mha.lora_params(jax.random.key(1), config, (1, 8), rank=2)
        >>> adapter = AttentionAdapter(lora, 16 / 2)
        >>> merged = flax_mha.merge_lora(params, adapter.lora, adapter.scale)
        >>> merged["query"]["kernel"].shape
        (8, 2, 4)
    """

    lora: Params
    scale: float


def with_one_scale(
    layer: str, lora: dict[str, Any], scales: Mapping[str, float]
) -> tuple[dict[str, Any], float]:
    """The adapters of a layer whose modules differ in scale: what is left is in b."""
    largest = max(scales.values(), key=abs)
    if len(set(scales.values())) == 1:
        return lora, largest
    ratios = {name: scale / largest for name, scale in scales.items()}
    return {name: {**x, "b": _times(layer, x["b"], ratios[name])} for name, x in lora.items()}, (
        largest
    )


def _times(layer: str, b: Array, ratio: float) -> Array:
    """Exact by powers of two; else float32 loses a last bit, and 16 bits would lose far more."""
    if ratio in (0.0, 1.0):
        return b * ratio
    product = (b * jnp.asarray(ratio, b.dtype)).astype(b.dtype)
    is_power = abs(math.frexp(ratio)[0]) == 0.5
    is_exact = is_power and bool((product / jnp.asarray(ratio, b.dtype) == b).all())
    if b.dtype.itemsize < 4 and not is_exact:
        rule = f"The modules of {layer!r} must have one alpha / rank, or ones by powers of two: "
        rule += "else 16 bits lose digits."
        remedy = "Write the adapter in float32."
        checks.fail(ValueError, rule, f"a ratio of {ratio:g} in {b.dtype}", remedy)
    return product
