"""A run on the screen: where it was, and one table a case."""

from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from flax_mha.bench import report
from flax_mha.bench.results import CaseResult
from flax_mha.bench.tables import say

COLUMNS = tuple(column for column in report.COLUMNS if column not in ("x min", "GEMM"))


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
    card = environment["card"]
    memory = "" if card["gigabytes"] is None else f", {card['gigabytes']:.1f} GB for JAX"
    for line in (
        f"device: {card['device']}, one of {card['count']}{memory}; {card['driver']}",
        f"host: {environment['processor']}, {environment['cores']} cores, "
        f"load {environment['load_average']}",
        report.versions_line(environment),
    ):
        say(console, line)


def print_case(console: Console, result: CaseResult) -> None:
    """One case of arrays."""
    size = f"times in ms; {result.case.flops / 1e12:.3g} TFLOP"
    report.print_rows(console, result, size, COLUMNS)
