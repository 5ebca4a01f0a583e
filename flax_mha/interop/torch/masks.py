"""PyTorch's masks, where True means masked out, and this package's, where True may attend."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Array
from flax_mha.interop.torch.arrays import as_numpy, writable


def mask_from_torch(
    attn_mask: Any = None, key_padding_mask: Any = None, *, num_heads: int | None = None
) -> dict[str, Array | None]:
    """The masks of `torch.nn.MultiheadAttention` as arguments of `multi_head_attention`.

        booleans: attention_mask = ~attn_mask, value_mask = ~key_padding_mask
        floats:   attention_mask = attn_mask > -inf, bias = attn_mask where it is finite

    Args:
        attn_mask: booleans, True = masked out, or floats, added to the logits; `[T, S]` or
            `[B * N, T, S]`.
        key_padding_mask: booleans, True = masked out, or floats; `[B, S]`, or `[S]` for inputs
            without a batch.
        num_heads: N; needed for a mask of rank 3.

    Returns:
        `{"attention_mask": [1, T, S] or [B, N, T, S], "value_mask": [B, S], "bias": ...}`, with
        None for what says nothing. Without a batch there is no B.

    Raises:
        TypeError: integers, of which torch does not say what they mean.
        ValueError: a shape that torch does not take.

    Differs from torch: a query that may attend nowhere has context 0, not NaN, on every path.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from flax_mha import MultiHeadAttentionConfig, init_params, multi_head_attention
        >>> from flax_mha.interop.torch import mask_from_torch
        >>> later = np.triu(np.ones((8, 8), bool), 1)  # torch: True = no attention
        >>> padded = np.arange(8) >= np.array([[8], [5]])
        >>> masks = mask_from_torch(later, padded)
        >>> config, x = MultiHeadAttentionConfig(num_heads=2, key_dim=16), jnp.ones((2, 8, 32))
        >>> params = init_params(jax.random.key(0), config, x.shape)
        >>> multi_head_attention(params, x, x, config=config, **masks).shape
        (2, 8, 32)
    """
    scores = _read("attn_mask", attn_mask, "[T, S] or [B N, T, S]", (2, 3))
    padding = _read("key_padding_mask", key_padding_mask, "[B, S] or [S]", (1, 2))
    batched = padding is None or padding.ndim == 2
    attend, bias = (_per_head(half, num_heads, batched) for half in _halves(scores))
    real, key_bias = _halves(padding)
    if key_bias is not None:
        key_bias = key_bias[:, None, None] if batched else key_bias[None, None]
        bias = key_bias if bias is None else np.add(*_fitting(bias, key_bias))
    if scores is not None and padding is not None and scores.shape[-1] != padding.shape[-1]:
        rule = "`attn_mask` [..., T, S] and `key_padding_mask` [..., S] must be of the same keys."
        checks.fail(ValueError, rule, f"shapes {scores.shape} and {padding.shape}")
    arrays = {"attention_mask": attend, "value_mask": real, "bias": bias}
    return {name: None if a is None else jnp.array(a) for name, a in arrays.items()}


def mask_to_torch(
    attention_mask: Any = None,
    value_mask: Any = None,
    bias: Any = None,
    *,
    num_heads: int | None = None,
) -> dict[str, np.ndarray | None]:
    """The masks of `multi_head_attention` as arguments of `torch.nn.MultiheadAttention`.

        without a bias: attn_mask = ~attention_mask, key_padding_mask = ~value_mask
        with one:       attn_mask = bias where attention_mask, else -inf; key_padding_mask likewise

    Args:
        attention_mask: booleans `[T, S]`, `[B, T, S]` or `[B, N, T, S]`, True = may attend.
        value_mask: booleans `[B, S]`, True = a real value.
        bias: floats shaped as an `attention_mask` may be.
        num_heads: N; needed where a mask has a batch but no heads, for torch has them in one axis.

    Returns:
        `{"attn_mask": [T, S] or [B * N, T, S], "key_padding_mask": [B, S]}` as NumPy arrays, both
        booleans or both floats (torch deprecates a mixture), for `torch.from_numpy`.

    Raises:
        TypeError: an `attention_mask` of floats.
        ValueError: shapes that do not fit each other.

    Example:
        >>> import numpy as np
        >>> from flax_mha.interop.torch import mask_to_torch
        >>> mask_to_torch(np.tri(2, dtype=bool))["attn_mask"]
        array([[False,  True],
               [False, False]])
    """
    attend = None if attention_mask is None else _boolean("attention_mask", attention_mask)
    real = None if value_mask is None else _boolean("value_mask", value_mask)
    if attend is not None:
        attend = _aligned("attention_mask", attend)
    if bias is None:
        mask = None if attend is None else ~attend
        padding = None if real is None else ~real
    else:
        checks.floating_array("bias", bias, "that broadcasts to [B, N, T, S]")
        added = _aligned("bias", np.asarray(bias))
        mask = added if attend is None else _hidden(*_fitting(attend, added))
        padding = None if real is None else _hidden(real, np.zeros((), added.dtype))
    if real is not None:
        _check_padding(real, [x for x in (attention_mask, bias) if x is not None])
    mask = None if mask is None else _merged_heads(mask, num_heads, real)
    arrays = {"attn_mask": mask, "key_padding_mask": padding}
    return {name: None if a is None else writable(a) for name, a in arrays.items()}


def _check_padding(real: np.ndarray, pairs: Any) -> None:
    """Real keys `[B, S]`, or `[S]`, are those of the other masks."""
    if real.ndim not in (1, 2):
        checks.fail(ValueError, "`value_mask` must be [B, S].", f"shape {real.shape}")
    for shape in map(np.shape, pairs):
        batch = (*shape[:-2], *real.shape[:-1])[:1] if len(shape) > 2 else ()
        if shape[-1:] not in ((1,), real.shape[-1:]) or (
            real.ndim == 2 and batch and 1 not in (batch[0], len(real)) and batch[0] != len(real)
        ):
            rule = "`value_mask` must be [B, S] of the same examples and keys as the other masks."
            checks.fail(ValueError, rule, f"shape {real.shape}, beside one of shape {shape}")


Halves = tuple[np.ndarray | None, np.ndarray | None]


def _read(name: str, mask: Any, letters: str, ranks: tuple[int, int]) -> np.ndarray | None:
    """One of torch's masks: booleans or floats of these ranks."""
    if mask is None:
        return None
    values = as_numpy(name, mask)
    if values.dtype != np.bool_ and not jnp.issubdtype(values.dtype, jnp.floating):
        rule = f"`{name}` must be booleans, True = masked out, or floats that are added."
        remedy = f"Pass `{name}.bool()` if 1 means masked out."
        checks.fail(TypeError, rule, f"{name} of dtype {values.dtype}", remedy)
    if values.ndim not in ranks:
        checks.fail(ValueError, f"`{name}` must be {letters}.", f"shape {values.shape}")
    return values


def _halves(mask: np.ndarray | None) -> Halves:
    """(True = may attend, what is added to the logits), None for what says nothing."""
    if mask is None:
        return None, None
    if mask.dtype == np.bool_:
        return ~mask, None
    # -inf as a bias would make NaN of a row that is -inf throughout
    hidden = mask == -np.inf
    added = np.where(hidden, np.zeros((), mask.dtype), mask)
    return ~hidden if hidden.any() else None, added if added.any() else None


def _fitting(mask: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, if they broadcast against each other."""
    try:
        np.broadcast_shapes(mask.shape, other.shape)
    except ValueError:
        rule = "The masks and the bias must broadcast against each other."
        checks.fail(ValueError, rule, f"as [B, N, T, S], {mask.shape} and {other.shape}")
    return mask, other


def _hidden(attend: np.ndarray, added: np.ndarray) -> np.ndarray:
    """What is added, and -inf where nothing may attend."""
    return np.where(attend, added, np.asarray(-np.inf, added.dtype))


def _per_head(array: np.ndarray | None, num_heads: int | None, batched: bool) -> np.ndarray | None:
    """`[T, S]` to `[1, T, S]`, which is never ambiguous, and `[B N, T, S]` to `[B, N, T, S]`."""
    if array is None or array.ndim == 2:
        return None if array is None else array[None]
    N = _num_heads("attn_mask", array, num_heads)
    if array.shape[0] % N or not (batched or array.shape[0] == N):
        rule = f"`attn_mask` of rank 3 must be [{'B N' if batched else 'N'}, T, S] with N = {N}."
        checks.fail(ValueError, rule, f"shape {array.shape}")
    return array.reshape(array.shape[0] // N, N, *array.shape[1:]) if batched else array


def _num_heads(name: str, array: np.ndarray, num_heads: int | None) -> int:
    if num_heads is None:
        rule = f"`num_heads` must be given: torch merges batch and heads of `{name}` in one axis."
        checks.fail(ValueError, rule, f"shape {array.shape}, num_heads=None")
    return checks.integer("num_heads", num_heads, minimum=1)


def _boolean(name: str, mask: Any) -> np.ndarray:
    return np.asarray(checks.boolean_mask(name, mask))


def _aligned(name: str, array: np.ndarray) -> np.ndarray:
    """`[T, S]`, `[B, T, S]` or `[B, N, T, S]` as `[b, n, T, S]`."""
    if array.ndim not in (2, 3, 4):
        rule = f"`{name}` must be [T, S], [B, T, S] or [B, N, T, S]."
        checks.fail(ValueError, rule, f"shape {array.shape}")
    return array[:, None] if array.ndim == 3 else array.reshape((1, 1, *array.shape)[-4:])


def _merged_heads(mask: np.ndarray, num_heads: int | None, real: np.ndarray | None) -> np.ndarray:
    """`[b, n, T, S]` to `[T, S]` or `[B N, T, S]`."""
    b, n, *lengths = mask.shape
    if b == n == 1:
        return mask[0, 0]
    N = _num_heads("attn_mask", mask, n if num_heads is None and n > 1 else num_heads)
    B = b if real is None or b > 1 else real.shape[0]
    checks.broadcastable("attention_mask", mask.shape, (B, N, *lengths), "[B, N, T, S]")
    return np.broadcast_to(mask, (B, N, *lengths)).reshape(B * N, *lengths)
