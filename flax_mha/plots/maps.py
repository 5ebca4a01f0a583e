"""Attention as pictures: weights, masks, and bands between tokens.

Every function returns a `matplotlib.figure.Figure` that is not registered with pyplot: as the value
of a notebook's cell it is shown, and `figure.savefig("name.png")` writes it. matplotlib is
optional: `pip install 'flax_mha[plots]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Array
from flax_mha.masks import Mask
from flax_mha.plots import bands
from flax_mha.plots import checks as plot_checks
from flax_mha.plots.figure import Side, aspect_of, import_matplotlib, new_panels
from flax_mha.plots.labels import labels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = "BuPu"  # white to dark without a turn, and so in grey and to every eye
_MARK = "#d55e00"
_OVER_TWO_AXES = "Of attention over two axes, pass also `query=(row, column)`."
# Forbidden, allowed, and a row that is forbidden altogether: apart in lightness, not in hue alone.
_MASK_COLOURS = ("#e4e4e4", "#1f4e8c", "#f0a000")
_MASK_TEXTS = ("may not attend", "may attend", "query that may attend nowhere")
_GRID_UP_TO = 40


def plot_attention(
    scores: Array | np.ndarray,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    *,
    head_labels: Sequence[str] | None = None,
    title: str | None = None,
    query: tuple[int, int] | None = None,
    image: Array | np.ndarray | None = None,
) -> Figure:
    """Attention weights as a matrix of colours, one panel a head, one colour scale for all.

    Args:
        scores: weights `[T, S]` or `[N, T, S]`: `scores[0]` of what `return_attention_scores=True`
            gives. With `query`, the weights of a layer with two attended axes, `[T1, T2, S1, S2]`
            or `[N, T1, T2, S1, S2]`.
        query_labels: T strings; a string stands for its characters. None = positions.
        key_labels: S strings; None = positions.
        head_labels: N strings; None = "head 0", "head 1" and so on.
        title: above all.
        query: (row, column) of one query: its weights are drawn over the S1 x S2 keys, and it is
            marked where the grids of queries and keys are equal.
        image: `[S1, S2]`, what the layer looked at, drawn as the first panel.

    Returns:
        A `matplotlib.figure.Figure`. The colours go from 0 to the largest weight that is drawn.

    Raises:
        ValueError: wrong axes, a batch axis among them; NaN, infinite or negative weights; labels
            of another number; a query outside of its grid.
        TypeError: no array, or one inside `jax.jit`; labels that are no strings.
        ImportError: matplotlib is not installed.

    Example:
        >>> import jax
        >>> from flax_mha.plots import plot_attention
        >>> scores = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, 3)))
        >>> figure = plot_attention(scores, ["the", "cat", "sat"], ["the", "cat", "sat"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['head 0', 'head 1']
    """
    import_matplotlib()
    if query is not None:
        _no_labels_of_tokens(query_labels, key_labels)
        return _plot_query(scores, query, image, head_labels, title)
    if image is not None:
        rule = "`image` needs `query=(row, column)`, the query whose weights are drawn over it."
        checks.fail(TypeError, rule, "query=None")
    weights = plot_checks.weights_NTS(scores, _OVER_TWO_AXES)
    N, T, S = weights.shape
    rows = Side("query", T, labels_of("query_labels", query_labels, T, "T"))
    columns = Side("key", S, labels_of("key_labels", key_labels, S, "S"))
    names = _head_names(head_labels, scores.ndim == 2, N)
    figure, panels = new_panels(names, rows, columns, title, beside=1.0)
    _draw_weights(figure, panels, weights)
    return figure


def plot_mask(
    mask: Mask | Array | np.ndarray,
    query_length: int | None = None,
    key_length: int | None = None,
    *,
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
        query_labels: T strings; a string stands for its characters. None = positions.
        key_labels: S strings; None = positions.
        title: above all.

    Returns:
        A `matplotlib.figure.Figure`, one panel for each example and head.

    Raises:
        ValueError: wrong axes or lengths; labels of another number; more than 64 panels.
        TypeError: a mask of floats, or one inside `jax.jit`; a `Mask` without lengths.
        ImportError: matplotlib is not installed.

    Example:
        >>> from flax_mha import Mask
        >>> from flax_mha.plots import plot_mask
        >>> figure = plot_mask(Mask.causal() & Mask.window(2, 0), 6, 6)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['may not attend', 'may attend']
    """
    import_matplotlib()
    allowed = plot_checks.mask_BNTS(mask, query_length, key_length)
    B, N, T, S = allowed.shape
    plot_checks.panel_count(B * N, "example and head")
    rows = Side("query", T, labels_of("query_labels", query_labels, T, "T"))
    columns = Side("key", S, labels_of("key_labels", key_labels, S, "S"))
    figure, panels = new_panels(_mask_names(B, N), rows, columns, title, below=0.7)
    kinds = np.where(allowed.any(-1, keepdims=True), allowed, 2).reshape(B * N, T, S)
    for axes, kinds_TS in zip(panels, kinds):
        _draw_mask(axes, kinds_TS)
    _mask_legend(figure, 2 + bool((kinds == 2).any()))
    return figure


def plot_bands(
    scores: Array | np.ndarray,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    *,
    head_labels: Sequence[str] | None = None,
    title: str | None = None,
    threshold: float | None = None,
) -> Figure:
    """Queries on the left, keys on the right, joined by bands: the wider and darker, the more.

    Args:
        scores: weights `[T, S]` or `[N, T, S]`, N at most 8; one colour a head.
        query_labels: T strings; a string stands for its characters. None = positions.
        key_labels: S strings; None = positions.
        head_labels: N strings; None = "head 0", "head 1" and so on.
        title: above all.
        threshold: weights below are not drawn; None = a tenth of the largest. The picture says it.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: as `plot_attention`; more than 8 heads.
        TypeError: as `plot_attention`.
        ImportError: matplotlib is not installed.

    Example:
        >>> import numpy as np
        >>> from flax_mha.plots import plot_bands
        >>> figure = plot_bands(np.array([[0.75, 0.25], [0.0, 1.0]]), ["a", "b"], ["A", "B"])
        >>> len(figure.axes[0].collections[0].get_paths())
        3
    """
    import_matplotlib()
    weights = plot_checks.weights_NTS(scores)
    N, T, S = weights.shape
    queries = Side("query", T, labels_of("query_labels", query_labels, T, "T"))
    keys = Side("key", S, labels_of("key_labels", key_labels, S, "S"))
    names = _head_names(head_labels, scores.ndim == 2, N)
    return bands.draw(weights, queries, keys, names, title, threshold)


def _plot_query(scores: Any, query: Any, image: Any, head_labels: Any, title: str | None) -> Figure:
    """One query's weights over the grid of keys, beside the image."""
    weights, (row, column), sizes = plot_checks.weights_of_query(scores, query)
    N, S1, S2 = weights.shape
    names = _head_names(head_labels, scores.ndim == 4, N)
    pixels = None if image is None else plot_checks.image_array(image, (S1, S2))
    first = [] if pixels is None else ["image"]
    sides = Side("row", S1), Side("column", S2)
    figure, panels = new_panels([*first, *names], *sides, title, beside=1.0, below=0.3)
    if pixels is not None:
        panels[0].imshow(pixels, cmap="gray")
    _draw_weights(figure, panels[len(first) :], weights)
    _mark_query(figure, panels if sizes == (S1, S2) else [], row, column)
    return figure


def _draw_weights(figure: Any, panels: Sequence[Any], weights_NTS: np.ndarray) -> None:
    # A row of uniform weights over many keys would be invisible on a scale that ends at 1.
    largest = float(weights_NTS.max()) or 1.0
    aspect = aspect_of(*weights_NTS.shape[1:])
    for axes, weights_TS in zip(panels, weights_NTS):
        drawn = axes.imshow(weights_TS, cmap=_COLOURS, vmin=0, vmax=largest, aspect=aspect)
    figure.colorbar(drawn, ax=list(panels), label="attention weight", pad=0.02, aspect=25)


def _mark_query(figure: Any, panels: Sequence[Any], row: int, column: int) -> None:
    """Frames the query's cell in every panel, and says which it is."""
    for axes in panels:
        axes.add_patch(_frame(row, column, "white", 4))
        axes.add_patch(_frame(row, column, _MARK, 2))
    sign = _frame(row, column, _MARK if panels else "none", 2)
    text = f"query: row {row}, column {column}"
    figure.legend([sign], [text], loc="outside lower center", frameon=False)


def _frame(row: int, column: int, colour: str, width: float) -> Any:
    from matplotlib.patches import Rectangle

    corner = (column - 0.5, row - 0.5)
    return Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False)


def _draw_mask(axes: Any, kinds_TS: np.ndarray) -> None:
    from matplotlib.colors import ListedColormap

    T, S = kinds_TS.shape
    # Where cells are smaller than pixels, colours may be mixed; kinds may not.
    drawing = {"aspect": aspect_of(T, S), "interpolation_stage": "rgba"}
    axes.imshow(kinds_TS, cmap=ListedColormap(_MASK_COLOURS), vmin=0, vmax=2, **drawing)
    if max(T, S) <= _GRID_UP_TO:
        axes.set_xticks(np.arange(S + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(T + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)


def _mask_legend(figure: Any, count: int) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="black") for colour in _MASK_COLOURS[:count]]
    figure.legend(patches, _MASK_TEXTS[:count], loc="outside lower center", ncols=1, frameon=False)


def _head_names(labels: Any, is_single: bool, N: int) -> list[str]:
    plot_checks.panel_count(N, "head")
    given = labels_of("head_labels", labels, N, "N")
    return given or ([""] if is_single else [f"head {n}" for n in range(N)])


def _mask_names(B: int, N: int) -> list[str]:
    """What tells the panels apart: an axis of size 1 does not."""
    examples = [f"example {b}" if B > 1 else "" for b in range(B)]
    heads = [f"head {n}" if N > 1 else "" for n in range(N)]
    return [", ".join(filter(None, (b, n))) for b in examples for n in heads]


def _no_labels_of_tokens(query_labels: Any, key_labels: Any) -> None:
    for name, labels in (("query_labels", query_labels), ("key_labels", key_labels)):
        if labels is not None:
            rule = f"`{name}` cannot be drawn where `query` is given: rows and columns are numbers."
            checks.fail(TypeError, rule, f"{name} of type {type(labels).__name__}")
