"""Two columns of tokens, joined by bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Array
from flax_mha.plots.checks import weights_NTS
from flax_mha.plots.figure import CHARACTER, Side, import_matplotlib, new_figure, set_ticks
from flax_mha.plots.labels import head_names, labels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito, apart for colour-blind readers; without their yellow, too faint on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_ROW = 0.8  # of the distance between two tokens, what the bands of all heads may fill
_TOKEN_INCHES = 0.3
_FONT = 10.0
_MAX_INCHES = 14.0


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
    weights = weights_NTS(scores)
    N, T, S = weights.shape
    queries = Side("query", T, labels_of("query_labels", query_labels, T, "T"))
    keys = Side("key", S, labels_of("key_labels", key_labels, S, "S"))
    names = head_names(head_labels, scores.ndim == 2, N)
    return _draw(weights, queries, keys, names, title, threshold)


def _draw(
    weights_NTS: np.ndarray,
    queries: Side,
    keys: Side,
    names: Sequence[str],
    title: str | None,
    threshold: float | None,
) -> Figure:
    _few_heads(len(names))
    largest = float(weights_NTS.max()) or 1.0  # nothing is drawn where all are 0
    least = _threshold(threshold, largest)
    rows = max(queries.length, keys.length)
    height = min(_TOKEN_INCHES * rows, _MAX_INCHES)
    width = max(3.5, height / 3) + _FONT * CHARACTER * (queries.longest + keys.longest)
    figure = new_figure(width, height + 1.2, title)
    axes = figure.subplots()
    _columns_of_tokens(axes, queries, keys, rows, height)
    for n, weights_TS in enumerate(weights_NTS):
        shift = (n - (len(names) - 1) / 2) * _ROW / len(names)
        places = (rows - queries.length) / 2 + shift, (rows - keys.length) / 2 + shift
        _bands(axes, weights_TS, places, _ROW / len(names), (least, largest), _COLOURS[n])
    axes.set_xlabel(f"full width: weight {largest:.2g}; not drawn: below {least:.2g}", fontsize=8)
    if any(names):
        _legend(figure, names)
    return figure


def _few_heads(count: int) -> None:
    if count > len(_COLOURS):
        rule = f"Bands of at most {len(_COLOURS)} heads can be told apart."
        remedy = f"Choose some, for example `scores[:{len(_COLOURS)}]`, or use `plot_attention`."
        checks.fail(ValueError, rule, f"{count} heads", remedy)


def _threshold(threshold: Any, largest: float) -> float:
    return largest / 10 if threshold is None else checks.rate("threshold", threshold)


def _columns_of_tokens(axes: Any, queries: Side, keys: Side, rows: int, height: float) -> None:
    left, right = (axes, queries, -0.02, "right"), (axes.twinx(), keys, 1.02, "left")
    for panel, side, x, align in (left, right):
        first = (rows - side.length) / 2
        set_ticks(panel.yaxis, side, height * side.length / rows, _FONT, first=first)
        panel.tick_params(length=0)
        panel.text(x, 1, side.name, ha=align, fontweight="bold", transform=panel.transAxes)
        panel.set(xlim=(0, 1), ylim=(rows - 0.5, -0.5), xticks=[], frame_on=False)


def _bands(
    axes: Any,
    weights_TS: np.ndarray,
    places: tuple[float, float],
    room: float,
    span: tuple[float, float],
    colour: str,
) -> None:
    """One path for each weight of at least `span[0]`, the widest last and so on top."""
    from matplotlib.collections import PathCollection

    least, largest = span
    pairs = np.argwhere((weights_TS >= least) & (weights_TS > 0))
    weights = weights_TS[tuple(pairs.T)]
    order = np.argsort(weights, kind="stable")
    pairs, shares = pairs[order], weights[order] / largest
    left, right = pairs[:, 0] + places[0], pairs[:, 1] + places[1]
    paths = [_band(a, b, room * share) for a, b, share in zip(left, right, shares)]
    opacities = 0.15 + 0.7 * shares
    axes.add_collection(
        PathCollection(paths, facecolors=[(colour, a) for a in opacities], linewidths=0)
    )


def _band(left: float, right: float, width: float) -> Any:
    """A band from (0, left) to (1, right), level at both ends and `width` high throughout."""
    from matplotlib.path import Path

    half, M, C, L = width / 2, Path.MOVETO, Path.CURVE4, Path.LINETO
    x = np.array([0, 0.5, 0.5, 1, 1, 0.5, 0.5, 0, 0])
    y = np.repeat(
        [left - half, right - half, right + half, left + half, left - half], [2, 2, 2, 2, 1]
    )
    return Path(np.stack([x, y], 1), [M, C, C, C, L, C, C, C, Path.CLOSEPOLY])


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    # A label that begins with `_` would be left out, so the texts are set afterwards.
    patches = [Patch(facecolor=colour) for colour in _COLOURS[: len(names)]]
    keys = [str(n) for n in range(len(names))]
    entry = _FONT * CHARACTER * (6 + max(map(len, names)))
    across = max(1, min(4, int(figure.get_figwidth() / entry)))
    legend = figure.legend(patches, keys, loc="outside lower center", ncols=across, frameon=False)
    for text, name in zip(legend.get_texts(), names):
        text.set(text=name, parse_math=False)
