"""A run on the screen: one table a case, what to reach, and where blockwise begins."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flax_mha.attention.choice import RULE
from flax_mha.bench.crossover import Crossover
from flax_mha.bench.results import CaseResult, Row, Run
from flax_mha.bench.targets import Target

COLUMNS = (
    *("contender", "median", "min", "x ours", "x min", "GEMM"),
    *("temp MB", "comp s", "error", "rounds"),
)
_COLOURS = {"met": "green", "missed": "red", "not measured": "yellow"}


def print_head(console: Console, environment: Mapping[str, Any]) -> None:
    """Where the numbers come from."""
    versions = environment["versions"]
    known = [f"{name} {version}" for name, version in versions.items() if version]
    lines = [
        f"{environment['processor']}, {environment['cores']} cores, {environment['device']}; "
        f"load {environment['load_average']}",
        f"Python {environment['python']}, {', '.join(known)}",
        f"OMP_WAIT_POLICY: {environment['omp_wait']}",
    ]
    for line in lines:
        _say(console, line)


def print_case(console: Console, result: CaseResult) -> None:
    """The contenders of one case, ours first; those without times with their reason."""
    size = f"times in ms; {result.case.flops / 1e9:.3g} GFLOP"
    if result.gemm_flops:
        size += f", GEMM {result.gemm_rate / 1e9:.0f} GFLOP/s"
    title = Text(f"{result.case.label}   ({size})", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in COLUMNS:
        left = column == "contender"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    base = result.row("ours") or next(iter(result.timed()), None)
    for row in result.timed():
        assert base is not None
        table.add_row(*cells(result, row, base), style="bold" if row.name == base.name else "")
    console.print(table)
    for row in result.rows:
        if not row.samples:
            _say(console, f"  {row.name}: {row.status}: {row.reason}")


def cells(result: CaseResult, row: Row, base: Row) -> list[str]:
    """One line of a case's table."""
    return [
        row.name,
        f"{1e3 * row.median:.4g}",
        f"{1e3 * row.minimum:.4g}",
        f"{row.median / base.median:.2f}",
        f"{row.minimum / base.minimum:.2f}",
        f"{result.gemm_share(row):.0%}",
        "-" if row.temp_bytes is None else f"{row.temp_bytes / 1e6:.1f}",
        "-" if row.compile_seconds is None else f"{row.compile_seconds:.2f}",
        f"{row.error:.0e}",
        f"{len(row.samples)}x{row.calls}",
    ]


def print_targets(console: Console, targets: list[Target]) -> None:
    """Every target with its figure, and met, missed or why it was not measured."""
    console.rule("What to reach", align="left")
    for target in targets:
        line = Text(f"{target.verdict:<14}", style=_COLOURS[target.verdict])
        console.print(line.append(target_line(target), style="default"), soft_wrap=True)
    counts = {verdict: [t.verdict for t in targets].count(verdict) for verdict in _COLOURS}
    _say(console, ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def target_line(target: Target) -> str:
    """The target's name, figure, goal and evidence.

    Example:
        >>> target_line(Target("FB over F", 2.5, 3.0, evidence="by minima 2.40"))
        'FB over F: 2.5x, at most 3x (by minima 2.40)'
    """
    found = "" if target.value is None else f" {target.value:.4g}{target.unit},"
    goal = f"{'at least' if target.at_least else 'at most'} {target.limit:.4g}{target.unit}"
    return f"{target.name}:{found} {goal} ({target.evidence})"


def print_crossovers(console: Console, found: Mapping[str, Crossover]) -> None:
    """Sentences about reference and blockwise on this machine."""
    if found:
        _say(console, f"implementation=None chooses {RULE}. Measured here:")
    for variant, crossover in found.items():
        for line in crossover_lines(variant, crossover):
            _say(console, f"  {line}")


def crossover_lines(variant: str, crossover: Crossover) -> Iterator[str]:
    """What was found of one variant."""
    start, lengths = crossover.blockwise_from, sorted(crossover.medians)
    if start is None:
        yield f"{variant}: reference is faster at T = {lengths[-1]}, the longest of this run."
    elif start == lengths[0]:
        yield f"{variant}: blockwise is as fast or faster at every T from {start} on."
    else:
        yield f"{variant}: blockwise is as fast or faster from T = {start} on."
    for length, quotient in sorted(crossover.lost.items()):
        chosen = crossover.chosen[length]
        yield f"{variant}: at T = {length} None chooses {chosen}, {quotient:.2f} x the faster one."


def print_wrong(console: Console, run: Run) -> bool:
    """Names every contender whose numbers were wrong; returns whether there was one."""
    wrong = [(r.case, row) for r in run.cases for row in r.rows if row.status == "wrong"]
    for case, row in wrong:
        _say(console, f"WRONG, and not timed: {row.name} in {case.label}: {row.reason}")
    return bool(wrong)


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
