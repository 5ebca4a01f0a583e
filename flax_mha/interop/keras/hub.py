"""A layer of a KerasHub model in a file: its config by its class, whole or refused by name.

config.json describes the model (or a KerasHub block in somebody's own model). backbones.py says
which class the layer is of and what it was made with, classes.py what that means.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.interop.keras.arguments import NO_OPTIONS, Arguments, Options
from flax_mha.interop.keras.backbones import MODELS, Model, Part
from flax_mha.interop.keras.calls import causal_in_calls
from flax_mha.interop.keras.classes import CAUSAL, ROWS, Row, Words
from flax_mha.interop.keras.config import nearest, registered
from flax_mha.interop.keras.layers import Contents, Layer
from flax_mha.interop.keras.tree import Stored
from flax_mha.keras.policies import policy_dtypes

DAMAGE = (AttributeError, ArithmeticError, KeyError, TypeError, ValueError)


class Found(NamedTuple):
    """A layer in the table: its model's row, its place there, its class's row, its arguments."""

    name: str
    entry: Mapping[str, Any]
    above: str
    model: Model
    part: Part
    number: int
    arguments: Arguments

    @property
    def row(self) -> Row:
        return ROWS[self.part.row]


def check_known(contents: Contents) -> None:
    """Of the models that the file describes, none may hold attention that is not found."""
    for entry in contents.described.values():
        name = registered(entry)
        if name is not None and name.endswith("Backbone") and name not in MODELS:
            _unknown_model(name, repr(name))
    if not contents.attention:
        rule = "The file must hold an attention layer."
        checks.fail(ValueError, rule, "none that is known by its arrays")


def _unknown_model(name: str, evidence: str) -> NoReturn:
    rule = f"A model of KerasHub must be among {sorted(MODELS)}, to tell its layers' configs."
    remedy = "Pass `config=` to `load_keras_file`, from reading the model's source."
    checks.fail(ValueError, rule, evidence, remedy)


def found_in_table(layer: Layer, contents: Contents, options: Options = NO_OPTIONS) -> Found | None:
    """The rows of a layer that KerasHub made; None for a layer of another's.

    Raises:
        ValueError: a model of KerasHub that is not in the table.
    """
    above = nearest(layer.path, contents.described)
    entry = contents.described[above]
    name = registered(entry)
    if name is None:
        return None
    if name not in MODELS:
        _unknown_model(name, f"{name!r}, which holds {layer.path!r}")
    for part in MODELS[name].parts:
        number = part.number(layer.path.removeprefix(above).removeprefix("/"))
        if number is not None:
            arguments = Arguments.of_fields(repr(name), _fields(entry))
            arguments.max_length = options.max_length
            arguments.given["hidden_dim"] = _features(layer, part)
            with usable(name):
                arguments.given |= part.given(arguments, number)
            return Found(name, entry, above, MODELS[name], part, number, arguments)
    return None


@contextlib.contextmanager
def usable(name: str) -> Iterator[None]:
    """Turns what nonsense in a model's fields raises into one error."""
    try:
        yield
    except DAMAGE as error:
        rule = f"config.json's description of {name!r} must be one that can be used here."
        checks.fail(ValueError, rule, f"{type(error).__name__}: {error}".rstrip("."))


def _fields(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    fields = entry.get("config")
    return fields if isinstance(fields, Mapping) else {}


def _features(layer: Layer, part: Part) -> int:
    """D, of the query's kernel."""
    shape = layer.arrays["query", "kernel"][1].shape
    axis = 1 if ROWS[part.row].kernel_axes == "NDH" else 0
    return (shape[axis : axis + 1] or (0,))[0]


def hub_config(found: Found, options: Options) -> MultiHeadAttentionConfig:
    """The layer's config, of every field that is set and makes a difference to attention."""
    arguments, fields = found.arguments, _fields(found.entry)
    with usable(found.name):
        words = found.row.config(arguments) | policy_dtypes(fields.get("dtype"))
        config = MultiHeadAttentionConfig(**words)
    unread = arguments.unread(found.model.others | {"hidden_dim"})
    refused = dict.fromkeys(unread, "it is not known here") | arguments.refused
    refused = {name: why for name, why in refused.items() if name not in options.ignore}
    if refused:
        evidence = "; ".join(f"{name}={fields[name]!r}: {why}" for name, why in refused.items())
        told = (
            f"Without it: `load_attention(..., ignore={list(refused)})`, or `config=`"
            f"MultiHeadAttentionConfig(**{shown(words)})."
        )
        rule = f"Every field of {found.name!r} must be understood."
        checks.fail(ValueError, rule, evidence, told)
    return config


def shown(words: Words) -> str:
    return "{" + ", ".join(f"{name!r}: {value!r}" for name, value in words.items()) + "}"


def hub_call(found: Found) -> Words:
    """What every call of the layer passes."""
    with usable(found.name):
        call = found.row.call(found.arguments)
    if found.model.asked and call:
        return CAUSAL if causal_in_calls(found.entry, default=True) else {}
    return call


def table_of(found: Found, contents: Contents) -> tuple[str, Stored] | None:
    """The table of distances that another layer owns, where this one uses it."""
    if found.part.table is None:
        return None
    with usable(found.name):
        owner = found.part.table(found.arguments, found.number)
    path = f"{found.above}/{owner}/vars/0".lstrip("/")
    if path not in contents.tree.arrays:
        rule = f"The file must hold the table of distances of {found.name!r}."
        checks.fail(ValueError, rule, f"nothing at {path!r}")
    return path, contents.tree.arrays[path]
