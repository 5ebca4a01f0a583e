"""Cycles a tile as bars, a panel for each topology and pass. matplotlib is imported where used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_mha.bench.aot.figures import Figure

_CUT = 2.0  # times the dearest kernel of a panel: a longer bar is cut, and its number written


def plot(figures: Sequence[Figure], path: Path) -> None:
    """Bars of the whole body by case and contender, each with a tick at its masked one."""
    from matplotlib.figure import Figure as Picture

    read = [figure for figure in figures if figure.whole is not None]
    panels = list(dict.fromkeys((figure.topology, figure.gradient) for figure in read))
    if not panels:
        return
    cases = list(dict.fromkeys(figure.case for figure in read))
    picture = Picture(figsize=(max(9, 1.2 * len(cases)), 3 * len(panels) + 1), layout="constrained")
    all_axes = picture.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    names = list(dict.fromkeys(figure.contender for figure in read))
    for axes, (topology, gradient) in zip(all_axes, panels):
        here = [x for x in read if (x.topology, x.gradient) == (topology, gradient)]
        _draw(axes, here, cases, names)
        axes.set_ylabel(f"{topology} {'FB' if gradient else 'F'}")
    all_axes[-1].set_xticks(range(len(cases)), labels=cases)
    handles = {label: h for axes in all_axes for h, label in zip(*axes.get_legend_handles_labels())}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    picture.suptitle("Cycles a tile of 512 x 512 entries, by the TPU's compiler; no device ran")
    picture.savefig(path, dpi=120)


def _draw(axes: Any, figures: Sequence[Figure], cases: list[str], names: list[str]) -> None:
    """The bars of one panel; those of programs without a kernel are hatched."""
    width = 0.84 / len(names)
    highest = [figure.masked for figure in figures if figure.kernels and figure.masked]
    cut = _CUT * max(highest, default=max(figure.masked or 0 for figure in figures))
    for figure in figures:
        index = names.index(figure.contender)
        middle = cases.index(figure.case) + (index - (len(names) - 1) / 2) * width
        _bar(axes, figure, middle, width, f"C{index}", cut)
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.set_ylim(0, cut)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _bar(axes: Any, figure: Figure, middle: float, width: float, colour: str, cut: float) -> None:
    labelled = axes.get_legend_handles_labels()[1]
    axes.bar(
        middle,
        min(figure.whole, cut),  # type: ignore[type-var]
        width,
        color=colour,
        hatch="" if figure.kernels else "///",
        edgecolor="white",
        alpha=1 if figure.kernels else 0.7,
        label=None if figure.contender in labelled else figure.contender,
    )
    sides = (middle - width / 2, middle + width / 2)
    axes.hlines(figure.masked, *sides, color="black", linewidth=1)
    if figure.whole > cut:  # type: ignore[operator]
        box = dict(facecolor=colour, edgecolor="none", pad=1)  # the hatches hide a number
        where = dict(rotation=90, ha="center", va="top", fontsize=8, color="white", bbox=box)
        axes.text(middle, 0.97 * cut, f"{figure.whole:.0f}", **where)
