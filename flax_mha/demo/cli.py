"""The command line: `python -m flax_mha.demo train CONFIG`, and what can be done with a run.

What a command needs is imported when it runs: `--help` is quick, and needs no optional package.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax_mha.demo.arguments import above_zero, at_least, host_and_port, of_many
from flax_mha.demo.settings import DemoError

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
  python -m flax_mha.demo predict runs/dates "Tuesday, the 3rd of March 1987"
  python -m flax_mha.demo inspect runs/digits 7
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0; 2 for a user's mistake; 130 for Ctrl-C; of a run over many processes 3, where one was lost.

    Example:
        >>> main(["train", "no_such_file.toml"])
        2
    """
    options = _parser().parse_args(arguments)
    return _answered(_watched if getattr(options, "process", None) else options.command, options)


def _answered(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    try:
        return command(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was changed", file=sys.stderr)
        return 130


def _watched(options: argparse.Namespace) -> int:
    """One process of many: a child does the work, and this one says so if it is lost."""
    from flax_mha.demo.processes import supervise

    place = _place(options)

    def how_to_go_on() -> str:
        from flax_mha.demo.run import after_a_loss

        return after_a_loss(_run_path(options), place)

    return supervise(_answered, (options.command, options), place, how_to_go_on)


def _place(options: argparse.Namespace) -> Any:
    from flax_mha.demo.processes import Place

    if (options.process is None) != (options.coordinator is None):
        rule = "--coordinator HOST:PORT and --process I/N need each other"
        raise DemoError(f"{rule}: one says where the processes meet, one which of them this is.")
    return options.process and Place(options.coordinator, *options.process)


def _run_path(options: argparse.Namespace) -> Path:
    """Of a new run, or of one that is there."""
    if hasattr(options, "run"):
        return options.run
    return options.out or Path("runs") / options.config.stem


def _make_virtual(options: argparse.Namespace) -> None:
    """Before any device is asked for: there is no changing it later."""
    if options.virtual_devices is not None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.virtual_devices)


def _train(options: argparse.Namespace) -> int:
    from flax_mha.demo.config_file import read_settings
    from flax_mha.demo.run import start

    _make_virtual(options)
    changes = list(options.overrides)
    if options.data is not None:
        # JSON's strings are TOML's; absolute, so that the run is resumed from anywhere.
        changes.append(f"data.file={json.dumps(str(options.data.absolute()))}")
    if options.steps is not None:
        changes.append(f"train.steps={options.steps}")
    settings = read_settings(options.config, changes)
    run = lambda: start(  # noqa: E731
        settings,
        _run_path(options),
        pictures=not options.no_plots,
        overwrite=options.overwrite,
        place=_place(options),
    )
    return _told_how_to_go_on(run)


def _resume(options: argparse.Namespace) -> int:
    from flax_mha.demo.run import resume

    _make_virtual(options)
    run = lambda: resume(  # noqa: E731
        options.run,
        pictures=not options.no_plots,
        overrides=options.overrides,
        place=_place(options),
    )
    return _told_how_to_go_on(run)


def _told_how_to_go_on(run: Callable[[], None]) -> int:
    from flax_mha.demo.run import Interrupted

    try:
        run()
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        return 130
    return 0


def _generate(options: argparse.Namespace) -> int:
    from flax_mha.demo.generate import Sampling

    how = Sampling(options.temperature, options.top_k, options.seed)
    task, params, screen = _opened(options.run)
    task.generate(params, options.prompt, options.bytes, how, screen)
    return 0


def _predict(options: argparse.Namespace) -> int:
    task, params, screen = _opened(options.run)
    task.predict(params, options.inputs, screen)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from flax_mha.demo.run import inspect

    inspect(options.run, options.input, pictures=not options.no_plots)
    return 0


def _opened(path: Path) -> Any:
    """The task, the parameters and a screen of a run, which need not be finished."""
    from flax_mha.demo.run import opened

    return opened(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flax_mha.demo",
        description="Train models built on flax_mha.MultiHeadAttention, and look at them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_resume(commands)
    _add_generate(commands)
    _add_predict(commands)
    _add_inspect(commands)
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
    train.set_defaults(command=_train)
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
    resume.set_defaults(command=_resume)
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


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="sample text from a language model",
        description="Sample text from a trained run, and print bytes per second with a key/value "
        "cache and without.",
    )
    generate.set_defaults(command=_generate)
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


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="what a model makes of digits or dates",
        description="Of dates: their ISO form. Of digits: what held-out images, by their number, "
        "are read as. Without inputs: of some held-out ones, with the truth.",
    )
    predict.set_defaults(command=_predict)
    _add_run(predict)
    predict.add_argument("inputs", nargs="*", metavar="INPUT", help='as "3rd of March, 1987", or 7')


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="draw what the attention looks at",
        description="Write the attention maps of a run into it: attention.html, where layer, head "
        "and query are picked, and a PNG a layer.",
    )
    inspect.set_defaults(command=_inspect)
    _add_run(inspect)
    inspect.add_argument(
        "input", nargs="?", metavar="INPUT", help="a text, a date, or the number of a digit"
    )
    inspect.add_argument("--no-plots", action="store_true", help="write the page alone")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="a directory that train has left")
