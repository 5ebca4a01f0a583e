"""The score of a layer's config as a function of pairs, of the parameters that it owns."""

from collections.abc import Callable
from typing import Any

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.pairs.placed import placed
from flax_mha.core.typing import Array, DType, ParamsLike
from flax_mha.layer.extend import Places


def score_of(
    params: ParamsLike, config: MultiHeadAttentionConfig, dtype: DType, places: Places | None = None
) -> Callable[..., Any] | None:
    """`score(logits, b, n, t, s)` of heads of this dtype, at the places of queries and keys."""
    if config.score is None:
        return None
    own = {name: x.astype(wide_dtype(dtype)) for name, x in params.get("score", {}).items()}

    def score(logits: Array, b: Array, n: Array, t: Array, s: Array) -> Array:
        return config.score(logits, b, n, t, s, **own)

    return score if places is None else placed(score, *places)
