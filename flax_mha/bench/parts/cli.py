"""The command line: `python -m flax_mha.bench --parts`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flax_mha.bench import command, report
from flax_mha.bench.cases import Case
from flax_mha.bench.environment import describe, set_omp_wait
from flax_mha.bench.parts.measure import Found, measure
from flax_mha.bench.parts.report import print_case
from flax_mha.bench.tables import say

CASES = tuple(map(Case.parse, ("1x4096x512x8 FB", "1x4096x512x8 FB causal", "8x512x512x8 FB")))
_EPILOG = f"""\
a case: BxTxDxN, then any of F, FB (gradient), causal, dropout=RATE, window=KEYS, as
'{Case.EXAMPLE}'; a mask's tiles are those of the forward pass"""


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Measures and prints; the numbers' rightness is the other sets' business."""
    cases = tuple(map(Case.parse, options.cases)) or CASES
    environment = describe(command.line(words), set_omp_wait(None))
    console, found = Console(), list[Found]()
    report.print_head(console, environment)
    _save(options.out, environment, found)
    for case in cases:
        found.append(measure(case, options.seconds, options.rounds))
        print_case(console, found[-1])
        _save(options.out, environment, found)
    say(console, f"Files: {options.out}/")
    return 0


def _save(directory: Path, environment: dict[str, Any], found: list[Found]) -> None:
    told = {"environment": environment, "cases": [one.to_dict() for one in found]}
    command.write(json.dumps(told, indent=1), directory / "parts.json")


def parser() -> argparse.ArgumentParser:
    """The options of this way to measure."""
    description = "Where our layer's time goes on this machine: its products and passes, each "
    made = command.parser("--parts", description + "timed alone, beside the whole.", _EPILOG)
    made.add_argument("--parts", action="store_true", required=True)
    command.add_timing(made, seconds=20.0)
    out = Path("runs") / "bench-parts"
    made.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"default: {out}")
    return made
