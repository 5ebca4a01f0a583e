"""What there is: `python -m flax_mha` prints names, implementations, commands and the platform.

All of it is read from the package itself: names from `__init__.py`, lines from docstrings.
`python -m flax_mha guide TOPIC` prints a page about one thing, `python -m flax_mha explain` which
implementation serves a call.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import platform
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import flax_mha
from flax_mha.attention.choice import RULE
from flax_mha.commands import explain
from flax_mha.commands.columns import WIDTH, section
from flax_mha.guides import pages

# A heading and the files whose names stand below it; the names are those of `__init__.py`.
GROUPS = {
    "The layer": (
        "linen",
        "functional",
        "layer.equation",
        "config.config",
        "config.latent",
        "params.tree",
        "params.initial",
    ),
    "Attention of arrays": (
        "attention.dispatch",
        "attention.explanation",
        "masks.mask",
        "masks.blocks",
        "masks.neighborhood",
        "scores",
    ),
    "Decoding": ("decoding", "layer.caches"),
    "Many devices": (
        "sharding.specs",
        "attention.context.axis",
        "attention.context_parallel",
        "attention.context.layout",
    ),
    "Training": ("training.losses", "training.updates", "params.lora", "config.lora"),
    "Serving": ("params.quantized",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the overview, or runs a command; returns the exit code.

    Example:
        >>> main([])  # doctest: +ELLIPSIS
        flax_mha ...
        0
    """
    parser = argparse.ArgumentParser(
        prog="python -m flax_mha",
        description="Prints what the package holds and what it runs on.",
        epilog=f"To run something: {', '.join(f'python -m {name}' for name in commands())}.",
    )
    subparsers = parser.add_subparsers(dest="command")
    explained = subparsers.add_parser(
        "explain",
        help="says which implementation serves a call",
        description=explain.__doc__,
        epilog="example: python -m flax_mha explain --platform tpu --shape 8x4096x8x128 "
        "--dtype bfloat16 --causal",
    )
    explain.add_arguments(explained)
    guide = subparsers.add_parser("guide", help="prints a guide")
    guide.add_argument(
        "topic", nargs="?", metavar="TOPIC", help="which guide; left out, the topics are listed"
    )
    given = parser.parse_args(arguments)
    if given.command is None:
        print("\n".join(overview()))
    elif given.command == "explain":
        explain.run(given, explained)
    else:
        print_guide(given.topic, guide)
    return 0


def print_guide(topic: str | None, parser: argparse.ArgumentParser) -> None:
    """Prints the page of a topic, or the list of topics; what is neither is the parser's error."""
    if topic is None:
        print("\n".join(list_of_guides()).lstrip())
        return
    try:
        pages.show(topic)
    except ValueError as error:
        parser.error(str(error))


def list_of_guides() -> Iterator[str]:
    """The topics of the guides, each with its sentence."""
    return section("Guides (python -m flax_mha guide TOPIC)", pages.topics())


def overview() -> Iterator[str]:
    """The lines of the overview, none longer than `WIDTH`."""
    title = f"flax_mha {flax_mha.__version__}: {first_line(flax_mha.__doc__)}"
    yield from textwrap.wrap(title, WIDTH)
    exported = exports()
    for heading, files in GROUPS.items():
        names = [name for file in files for name in exported[file]]
        yield from section(f"{heading} (from flax_mha)", {n: summary_of_name(n) for n in names})
    yield from section("Imported by their own names", {m: summary(m) for m in submodules()})
    yield from section("Implementations of attention", implementations())
    told = {"python -m flax_mha explain": first_line(explain.__doc__)}
    told |= {f"python -m {name}": summary(name) for name in commands()}
    yield from section("Commands", told)
    yield from list_of_guides()
    yield from section("Here", here())
    yield from ("", "help(flax_mha.multi_head_attention), and of any other name, says more.")


def exports() -> dict[str, list[str]]:
    """The functions and classes of `__init__.py` by the file of the package that defines them."""
    names: dict[str, list[str]] = {}
    for name in handed_on("flax_mha"):
        value = getattr(flax_mha, name)
        if callable(value):
            names.setdefault(value.__module__.removeprefix("flax_mha."), []).append(name)
    return names


def handed_on(module: str) -> dict[str, str]:
    """The names that a folder's face hands on, those that it imports as themselves: from where."""
    return {
        alias.name: str(node.module)
        for node in ast.parse(_source(module)).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def submodules() -> list[str]:
    """The public modules with names that `__init__.py` does not have."""
    modules = pkgutil.iter_modules(flax_mha.__path__, "flax_mha.")
    found = (_rooms(module.name) if module.ispkg else _file(module.name) for module in modules)
    return [name for names in found for name in names if name not in commands()]


def _rooms(folder: str) -> list[str]:
    """A folder that hands on more than `__init__.py` does; of one that gathers modules, those."""
    names = handed_on(folder)
    files = {module.name for module in pkgutil.iter_modules([str(_path(folder).parent)])}
    inner = [f"{folder}.{name}" for name in names if name in files]
    if inner and len(inner) == len(names):
        return inner
    above = handed_on("flax_mha")
    return [] if all(above.get(name, "").startswith(folder) for name in names) else [folder]


def _file(module: str) -> list[str]:
    """A file of the package's top that `__init__.py` takes nothing from."""
    short = module.removeprefix("flax_mha.")
    return [] if short in exports() or short.startswith("_") else [module]


def commands() -> list[str]:
    """The packages that `python -m` runs."""
    modules = pkgutil.iter_modules(flax_mha.__path__, "flax_mha.")
    packages = [module.name for module in modules if module.ispkg]
    return [name for name in packages if _path(name).with_name("__main__.py").exists()]


def implementations() -> dict[str, str]:
    """Each implementation's line, and what None chooses."""
    lines = {name: first_line(module.__doc__) for name, module in flax_mha.IMPLEMENTATIONS.items()}
    return lines | {"None": f"{RULE}; `flax_mha.explain` says which serves a call, or why not."}


def here() -> dict[str, str]:
    """The versions and the devices of this machine."""
    packages = ("jax", "flax", "optax", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    try:
        devices = [device.device_kind for device in jax.devices()]
        runs_on = f"{jax.default_backend()}: {len(devices)} x {devices[0]}"
    except (RuntimeError, AssertionError) as error:  # JAX's, for a platform that is not there
        runs_on = f"nothing, with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: {error!r}"
    return {
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "JAX runs on": runs_on,
    }


def summary_of_name(name: str) -> str:
    return first_line(inspect.getdoc(getattr(flax_mha, name)))


def summary(module: str) -> str:
    """The first line of a module, which is not imported for it."""
    return first_line(ast.get_docstring(ast.parse(_source(module))))


def _source(module: str) -> str:
    return _path(module).read_text()


def _path(module: str) -> pathlib.Path:
    spec: Any = importlib.util.find_spec(module)
    return pathlib.Path(spec.origin)


def first_line(docstring: str | None) -> str:
    return (docstring or "").split("\n")[0]


if __name__ == "__main__":
    raise SystemExit(main())
