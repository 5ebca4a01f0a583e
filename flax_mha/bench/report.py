"""A run on the screen: one table a case, what to reach, and where blockwise begins."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from flax_mha.attention.choice import RULE
from flax_mha.bench.crossover import Crossover
from flax_mha.bench.results import CaseResult, LayerResult, Row
from flax_mha.bench.tables import say, table
from flax_mha.bench.targets import Target

Cell = Callable[[Any, Row, Row], str]  # (the case's result, a row, the row of ours) -> what is told
COLUMNS: dict[str, Cell] = {
    "contender": lambda result, row, ours: row.name,
    "median": lambda result, row, ours: f"{1e3 * row.median:.4g}",
    "min": lambda result, row, ours: f"{1e3 * row.minimum:.4g}",
    "x ours": lambda result, row, ours: f"{row.median / ours.median:.2f}",
    "x min": lambda result, row, ours: f"{row.minimum / ours.minimum:.2f}",
    "GEMM": lambda result, row, ours: f"{result.gemm_share(row):.0%}",
    "TFLOP/s": lambda result, row, ours: f"{result.case.flops / row.median / 1e12:.3g}",
    "temp MB": lambda result, row, ours: _known(row.temp_bytes, 1e6, ".1f"),
    "comp s": lambda result, row, ours: _known(row.compile_seconds, 1, ".2f"),
    "error": lambda result, row, ours: f"{row.error:.0e}",
    "rounds": lambda result, row, ours: f"{len(row.samples)}x{row.calls}",
}
LAYERS = tuple(column for column in COLUMNS if column != "TFLOP/s")
_COLOURS = {"met": "green", "missed": "red", "not measured": "yellow"}


def print_head(console: Console, environment: Mapping[str, Any]) -> None:
    """Where the numbers come from."""
    lines = [
        f"{environment['processor']}, {environment['cores']} cores, {environment['device']}; "
        f"load {environment['load_average']}",
        versions_line(environment),
        f"OMP_WAIT_POLICY: {environment['omp_wait']}",
    ]
    for line in lines:
        say(console, line)


def versions_line(environment: Mapping[str, Any]) -> str:
    """Python's version, and those of the packages that are installed."""
    known = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    return f"Python {environment['python']}, {', '.join(known)}"


def print_case(console: Console, result: LayerResult) -> None:
    """One case of the layers."""
    size = f"times in ms; {result.case.flops / 1e9:.3g} GFLOP"
    if result.gemm_flops:
        size += f", GEMM {result.gemm_rate / 1e9:.0f} GFLOP/s"
    print_rows(console, result, size, LAYERS)


def print_rows(console: Console, result: CaseResult, size: str, columns: Sequence[str]) -> None:
    """The contenders of one case, ours in bold; those without times with their reason."""
    lines = table(f"{result.case.label}   ({size})", columns, ("contender",))
    ours = result.row("ours") or next(iter(result.timed()), None)
    for row in result.timed():
        assert ours is not None
        cells = [COLUMNS[column](result, row, ours) for column in columns]
        lines.add_row(*cells, style="bold" if row is ours else "")
    console.print(lines)
    for row in result.rows:
        if not row.samples:
            say(console, f"  {row.name}: {row.status}: {row.reason}")


def _known(number: float | None, unit: float, form: str) -> str:
    return "-" if number is None else f"{number / unit:{form}}"


def print_targets(console: Console, targets: list[Target]) -> None:
    """Every target with its figure, and met, missed or why it was not measured."""
    console.rule("What to reach", align="left")
    for target in targets:
        line = Text(f"{target.verdict:<14}", style=_COLOURS[target.verdict])
        console.print(line.append(target_line(target), style="default"), soft_wrap=True)
    counts = {verdict: [t.verdict for t in targets].count(verdict) for verdict in _COLOURS}
    say(console, ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


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
        say(console, f"implementation=None chooses {RULE}. Measured here:")
    for variant, crossover in found.items():
        for line in crossover_lines(variant, crossover):
            say(console, f"  {line}")


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


def print_wrong(console: Console, results: Iterable[CaseResult]) -> bool:
    """Names every contender whose numbers were wrong, and ours that failed; returns whether any."""
    wrong = [(found.case, row) for found in results for row in found.rows if _is_wrong(row)]
    for case, row in wrong:
        status = row.status.upper()
        say(console, f"{status}, and not timed: {row.name} in {case.label}: {row.reason}")
    return bool(wrong)


def _is_wrong(row: Row) -> bool:
    return row.status == "wrong" or (row.status == "failed" and row.family == "ours")
