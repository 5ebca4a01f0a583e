"""A run on the screen: where it was, and one table a case."""

from collections.abc import Mapping
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from flax_mha.bench.accelerator.measure import CaseResult
from flax_mha.bench.results import Row

COLUMNS = (
    "contender",
    "median",
    "min",
    "x ours",
    "TFLOP/s",
    "temp MB",
    "comp s",
    "error",
    "rounds",
)


def place() -> dict[str, Any]:
    """The card: its name, how many there are, what memory JAX has of one, and its driver."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "device": device.device_kind,
        "count": len(jax.devices()),
        "gigabytes": None if memory is None else memory / 1e9,
        "driver": device.client.platform_version.replace("\n", " "),
    }


def print_head(console: Console, environment: Mapping[str, Any]) -> None:
    """Where the numbers come from."""
    card, versions = environment["card"], environment["versions"]
    memory = "" if card["gigabytes"] is None else f", {card['gigabytes']:.1f} GB for JAX"
    known = [f"{name} {version}" for name, version in versions.items() if version]
    for line in (
        f"device: {card['device']}, one of {card['count']}{memory}; {card['driver']}",
        f"host: {environment['processor']}, {environment['cores']} cores, "
        f"load {environment['load_average']}",
        f"Python {environment['python']}, {', '.join(known)}",
    ):
        say(console, line)


def print_case(console: Console, result: CaseResult) -> None:
    """The contenders that were timed, ours first; the others with their reason."""
    title = f"{result.case.label}   (times in ms; {result.case.flops / 1e12:.3g} TFLOP)"
    say(console, title)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for column in COLUMNS:
        left = column == "contender"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    timed = result.timed()
    for row in timed:
        table.add_row(*cells(result, row, timed[0]))
    if timed:
        console.print(table)
    for row in result.rows:
        if not row.samples:
            say(console, f"  {row.name}: {row.status}: {row.reason}")


def cells(result: CaseResult, row: Row, base: Row) -> list[str]:
    """One line of a case's table."""
    return [
        row.name,
        f"{1e3 * row.median:.4g}",
        f"{1e3 * row.minimum:.4g}",
        f"{row.median / base.median:.2f}",
        f"{result.case.flops / row.median / 1e12:.3g}",
        "-" if row.temp_bytes is None else f"{row.temp_bytes / 1e6:.1f}",
        "-" if row.compile_seconds is None else f"{row.compile_seconds:.2f}",
        f"{row.error:.0e}",
        f"{len(row.samples)}x{row.calls}",
    ]


def say(console: Console, line: str) -> None:
    """A line as it is, however wide."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
