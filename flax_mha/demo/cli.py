"""The command line: `python -m flax_mha.demo train CONFIG`, and `... generate RUN`."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flax_mha.demo.config_file import read_settings
from flax_mha.demo.generate import Sampling
from flax_mha.demo.run import run
from flax_mha.demo.sample import sample
from flax_mha.demo.settings import DemoError
from flax_mha.demo.tasks import load_split

_EXAMPLES = """\
examples:
  python -m flax_mha.demo train configs/python_lm.toml
  python -m flax_mha.demo train configs/python_lm.toml --steps 200 --set attention.num_heads=2
  python -m flax_mha.demo train configs/python_lm.toml --data shakespeare.txt --out runs/plays
  python -m flax_mha.demo generate runs/python_lm --prompt "class " --top-k 40 --seed 1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C.

    Example:
        >>> main(["train", "no_such_file.toml"])
        2
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {options.interrupted}", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    steps = [] if options.steps is None else [f"train.steps={options.steps}"]
    settings = read_settings(options.config, [*options.overrides, *steps])
    directory = options.out or Path("runs") / options.config.stem
    split = load_split(settings.data, options.data)
    run(settings, split, directory, pictures=not options.no_plots)


def _generate(options: argparse.Namespace) -> None:
    how = Sampling(options.temperature, options.top_k, options.seed)
    sample(options.run, options.prompt, options.bytes, how)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flax_mha.demo",
        description="Train a byte-level language model built on flax_mha.MultiHeadAttention.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_generate(commands)
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
    train.set_defaults(command=_train, interrupted="nothing was saved")
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


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="sample text from a trained run",
        description="Sample text from a trained run, and print bytes per second with a key/value "
        "cache and without.",
    )
    generate.set_defaults(command=_generate, interrupted="the run is as it was")
    generate.add_argument("run", type=Path, metavar="RUN", help="a directory that train has left")
    generate.add_argument("--prompt", default="def ", help="what the text begins with")
    generate.add_argument("--bytes", type=_at_least(1), default=400, metavar="N", help="how many")
    generate.add_argument("--temperature", type=_above_zero, default=0.7, metavar="X")
    generate.add_argument(
        "--top-k",
        type=_at_least(0),
        default=0,
        metavar="K",
        help="draw from the K likeliest; 0 = all",
    )
    generate.add_argument("--seed", type=_at_least(0), default=0, metavar="N")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, not {text!r}")
        return int(text)

    return number


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value
