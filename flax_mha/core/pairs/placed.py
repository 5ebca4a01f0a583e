"""A function of pairs whose queries and keys stand elsewhere than their indices say.

A cache shows keys in slots, and a step's queries begin behind what it holds: a function of
positions becomes one of these indices.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flax_mha.core.typing import Array


def placed(
    function: Callable[..., Any], query_position_bT: Array, key_position_bS: Array
) -> Callable[..., Any]:
    """`function` of (b, n, t, s), perhaps of a logit before them, at the positions of t and s.

    Example:
        >>> import jax.numpy as jnp
        >>> later = placed(lambda b, n, t, s: s <= t, jnp.array([[4]]), jnp.array([[3, 4, 5]]))
        >>> [bool(later(0, 0, 0, s)) for s in range(3)]
        [True, True, False]
    """

    def at_positions(*numbers: Any) -> Any:
        *logits, b, n, t, s = numbers
        return function(*logits, b, n, entry(query_position_bT, b, t), entry(key_position_bS, b, s))

    return at_positions


def entry(x: Any, *places: Any) -> Array:
    """The number at some places of an array, any axis of which may have size 1.

    Of no tokens there is no pair that could ask, and any number does.
    """
    x = jnp.asarray(x)
    if x.size == 0:
        return jnp.zeros((), x.dtype)
    return x[tuple(0 if size == 1 else place for size, place in zip(x.shape, places))]
