"""The layer under test, as it is called by default or with `implementation=` named."""

from collections.abc import Callable
from typing import Any

from flax_mha import multi_head_attention
from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data, config_of
from flax_mha.bench.peers import jax_layers
from flax_mha.bench.peers.contract import Contender, Unserved
from flax_mha.core.typing import Array


def builder(implementation: str | None) -> Callable[[Case, Data], Contender]:
    """`build` of one implementation; None lets the layer choose."""

    def build(case: Case, data: Data) -> Contender:
        config = config_of(case, implementation)

        def apply(params: Any, x_BTD: Array, dropout_key: Any) -> Array:
            call: dict[str, Any] = {"config": config, "use_causal_mask": case.causal}
            return multi_head_attention(params, x_BTD, x_BTD, dropout_key=dropout_key, **call)

        layer = jax_layers.Layer(apply, convert=lambda params: params)
        try:
            return jax_layers.contender(layer, case, data)
        except NotImplementedError as error:
            raise Unserved(str(error)) from error

    return build
