"""What stands on the command line: every command, its options, and what the help says of them."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax_mha.demo.arguments import (
    above_zero,
    at_least,
    folder_name,
    host_and_port,
    of_many,
)

_EXAMPLES = """\
examples:
  python -m flax_mha.demo train configs/python_lm.toml
  python -m flax_mha.demo train configs/python_lm.toml --steps 200 --set attention.num_heads=2
  python -m flax_mha.demo train configs/python_lm.toml --data shakespeare.txt --out runs/plays
  python -m flax_mha.demo resume runs/plays
  python -m flax_mha.demo train configs/digits.toml --virtual-devices 4 --set mesh.data=4
  python -m flax_mha.demo train configs/digits.toml --set mesh.data=2 \
      --coordinator 10.0.0.1:7000 --process 0/2        # and 1/2 on another machine
  python -m flax_mha.demo generate runs/python_lm --prompt "class " --top-k 40 --seed 1
  python -m flax_mha.demo generate runs/python_lm --cache int8 --weights int8
  python -m flax_mha.demo adapt runs/python_lm --data README.md
  python -m flax_mha.demo generate runs/python_lm --adapter README --prompt "# "
  python -m flax_mha.demo predict runs/dates "Tuesday, the 3rd of March 1987"
  python -m flax_mha.demo inspect runs/digits 7
"""


def make_parser(does: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """Reads a command and its options; `command` of what it returns is what the command does."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_mha.demo",
        description="Train models built on flax_mha.MultiHeadAttention, and look at them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_train, _add_resume, _add_adapt, _add_generate, _add_predict, _add_inspect):
        add(commands)
    for name, command in does.items():
        commands.choices[name].set_defaults(command=command)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model, and judge it on held-out data",
        description="Train the model that a TOML file describes, and judge it on held-out data. "
        "Ctrl-C saves; `resume` goes on from there.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="the TOML file of settings")
    train.add_argument(
        "--data", type=Path, metavar="FILE", help="a language model learns from FILE instead"
    )
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="where the files go (default: runs/NAME of CONFIG)"
    )
    train.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    train.add_argument("--steps", metavar="N", help="short for --set train.steps=N")
    _add_set(train, "SECTION.KEY=VALUE", "change one setting, as attention.num_heads=4")
    _add_devices(train)
    train.add_argument("--no-plots", action="store_true", help="draw no pictures")


def _add_resume(commands: Any) -> None:
    resume = commands.add_parser(
        "resume",
        help="go on with a run that was interrupted",
        description="Go on from a run's last checkpoint, to the numbers of an uninterrupted run.",
    )
    _add_run(resume)
    _add_set(resume, "mesh.KEY=N", "go on on another mesh, as mesh.data=4")
    _add_devices(resume)
    resume.add_argument("--no-plots", action="store_true", help="draw no pictures")


def _add_set(command: argparse.ArgumentParser, what: str, purpose: str) -> None:
    purpose = f"{purpose}; may be repeated"
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar=what, help=purpose
    )


def _add_devices(command: argparse.ArgumentParser) -> None:
    devices = command.add_argument_group("many devices, as [mesh] cuts the work over them")
    devices.add_argument(
        "--virtual-devices", type=at_least(1), metavar="N", help="as many of this machine's CPU"
    )
    devices.add_argument(
        "--coordinator",
        type=host_and_port,
        metavar="HOST:PORT",
        help="over many processes: where they meet; it is served by process 0",
    )
    devices.add_argument(
        "--process", type=of_many, metavar="I/N", help="which of how many this is, from 0/N on"
    )


def _add_adapt(commands: Any) -> None:
    adapt = commands.add_parser(
        "adapt",
        help="learn another text by low-rank adapters",
        description="Train low-rank adapters (LoRA) of a finished language model's attention on "
        "another text, and save them in the run; its own parameters stay. The end of the text is "
        "held out: print its bits per byte of the base, adapted, and with the adapters merged.",
    )
    _add_run(adapt)
    adapt.add_argument("--data", type=Path, required=True, metavar="FILE", help="the other text")
    adapt.add_argument(
        "--name", type=folder_name, help="what to call the adapters (default: as FILE)"
    )
    adapt.add_argument("--overwrite", action="store_true", help="replace adapters of that name")
    adapt.add_argument("--rank", type=at_least(1), default=8, metavar="R", help="default: 8")
    adapt.add_argument(
        "--alpha", type=above_zero, metavar="X", help="the scale is X / R (default: 2 R)"
    )
    adapt.add_argument(
        "--which",
        nargs="+",
        metavar="PROJECTION",
        help="as query value (default: all that the layers have)",
    )
    adapt.add_argument("--steps", type=at_least(1), default=600, metavar="N", help="default: 600")
    adapt.add_argument(
        "--learning-rate", type=above_zero, default=0.01, metavar="X", help="default: 0.01"
    )
    adapt.add_argument("--seed", type=at_least(0), default=0, metavar="N")


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="sample text from a language model",
        description="Sample text from a trained run, and print bytes per second with a key/value "
        "cache and without; with int8, beside the run's own numbers: speed, bits per byte of "
        "held-out text, bytes of the cache and of the attention layers' weights.",
    )
    _add_run(generate)
    generate.add_argument("--prompt", default="def ", help="what the text begins with")
    generate.add_argument("--bytes", type=at_least(1), default=400, metavar="N", help="how many")
    generate.add_argument("--temperature", type=above_zero, default=0.7, metavar="X")
    generate.add_argument(
        "--top-k",
        type=at_least(0),
        default=0,
        metavar="K",
        help="draw from the K likeliest; 0 = all",
    )
    generate.add_argument("--seed", type=at_least(0), default=0, metavar="N")
    generate.add_argument("--adapter", metavar="NAME", help="with adapters that adapt has trained")
    generate.add_argument(
        "--cache",
        choices=("float32", "int8"),
        help="keys and values in these numbers (default: as the run)",
    )
    generate.add_argument(
        "--weights",
        choices=("float32", "int8"),
        help="the attention layers' weights, and no others, in these numbers (default: as the run)",
    )


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="what a model makes of digits or dates",
        description="Of dates: their ISO form. Of digits: what held-out images, by their number, "
        "are read as. Without inputs: of some held-out ones, with the truth.",
    )
    _add_run(predict)
    predict.add_argument("inputs", nargs="*", metavar="INPUT", help='as "3rd of March, 1987", or 7')


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="draw what the attention looks at",
        description="Write the attention maps of a run into it: attention.html, where layer, head "
        "and query are picked, and a PNG a layer.",
    )
    _add_run(inspect)
    inspect.add_argument(
        "input", nargs="?", metavar="INPUT", help="a text, a date, or the number of a digit"
    )
    inspect.add_argument("--no-plots", action="store_true", help="write the page alone")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="a directory that train has left")
