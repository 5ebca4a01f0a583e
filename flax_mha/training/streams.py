"""What a flax.linen module draws from in training."""

from typing import Any

import jax

from flax_mha.core import checks
from flax_mha.core.typing import PRNGKey


def dropout_key(module: Any, rate: float, training: bool) -> PRNGKey | None:
    """A key of the "dropout" stream, or else of the module's `seed`; None where nothing drops."""
    if not training or rate == 0 or module.is_initializing():
        return None
    if module.has_rng("dropout"):
        return module.make_rng("dropout")
    if module.seed is not None:
        return jax.random.key(module.seed)
    checks.no_dropout_stream(rate, "rngs={'dropout': jax.random.key(0)}` to `apply")
