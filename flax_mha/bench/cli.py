"""The command line: `python -m flax_mha.bench --set NAME`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flax_mha.bench import command
from flax_mha.bench.accelerator import cli as accelerator
from flax_mha.bench.aot import cli as aot
from flax_mha.bench.cases import SETS, Case
from flax_mha.bench.environment import describe, set_omp_wait
from flax_mha.bench.parts import cli as parts
from flax_mha.bench.peers import CONTENDERS, PEERS
from flax_mha.bench.run import Settings, run

_SKIPPABLE = ("compile", "memory", "import")
_EXAMPLES = """\
examples:
  python -m flax_mha.bench                       a look, in about a minute
  python -m flax_mha.bench --set readme          the README's sizes; the longest
  python -m flax_mha.bench --set crossover       what implementation=None should choose here
  python -m flax_mha.bench --parts               where our own time goes; its own --help
  python -m flax_mha.bench --set accelerator     attention on a GPU or TPU; its own --help
  python -m flax_mha.bench aot -h                what a TPU's compiler says, without a TPU
  python -m flax_mha.bench --case '4x2048x768x12 FB causal' --contenders ours,keras

a case: BxTxDxN, then any of F, FB (gradient), causal, dropout=RATE, window=KEYS, alone"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns the exit code.

    Returns:
        0; 1 where numbers were wrong, ours failed, or a figure of `aot` has grown beyond the kept
        one; 2 for a user's mistake; 3 where the kept ones are another compiler's; 130 for Ctrl-C.

    Example:
        >>> main(["--case", "8x512"])
        2
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    kept = "bench.json holds the cases"
    if words[:1] == ["aot"]:
        options, measure = aot.parser().parse_args(words[1:]), aot.run
        kept = "aot.json holds the figures"
    elif _set_of(words) == "accelerator":  # attention of arrays, with options of its own
        options, measure = accelerator.parser().parse_args(words), accelerator.run
    elif "--parts" in words:
        options, measure = parts.parser().parse_args(words), parts.run
        kept = "parts.json holds the cases"
    else:
        options, measure = _parser().parse_args(words), _run
    try:
        return measure(options, words)
    except command.BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {kept} until now", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    settings = _settings(options)
    environment = describe(command.line(words), set_omp_wait(options.omp_wait))
    directory = options.out or Path("runs") / f"bench-{options.set or 'cases'}"
    return 0 if run(settings, environment, directory, pictures=not options.no_plots) else 1


def _set_of(words: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", nargs="?")
    return parser.parse_known_args(words)[0].set


def _settings(options: argparse.Namespace) -> Settings:
    if not options.cases and options.set is None:
        options.set = "quick"
    named = SETS[options.set] if options.set else ()
    cases = (*named, *map(Case.parse, options.cases))
    return Settings(
        cases=tuple(dict.fromkeys(cases)),
        contenders=_contenders(options),
        seconds=options.seconds,
        rounds=options.rounds,
        max_gigabytes=options.max_gigabytes,
        compiles=0 if "compile" in options.skip else options.compiles,
        imports=0 if "import" in options.skip else 5,
        memory="memory" not in options.skip,
    )


def _contenders(options: argparse.Namespace) -> tuple[str, ...]:
    """Those asked for; the crossover compares our own implementations, all else the peers."""
    if options.contenders is None:
        ours = tuple(name for name in CONTENDERS if name not in PEERS)
        return ours if options.set == "crossover" else ("ours", *PEERS)
    return command.chosen("contender", options.contenders, CONTENDERS)


def _parser() -> argparse.ArgumentParser:
    description = (
        "Time and memory of multi_head_attention beside the layers of Keras, flax, equinox, haiku "
        "and torch, whichever are installed."
    )
    parser = command.parser("", description, _EXAMPLES)
    parser.add_argument(
        "--set", choices=(*SETS, "accelerator"), help="a list of cases (default: quick)"
    )
    command.add_cases(parser, CONTENDERS, seconds=8.0)
    told = "run nothing with more temporaries (default: 4)"
    parser.add_argument("--max-gigabytes", type=float, default=4.0, metavar="N", help=told)
    told = "fresh compilations of the first FB case (default: 5)"
    parser.add_argument("--compiles", type=command.positive, default=5, metavar="N", help=told)
    parser.add_argument(
        "--omp-wait",
        choices=("passive", "active"),
        help="OMP_WAIT_POLICY: whether torch's threads sleep between calls, or spin "
        "(default: the variable, else passive)",
    )
    parser.add_argument("--skip", nargs="+", choices=_SKIPPABLE, default=[], help="leave out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/bench-SET")
    parser.add_argument("--no-plots", action="store_true", help="draw no picture")
    return parser
