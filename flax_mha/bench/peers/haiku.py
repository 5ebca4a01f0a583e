"""`haiku.MultiHeadAttention`."""

from typing import Any

import jax.numpy as jnp

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.masks import allowed
from flax_mha.bench.peers import jax_layers
from flax_mha.bench.peers.contract import Contender, Unserved
from flax_mha.core.typing import Array


def build(case: Case, data: Data) -> Contender:
    """The mask is a matrix; the layer has no dropout."""
    if case.dropout:
        raise Unserved("haiku.MultiHeadAttention has no dropout")
    import haiku

    def attention(x_BTD: Array) -> Array:
        initializer = haiku.initializers.VarianceScaling()
        layer = haiku.MultiHeadAttention(
            case.heads, case.head_size, w_init=initializer, name="attention"
        )
        allowed_TS = allowed(case)
        mask = None if allowed_TS is None else allowed_TS[None, None]
        return layer(x_BTD, x_BTD, x_BTD, mask)

    transformed: Any = haiku.without_apply_rng(haiku.transform(attention))

    def apply(weights: Any, x_BTD: Array, dropout_key: None) -> Any:
        return transformed.apply(weights, x_BTD)

    return jax_layers.contender(jax_layers.Layer(apply, _convert), case, data)


def _convert(params: Any) -> dict[str, dict[str, Array]]:
    """Heads and features in one axis; the last projection is called `linear`."""
    names = {"attention_output": "linear"}
    return {f"attention/{names.get(name, name)}": _linear(params[name]) for name in params}


def _linear(projection: Any) -> dict[str, Array]:
    bias = jnp.asarray(projection["bias"]).reshape(-1)
    return {"w": jnp.asarray(projection["kernel"]).reshape(-1, bias.size), "b": bias}
