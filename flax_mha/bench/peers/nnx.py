"""`flax.nnx.MultiHeadAttention`."""

from typing import Any

import jax
from flax import nnx

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.masks import allowed
from flax_mha.bench.peers import jax_layers
from flax_mha.bench.peers.contract import Contender
from flax_mha.bench.peers.linen import renamed
from flax_mha.core.typing import Array


def build(case: Case, data: Data) -> Contender:
    """The mask is a matrix; dropout draws for every weight (see the linen peer)."""
    module = nnx.MultiHeadAttention(
        num_heads=case.heads,
        in_features=case.features,
        dropout_rate=case.dropout,
        broadcast_dropout=False,
        decode=False,
        keep_rngs=False,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(module, nnx.Param)

    def apply(weights: Any, x_BTD: Array, dropout_key: Any) -> Any:
        allowed_TS = allowed(case)
        return nnx.merge(graph, weights)(
            x_BTD,
            mask=None if allowed_TS is None else allowed_TS[None, None],
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else nnx.Rngs(dropout=dropout_key),
        )

    return jax_layers.contender(jax_layers.Layer(apply, lambda p: _filled(state, p)), case, data)


def _filled(state: Any, params: Any) -> Any:
    """The module's state with our numbers, matched by name."""
    named = renamed(params)

    def leaf(path: Any, old: Array) -> Array:
        # Paths end in names, and in the versions whose Variables are nodes, in one entry more.
        names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        return jax.numpy.asarray(named[names[0]][names[1]], old.dtype)

    return jax.tree_util.tree_map_with_path(leaf, state)
