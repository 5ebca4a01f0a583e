"""The command line: `python -m flax_mha.bench --set accelerator`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from flax_mha.bench import command
from flax_mha.bench.accelerator.cases import CASES, REHEARSAL, Case
from flax_mha.bench.accelerator.contenders import CONTENDERS
from flax_mha.bench.accelerator.measure import measure
from flax_mha.bench.accelerator.report import place, print_case, print_head
from flax_mha.bench.environment import describe, set_omp_wait
from flax_mha.bench.report import print_wrong
from flax_mha.bench.results import CaseResult
from flax_mha.bench.tables import say

_EPILOG = f"""\
a case: BxTxNxH, then any of F, FB (gradient), bfloat16, float16, float32, causal, window=KEYS,
dropout=RATE, bias; such as '{Case.EXAMPLE}'"""


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Measures and prints; 1 where a contender's numbers were wrong or ours failed, else 0."""
    cases = _cases(options)
    names = command.chosen("contender", options.contenders or CONTENDERS, CONTENDERS)
    _require_accelerator(options.rehearse)
    console, results = Console(), list[CaseResult]()
    environment = describe(command.line(words), set_omp_wait(None)) | {"card": place()}
    print_head(console, environment)
    _save(options.out, environment, results)
    for case in cases:
        results.append(measure(case, names, options.seconds, options.rounds))
        print_case(console, results[-1])
        _save(options.out, environment, results)
    say(console, f"Files: {options.out}/")
    return int(print_wrong(console, results))


def _cases(options: argparse.Namespace) -> tuple[Case, ...]:
    named = tuple(map(Case.parse, options.cases))
    return named or (REHEARSAL if options.rehearse else CASES)


def _require_accelerator(rehearse: bool) -> None:
    if jax.default_backend() == "cpu" and not rehearse:
        raise command.BenchError(
            "the set 'accelerator' is for a GPU or a TPU, and JAX runs on the CPU here. Install a "
            "JAX for yours (pip install 'jax[cuda12]' or 'jax[tpu]'), or pass --rehearse, which "
            "runs a few small cases where you are."
        )


def _save(directory: Path, environment: dict[str, Any], results: list[CaseResult]) -> None:
    found = {"environment": environment, "cases": [result.to_dict() for result in results]}
    command.write(json.dumps(found, indent=1), directory / "bench.json")


def parser() -> argparse.ArgumentParser:
    """The options of this set."""
    description = (
        "Time and memory of attention of arrays on one GPU or TPU, beside jax.nn, flax.linen, "
        "Keras and torch, whichever are installed."
    )
    made = command.parser("--set accelerator", description, _EPILOG)
    made.add_argument("--set", choices=("accelerator",), required=True)
    made.add_argument("--rehearse", action="store_true", help="small cases, on a CPU too")
    command.add_cases(made, CONTENDERS, seconds=2.0)
    out = Path("runs") / "bench-accelerator"
    made.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"default: {out}")
    return made
