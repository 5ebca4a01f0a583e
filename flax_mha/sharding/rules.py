"""Rules from names of axes to axes of a mesh, in one checked form: a tuple of pairs."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from flax_mha.core import checks

Axes: TypeAlias = str | tuple[str, ...] | None
Rules: TypeAlias = tuple[tuple[str, Axes], ...]

# The letters of the parameters' axes, by the names that MaxText, T5X and Flax's examples use.
AXIS_NAMES = {
    "D": "embed",
    "C": "embed",
    "M": "embed",
    "E": "embed",
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "V": "head_dim",
    "U": "head_dim",
    "W": "head_dim",
    "L": "kv_lora",
    "Q": "q_lora",
    "X": "relpos_buckets",
}


def checked(rules: Any) -> Rules:
    """Pairs (key, mesh axes), hashable; a mapping's keys become letters. Pairs return as they are.

    Of a mapping every key must be known, and a letter goes before a name. A sequence of pairs may
    be a whole model's: the names that no attention has are passed over, the first rule counts.
    """
    if isinstance(rules, Mapping):
        checks.known_names("An axis in `rules`", rules, valid_keys())
        found = {x: rules.get(x, rules.get(name)) for x, name in AXIS_NAMES.items()}
        given = [x for x, name in AXIS_NAMES.items() if x in rules or name in rules]
        return tuple((letter, _axes(letter, found[letter])) for letter in given)
    return tuple((key, _axes(key, axes)) for key, axes in _pairs(rules))


def valid_keys() -> list[str]:
    return [*AXIS_NAMES, *dict.fromkeys(AXIS_NAMES.values())]


def _pairs(rules: Any) -> list[Any]:
    rule = '`rules` must be a mapping, or a sequence of pairs: {"N": "model"} or (("N", "model"),).'
    if not isinstance(rules, tuple | list):
        checks.fail(TypeError, rule, f"{rules!r} of type {type(rules).__name__}")
    for pair in rules:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        if not is_pair:
            checks.fail(TypeError, rule, f"{pair!r} among them")
    return list(rules)


def _axes(key: str, value: Any) -> Axes:
    """One name of a mesh axis as it is, several as a tuple."""
    if value is None or isinstance(value, str):
        return value
    rule = f"The rule for {key!r} must be the name of a mesh axis, a tuple of names, or None."
    is_names = isinstance(value, tuple | list) and all(isinstance(x, str) for x in value)
    if not is_names:
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")
    return (value[0] if len(value) == 1 else tuple(value)) if value else None
