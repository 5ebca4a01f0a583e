"""What the plots take: arrays of numbers that exist, labels of the right count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.pairs.function import mask_function
from flax_mha.core.typing import Shape
from flax_mha.masks import Mask
from flax_mha.masks.of_pairs import beyond
from flax_mha.masks.parts import counts

# Attention weights of T1 x T2 queries over S1 x S2 keys, with their heads.
GRID_LETTERS = "[T1, T2, S1, S2] or [N, T1, T2, S1, S2]"
LETTERS = "[T, S] or [N, T, S]"
_ONE_EXAMPLE = "Pass `scores[0]`, one example of the batch."
MAX_PANELS = 64


def weights_NTS(scores: Any, remedy: str = "") -> np.ndarray:
    """Attention weights `[N, T, S]` of `[T, S]` or `[N, T, S]`; `remedy` is for more axes."""
    weights = _weights(scores, LETTERS)
    if weights.ndim < 2:
        _wrong_rank(LETTERS, weights.shape)
    if weights.ndim > 3:
        _wrong_rank(LETTERS, weights.shape, f"{_ONE_EXAMPLE} {remedy}".strip())
    return _non_empty("scores", weights).reshape(-1, *weights.shape[-2:])


def weights_of_query(scores: Any, query: Any) -> tuple[np.ndarray, tuple[int, int], Shape]:
    """Weights `[N, S1, S2]` of one query of a grid, its place, and the grid's sizes (T1, T2)."""
    weights = _weights(scores, GRID_LETTERS)
    if weights.ndim not in (4, 5):
        remedy = _ONE_EXAMPLE if weights.ndim > 5 else ""
        _wrong_rank(f"{GRID_LETTERS} where `query` is given", weights.shape, remedy)
    weights = _non_empty("scores", weights).reshape(-1, *weights.shape[-4:])
    row, column = place(query, weights.shape[1:3])
    return weights[:, row, column], (row, column), weights.shape[1:3]


def place(query: Any, sizes: Shape) -> tuple[int, int]:
    rule = f"`query` must be (row, column) within (T1, T2) = {sizes}."
    if not isinstance(query, Sequence) or len(query) != 2:
        checks.fail(TypeError, rule, f"query={query!r}")
    row, column = (checks.integer("query", index) for index in query)
    if not (0 <= row < sizes[0] and 0 <= column < sizes[1]):
        checks.fail(ValueError, rule, f"query={query!r}", "Count from the top left, from 0.")
    return row, column


def image_array(image: Any, sizes: Shape) -> np.ndarray:
    """`[S1, S2]` as float32."""
    array = _numbers("image", image, "[S1, S2]")
    if array.shape != sizes:
        rule = f"`image` must have the shape [S1, S2] = {sizes} of the keys."
        remedy = "Of colours, pass `image.mean(-1)`." if array.ndim == 3 else ""
        checks.fail(ValueError, rule, f"shape {array.shape}", remedy)
    return array


def mask_BNTS(
    mask: Any, query_length: Any, key_length: Any, examples: Any = None, heads: Any = None
) -> np.ndarray:
    """Booleans `[B, N, T, S]` of a `Mask` and its lengths, or of an array."""
    given = {"examples": examples, "heads": heads}
    if isinstance(mask, Mask):
        return _of_structure(mask, query_length, key_length, given)
    _concrete("mask", mask)
    array = np.asarray(checks.boolean_mask("mask", mask))
    if any(count is not None for count in given.values()):
        rule = "`examples` and `heads` are of a Mask: an array has as many as it has."
        checks.fail(TypeError, rule, f"{given}")
    if array.ndim not in (2, 3, 4):
        rule = "`mask` must be a Mask, or have the axes [T, S], [N, T, S] or [B, N, T, S]."
        checks.fail(ValueError, rule, f"shape {array.shape}")
    for name, length, size in (
        ("query_length", query_length, array.shape[-2]),
        ("key_length", key_length, array.shape[-1]),
    ):
        if length is not None and length != size:
            rule = f"`{name}` must be {size}, the length that the array has; it may be left out."
            checks.fail(ValueError, rule, f"{name}={length!r}")
    return _non_empty("mask", array).reshape((1,) * (4 - array.ndim) + array.shape)


def _of_structure(
    mask: Mask, query_length: Any, key_length: Any, given: dict[str, Any]
) -> np.ndarray:
    if query_length is None or key_length is None:
        rule = "A Mask has no lengths of its own: `query_length` and `key_length` must be given."
        evidence = f"query_length={query_length!r}, key_length={key_length!r}"
        checks.fail(TypeError, rule, evidence, "For example `plot_mask(Mask.causal(), 8, 8)`.")
    T = checks.integer("query_length", query_length, minimum=1)
    S = checks.integer("key_length", key_length, minimum=1)
    for leaf in jax.tree.leaves(mask):
        _concrete("mask", leaf)
    B, N = _counts(mask, given)
    mask.check(B or 1, N or 1, T, S)
    return np.asarray(mask.as_array(T, S, B, N))


def _counts(mask: Mask, given: dict[str, Any]) -> list[int | None]:
    """Examples and heads, as told or as arrays show; what a function reads must be known."""
    return [
        _count(mask, letter, name, count, shown)
        for letter, (name, count), shown in zip("bn", given.items(), counts(mask))
    ]


def _count(mask: Mask, letter: str, name: str, count: Any, shown: int) -> int | None:
    if count is not None:
        return checks.integer(name, count, minimum=1)
    if shown > 1:
        return shown
    if any(mask_function(f).reads(letter) for f in beyond(mask)):
        rule = f"A function of the mask reads `{letter}`: `{name}` says how many to draw."
        checks.fail(TypeError, rule, f"{name}=None", f"Pass `{name}=1` for the first.")
    return None


def panel_count(count: int, what: str) -> None:
    if count > MAX_PANELS:
        rule = f"At most {MAX_PANELS} panels can be drawn, one for each {what}."
        checks.fail(ValueError, rule, f"{count}", "Choose some of them by indexing.")


def _weights(scores: Any, letters: str) -> np.ndarray:
    weights = _numbers("scores", scores, letters)
    if (weights < 0).any():
        rule = "`scores` must be attention weights, which are not negative."
        remedy = "Of logits, draw `jax.nn.softmax(logits)`."
        checks.fail(ValueError, rule, f"a smallest value of {weights.min():.3g}", remedy)
    return weights


def _numbers(name: str, value: Any, letters: str) -> np.ndarray:
    """A NumPy or JAX array of finite numbers as float32."""
    rule = f"`{name}` must be an array of numbers {letters}."
    _concrete(name, value)
    if not isinstance(value, (np.ndarray, jax.Array)):
        remedy = f"Pass `numpy.asarray({name})`."
        checks.fail(TypeError, rule, f"{name} of type {type(value).__name__}", remedy)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        checks.fail(TypeError, rule, f"{name} of dtype {value.dtype}")
    numbers = np.asarray(value).astype(np.float32)
    if not np.isfinite(numbers).all():
        places = np.argwhere(~np.isfinite(numbers))
        evidence = f"{len(places)} NaN or infinite, the first at {tuple(places[0].tolist())}"
        checks.fail(ValueError, f"`{name}` must be finite.", evidence)
    return numbers


def _concrete(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        rule = f"A picture needs the numbers of `{name}`, which do not exist inside `jax.jit`."
        remedy = f"Return `{name}` from the compiled function, and draw it outside."
        checks.fail(TypeError, rule, f"a tracer of shape {value.shape}", remedy)


def _non_empty(name: str, array: np.ndarray) -> np.ndarray:
    if array.size == 0:
        rule = f"`{name}` must have at least one query, one key and one head."
        checks.fail(ValueError, rule, f"shape {array.shape}")
    return array


def _wrong_rank(letters: str, shape: Shape, remedy: str = "") -> None:
    checks.fail(ValueError, f"`scores` must have the axes {letters}.", f"shape {shape}", remedy)
