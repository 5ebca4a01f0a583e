"""Figures without pyplot: panels of one size, ticks that can be read, a picture in a notebook."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax_mha import _checks
from flax_mha._plot_labels import step_between

_ROW_INCHES = 13.0  # of all panels of a row
_MARGIN = 0.5  # inches: an axis's name and ticks


class Font(NamedTuple):
    """A size in points; in inches, the height of a line and about the width of a character."""

    size: float

    @property
    def line(self) -> float:
        return self.size * 1.3 / 72

    @property
    def character(self) -> float:
        return self.size * 0.65 / 72


class Side(NamedTuple):
    """One side of a matrix: its name, its length, and what stands at its ticks (None: numbers)."""

    name: str
    length: int
    labels: Sequence[str] | None = None

    @property
    def longest(self) -> int:
        """Characters of the longest label."""
        return max(map(len, self.labels or [str(self.length - 1)]))

    def ticks(self, fits: float) -> tuple[range, list[str]]:
        """At most `fits` evenly spaced positions, and what stands there."""
        positions = range(0, self.length, step_between(self.length, fits))
        return positions, [self.labels[i] if self.labels else str(i) for i in positions]


def import_matplotlib() -> Any:
    """matplotlib, or an error that says how to get it."""
    try:
        import matplotlib.figure
    except ImportError as error:
        rule = "Pictures are drawn by matplotlib."
        _checks.fail(ImportError, rule, str(error), "Run `pip install 'flax_mha[plots]'`.")
    return matplotlib


def new_figure(width: float, height: float, title: str | None) -> Any:
    """A figure that a notebook shows as a cell's value, whether or not pyplot was imported."""
    figure = import_matplotlib().figure.Figure(figsize=(width, height), layout="compressed")
    # IPython learns of figures from pyplot alone; without this it would print `<Figure ...>`.
    figure._repr_png_ = functools.partial(_png, figure)
    if title is not None:
        figure.suptitle(title, parse_math=False)
    return figure


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight")
    return stream.getvalue()


def new_panels(
    titles: Sequence[str], rows: Side, columns: Side, title: str | None, *, beside: float
) -> tuple[Any, list[Any]]:
    """A figure and one axes for each title; `beside` inches of its width are for a legend."""
    count = len(titles)
    font = Font(9 if count == 1 else 8)
    width, height = _panel_inches(rows.length, columns.length, count)
    across = _columns(count, width)
    figure = new_figure(
        across * (width + 0.1) + _MARGIN + font.character * rows.longest + beside,
        -(-count // across) * (height + 0.3) + _MARGIN + font.character * columns.longest,
        title,
    )
    grid = list(figure.subplots(-(-count // across), across, squeeze=False).ravel())
    for i, (axes, name) in enumerate(zip(grid, titles)):
        axes.set_title(name, fontsize=font.size + 1, parse_math=False)
        _query_ticks(axes, rows, font, height, shown=i % across == 0)
        _key_ticks(axes, columns, font, width, shown=i + across >= count)
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def is_square(T: int, S: int) -> bool:
    """Whether the cells of T x S are drawn as squares: not where a row would be a thin line."""
    return max(T, S) <= 8 * min(T, S)


def _panel_inches(T: int, S: int, count: int) -> tuple[float, float]:
    low, high, cell = (2.4, 7.0, 0.32) if count == 1 else (1.8, 3.2, 0.22)
    side = min(max(cell * max(T, S), low), high)
    width, height = side * S / max(T, S), side * T / max(T, S)
    return (width, height) if is_square(T, S) else (max(width, side / 8), max(height, side / 8))


def _columns(count: int, width: float) -> int:
    """As many panels side by side as there is room for, with rows of about equal length."""
    rows = -(-count // max(int(_ROW_INCHES // width), 1))
    return -(-count // rows)


def _query_ticks(axes: Any, side: Side, font: Font, inches: float, *, shown: bool) -> None:
    ticks, labels = side.ticks(inches / font.line)
    axes.yaxis.set_ticks(ticks, labels, fontsize=font.size, parse_math=False)
    axes.tick_params(axis="y", labelleft=shown)
    axes.set_ylabel(side.name if shown else "", fontsize=font.size + 1)


def _key_ticks(axes: Any, side: Side, font: Font, inches: float, *, shown: bool) -> None:
    fits = inches / (font.character * (side.longest + 1))
    upright = side.labels is not None and fits < side.length
    ticks, labels = side.ticks(inches / font.line if upright else fits)
    rotation = 90 if upright else 0
    axes.xaxis.set_ticks(ticks, labels, fontsize=font.size, rotation=rotation, parse_math=False)
    axes.tick_params(axis="x", labelbottom=shown)
    axes.set_xlabel(side.name if shown else "", fontsize=font.size + 1)
