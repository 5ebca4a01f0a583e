"""`flax.linen.MultiHeadDotProductAttention`."""

from typing import Any

from flax import linen

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.masks import allowed
from flax_mha.bench.peers import jax_layers
from flax_mha.bench.peers.contract import Contender
from flax_mha.core.typing import Array


def build(case: Case, data: Data) -> Contender:
    """The mask is a matrix. Dropout draws for every weight, as everyone else's does.

    flax's default, `broadcast_dropout=True`, draws one `[T, S]` for the whole batch: another layer.
    """
    module = linen.MultiHeadDotProductAttention(
        num_heads=case.heads, dropout_rate=case.dropout, broadcast_dropout=False
    )

    def apply(weights: Any, x_BTD: Array, dropout_key: Any) -> Any:
        allowed_TS = allowed(case)
        return module.apply(
            {"params": weights},
            x_BTD,
            mask=None if allowed_TS is None else allowed_TS[None, None],
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )

    return jax_layers.contender(jax_layers.Layer(apply, renamed), case, data)


def renamed(params: Any) -> dict[str, Any]:
    """flax lays kernels out as Keras does, and calls the last projection `out`.

    Example:
        >>> renamed({"query": 1, "attention_output": 2})
        {'query': 1, 'out': 2}
    """
    return {{"attention_output": "out"}.get(name, name): leaves for name, leaves in params.items()}
