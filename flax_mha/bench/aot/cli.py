"""The command line: `python -m flax_mha.bench aot`."""

import argparse
import datetime
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flax_mha.bench.aot import kept, plots, report
from flax_mha.bench.aot.cases import CASES, LENGTHS
from flax_mha.bench.aot.compile import DUMP, environment, libtpu_version
from flax_mha.bench.aot.contenders import CONTENDERS
from flax_mha.bench.aot.figures import Figure
from flax_mha.bench.aot.measure import Settings, figures
from flax_mha.bench.cases import BenchError
from flax_mha.bench.plots import require_matplotlib

WIDTH = 100  # of a file; a terminal has its own
Keep = Callable[[Sequence[Figure]], None]

_EXAMPLES = """\
examples:
  python -m flax_mha.bench aot --topology v5e:2x2 --topology v6e:2x2
  python -m flax_mha.bench aot --cases causal,bias --contenders blockwise,'splash 1024'
  python -m flax_mha.bench aot --check tests/bench/aot/figures.json
"""


def main(arguments: Sequence[str]) -> int:
    """Compiles and prints; returns the exit code.

    Returns:
        0; 1 where a figure has grown beyond the kept one; 2 for a user's mistake; 3 where the kept
        figures are another compiler's; 130 for Ctrl-C.

    Example:
        >>> main(["--cases", "acausal"])
        2
    """
    given = _parser().parse_args(arguments)
    try:
        settings = _settings(given)
        libtpu_version()
        if DUMP not in os.environ:
            return _in_a_process_that_dumps(arguments)
        return _run(given, settings, f"python -m flax_mha.bench aot {shlex.join(arguments)}")
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if DUMP in os.environ:  # once: the process that waits for it is interrupted too
            print("\ninterrupted: aot.json holds the figures until now", file=sys.stderr)
        return 130


def _in_a_process_that_dumps(arguments: Sequence[str]) -> int:
    """The same command anew: libtpu reads its flags from the environment, once."""
    command = [sys.executable, "-m", "flax_mha.bench", "aot", *arguments]
    with tempfile.TemporaryDirectory(prefix="flax_mha-aot-") as dump:
        return subprocess.run(command, env=environment(dump)).returncode


def _run(given: argparse.Namespace, settings: Settings, command: str) -> int:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if given.check:
        return _check(given.check, settings, console)
    if not given.no_plots:
        require_matplotlib()
    keep = functools.partial(_keep, given.out / "aot.json", command)
    given.out.mkdir(parents=True, exist_ok=True)
    found = _measured(settings, console, keep)
    for topology in settings.topologies:
        report.print_cycles(console, topology, found)
        report.print_memory(console, topology, found)
    report.print_notes(console)
    if not given.no_plots:
        plots.plot(found, given.out / "aot.png")
    if given.write_figures:
        kept.write(found, given.write_figures)
    return 0


def _measured(settings: Settings, console: Console, keep: Keep | None = None) -> list[Figure]:
    """All figures; `keep` gets those until now, after each."""
    found: list[Figure] = []
    with console.status("") as status:
        show = status.update if console.is_terminal else functools.partial(print, file=sys.stderr)
        for figure in figures(settings, lambda text: show(f"compiling {text}")):
            found.append(figure)
            if keep is not None:
                keep(found)
    return found


def _keep(path: Path, command: str, found: Sequence[Figure]) -> None:
    """All figures as JSON, with what they depend on."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"command": command, "date": date, "compilers": kept.compilers(), "note": report.NOTES}
    result = about | {"figures": [figure.to_dict() for figure in found]}
    path.write_text(json.dumps(result, indent=2) + "\n")


def _check(path: Path, settings: Settings, console: Console) -> int:
    before = kept.read(path)
    other = kept.other_compiler(before)
    if other:
        print(f"not compared: {other}")
        return 3
    grown = 0
    for line, failure in kept.changes(before, _measured(settings, console)):
        print(f"{'GROWN' if failure else 'less'}: {line}")
        grown += failure
    print(f"{len(before['cycles'])} programs held against {path}: {grown or 'none'} grown")
    return 1 if grown else 0


def _settings(given: argparse.Namespace) -> Settings:
    cases, contenders = given.cases, given.contenders
    topologies = given.topology or ["v5e:2x2"]
    if given.check:
        wanted = kept.wanted(kept.read(given.check))
        topologies, cases, contenders = wanted.values()
    return Settings(
        topologies=tuple(dict.fromkeys(topologies)),
        cases=_named("case", CASES, cases),
        contenders=_named("contender", CONTENDERS, contenders),
        lengths=() if given.check or given.no_memory else given.lengths,
    )


def _named(what: str, there: dict[str, Any], names: Sequence[str] | None) -> tuple[Any, ...]:
    """Those of these names, all where none is given."""
    unknown = [name for name in names or () if name not in there]
    if unknown:
        raise BenchError(f"no {what} {unknown[0]!r}. There are: {', '.join(there)}.")
    return tuple(there[name] for name in dict.fromkeys(names or there))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flax_mha.bench aot",
        description="What the TPU's compiler says of every implementation, beside jax's splash "
        "attention: cycles a tile by the static schedule, and memory. No TPU is needed, libtpu is.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--topology", action="append", metavar="NAME", help="v5e:2x2 (default), v5p:2x2x1, v6e:2x2")
    add("--cases", type=_names, metavar="A,B", help=f"of: {', '.join(CASES)}")
    add("--contenders", type=_names, metavar="A,B", help=f"of: {', '.join(CONTENDERS)}")
    add("--lengths", type=_lengths, default=LENGTHS, metavar="T,T", help="at which memory is read")
    add("--no-memory", action="store_true", help="read no memory: four compilations less a case")
    add("--out", type=Path, default=Path("runs/bench-aot"), metavar="DIR", help="%(default)s")
    add("--no-plots", action="store_true", help="draw no picture")
    add("--write-figures", type=Path, metavar="FILE", help="keep the cycles in this file")
    add("--check", type=Path, metavar="FILE", help="compare those of a file with today's, alone")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(int(length) for length in text.split(","))
    if any(length < 1 or length % 1024 for length in lengths):
        raise argparse.ArgumentTypeError(f"lengths are multiples of 1024. Received: {text!r}.")
    return lengths
