"""Keras's list of arrays and our tree: the same arrays with the same axes, in Keras's order."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params, Shape
from flax_mha.norms import RMSNorm
from flax_mha.params import check_params
from flax_mha.positions import RelativeBias

_ORDER = ("query", "key", "gate", "value", "attention_output")


def places_of(config: MultiHeadAttentionConfig) -> list[tuple[str, str]]:
    """(projection, leaf) of every array, in Keras's order; what Keras lacks, in KerasHub's."""
    _is_config(config)
    if isinstance(config.position, RelativeBias):
        rule = "Keras's layer has no place for a table of distances."
        remedy = "Carry it by hand: a config without `position`, and `relative_bias` added."
        checks.fail(ValueError, rule, f"position={config.position}", remedy)
    learned = isinstance(config.qk_norm, RMSNorm)
    norms = {"query": "query_norm", "key": "key_norm"} if learned else {}
    places = [("sinks", "logits")] if config.use_sinks else []
    for projection in (name for name in _ORDER if name in config.projections):
        places.append((projection, "kernel"))
        places += [(projection, "bias")] if projection in config.biases else []
        places += [(norms[projection], "scale")] if projection in norms else []
    return places


def _is_config(config: Any) -> None:
    if not isinstance(config, MultiHeadAttentionConfig):
        rule = "`config` must be a MultiHeadAttentionConfig."
        checks.fail(TypeError, rule, f"config of type {type(config).__name__}")
    if config.latent is not None:
        rule = "Keras's layer makes keys and values of its inputs: `latent` must be None."
        checks.fail(ValueError, rule, f"latent={config.latent}")


def params_from(
    arrays: Mapping[tuple[str, str], np.ndarray], config: MultiHeadAttentionConfig
) -> Params:
    """Checked arrays as JAX's, none of them cast."""
    for (projection, leaf), array in arrays.items():
        name = f"{projection}/{leaf}"
        if not jnp.issubdtype(array.dtype, jnp.floating):
            remedy = "Is the layer quantized? Take its weights before it is."
            rule = f"`{name}` must be a floating-point array."
            checks.fail(TypeError, rule, f"dtype {array.dtype}", remedy)
        checks.x64_enabled(name, array.dtype)
    params = tree_of(arrays)
    check(params, config)
    return cast(Params, jax.tree.map(jnp.array, params))


def tree_of(arrays: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for (projection, leaf), array in arrays.items():
        tree.setdefault(projection, {})[leaf] = array
    return tree


def check(params: Any, config: MultiHeadAttentionConfig) -> None:
    """The tree fits the config; D, M and C are whatever the kernels have."""
    _is_config(config)
    check_params(params, config, *(_features(params, x) for x in ("query", "value", "key")))


def _features(params: Any, projection: str) -> Shape:
    """The kernel's first axis as the shape of an input; 0 where there is none to read."""
    leaves = params.get(projection) if isinstance(params, Mapping) else None
    kernel = leaves.get("kernel") if isinstance(leaves, Mapping) else None
    return (1, *(tuple(getattr(kernel, "shape", ()))[:1] or (0,)))
