"""A case's causal order and window as booleans, for textbook and peers that want a matrix."""

import jax.numpy as jnp

from flax_mha.bench.cases import AnyCase
from flax_mha.core.typing import Array


def allowed(case: AnyCase, t_T: Array | None = None) -> Array | None:
    """Booleans `[T, S]` for all queries or those at `t_T`, True = may attend; None = all may.

    Made of two aranges inside the compiled program, so that no peer reads it from an argument.

    Example:
        >>> from flax_mha.bench.cases import Case
        >>> allowed(Case(1, 3, 4, 2, causal=True, window=2)).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    if not case.causal and case.window is None:
        return None
    s_S = jnp.arange(case.length)
    distance_TS = (s_S if t_T is None else t_T)[:, None] - s_S[None, :]
    reach = case.length if case.window is None else case.window
    allowed_TS = jnp.abs(distance_TS) < reach
    return allowed_TS & (distance_TS >= 0) if case.causal else allowed_TS
