"""`equinox.nn.MultiheadAttention`, vmapped over the batch as its documentation does."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.masks import allowed
from flax_mha.bench.peers import jax_layers
from flax_mha.bench.peers.contract import Contender
from flax_mha.core.typing import Array


def build(case: Case, data: Data) -> Contender:
    """The mask is a matrix."""
    import equinox

    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    module = equinox.nn.MultiheadAttention(
        case.heads, case.features, dropout_p=case.dropout, **biases, key=jax.random.key(0)
    )
    weights, static = equinox.partition(module, equinox.is_inexact_array)

    def apply(weights: Any, x_BTD: Array, dropout_key: Any) -> Array:
        layer, allowed_TS = equinox.combine(weights, static), allowed(case)
        keys = None if dropout_key is None else jax.random.split(dropout_key, case.batch)

        def one(x_TD: Array, key: Any) -> Array:
            return layer(x_TD, x_TD, x_TD, mask=allowed_TS, key=key, inference=key is None)

        return jax.vmap(one, in_axes=(0, None if keys is None else 0))(x_BTD, keys)

    def convert(params: Any) -> Any:
        leaves = [array for name in _PROJECTIONS for array in _linear(name, params[name])]
        return equinox.tree_at(_leaves, weights, leaves)

    return jax_layers.contender(jax_layers.Layer(apply, convert), case, data)


_PROJECTIONS = ("query", "key", "value", "attention_output")


def _leaves(module: Any) -> list[Any]:
    """Weight and bias of each projection, in the order of `_PROJECTIONS`."""
    maps = (module.query_proj, module.key_proj, module.value_proj, module.output_proj)
    return [leaf for linear in maps for leaf in (linear.weight, linear.bias)]


def _linear(name: str, projection: Any) -> tuple[Array, Array]:
    """[output, input] and [output] of one projection."""
    bias = jnp.asarray(projection["bias"]).reshape(-1)
    kernel = jnp.asarray(projection["kernel"])
    return kernel.reshape(-1, bias.size).T, bias
