"""The picture of a training. matplotlib is imported where it is used: it is an optional extra."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_mha.demo.directory import Records

# lzma and bz2 often lie on one another: their dashes do not.
_YARDSTICK_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "C2", "linestyle": (0, (4, 4))},
    {"color": "C3", "linestyle": (4, (4, 4))},
    {"color": "C4", "linestyle": ":"},
)


def plot_training(records: Records, yardsticks: Mapping[str, float], path: Path) -> None:
    """Over the steps, one panel a measure: of the training, and of data not trained on.

    `yardsticks` are horizontal lines in the panel of the latter.
    """
    from matplotlib.figure import Figure

    trained, held_out = records.of("train"), records.of("held_out")
    measures = list(dict.fromkeys([_measure(trained), _measure(held_out)]))
    figure = Figure(figsize=(8, 3 + 1.5 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False).ravel()
    for axes, measure in zip(panels, measures):
        _draw(axes, trained, measure, label="training")
        _draw(axes, held_out, measure, label="not trained on", marker="o", markersize=4)
        axes.set(ylabel=measure.replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for (name, value), style in zip(yardsticks.items(), _YARDSTICK_STYLES):
        axes.axhline(value, linewidth=1.2, label=f"{name} on the same, {value:.2f}", **style)
    for axes in panels:
        axes.legend()
    axes.set(xlabel="step")
    figure.savefig(path, dpi=130)


def _measure(rows: list[dict[str, Any]]) -> str:
    """The name of what the records measure: their last entry."""
    return list(rows[0])[-1]


def _draw(axes: Any, rows: list[dict[str, Any]], measure: str, **style: Any) -> None:
    steps = [row["step"] for row in rows if measure in row]
    if steps:
        axes.plot(steps, [row[measure] for row in rows if measure in row], linewidth=1, **style)
