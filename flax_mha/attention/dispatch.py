"""Chooses an implementation openly and runs it: `dot_product_attention`."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from flax_mha.attention.canonical import canonical
from flax_mha.attention.context.axis import ContextAxis, context_axis_of
from flax_mha.attention.context.positions import is_shard
from flax_mha.attention.context.strategies import run_context
from flax_mha.attention.contract import Options, Output, Residuals, Scales
from flax_mha.attention.cut import Cut, cut_along, cut_of, run_cut
from flax_mha.attention.distance import DistanceBias
from flax_mha.attention.dropout import start_of
from flax_mha.attention.implementations import chosen, run
from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.meshes import axes_of, explicit_mesh, spec, with_auto_axes
from flax_mha.core.pairs.function import PairFunction, score_function
from flax_mha.core.typing import Array, PRNGKey, Shape
from flax_mha.masks import Mask

# The arguments of a call that are arrays or hold some; all others are static.
DATA = (
    *("query", "key", "value", "mask", "bias", "score", "distance_bias", "sinks"),
    *("dropout_key", "dropout_start"),
)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    score: Callable[..., Any] | None = None,
    distance_bias: DistanceBias | None = None,
    sinks: Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    dropout_start: Any = None,
    broadcast_dropout: bool = False,
    precision: Any = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
    return_weights: bool = False,
    return_residuals: bool = False,
    context_axis: str | ContextAxis | None = None,
) -> Any:
    """Attention of arrays: softmax(scale query . key + bias) . value over the allowed keys.

    Args:
        query: `[..., T, N, H]`, floating; any number of leading batch axes, none included.
        key: `[..., S, K, H]`; N is a multiple of K, query head n reads key head n // (N // K).
        value: `[..., S, K, V]`; V may differ from H.
        mask: a `Mask`, or booleans that broadcast to `[..., N, T, S]`; True = may attend.
        bias: floats that broadcast to `[..., N, T, S]`, added to the scaled logits.
        score: `score(logits, b, n, t, s) -> logits`, what becomes of the logit of query t of
            example b and head n with key s, after all biases and before the mask: a function of
            numbers that is traced once, like those of `Mask.function`. What it closes over has
            gradients. In a `jax.vmap` or `jax.shard_map` around the call b, n, t and s count that
            call's own arrays; along a `context_axis` t and s are places in the whole sequence. See
            `python -m flax_mha guide pair_functions`.
        distance_bias: a `DistanceBias`, added likewise: floats by head and distance alone.
        sinks: floats `[N]`, a logit for each head that attends to nothing and joins the softmax;
            -inf = none. Of parts that are merged, one takes them.
        soft_cap: the scaled product becomes soft_cap * tanh(product / soft_cap), before biases.
        scale: factor of the logits; None = 1 / sqrt(H).
        is_causal: no key after the query, aligned top-left.
        local_window_size: (left, right) keys around the query, itself besides; an int = both.
        dropout_rate: probability in [0, 1] of dropping a weight; acts only with `dropout_key`.
        dropout_key: one PRNG key; None = no dropout.
        dropout_start: integers (b, n, t, s), traced or not: where these arrays begin in the whole
            ones of which they are a shard, b counted over all batch axes; None = (0, 0, 0, 0).
            Inside `jax.shard_map` or `jax.pmap` every shard draws the bits of the first one without
            it, or without a key of its own by `jax.random.fold_in`.
        broadcast_dropout: whether all examples and heads drop the same positions; b and n of
            `dropout_start` are not looked at then.
        precision: of both products, as in `jax.numpy.einsum`.
        implementation: one of `IMPLEMENTATIONS`; None chooses. See `explain`.
        block_sizes: (queries, keys) a block of the blockwise implementation or a kernel's tile;
            None = by length. With dropout a multiple of 32 queries draws the least.
        return_weights: also return the weights `[..., N, T, S]`, before dropout.
        return_residuals: also return `Residuals(row_max, row_sum)`, float32 `[..., N, T]`.
        context_axis: the mesh axis that cuts T and S, a name or a `ContextAxis`: each device has
            its part of the sequence, and they meet by a strategy. The mesh is that of
            `jax.set_mesh` or of the arrays; inside a `jax.shard_map` over the axis the arrays are a
            device's own, as in `context_parallel_attention`.

    Returns:
        The context `[..., T, N, V]`; with weights and/or residuals, a tuple in this order.

    Raises:
        ValueError: shapes that do not fit, an unknown name, a rate outside [0, 1].
        TypeError: a float mask, an integer query, mixed dtypes, a dropout key that is none.
        NotImplementedError: the named implementation cannot serve this call.

    Memory: blockwise O(T + S), reference O(T S); `explain` says which one is chosen.

    Differs from jax.nn.dot_product_attention: (1) a query that may attend nowhere gets context 0,
    not mean(value); (2) V may differ from H; (3) dropout, weights; (4) any number of batch axes;
    (5) NaN in padded keys and values goes nowhere.

    Reference: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762.

    Example:
        >>> import jax, flax_mha
        >>> x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
        >>> flax_mha.dot_product_attention(x, x, x, is_causal=True).shape
        (2, 5, 3, 8)
    """
    mask = _before_tracing(mask)
    data = dict(query=query, key=key, value=value, mask=mask, bias=bias, sinks=sinks)
    data |= dict(distance_bias=distance_bias, dropout_key=dropout_key)
    data |= dict(dropout_start=start_of(dropout_start), score=traced_score(score, query))
    static = dict(
        soft_cap=soft_cap,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        block_sizes=block_sizes,
        return_weights=return_weights,
        return_residuals=return_residuals,
    )

    wanted = (return_weights, return_residuals)
    axis = None if context_axis is None else context_axis_of(context_axis)
    how = how_cut(query, key, value, implementation, axis)
    attend = functools.partial(_attend, static=static, how=how)
    return with_auto_axes(attend, lambda: _placed(query, key, value, *wanted), data)


def attention_cut(
    cut: Cut | None,
    query: Array,
    key: Array,
    value: Array,
    *,
    scales: Scales | None = None,
    **call: Any,
) -> Any:
    """`dot_product_attention` of arrays with automatic axes only, cut over devices as told.

    With `scales` key and value are int8, of a cache, which no cut ever meets.

    Example:
        >>> import jax
        >>> x = jax.numpy.zeros((2, 5, 3, 8))
        >>> attention_cut(None, x, x, x, is_causal=True).shape
        (2, 5, 3, 8)
    """
    data, static, implementation, axis = bound(query, key, value, call)
    return _attend(data, static, How(implementation, cut, axis), scales)


class How(NamedTuple):
    """The name of an implementation, the cut that is opened here, and the context axis if any."""

    implementation: str | None
    cut: Cut | None
    axis: ContextAxis | None

    @property
    def along(self) -> ContextAxis | None:
        """The axis along which devices share a call: of the cut, or else of the caller's own."""
        if self.cut is not None:
            return self.cut.context
        return self.axis if is_shard(self.axis) else None


def _attend(data: Any, static: Any, how: How, scales: Scales | None = None) -> Any:
    axis = how.along
    inputs, options = canonical(**data, **static, axis=how.axis, scales=scales)
    if axis is None:
        one = functools.partial(run, chosen(how.implementation, inputs, options))
    else:
        one = functools.partial(run_context, axis, how.implementation)
    output = run_cut(how.cut, one, inputs, options)
    return _restore(output, data["query"].shape[:-3], options)


def bound(query: Any, key: Any, value: Any, call: Any) -> tuple[Any, Any, str | None, Any]:
    """The arguments of a call, with their defaults: data, static ones, name and context axis."""
    bound = inspect.signature(dot_product_attention).bind(query, key, value, **call)
    bound.apply_defaults()
    given = bound.arguments
    given["mask"] = _before_tracing(given["mask"])
    given["score"] = traced_score(given["score"], query)
    given["dropout_start"] = start_of(given["dropout_start"])
    implementation, axis = given.pop("implementation"), given.pop("context_axis")
    static = {name: x for name, x in given.items() if name not in DATA}
    axis = None if axis is None else context_axis_of(axis)
    return {name: given[name] for name in DATA}, static, implementation, axis


def how_cut(query: Array, key: Array, value: Array, name: str | None, axis: Any) -> How:
    """How the arrays' types, and the context axis, say that a call is cut."""
    mesh = explicit_mesh((query, key, value))
    if mesh is None:
        return How(name, None if axis is None else cut_along(None, axis, None), axis)
    checks.attention_arrays(query, key, value)
    *batch, _, heads, _ = axes_of(query)
    lengths = () if axis is None else (axis.name,)
    cut = cut_of(mesh, batch, heads, math.prod(query.shape[:-3]), key.shape[-2], lengths)
    return How(name, cut if axis is None else cut_along(mesh, axis, cut), axis)


def _placed(query: Array, key: Array, value: Array, weights: bool, residuals: bool) -> Any:
    """On a mesh with explicit axes: batch, length and heads as the query's, features as V."""
    checks.attention_arrays(query, key, value)
    *batch, T, N, _ = axes_of(query)
    specs: list[Any] = [spec(*batch, T, N, axes_of(value)[-1])]
    if weights:
        specs.append(spec(*batch, N, T, axes_of(key)[-3]))
    if residuals:
        rows: list[Any] = [spec(*batch, N, T)] * 2
        specs.append(Residuals(*rows))
    return specs[0] if len(specs) == 1 else tuple(specs)


def traced_score(score: Any, query: Any) -> PairFunction | None:
    """A score as a function of the logits' dtype, its arrays as data."""
    if score is None or isinstance(score, PairFunction):
        return score
    checks.floating_array("query", query, "[..., T, N, H]")
    return score_function(score, wide_dtype(query.dtype))


def _before_tracing(mask: Any) -> Any:
    """A mask whose integers are looked at, before tracing hides them."""
    if not checks.is_array(mask) or isinstance(mask, jax.ShapeDtypeStruct):
        return mask
    return checks.boolean_mask("mask", mask)


def _restore(output: Output, batch: Shape, options: Options) -> Any:
    """The caller's batch axes; a tuple where more than the context was asked for."""
    unfold = lambda x: x.reshape(*batch, *x.shape[1:])  # noqa: E731
    results = [unfold(output.context_BTNV)]
    if options.return_weights:
        results.append(unfold(output.weights_BNTS))
    if options.return_residuals:
        results.append(jax.tree.map(unfold, output.residuals))
    return results[0] if len(results) == 1 else tuple(results)
