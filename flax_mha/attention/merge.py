"""Two partial results over different keys, as one: the law that blocks, caches and rings share."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.contract import Residuals, shift_of
from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array

Partial = tuple[Array, Residuals]


def merge(first: Partial, second: Partial) -> Partial:
    """Attention over the keys of both, from attention over each: keys in two parts, any order.

        row_max = max(row_max_1, row_max_2)          decay_i = row_sum_i e^(row_max_i - row_max)
        row_sum = decay_1 + decay_2                  context = sum_i context_i decay_i / row_sum

    Args:
        first: `(context [..., T, N, V], Residuals [..., N, T])`, as `dot_product_attention`
            returns with `return_residuals=True`.
        second: the same queries over other keys.

    A sink is one more key: give `sinks` to one of the parts, or it counts twice.

    Returns:
        The pair for all keys. A query that neither part served has context 0 and row_sum 0.

    Raises:
        ValueError: shapes that do not broadcast.
        TypeError: what is no such pair of floats.

    Memory: O(T); differentiable.

    Reference: Rabe and Staats, https://arxiv.org/abs/2112.05682.

    Example:
        >>> import jax, flax_mha
        >>> from flax_mha.attention import merge
        >>> x = jax.random.normal(jax.random.key(0), (2, 6, 3, 8))
        >>> part = lambda keys: flax_mha.dot_product_attention(x, keys, keys, return_residuals=True)
        >>> context, residuals = merge(part(x[:, :4]), part(x[:, 4:]))
        >>> bool(abs(context - flax_mha.dot_product_attention(x, x, x)).max() < 1e-6)
        True
    """
    partials = (first, second)
    _check(partials)
    # The result is the same for every shift: no gradient passes through it.
    row_maxs_NT = [jax.lax.stop_gradient(residuals.row_max_BNT) for _, residuals in partials]
    row_max_NT = jnp.maximum(*row_maxs_NT)
    decays_NT = [
        residuals.row_sum_BNT * jnp.exp(one_NT - shift_of(row_max_NT))
        for (_, residuals), one_NT in zip(partials, row_maxs_NT)
    ]
    row_sum_NT = decays_NT[0] + decays_NT[1]
    divisor_NT = jnp.where(row_sum_NT == 0, 1, row_sum_NT)
    shares_TNV = [
        context_TNV.astype(wide_dtype(context_TNV.dtype)) * _of_rows(decay_NT / divisor_NT)
        for (context_TNV, _), decay_NT in zip(partials, decays_NT)
    ]
    context_TNV = (shares_TNV[0] + shares_TNV[1]).astype(first[0].dtype)
    return context_TNV, Residuals(row_max_NT, row_sum_NT)


def _check(partials: Any) -> None:
    """Pairs of floats, of shapes that broadcast."""
    letters = {"context": "[..., T, N, V]", "row_max": "[..., N, T]", "row_sum": "[..., N, T]"}
    shapes = []
    for name, part in zip(("first", "second"), partials):
        rule = f"`{name}` must be a pair (context, Residuals(row_max, row_sum))."
        if not isinstance(part, tuple) or len(part) != 2 or not isinstance(part[1], Residuals):
            checks.fail(TypeError, rule, f"type {type(part).__name__}")
        for what, x in zip(letters, (part[0], *part[1])):
            checks.floating_array(f"{what}` of `{name}", x, letters[what])
        own = [tuple(x.shape) for x in (part[0], *part[1])]
        rows = (*own[0][:-3], *own[0][-2:-4:-1])  # [..., N, T]
        if len(own[0]) < 3 or not all(_meet(rows, shape) for shape in own[1:]):
            rule = f"`{name}` must hold context [..., T, N, V], row_max and row_sum [..., N, T]."
            checks.fail(ValueError, rule, f"shapes {', '.join(map(str, own))}")
        shapes.append(own[0])
    if not _meet(*shapes):
        rule = "`first` and `second` must be of the same queries."
        checks.fail(ValueError, rule, f"contexts of shapes {shapes[0]} and {shapes[1]}")


def _meet(first: Any, second: Any) -> bool:
    """Whether two shapes of one rank broadcast."""
    sizes = zip(first, second)
    return len(first) == len(second) and all(n == m or n == 1 or m == 1 for n, m in sizes)


def _of_rows(x_NT: Array) -> Array:
    """`[..., N, T]` to `[..., T, N, 1]`."""
    return jnp.swapaxes(x_NT, -1, -2)[..., None]
