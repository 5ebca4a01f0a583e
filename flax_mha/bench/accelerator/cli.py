"""The command line: `python -m flax_mha.bench --set accelerator`."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from flax_mha.bench.accelerator.cases import CASES, EXAMPLE, REHEARSAL, Case
from flax_mha.bench.accelerator.contenders import CONTENDERS
from flax_mha.bench.accelerator.measure import CaseResult, measure
from flax_mha.bench.accelerator.report import place, print_case, print_head, say
from flax_mha.bench.cases import BenchError
from flax_mha.bench.environment import describe, set_omp_wait
from flax_mha.bench.run import write

_EPILOG = f"""\
a case: BxTxNxH, then any of F, FB (gradient), bfloat16, float16, float32, causal, window=KEYS,
dropout=RATE, bias; such as '{EXAMPLE}'"""


def main(words: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit code.

    Returns:
        0; 1 where a contender's numbers were wrong; 2 for a user's mistake; 130 for Ctrl-C.

    Example:
        >>> main(["--set", "accelerator", "--case", "8x512"])
        2
    """
    options = _parser().parse_args(words)
    try:
        return _run(options, shlex.join(["python", "-m", "flax_mha.bench", *words]))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: bench.json holds the cases until now", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, command: str) -> int:
    cases, names = _cases(options), _contenders(options.contenders)
    _require_accelerator(options.rehearse)
    console, results = Console(), list[CaseResult]()
    environment = describe(command, set_omp_wait(None)) | {"card": place()}
    print_head(console, environment)
    _save(options.out, environment, results)
    for case in cases:
        results.append(measure(case, names, options.seconds, options.rounds))
        print_case(console, results[-1])
        _save(options.out, environment, results)
    say(console, f"Files: {options.out}/")
    return int(any(row.status == "wrong" for result in results for row in result.rows))


def _cases(options: argparse.Namespace) -> tuple[Case, ...]:
    named = tuple(map(Case.parse, options.cases))
    return named or (REHEARSAL if options.rehearse else CASES)


def _contenders(given: str | None) -> tuple[str, ...]:
    if given is None:
        return tuple(CONTENDERS)
    names = tuple(name.strip() for name in given.split(","))
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise BenchError(f"no contender {unknown[0]!r}. There are: {', '.join(CONTENDERS)}.")
    return tuple(dict.fromkeys(names))


def _require_accelerator(rehearse: bool) -> None:
    if jax.default_backend() == "cpu" and not rehearse:
        raise BenchError(
            "the set 'accelerator' is for a GPU or a TPU, and JAX runs on the CPU here. Install a "
            "JAX for yours (pip install 'jax[cuda12]' or 'jax[tpu]'), or pass --rehearse, which "
            "runs a few small cases where you are."
        )


def _save(directory: Path, environment: dict[str, Any], results: list[CaseResult]) -> None:
    found = {"environment": environment, "cases": [result.to_dict() for result in results]}
    write(json.dumps(found, indent=1), directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flax_mha.bench --set accelerator",
        description="Time and memory of attention of arrays on one GPU or TPU, beside jax.nn, "
        "flax.linen, Keras and torch, whichever are installed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--set", choices=("accelerator",), required=True)
    parser.add_argument("--rehearse", action="store_true", help="small cases, on a CPU too")
    parser.add_argument("--case", dest="cases", action="append", default=[], help="see below")
    parser.add_argument("--contenders", metavar="A,B", help=f"of: {', '.join(CONTENDERS)}")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="N", help="of timing a case (default: 2)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="whatever the seconds")
    out = Path("runs") / "bench-accelerator"
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"default: {out}")
    return parser
