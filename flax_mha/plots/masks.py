"""Who may attend to whom, in colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_mha.core.typing import Array
from flax_mha.masks import Mask
from flax_mha.plots.checks import mask_BNTS, panel_count
from flax_mha.plots.figure import Side, aspect_of, import_matplotlib, new_panels
from flax_mha.plots.labels import labels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Forbidden, allowed, and a row that is forbidden altogether: apart in lightness, not in hue alone.
_COLOURS = ("#e4e4e4", "#1f4e8c", "#f0a000")
_TEXTS = ("may not attend", "may attend", "query that may attend nowhere")
_GRID_UP_TO = 40


def plot_mask(
    mask: Mask | Array | np.ndarray,
    query_length: int | None = None,
    key_length: int | None = None,
    *,
    examples: int | None = None,
    heads: int | None = None,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Which query may attend to which key, in two colours; a third marks queries without any key.

    Args:
        mask: a `Mask`, or booleans `[T, S]`, `[N, T, S]` or `[B, N, T, S]`, True = may attend; of
            `[B, T, S]` pass `mask[:, None]`.
        query_length: T; needed with a `Mask`.
        key_length: S; needed with a `Mask`.
        examples: B, of a `Mask`; needed where a function of it reads b. None = as its arrays tell.
        heads: N, likewise of n.
        query_labels: T strings; a string stands for its characters. None = positions.
        key_labels: S strings; None = positions.
        title: above all.

    Returns:
        A `matplotlib.figure.Figure`, one panel for each example and head.

    Raises:
        ValueError: wrong axes or lengths; labels of another number; more than 64 panels.
        TypeError: a mask of floats, or one inside `jax.jit`; a `Mask` without lengths, or of a
            function that reads b or n without `examples` or `heads`.
        ImportError: matplotlib is not installed.

    Example:
        >>> from flax_mha import Mask
        >>> from flax_mha.plots import plot_mask
        >>> figure = plot_mask(Mask.causal() & Mask.window(2, 0), 6, 6)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['may not attend', 'may attend']
        >>> dilated = Mask.function(lambda b, n, t, s: (t - s) % (n + 1) == 0)
        >>> len(plot_mask(dilated, 6, 6, heads=2).axes)
        2
    """
    import_matplotlib()
    allowed = mask_BNTS(mask, query_length, key_length, examples, heads)
    B, N, T, S = allowed.shape
    panel_count(B * N, "example and head")
    rows = Side("query", T, labels_of("query_labels", query_labels, T, "T"))
    columns = Side("key", S, labels_of("key_labels", key_labels, S, "S"))
    figure, panels = new_panels(_names(B, N), rows, columns, title, below=0.7)
    kinds = np.where(allowed.any(-1, keepdims=True), allowed, 2).reshape(B * N, T, S)
    for axes, kinds_TS in zip(panels, kinds):
        _draw(axes, kinds_TS)
    _legend(figure, 2 + bool((kinds == 2).any()))
    return figure


def _draw(axes: Any, kinds_TS: np.ndarray) -> None:
    from matplotlib.colors import ListedColormap

    T, S = kinds_TS.shape
    # Where cells are smaller than pixels, colours may be mixed; kinds may not.
    drawing = {"aspect": aspect_of(T, S), "interpolation_stage": "rgba"}
    axes.imshow(kinds_TS, cmap=ListedColormap(_COLOURS), vmin=0, vmax=2, **drawing)
    if max(T, S) <= _GRID_UP_TO:
        axes.set_xticks(np.arange(S + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(T + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)


def _legend(figure: Any, count: int) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="black") for colour in _COLOURS[:count]]
    figure.legend(patches, _TEXTS[:count], loc="outside lower center", ncols=1, frameon=False)


def _names(B: int, N: int) -> list[str]:
    """What tells the panels apart: an axis of size 1 does not."""
    examples = [f"example {b}" if B > 1 else "" for b in range(B)]
    heads = [f"head {n}" if N > 1 else "" for n in range(N)]
    return [", ".join(filter(None, (b, n))) for b in examples for n in heads]
