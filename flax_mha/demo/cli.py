"""The command line: `python -m flax_mha.demo train CONFIG`, and what can be done with a run.

What a command needs is imported when it runs: `--help` is quick, and needs no optional package.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax_mha.demo.options import make_parser
from flax_mha.demo.settings import DemoError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0; 2 for a user's mistake; 130 for Ctrl-C; of a run over many processes 3, where one was lost.

    Example:
        >>> main(["train", "no_such_file.toml"])
        2
    """
    does = {
        "train": _train,
        "resume": _resume,
        "adapt": _adapt,
        "generate": _generate,
        "predict": _predict,
        "inspect": _inspect,
    }
    options = make_parser(does).parse_args(arguments)
    return _answered(_watched if getattr(options, "process", None) else options.command, options)


def _answered(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    try:
        return command(options)
    except (DemoError, OSError) as error:  # of the user's, or of the user's disk
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
        from flax_mha.demo.directory import after_a_loss

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


def _adapt(options: argparse.Namespace) -> int:
    from flax_mha.demo.adapt import Wishes, adapt

    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(Wishes)}
    adapt(options.run, Wishes(**chosen))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from flax_mha.demo.generate import Sampling, Storage

    how = Sampling(options.temperature, options.top_k, options.seed)
    stored = Storage(options.cache, options.weights)
    task, params, screen = _opened(options.run)
    if options.adapter is not None:
        from flax_mha.demo.adapters import with_adapter

        task, params = with_adapter(options.run, task, params, options.adapter)
    task.generate(params, options.prompt, options.bytes, how, screen, stored)
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
