"""A case's causal order and window as booleans, for textbook and peers that want a matrix."""

import jax.numpy as jnp

from flax_mha.bench.cases import Case
from flax_mha.core.typing import Array


def allowed(case: Case) -> Array | None:
    """Booleans `[T, S]`, True = may attend; None where every pair may.

    Made of two aranges inside the compiled program, so that no peer reads it from an argument.

    Example:
        >>> allowed(Case(1, 3, 4, 2, causal=True, window=2)).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    if not case.causal and case.window is None:
        return None
    distance_TS = jnp.arange(case.length)[:, None] - jnp.arange(case.length)[None, :]
    reach = case.length if case.window is None else case.window
    allowed_TS = jnp.abs(distance_TS) < reach
    return allowed_TS & (distance_TS >= 0) if case.causal else allowed_TS
