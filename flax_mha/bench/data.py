"""The input and the one set of weights that every contender of a case computes with."""

from typing import NamedTuple

import jax
import numpy as np

from flax_mha import MultiHeadAttentionConfig, init_params
from flax_mha.bench.cases import Case
from flax_mha.core.typing import Array, ParamsLike, PRNGKey


class Data(NamedTuple):
    """Our parameter tree is the single source of weights; each peer's file converts it."""

    params: ParamsLike
    x_BTD: Array
    dropout_key: PRNGKey


def config_of(case: Case, implementation: str | None = None) -> MultiHeadAttentionConfig:
    """Our layer of this case. Biases are not zero: a peer that mislays one must not agree."""
    return MultiHeadAttentionConfig(
        num_heads=case.heads,
        key_dim=case.head_size,
        dropout=case.dropout,
        sliding_window=case.window,
        bias_initializer="random_normal",
        implementation=implementation,
    )


def make_data(case: Case) -> Data:
    """The same numbers for the same case, on every machine of one JAX version."""
    shape = (case.batch, case.length, case.features)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    init_key, dropout_key = jax.random.split(jax.random.key(0))
    return Data(init_params(init_key, config_of(case), shape), jax.device_put(x), dropout_key)
