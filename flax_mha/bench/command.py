"""What the command lines share: their words, a user's mistakes, and the file of a run."""

import argparse
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


class BenchError(Exception):
    """A mistake of the user's: printed as `error: ...`, without a traceback."""


def line(words: Sequence[str]) -> str:
    """The command as a shell reads it."""
    return shlex.join(["python", "-m", "flax_mha.bench", *words])


def parser(words: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of `python -m flax_mha.bench` and these words."""
    return argparse.ArgumentParser(
        prog=f"python -m flax_mha.bench {words}".strip(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_contenders(parser: argparse.ArgumentParser, there: Iterable[str]) -> None:
    """The option `--contenders A,B`."""
    told = f"of: {', '.join(there)}"
    parser.add_argument("--contenders", type=comma_separated, metavar="A,B", help=told)


def add_cases(parser: argparse.ArgumentParser, contenders: Iterable[str], seconds: float) -> None:
    """The options of a benchmark that takes times: which cases, of whom, and for how long."""
    add_contenders(parser, contenders)
    add_timing(parser, seconds)


def add_timing(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Which cases, and for how long."""
    parser.add_argument("--case", dest="cases", action="append", default=[], help="see below")
    told = f"of timing a case, shared by all that is timed (default: {seconds:g})"
    parser.add_argument("--seconds", type=float, default=seconds, metavar="N", help=told)
    told = "of each, whatever the seconds"
    parser.add_argument("--rounds", type=positive, metavar="N", help=told)


def comma_separated(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def chosen(what: str, names: Iterable[str], there: Iterable[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        BenchError: there is none of this name.

    Example:
        >>> chosen("contender", ["ours", "keras", "ours"], ["keras", "linen", "ours"])
        ('ours', 'keras')
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        if name not in there:
            raise BenchError(f"no {what} {name!r}. There are: {', '.join(there)}.")
    return names


def write(text: str, path: Path) -> None:
    """Replaces a file as a whole; one that is interrupted leaves what was there.

    Raises:
        BenchError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".unfinished-{path.name}")
        unfinished.write_text(text + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise BenchError(f"cannot write the run's files: {error}") from error
