"""Time and memory against T, a column for each variant. matplotlib is imported where it is used."""

import importlib.util
from pathlib import Path
from typing import Any

from flax_mha.bench.command import BenchError
from flax_mha.bench.peers import CONTENDERS
from flax_mha.bench.results import LayerResult, Run


def require_matplotlib() -> None:
    """Says at the start, not after ten minutes, what the picture needs.

    Raises:
        BenchError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "Run `pip install 'flax_mha[bench]'` (or `pip install matplotlib`)"
        raise BenchError(f"the picture needs matplotlib. {remedy}, or pass --no-plots.")


def plot(run: Run, path: Path) -> None:
    """Per token, for the cases of one curve differ in their batch too."""
    from matplotlib.figure import Figure

    variants = sorted({result.case.variant for result in run.cases if result.timed()})
    if not variants:
        return
    figure = Figure(figsize=(3.6 * len(variants) + 1.6, 7), layout="constrained")
    panels = figure.subplots(2, len(variants), squeeze=False, sharex="col", sharey="row")
    for column, variant in enumerate(variants):
        results = [result for result in run.cases if result.case.variant == variant]
        upper, lower = panels[:, column]
        _draw(upper, results, lambda row: 1e6 * row.median)
        _draw(lower, results, lambda row: row.temp_bytes and row.temp_bytes / 1e3)
        upper.set_title(variant)
        lower.set_xlabel("T")
    panels[0, 0].set_ylabel("\u00b5s per token (median)")
    panels[1, 0].set_ylabel("kB of temporaries per token")
    entries = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    environment = run.environment
    figure.suptitle(f"{environment['processor']}, {environment['cores']} cores, float32")
    figure.savefig(path, dpi=120)


def _draw(axes: Any, results: list[LayerResult], measure: Any) -> None:
    """One line a contender; the batch and the features may differ from point to point."""
    for index, name in enumerate(CONTENDERS):
        points = sorted(
            (result.case.length, measure(row) / (result.case.batch * result.case.length))
            for result in results
            if (row := result.row(name)) is not None and measure(row)
        )
        ours = name.startswith("ours")
        if points:
            axes.plot(
                *zip(*points),
                label=name,
                color="black" if name == "ours" else f"C{index % 10}",
                linewidth=2.2 if ours else 1.2,
                marker="o" if ours else ".",
            )
    lengths = sorted({result.case.length for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=[str(length) for length in lengths])
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
