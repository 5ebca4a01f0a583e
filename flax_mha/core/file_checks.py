"""Checks of what readers and writers of files are handed: paths, and objects by their names."""

import os
import pathlib
from typing import Any

from flax_mha.core import checks


def path(name: str, value: Any) -> pathlib.Path:
    """A path that is spelled out; a number would be a file that is open already, and be closed."""
    rule = f"`{name}` must be a path, a string or an os.PathLike."
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        checks.fail(ValueError, rule, f"{value!r}")
    return pathlib.Path(value)


def new_file(name: str, value: Any) -> pathlib.Path:
    """Where a file can be written or replaced."""
    target = path(name, value)
    if target.is_dir() or not target.parent.is_dir():
        rule = f"`{name}` must be a file, or a new one in a folder that is there."
        checks.fail(ValueError, rule, f"{str(target)!r}")
    return target


def by_name(name: str, value: Any, kind: type) -> None:
    """A mapping of names to objects of a kind."""
    checks.mapping(name, value)
    for key, one in value.items():
        checks.instance(f"{name}[{key!r}]", one, kind)
