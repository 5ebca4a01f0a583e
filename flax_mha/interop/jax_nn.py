"""`jax.nn.dot_product_attention`'s signature over this package's attention."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import attention
from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array
from flax_mha.masks import Mask

REMEDIES = {"xla": "implementation='reference' is the same einsum, softmax, einsum."}


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Mask | Array | None = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention` with this package's implementations.

    softmax(scale query . key + bias) . value over the allowed keys.

    Args:
        query: `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; N is a multiple of K.
        value: `[B, S, K, V]` or `[S, K, V]`.
        bias: floats that broadcast to `[B, N, T, S]`, added to the scaled logits.
        mask: booleans that broadcast to `[B, N, T, S]`, True = may attend; or a `Mask`.
        scale: factor of the logits; None = 1 / sqrt(H). Under a transformation it may be traced:
            it then multiplies the query, in the query's dtype.
        is_causal: no key after the query, aligned top-left.
        query_seq_lengths: integers `[B]`: the queries of an example that are real.
        key_value_seq_lengths: integers `[B]`: the keys of an example that are real.
        local_window_size: (left, right) keys around the query, itself besides; an int = both.
        implementation: one of `flax_mha.IMPLEMENTATIONS`; None chooses.
        return_residual: also return the log of the sum of exp(logits), without a gradient.

    Returns:
        The context, of the query's axes with V for H; with `return_residual` the pair of it and
        `[B, T, N]` or `[T, N]`.

    Raises:
        NotImplementedError: `implementation` is jax.nn's "xla", or cannot serve this.
        ValueError: shapes that do not fit.
        TypeError: a float mask, an integer query, mixed dtypes.

    Memory: O(T + S) from 96 x 96 on; lengths, causal and window never become a `[T, S]` array.

    Guide: `python -m flax_mha guide drop_ins`.

    Differs from jax.nn: (1) a query that may attend nowhere gets context 0 and residual -inf, not
    mean(value); (2) V may differ from H; (3) NaN beyond a length goes nowhere; (4) bounds of a
    window are not negative; (5) `local_window_size` alone acts (in jax 0.7 it does not).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax_mha.interop import jax_nn
        >>> x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
        >>> jax_nn.dot_product_attention(x, x, x, key_value_seq_lengths=jnp.array([5, 3])).shape
        (2, 5, 3, 8)
    """
    _known(implementation)
    for name, x in {"query": query, "key": key, "value": value, "bias": bias}.items():
        if x is not None or name != "bias":
            checks.floating_array(name, x, "[B, T, N, H]" if name == "query" else "of its axes")
    axes = jnp.shape(query)
    query_BTNH = _with_batch("query", query, "[B, T, N, H]")
    key_BSKH = _with_batch("key", key, "[B, S, K, H]")
    value_BSKV = _with_batch("value", value, "[B, S, K, V]")
    (B, T), S = query_BTNH.shape[:2], key_BSKH.shape[1]
    padding = Mask.padding(
        query=_real("query_seq_lengths", query_seq_lengths, B, T),
        key=_real("key_value_seq_lengths", key_value_seq_lengths, B, S),
    )
    if isinstance(scale, jax.core.Tracer):
        query_BTNH, scale = _scaled(query_BTNH, scale), 1.0
    result = attention.dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKV,
        bias=None if bias is None else jnp.asarray(bias),
        mask=padding if mask is None else _mask(mask) & padding,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residuals=return_residual,
    )
    if not return_residual:
        return result.reshape(*axes[:-1], result.shape[-1])
    context, residuals = result
    return context.reshape(*axes[:-1], context.shape[-1]), _log_sum(residuals, context, axes)


def _known(implementation: str | None) -> None:
    """A name of jax.nn's that is not one of ours is refused: it would run something else."""
    if (
        isinstance(implementation, str)
        and implementation in REMEDIES
        and implementation not in attention.IMPLEMENTATIONS
    ):
        rule = "jax.nn's implementations are not run here."
        ours = list(attention.IMPLEMENTATIONS)
        remedy = f"Pass None or one of {ours}. {REMEDIES[implementation]}"
        checks.fail(NotImplementedError, rule, f"implementation={implementation!r}", remedy)


def _with_batch(name: str, x: Any, letters: str) -> Array:
    """The array with a batch axis, of 1 where it had none."""
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
        checks.fail(ValueError, f"`{name}` must be {letters}, or without B.", f"shape {x.shape}")
    return jax.lax.broadcast_to_rank(x, 4)


def _mask(mask: Any) -> Mask:
    if isinstance(mask, Mask):
        return mask
    return Mask.dense(checks.boolean_mask("mask", mask))


def _real(name: str, lengths: Any, B: int, size: int) -> Array | None:
    """Booleans `[B, size]`, True before the example's length."""
    if lengths is None:
        return None
    if not checks.is_array(lengths):
        rule = f"`{name}` must be integers [B] = ({B},)."
        checks.fail(TypeError, rule, f"type {type(lengths).__name__}")
    checks.known_dtype(name, lengths, f"`{name}` must be integers [B].")
    if tuple(lengths.shape) != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        evidence = f"shape {tuple(lengths.shape)} and dtype {lengths.dtype}"
        checks.fail(ValueError, f"`{name}` must be integers [B] = ({B},).", evidence)
    checks.fits(name, lengths)
    lengths_B = jnp.asarray(lengths)
    return jnp.arange(size, dtype="int32")[None] < lengths_B.astype("int32")[:, None]


def _scaled(query_BTNH: Array, scale: Array) -> Array:
    """A traced scale has no value that could be static; in the query it is data."""
    if scale.shape:
        checks.fail(ValueError, "`scale` must be one number.", f"shape {scale.shape}")
    wide = wide_dtype(query_BTNH.dtype)
    return (query_BTNH.astype(wide) * scale.astype(wide)).astype(query_BTNH.dtype)


def _log_sum(residuals: attention.Residuals, context: Array, axes: tuple[int, ...]) -> Array:
    """log(sum(exp(logits))) `[..., T, N]`, in the context's dtype and without a gradient."""
    row_max_BNT, row_sum_BNT = jax.lax.stop_gradient(residuals)
    log_sum_BNT = row_max_BNT + jnp.log(row_sum_BNT)
    return log_sum_BNT.swapaxes(1, 2).reshape(axes[:-1]).astype(context.dtype)
