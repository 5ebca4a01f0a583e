"""Attention weights as matrices of colours, or of one query over an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Array
from flax_mha.plots.checks import image_array, weights_NTS, weights_of_query
from flax_mha.plots.figure import Side, aspect_of, import_matplotlib, new_panels
from flax_mha.plots.labels import head_names, labels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = "BuPu"  # white to dark without a turn, and so in grey and to every eye
_MARK = "#d55e00"
_OVER_TWO_AXES = "Of attention over two axes, pass also `query=(row, column)`."


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
    weights = weights_NTS(scores, _OVER_TWO_AXES)
    N, T, S = weights.shape
    rows = Side("query", T, labels_of("query_labels", query_labels, T, "T"))
    columns = Side("key", S, labels_of("key_labels", key_labels, S, "S"))
    names = head_names(head_labels, scores.ndim == 2, N)
    figure, panels = new_panels(names, rows, columns, title, beside=1.0)
    _draw_weights(figure, panels, weights)
    return figure


def _plot_query(scores: Any, query: Any, image: Any, head_labels: Any, title: str | None) -> Figure:
    """One query's weights over the grid of keys, beside the image."""
    weights, (row, column), sizes = weights_of_query(scores, query)
    N, S1, S2 = weights.shape
    names = head_names(head_labels, scores.ndim == 4, N)
    pixels = None if image is None else image_array(image, (S1, S2))
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


def _no_labels_of_tokens(query_labels: Any, key_labels: Any) -> None:
    for name, labels in (("query_labels", query_labels), ("key_labels", key_labels)):
        if labels is not None:
            rule = f"`{name}` cannot be drawn where `query` is given: rows and columns are numbers."
            checks.fail(TypeError, rule, f"{name} of type {type(labels).__name__}")
