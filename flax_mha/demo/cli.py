"""The command line: `python -m flax_mha.demo train CONFIG`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flax_mha.demo.config_file import read_settings
from flax_mha.demo.run import run
from flax_mha.demo.settings import DemoError
from flax_mha.demo.tasks import load_split

_EXAMPLES = """\
examples:
  python -m flax_mha.demo train configs/python_lm.toml
  python -m flax_mha.demo train configs/python_lm.toml --steps 200 --set attention.num_heads=2
  python -m flax_mha.demo train configs/python_lm.toml --data shakespeare.txt --out runs/plays
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C.

    Example:
        >>> main(["train", "no_such_file.toml"])
        2
    """
    options = _parser().parse_args(arguments)
    try:
        _train(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was saved", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    steps = [] if options.steps is None else [f"train.steps={options.steps}"]
    settings = read_settings(options.config, [*options.overrides, *steps])
    directory = options.out or Path("runs") / options.config.stem
    split = load_split(settings.data, options.data)
    run(settings, split, directory, pictures=not options.no_plots)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flax_mha.demo",
        description="Train a byte-level language model built on flax_mha.MultiHeadAttention.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train a model, and compare it with compressors",
        description="Train a model on text and compare it with lzma, bz2 and zlib on text that "
        "it has not seen. The text is the source of Python's own standard library.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="the TOML file of settings")
    train.add_argument("--data", type=Path, metavar="FILE", help="learn from FILE instead")
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="where the files go (default: runs/NAME of CONFIG)"
    )
    train.add_argument("--steps", metavar="N", help="short for --set train.steps=N")
    train.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting, as attention.num_heads=4; may be repeated",
    )
    train.add_argument("--no-plots", action="store_true", help="draw no pictures")
