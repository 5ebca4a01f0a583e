"""Reads settings from TOML and from `--set section.key=value`; refuses what no task has."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_mha import MultiHeadAttentionConfig
from flax_mha.demo.settings import FIXED_ATTENTION, SECTIONS, DemoError, MeshSettings, Settings
from flax_mha.demo.tasks import TASKS

_SECTIONS = ("task", *SECTIONS, "attention")


def read_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings in a TOML file, with `section.key=value` strings applied over it.

    Raises:
        DemoError: the file cannot be read, or holds something unknown or of the wrong type.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"cannot read the settings: {error}") from error
    # TOMLDecodeError, and what Python says of ints of thousands of digits and of deep arrays.
    except (ValueError, RecursionError) as error:
        raise DemoError(f"{path} is not valid TOML: {error}") from error
    for text in overrides:
        _apply(tables, text)
    return settings_from(tables)


def with_mesh(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The settings on another mesh: all else of a run stays as it began.

    Raises:
        DemoError: what is to change is not in `[mesh]`, or is no size.
    """
    tables: dict[str, Any] = settings.to_dict()
    for text in overrides:
        if not text.strip().startswith("mesh."):
            rule = "a run goes on with its own settings: only [mesh] may change, as mesh.data=2"
            raise DemoError(f"{rule}. Received: --set {text}.")
        _apply(tables, text)
    return settings_from(tables)


def settings_from(tables: Mapping[str, Any]) -> Settings:
    """Checked settings from plain tables; a section left out has its defaults."""
    _known("section", tables, _SECTIONS)
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise DemoError(f"[{name}] must be a section. Received: {name} = {table!r}.")
    task = _task(tables.get("task", {}))
    sections = {name: _section(name, tables.get(name, {}), task) for name in SECTIONS}
    attention = _attention(tables.get("attention", {}), sections["model"].features)
    return Settings(task=task, attention=attention, **sections)


def parse_value(text: str) -> Any:
    """A TOML value; a bare word, which TOML has not, is a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def _apply(tables: dict[str, Any], text: str) -> None:
    """One `section.key=value` into the tables."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise DemoError(f"--set takes SECTION.KEY=VALUE, as train.steps=100. Received: {text!r}.")
    _known("section", [section], _SECTIONS)
    table = tables.setdefault(section, {})
    if isinstance(table, dict):
        table[key] = parse_value(value.strip())


def _task(table: Mapping[str, Any]) -> str:
    """The name in `[task]`, which must be there: nothing is trained by default."""
    _known("key of [task]", table, ["name"])
    if "name" not in table:
        raise DemoError(f"the settings must name a task: [task] name = one of {_names(TASKS)}.")
    _known("task", [table["name"]], TASKS)
    return table["name"]


def _section(name: str, table: Mapping[str, Any], task: str) -> Any:
    section = MeshSettings if name == "mesh" else TASKS[task].sections[name]
    fields = {field.name: field for field in dataclasses.fields(section)}
    _known(f"key of [{name}] in the task {task!r}", table, fields)
    return section(**{key: _checked(f"{name}.{key}", table[key], fields[key]) for key in table})


def _checked(name: str, value: Any, field: Any) -> Any:
    """`value` as the field's type; a whole number may stand for a fraction, but True is not 1."""
    kind = field.type
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        received = f"{value!r} of type {type(value).__name__}"
        raise DemoError(f"{name} must be of type {kind.__name__}. Received: {received}.")
    if kind in (int, float):
        _in_range(name, value, **field.metadata)
    return value


def _in_range(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
) -> None:
    if isinstance(value, int) and value >= 2**31:  # a seed and a count alike are 32 bits
        shown = value if value < 2**64 else f"an int of {value.bit_length()} bits"
        raise DemoError(f"{name} must be below 2**31. Received: {shown}.")
    least = (1 if isinstance(value, int) else 0) if least is None else least
    # Negated, so that NaN is refused too.
    if not value >= least or value == math.inf:
        raise DemoError(f"{name} must be a number of at least {least}. Received: {value!r}.")
    if above is not None and value <= above:
        raise DemoError(f"{name} must be above {above}. Received: {value!r}.")
    if value >= below:
        raise DemoError(f"{name} must be below {below}. Received: {value!r}.")


def _attention(table: Mapping[str, Any], features: int) -> MultiHeadAttentionConfig:
    """`[attention]`: 4 heads that share the features, unless the table says otherwise."""
    names = [field.name for field in dataclasses.fields(MultiHeadAttentionConfig)]
    _known("key of [attention]", table, [name for name in names if name not in FIXED_ATTENTION])
    heads = table.get("num_heads", 4)
    # A wrong number of heads is left for the config to refuse.
    share = features // heads if isinstance(heads, int) and heads > 0 else 1
    try:
        return MultiHeadAttentionConfig(**{"num_heads": heads, "key_dim": max(share, 1), **table})
    except (TypeError, ValueError) as error:
        raise DemoError(f"[attention] {error}") from error


def _known(what: str, names: Iterable[Any], valid: Iterable[str]) -> None:
    valid = list(valid)
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(str(name), valid, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise DemoError(f"unknown {what}: {name!r}.{hint} Valid: {_names(valid)}.")


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
