"""Figures without pyplot: panels of one size, ticks that can be read, a picture in a notebook."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax_mha.core import checks
from flax_mha.plots.labels import step_between

_ROW_INCHES = 13.0  # of all panels of a row
_MARGIN = 0.5  # inches: an axis's name and ticks
_LONGEST = 8  # sides' ratio above which a panel is not drawn true to scale
_SMALLEST = 6.0  # points
LINE, CHARACTER = 1.3 / 72, 0.65 / 72  # inches for each point of a font: its height, its width


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
        checks.fail(ImportError, rule, str(error), "Run `pip install 'flax_mha[plots]'`.")
    return matplotlib


def new_figure(width: float, height: float, title: str | None) -> Any:
    """A figure that a notebook shows as a cell's value, whether or not pyplot was imported."""
    if title is not None and not isinstance(title, str):
        checks.fail(TypeError, "`title` must be a string.", f"title={title!r}")
    height += 0.0 if title is None else 0.3
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
    titles: Sequence[str],
    rows: Side,
    columns: Side,
    title: str | None,
    *,
    beside: float = 0.1,
    below: float = 0.0,
) -> tuple[Any, list[Any]]:
    """A figure and one axes for each title, with inches `beside` and `below` for legends."""
    count = len(titles)
    largest = 9 if count == 1 else 8
    width, height = _panel_inches(rows.length, columns.length, count)
    across = _columns(count, width)
    character = largest * CHARACTER
    figure = new_figure(
        across * (width + 0.1) + _MARGIN + character * rows.longest + beside,
        -(-count // across) * (height + 0.3) + _MARGIN + character * columns.longest + below,
        title,
    )
    grid = list(figure.subplots(-(-count // across), across, squeeze=False).ravel())
    for i, (axes, name) in enumerate(zip(grid, titles)):
        axes.set_title(name, fontsize=largest + 1, parse_math=False)
        _query_ticks(axes, rows, height, largest, shown=i % across == 0)
        _key_ticks(axes, columns, width, largest, shown=i + across >= count)
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def aspect_of(T: int, S: int) -> str:
    """Square cells, but not where a row of them would be a thin line."""
    return "equal" if max(T, S) <= _LONGEST * min(T, S) else "auto"


def _panel_inches(T: int, S: int, count: int) -> tuple[float, float]:
    """Cells of a readable size within limits; a long panel may be longer than a square one."""
    low, high, cell = (2.4, 8.0, 0.32) if count == 1 else (1.8, 3.2, 0.22)
    longest = max(T, S)
    limit = min(high * math.sqrt(longest / min(T, S)), max(high, 6.5))
    side = min(max(cell * longest, low), limit)
    return max(side * S / longest, side / _LONGEST), max(side * T / longest, side / _LONGEST)


def _columns(count: int, width: float) -> int:
    """As many panels side by side as there is room for, with rows of about equal length."""
    rows = -(-count // max(int(_ROW_INCHES // width), 1))
    return -(-count // rows)


def _query_ticks(axes: Any, side: Side, inches: float, largest: float, *, shown: bool) -> None:
    set_ticks(axes.yaxis, side, inches, largest)
    axes.tick_params(axis="y", labelleft=shown)
    axes.set_ylabel(side.name if shown else "", fontsize=largest + 1)


def _key_ticks(axes: Any, side: Side, inches: float, largest: float, *, shown: bool) -> None:
    room = (side.longest + 0.6) * CHARACTER
    stands = side.labels is not None and room * _SMALLEST * side.length > inches
    set_ticks(axes.xaxis, side, inches, largest, LINE if stands else room, upright=stands)
    axes.tick_params(axis="x", labelbottom=shown)
    axes.set_xlabel(side.name if shown else "", fontsize=largest + 1)


def set_ticks(
    axis: Any,
    side: Side,
    inches: float,
    largest: float,
    room: float = LINE,
    *,
    upright: bool = False,
    first: float = 0.0,
) -> None:
    """Labels as large as all have room for; where that could not be read, evenly spaced ones.

    Args:
        axis: of matplotlib.
        side: what stands there.
        inches: the length of the axis.
        largest: points.
        room: inches along the axis that a label takes for each point of its font.
        upright: whether the texts stand on end.
        first: where on the axis position 0 is.
    """
    size = min(inches / side.length / room, largest)
    if side.labels is None or size < _SMALLEST:
        size = largest
    # Numbers need not be close to one another to be read; and what fits exactly does fit.
    gap = 1.0 if side.labels else 1.5
    ticks, labels = side.ticks(inches / (gap * room * size) + 1e-6)
    rotation = "vertical" if upright else "horizontal"
    axis.set_ticks(
        [first + tick for tick in ticks], labels, fontsize=size, rotation=rotation, parse_math=False
    )
