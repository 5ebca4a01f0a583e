"""Keras's list of arrays and our tree: the same arrays with the same axes, in Keras's order."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params, Shape
from flax_mha.params.tree import check_params, places

_ORDER = ("query", "key", "gate", "value", "attention_output")
# Arrays of the layer itself come first: T5's table of distances, gpt-oss's sinks.
_FIRST = [("relative_bias", "embedding"), ("sinks", "logits")]


def places_of(config: MultiHeadAttentionConfig) -> list[tuple[str, str]]:
    """(projection, leaf) of every array, in Keras's order; what Keras lacks, in KerasHub's."""
    _is_config(config)
    rest = set(places(config))
    named = [f"{name}{suffix}" for name in _ORDER for suffix in ("", "_norm")]
    leaves = [(name, leaf) for name in named for leaf in ("kernel", "scale", "bias")]
    ordered = [place for place in (*_FIRST, *leaves) if place in rest]
    if len(ordered) < len(rest):
        rule = "Keras's layers and KerasHub's must have a place for every array of the layer."
        evidence = f"none for {sorted(rest - set(ordered))}"
        checks.fail(ValueError, rule, evidence, "Carry it by hand.")
    return ordered


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
    """Checked arrays as JAX's, none of them cast; a kernel that has a scale, as a quantized one."""
    scaled = {name for name, leaf in arrays if leaf == "scale" and (name, "kernel") in arrays}
    for (projection, leaf), array in arrays.items():
        name = f"{projection}/{leaf}"
        if leaf == "kernel" and projection in scaled:
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            remedy = "Is the layer quantized? Take its weights before it is."
            rule = f"`{name}` must be a floating-point array."
            checks.fail(TypeError, rule, f"dtype {array.dtype}", remedy)
        checks.x64_enabled(name, array.dtype)
    scales = {name: arrays[name, "scale"] for name in scaled}
    params = tree_of(without_scales(arrays))
    check(params, config)
    for name, scale in scales.items():
        params[name]["kernel"] = {"value": params[name]["kernel"], "scale": scale}
    return jax.tree.map(jnp.array, params)


def without_scales(arrays: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """All but the scales of kernels; those of norms stay."""
    return {
        (name, leaf): x
        for (name, leaf), x in arrays.items()
        if leaf != "scale" or (name, "kernel") not in arrays
    }


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
