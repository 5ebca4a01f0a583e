"""Where queries and keys stand: positions for rotary embedding, distances for biases."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention import DistanceBias
from flax_mha.attention.context import ContextAxis
from flax_mha.attention.context.positions import is_shard, order_of, whole_length
from flax_mha.attention.context.positions import positions as positions_along
from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.dtypes import promoted
from flax_mha.core.folding import Folding
from flax_mha.core.typing import Array, ParamsLike, Shape
from flax_mha.layer.caches import CrossCache, KVCache
from flax_mha.positions import DenseBias, DistanceFunction, PositionFunction


class Positions(NamedTuple):
    """`[b, T]` and `[b, S]`, where b is 1 or B; of several axes `[axes, b, T]`.

    None where nothing reads them.
    """

    query_bT: Array | None
    key_bS: Array | None


def positions_of(
    positions: Any,
    segment_ids: Any,
    folding: Folding,
    config: MultiHeadAttentionConfig,
    cache: KVCache | CrossCache | None = None,
) -> Positions:
    """The caller's; or those within each segment; or 0, 1, ... from the cache's length on."""
    if not _are_read(config):
        if positions is not None:
            rule = "`positions` are read by rotary embedding, `QueryGrowth` and `chunk_size` alone."
            evidence = f"positions, and position={config.position} in the config"
            checks.fail(ValueError, rule, evidence, 'Set `position="rotary"`.')
        return Positions(None, None)
    if isinstance(cache, CrossCache):
        return Positions(
            _beside_source(_axes(config), positions, segment_ids, folding, cache), None
        )
    if positions is not None:
        _check_counted(config, cache)
        query, key = _pair("positions", positions, folding)
        if query is not key:
            _refuse_ambiguous(_axes(config), query, key, folding)
        read = functools.partial(_folded, _axes(config), folding=folding)
        return Positions(read(query, folding.targets, "T"), read(key, folding.sources, "S"))
    axis = config.context_axis if cache is None else None
    if segment_ids is not None:
        pair = folded_pair("segment_ids", segment_ids, folding)
        return Positions(*(_restarted_along(axis, x) for x in pair))
    counted = (positions_along(axis, size)[None] for size in (folding.T, folding.S))
    offset_B1 = 0 if cache is None else cache.length.reshape(-1, 1)
    return Positions(*(index_1L + offset_B1 for index_1L in counted))


def _are_read(config: MultiHeadAttentionConfig) -> bool:
    return isinstance(config.position, PositionFunction) or config.chunk_size is not None


def _axes(config: MultiHeadAttentionConfig) -> int:
    """How many numbers say where a token stands."""
    return config.position.axes if isinstance(config.position, PositionFunction) else 1


def _check_counted(config: MultiHeadAttentionConfig, cache: Any) -> None:
    if config.chunk_size is not None and isinstance(cache, KVCache):
        rule = "The chunks of a KVCache are counted from its length, for it keeps no `positions`."
        evidence = f"positions, a cache, and chunk_size={config.chunk_size}"
        checks.fail(NotImplementedError, rule, evidence, "Call without `positions`.")


def _beside_source(
    A: int, positions: Any, segment_ids: Any, folding: Folding, cache: CrossCache
) -> Array:
    """Those of the queries alone: the keys of an encoder were turned when they were projected."""
    if positions is not None:
        if not checks.is_array(positions):
            rule = "With a CrossCache, `positions` are those of the queries alone, [B, T]."
            evidence = f"positions of type {type(positions).__name__}"
            remedy = "The keys stand at 0, 1, ...: they were turned when they were projected."
            checks.fail(ValueError, rule, evidence, remedy)
        return _folded(A, positions, folding.targets, "T", folding)
    if segment_ids is not None:
        rule = "A CrossCache holds keys at the positions 0, 1, ..., not anew in each segment."
        evidence = "segment_ids, and rotary embedding without positions"
        checks.fail(ValueError, rule, evidence, "Pass the queries' `positions=`, [B, T].")
    return jnp.arange(folding.T, dtype="int32")[None] + cache.length.reshape(-1, 1)


def distance_bias(
    params: ParamsLike, config: MultiHeadAttentionConfig, T: int, S: int, reach: int = 0
) -> DistanceBias | None:
    """The bias of every distance between T queries, whose first is at most `reach`, and S keys."""
    if not isinstance(config.position, DistanceFunction):
        return None
    T, S = (whole_length(config.context_axis, length) for length in (T, S))
    first = 1 - T - reach
    distance_L = np.arange(first, max(S, first + 1))
    values_NL = config.position(distance_L, config.num_heads, _table(params))
    return DistanceBias(values_NL, first=first)


def _folded(A: int, positions: Array, lengths: Shape, letter: str, folding: Folding) -> Array:
    """`[b, T]` of `[*batch, T]`; `[axes, b, T]` of `[axes, *batch, T]`: the rank tells them apart.

    Axes are as many as the batch may have examples, so an array with axes has all axes of a batch.
    """
    rank = len(folding.batch) + len(lengths)
    _check_axes(positions, (*folding.batch, *lengths), A, letter)
    fold = functools.partial(folding.fold_padding, "positions", lengths=lengths, letter=letter)
    if positions.ndim > rank:
        return jnp.stack([fold(of_axis) for of_axis in positions])
    return fold(positions)


def _check_axes(positions: Array, full: Shape, A: int, letter: str) -> None:
    rule = f"`positions` must be [*batch, {letter}] = {full}, or [axes, *batch, {letter}]."
    evidence = f"shape {positions.shape}, and a position of {A} axes in the config"
    extra = positions.ndim - len(full)
    if extra > 1 or (extra == 1 and len(positions) != A):
        checks.fail(ValueError, rule, evidence, "Several axes are read by `AxialRotary`.")
    if extra == 0 and len(full) > 1 and len(positions) == A > 1 and full[0] != A:
        checks.fail(ValueError, rule, evidence, "Axes stand before a batch: `positions[:, None]`.")


def with_dense_bias(
    bias_bnts: Array | None,
    params: ParamsLike,
    folding: Folding,
    config: MultiHeadAttentionConfig,
    cache: KVCache | CrossCache | None,
) -> Array | None:
    """The caller's bias and that of the config's position, where it is one of every pair."""
    if not isinstance(config.position, DenseBias):
        return bias_bnts
    _refuse_dense(config, cache)
    dense_NTS = config.position(folding.T, folding.S, config.num_heads, _table(params))
    if bias_bnts is None:
        return dense_NTS[None]
    dtype = promoted([bias_bnts.dtype, dense_NTS.dtype])
    return bias_bnts.astype(dtype) + dense_NTS[None].astype(dtype)


def _refuse_dense(config: MultiHeadAttentionConfig, cache: KVCache | CrossCache | None) -> None:
    if cache is not None:
        rule = "A dense bias of positions is of whole sequences: with a cache it has no meaning."
        evidence = f"position={config.position}, and a {type(cache).__name__}"
        checks.fail(NotImplementedError, rule, evidence, "Call without a cache.")
    if config.context_axis is not None:
        rule = "A dense bias of positions is [N, T, S], which a context axis would cut."
        evidence = f"position={config.position}, context_axis={config.context_axis.name!r}"
        remedy = "Call with `config.replace(context_axis=None)`."
        checks.fail(NotImplementedError, rule, evidence, remedy)


def _table(params: ParamsLike) -> Array | None:
    return params["relative_bias"]["embedding"] if "relative_bias" in params else None


def _refuse_ambiguous(A: int, query: Array, key: Array, folding: Folding) -> None:
    """A pair of which nobody can tell whether it is queries and keys, or rows and columns."""
    rank = len(folding.batch) + len(folding.targets)
    without_axes = query.ndim <= rank and key.ndim <= rank
    if A == 2 and without_axes and folding.targets == folding.sources:
        rule = "A pair of `positions` is (queries, keys), each [axes, B, T] where there are 2 axes."
        evidence = f"shapes {query.shape} and {key.shape}, which may be those of two axes"
        remedy = "For rows and columns of both pass one array, `jnp.stack([rows, columns])`."
        checks.fail(ValueError, rule, evidence, remedy)


def folded_pair(name: str, value: Any, folding: Folding) -> tuple[Array, Array]:
    """Integers `[b, T]` and `[b, S]`, from one array for self-attention or from a pair."""
    query, key = _pair(name, value, folding)
    return (
        folding.fold_padding(name, query, folding.targets, "T"),
        folding.fold_padding(name, key, folding.sources, "S"),
    )


def _pair(name: str, value: Any, folding: Folding) -> tuple[Array, Array]:
    """Those of the queries and of the keys, of one array the same."""
    if not checks.is_array(value):
        query, key = value
        return query, key
    if folding.targets != folding.sources:
        rule = f"`{name}` must be a pair (queries [B, T], keys [B, S]) where T != S."
        checks.fail(ValueError, rule, f"one array, T={folding.targets}, S={folding.sources}")
    return value, value


def _restarted_along(axis: ContextAxis | None, ids_bT: Array) -> Array:
    """Positions within segments, of tokens that stand in the order of a context axis."""
    if is_shard(axis):
        rule = "On one device's part of a sequence nobody knows where its segments begin."
        evidence = "segment_ids and rotary embedding along a context axis, without positions"
        checks.fail(ValueError, rule, evidence, "Pass `positions=`, counted over the whole.")
    order = order_of(axis, ids_bT.shape[1])
    if order is None:
        return restarted(ids_bT)
    return restarted(ids_bT[:, np.argsort(order)])[:, order]


def restarted(ids_bT: Array) -> Array:
    """Positions that count each segment's tokens, `[b, T]`: how many before have the same id.

    An id that comes back goes on with its own count, for it attends to its first run: the two are
    one document. A stable sort brings equal ids together, in order; O(T log T).
    """
    index_bT = jnp.broadcast_to(jnp.arange(ids_bT.shape[1], dtype="int32")[None], ids_bT.shape)
    sorted_bT, place_bT = jax.lax.sort((ids_bT, index_bT), dimension=1, is_stable=True, num_keys=1)
    changes_bT = jnp.pad(sorted_bT[:, 1:] != sorted_bT[:, :-1], ((0, 0), (1, 0)))
    start_bT = jax.lax.cummax(jnp.where(changes_bT, index_bT, 0), axis=1)
    _, count_bT = jax.lax.sort((place_bT, index_bT - start_bT), dimension=1, num_keys=1)
    return count_bT
