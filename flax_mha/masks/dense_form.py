"""A mask as booleans `[b, n, T, S]`, of all queries or of some."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.pairs.function import PairFunction, mask_function
from flax_mha.core.pairs.separated import separated
from flax_mha.core.typing import Array
from flax_mha.masks import of_pairs
from flax_mha.masks.function import function_of
from flax_mha.masks.parts import BEYOND, counts


def of(mask: Any, sizes: dict[str, int | None]) -> Array:
    """All parts, joined; the sizes of b and n may be None where no function asks for them."""
    T, S = sizes["t"], sizes["s"]
    parts = [band(mask, jnp.arange(T, dtype="int32"), S), *mask.dense_masks]
    if mask.query_padding is not None:
        parts.append(mask.query_padding[:, None, :, None])
    if mask.key_padding is not None:
        parts.append(mask.key_padding[:, None, None, :])
    parts += [_same_segment(*ids)[:, None] for ids in mask.segment_ids]
    told = {letter: sizes[letter] or count for letter, count in zip("bn", counts(mask))}
    parts += [_values(mask_function(f), sizes, told) for f in of_pairs.beyond(mask)]
    allowed = functools.reduce(jnp.logical_and, parts)
    return jnp.broadcast_to(allowed, (*allowed.shape[:2], T, S))


def taken(mask: Any, rows: Array, S: int) -> Any:
    """The mask of the queries at some positions."""
    take = lambda x, axis: x if x.shape[axis] == 1 else jnp.take(x, rows, axis)  # noqa: E731
    rows = rows.astype("int32")
    functions = [_of_rows(f, rows) for f in of_pairs.beyond(mask)]
    empty: Any = dict.fromkeys(BEYOND, ())
    padding = mask.query_padding
    return dataclasses.replace(
        mask,
        band=(None, None),
        query_offset=None,
        query_padding=None if padding is None else jnp.take(padding, rows, 1),
        segment_ids=tuple((jnp.take(q, rows, 1), k) for q, k in mask.segment_ids),
        dense_masks=(band(mask, rows, S), *(take(dense, 2) for dense in mask.dense_masks)),
        **empty | {"functions": tuple(map(function_of, functions))},
    )


def _of_rows(function: Any, rows: Array) -> Any:
    return lambda b, n, t, s: function(b, n, rows[t], s)


def _values(function: PairFunction, sizes: dict[str, int | None], told: dict[str, int]) -> Array:
    for letter in function.reads("bn"):
        if told[letter] == 1 and sizes[letter] is None:
            name = letter.upper()
            rule = (
                f"`as_array` of a function that reads `{letter}` must be told how many there are."
            )
            checks.fail(ValueError, rule, f"{name}=None", f"Pass `{name}=`.")
    whole = {letter: size or 1 for letter, size in (sizes | told).items()}
    places = {letter: jnp.arange(size, dtype="int32") for letter, size in whole.items()}
    return separated(function, places).whole()


def band(mask: Any, query_T: Array, S: Any) -> Array:
    """The band's part `[b, 1, T, S]` for queries at these positions."""
    left, right = mask.band
    position_bT = query_T[None]
    if mask.query_offset is not None:
        position_bT += jnp.reshape(mask.query_offset, (-1, 1)).astype("int32")
    distance_bTS = jnp.arange(S, dtype="int32")[None, None] - position_bT[..., None]
    allowed_bTS = jnp.ones((1, 1, 1), bool)
    if left is not None:
        allowed_bTS = distance_bTS >= -left
    if right is not None:
        allowed_bTS = allowed_bTS & (distance_bTS <= right)
    return allowed_bTS[:, None]


def _same_segment(query_ids_bT: Array, key_ids_bS: Array) -> Array:
    return query_ids_bT[:, :, None] == key_ids_bS[:, None, :]
