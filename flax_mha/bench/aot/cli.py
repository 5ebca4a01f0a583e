"""The command line: `python -m flax_mha.bench aot`."""

import argparse
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from flax_mha.bench import command
from flax_mha.bench.aot import kept, plots, report
from flax_mha.bench.aot.cases import CASES, LENGTHS
from flax_mha.bench.aot.compile import DUMP, environment, libtpu_version
from flax_mha.bench.aot.contenders import CONTENDERS
from flax_mha.bench.aot.figures import Figure
from flax_mha.bench.aot.measure import Settings, figures
from flax_mha.bench.plots import require_matplotlib

WIDTH = 100  # of a file; a terminal has its own
Keep = Callable[[Sequence[Figure]], None]

_EXAMPLES = """\
examples:
  python -m flax_mha.bench aot --topology v5e:2x2 --topology v6e:2x2
  python -m flax_mha.bench aot --cases causal,bias --contenders blockwise,'splash 1024'
  python -m flax_mha.bench aot --check tests/bench/aot/figures.json
"""


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Compiles and prints; 1 where a figure has grown, 3 where it is another compiler's, else 0."""
    settings = _settings(options)
    libtpu_version()
    if DUMP not in os.environ:
        return _in_a_process_that_dumps(words)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.check:
        return _check(options.check, settings, console)
    if not options.no_plots:
        require_matplotlib()
    keep = functools.partial(_keep, options.out / "aot.json", command.line(words))
    keep(())  # says at the start that it cannot be written
    found = _measured(settings, console, keep)
    for topology in settings.topologies:
        report.print_cycles(console, topology, found)
        report.print_memory(console, topology, found)
    report.print_notes(console)
    if not options.no_plots:
        plots.plot(found, options.out / "aot.png")
    if options.write_figures:
        kept.write(found, options.write_figures)
    return 0


def _in_a_process_that_dumps(words: Sequence[str]) -> int:
    """The same command anew: libtpu reads its flags from the environment, once."""
    anew = [sys.executable, "-m", "flax_mha.bench", *words]
    with tempfile.TemporaryDirectory(prefix="flax_mha-aot-") as dump:
        try:
            return subprocess.run(anew, env=environment(dump)).returncode
        except KeyboardInterrupt:
            return 130  # it is interrupted too, and says what is left


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


def _keep(path: Path, line: str, found: Sequence[Figure]) -> None:
    """All figures as JSON, with what they depend on."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"command": line, "date": date, "compilers": kept.compilers(), "note": report.NOTES}
    result = about | {"figures": [figure.to_dict() for figure in found]}
    command.write(json.dumps(result, indent=2), path)


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


def _settings(options: argparse.Namespace) -> Settings:
    cases, contenders = options.cases, options.contenders
    topologies = options.topology or ["v5e:2x2"]
    if options.check:
        wanted = kept.wanted(kept.read(options.check))
        topologies, cases, contenders = wanted.values()
    return Settings(
        topologies=tuple(dict.fromkeys(topologies)),
        cases=[CASES[name] for name in command.chosen("case", cases or CASES, CASES)],
        contenders=[
            CONTENDERS[name]
            for name in command.chosen("contender", contenders or CONTENDERS, CONTENDERS)
        ],
        lengths=() if options.check or options.no_memory else options.lengths,
    )


def parser() -> argparse.ArgumentParser:
    """The options of `aot`."""
    description = (
        "What the TPU's compiler says of every implementation, beside jax's splash attention: "
        "cycles a tile by the static schedule, and memory. No TPU is needed, libtpu is."
    )
    made = command.parser("aot", description, _EXAMPLES)
    add = made.add_argument
    add("--topology", action="append", metavar="NAME", help="v5e:2x2 (default), v5p:2x2x1, v6e:2x2")
    add("--cases", type=command.comma_separated, metavar="A,B", help=f"of: {', '.join(CASES)}")
    command.add_contenders(made, CONTENDERS)
    add("--lengths", type=_lengths, default=LENGTHS, metavar="T,T", help="at which memory is read")
    add("--no-memory", action="store_true", help="read no memory: four compilations less a case")
    add("--out", type=Path, default=Path("runs/bench-aot"), metavar="DIR", help="%(default)s")
    add("--no-plots", action="store_true", help="draw no picture")
    add("--write-figures", type=Path, metavar="FILE", help="keep the cycles in this file")
    add("--check", type=Path, metavar="FILE", help="compare those of a file with today's, alone")
    return made


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(int(length) for length in text.split(","))
    if any(length < 1 or length % 1024 for length in lengths):
        raise argparse.ArgumentTypeError(f"lengths are multiples of 1024. Received: {text!r}.")
    return lengths
