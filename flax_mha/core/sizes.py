"""Sizes that are numbers, and sizes that `jax.export` leaves open, as symbols."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# jax 0.7 has it in jax.core.
_home = jax.errors if hasattr(jax.errors, "InconclusiveDimensionOperation") else jax.core
Inconclusive: Any = getattr(_home, "InconclusiveDimensionOperation")  # noqa: B009


def is_known(*sizes: Any) -> bool:
    """Whether each size is a number."""
    return all(isinstance(size, int | np.integer) for size in sizes)


def as_index(size: Any) -> Any:
    """The size as an int32 to calculate with, where it is a symbol too."""
    return np.int32(size) if is_known(size) else jnp.asarray(size, "int32")


def at_least(size: Any, bound: int) -> bool | None:
    """Whether size >= bound; None where the constraints of a symbol do not tell."""
    try:
        return bool(size >= bound)
    except Inconclusive:
        return None
