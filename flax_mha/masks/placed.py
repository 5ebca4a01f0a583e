"""A mask by positions, of queries and keys that have other indices: what a cache shows."""

import dataclasses
import functools
from typing import Any

import jax

from flax_mha.core.pairs.placed import placed
from flax_mha.core.typing import Array
from flax_mha.masks import of_pairs
from flax_mha.masks.function import function_of
from flax_mha.masks.parts import BEYOND, of_indices, parts_of


def placed_mask(mask: Any, query_position_bT: Array, key_position_bS: Array) -> Any:
    """The mask of queries and keys that stand at these positions, `[b, T]` and `[b, S]`.

    Of a mask without arrays of queries or keys: see `parts_of_indices`.
    """
    functions = of_pairs.beyond(mask)
    if mask.band != (None, None):
        alone: Any = dict.fromkeys(BEYOND, ())
        band = dataclasses.replace(mask, **alone)
        functions.append(functools.partial(of_pairs.at, band))
    at = (placed(f, query_position_bT, key_position_bS) for f in functions)
    new: Any = dict.fromkeys(BEYOND, ()) | {"functions": tuple(map(function_of, at))}
    return dataclasses.replace(mask, band=(None, None), query_offset=None, **new)


def parts_of_indices(mask: Any) -> list[str]:
    """The names of a mask's arrays of queries and keys, which have no positions to be asked for."""
    named = [entry for part in parts_of(mask) for entry in of_indices(part).items()]
    return [name for name, x in named if jax.tree.leaves(x)]
