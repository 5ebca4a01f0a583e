"""flax's `attention_fn` hook: flax's arguments by name, this package's attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention import dot_product_attention
from flax_mha.core import checks
from flax_mha.core.dtypes import promoted, wide_dtype
from flax_mha.core.typing import Array, DType, PRNGKey
from flax_mha.masks import Mask

EINSUM = "Blocks run no einsum that could be replaced: leave it out, and set `precision` instead."
REMEDIES = {
    "einsum_dot_general": EINSUM,
    "qk_attn_weights_einsum": EINSUM + " In flax.linen: `qk_attn_weights_einsum_cls=None`.",
    "attn_weights_value_einsum": EINSUM + " In flax.linen: `attn_weights_value_einsum_cls=None`.",
    "input_positions": "Rotate query and key first, and call this function with the rotated ones.",
}


# flax.linen passes an argument only where the signature names it, and drops it silently otherwise;
# so every one that flax has stands here, those that can only be refused too.
def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Mask | Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: PRNGKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DType = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Any = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    input_positions: Any = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> Array:
    """flax's dot_product_attention, for `attention_fn=` of flax.linen's and flax.nnx's modules.

    softmax(query . key / sqrt(H) + bias) . value over the allowed keys.

    Args:
        query: `[..., T, N, H]`; any number of leading batch axes.
        key: `[..., S, K, H]`; N is a multiple of K.
        value: `[..., S, K, V]`.
        bias: floats that broadcast to `[..., N, T, S]`, added to the logits.
        mask: broadcasts to `[..., N, T, S]`, True = may attend: booleans, integers or floats of 0
            and 1 as flax's `make_causal_mask` returns them; or a `Mask`, which holds no `[T, S]`.
        broadcast_dropout: whether all examples and heads drop the same positions.
        dropout_rng: one PRNG key; needed where dropout acts.
        dropout_rate: probability in [0, 1] of dropping a weight.
        deterministic: True = no dropout.
        dtype: cast query, key and value to it; None = to the dtype they promote to.
        precision: of both products, as in `jax.numpy.einsum`.
        module: where given (flax: `sow_weights=True`), the weights `[..., N, T, S]` before dropout
            are sown in it as "attention_weights" of "intermediates".
        promote_dtype: casts `(query, key, value)`, as flax.nnx's function of that name.
        is_causal: no key after the query, aligned top-left.
        force_fp32_for_softmax: the softmax is in float32 at least in any case; True also returns
            float32 for 16-bit inputs, as flax does.
        einsum_dot_general: must be None, and so must the next three.
        qk_attn_weights_einsum: must be None.
        attn_weights_value_einsum: must be None.
        input_positions: must be None.
        implementation: one of `flax_mha.IMPLEMENTATIONS`; None chooses.
        block_sizes: (queries, keys) a block, as in `flax_mha.dot_product_attention`.

    Returns:
        The context `[..., T, N, V]`.

    Raises:
        NotImplementedError: an argument of flax that cannot be honoured, by its name; complex
            inputs.
        ValueError: dropout without a key, an additive mask, shapes that do not fit.
        TypeError: integer inputs, a `module` without `sow`.

    Memory: O(T + S) from 96 x 96 on; O(T S) where the weights are sown. A mask array is what it
    is: pass `mask=Mask.causal()` to the flax module instead of `make_causal_mask(x)`.

    Differs from flax: (1) a query that may attend nowhere gets context 0, not mean(value);
    (2) dropout draws other numbers than flax's from the same key, and rate 1 gives zeros, not NaN;
    (3) the softmax is never in 16 bits; (4) under `jax.jit` an additive float mask cannot be seen:
    it then removes every key, and is not inverted; (5) complex inputs are refused.

    Example:
        >>> import functools, jax
        >>> from flax import linen as nn
        >>> from flax_mha.interop.flax import attention_fn
        >>> blocks = functools.partial(attention_fn, implementation="blockwise")
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=blocks)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> layer.init_with_output(jax.random.key(1), x)[0].shape
        (4, 8, 32)
    """
    for name, x in {"query": query, "key": key, "value": value}.items():
        if not checks.is_array(x) or getattr(x.dtype, "kind", "") in "OUS":  # a cast reads text
            rule = f"`{name}` must be a floating-point array [..., length, heads, features]."
            checks.fail(TypeError, rule, f"{name} of type {type(x).__name__}")
    _refuse(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
        input_positions=input_positions,
    )
    _refuse_complex(query=query, key=key, value=value)  # before a cast drops what is imaginary
    query, key, value = _promoted((query, key, value), dtype, promote_dtype)
    rate = checks.rate("dropout_rate", dropout_rate)
    drops = not checks.boolean("deterministic", deterministic) and rate > 0
    if checks.boolean("is_causal", is_causal) and checks.is_array(mask):
        _one_query_of_many(query, key)
    sows = _sows(module)
    result = dot_product_attention(
        query,
        key,
        value,
        mask=_allowed(mask),
        bias=bias,
        is_causal=is_causal,
        dropout_rate=rate,
        dropout_key=_dropout_key(dropout_rng) if drops else None,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        implementation=implementation,
        block_sizes=block_sizes,
        return_weights=sows,
    )
    if checks.boolean("force_fp32_for_softmax", force_fp32_for_softmax):
        result = jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), result)
    if not sows:
        return result
    context, weights = result
    module.sow("intermediates", "attention_weights", weights)
    return context


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            rule = f"`{name}` of flax's attention cannot be honoured here, and must be None."
            evidence = f"{name} of type {type(value).__name__}"
            checks.fail(NotImplementedError, rule, evidence, REMEDIES[name])


def _refuse_complex(**arrays: Any) -> None:
    for name, x in arrays.items():
        if jnp.iscomplexobj(x):
            rule = "Complex attention cannot be honoured here: complex numbers have no order, by "
            rule += "which a softmax finds its largest logit."
            evidence = f"{name} of dtype {x.dtype}"
            remedy = "Attend with real and imaginary parts as features of their own."
            checks.fail(NotImplementedError, rule, evidence, remedy)


def _promoted(arrays: tuple[Array, ...], dtype: DType, promote_dtype: Any) -> tuple[Array, ...]:
    """The arrays in one dtype, as flax has them before it attends."""
    if dtype is not None:
        dtype = checks.floating_dtype("dtype", dtype)
        checks.x64_enabled("dtype", dtype)
    if promote_dtype is not None:
        return promote_dtype(arrays, dtype=dtype)
    if dtype is None:
        dtype = promoted(x.dtype for x in arrays)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _dropout_key(dropout_rng: PRNGKey | None) -> PRNGKey:
    if dropout_rng is None:
        remedy = "Pass `dropout_rng=jax.random.key(0)`, or `deterministic=True`."
        checks.fail(ValueError, "Dropout needs a PRNG key.", "dropout_rng=None", remedy)
    checks.prng_key("dropout_rng", dropout_rng)
    return dropout_rng


def _allowed(mask: Any) -> Mask | Array | None:
    """`mask` without floats; flax's own helpers return floats of 0 and 1."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if not checks.is_array(mask) or not jnp.issubdtype(mask.dtype, jnp.floating):
        return checks.boolean_mask("mask", mask)
    if not isinstance(mask, jax.core.Tracer):
        values = np.asarray(mask)
        if not ((values == 0) | (values == 1)).all():
            rule = "A float `mask` must hold 0 and 1 alone, 1 = may attend."
            remedy = "An additive mask (0 and -inf) goes to `bias=`, or pass `mask == 0`."
            checks.fail(ValueError, rule, f"values {np.unique(values)[:5].tolist()}", remedy)
    # Not `!= 0`: that would invert an additive mask, whose values cannot be seen under jit.
    return mask > 0


def _one_query_of_many(query: Array, key: Array) -> None:
    """flax.nnx before 0.12.12 passes `is_causal` on while it decodes from its cache."""
    if query.shape[-3] == 1 and key.shape[-3] > 1:
        rule = "`is_causal=True` with one query lets it attend to key 0 alone."
        evidence = f"T = 1, S = {key.shape[-3]}, and a mask, as with `decode=True`"
        remedy = "Leave `is_causal` out: flax's mask of the cache is causal already."
        checks.fail(ValueError, rule, evidence, remedy)


def _sows(module: Any) -> bool:
    """Whether the weights will be kept: linen drops what is sown in a collection not asked for."""
    if module is None:
        return False
    if not hasattr(module, "sow"):
        rule = "`module` must be a flax module, in which the weights are sown."
        checks.fail(TypeError, rule, f"module of type {type(module).__name__}")
    is_linen = hasattr(module, "is_mutable_collection")
    return not is_linen or module.is_mutable_collection("intermediates")
