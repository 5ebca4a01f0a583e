"""Labels of tokens: visible whatever they hold, and no more of them than can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from flax_mha.core import checks
from flax_mha.plots.checks import panel_count

_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
_LONGEST = 24
_REMEDY = "Pass bytes as `text.decode('latin-1')`, an array of token ids as `ids.tolist()`."


def labels_of(name: str, labels: Any, count: int, letter: str) -> list[str] | None:
    """The visible form of `count` labels, or None where none are given."""
    if labels is None:
        return None
    rule = f"`{name}` must be a sequence of {letter} = {count} strings."
    if isinstance(labels, bytes) or not isinstance(labels, (Sequence, np.ndarray)):
        checks.fail(TypeError, rule, f"{name} of type {type(labels).__name__}", _REMEDY)
    for label in labels:
        if not isinstance(label, (str, Integral)):
            checks.fail(TypeError, rule, f"an entry of type {type(label).__name__}", _REMEDY)
    if len(labels) != count:
        checks.fail(ValueError, rule, f"{len(labels)} labels")
    return [visible(str(label)) for label in labels]


def visible(label: str) -> str:
    r"""A label that can be read: blanks at its ends and control characters are drawn as signs.

    Example:
        >>> [visible(label) for label in (" the", "a b", "\n", "\x1b", "")]
        ['␣the', 'a b', '↵', '\\x1b', '']
    """
    inner = label.strip(" ")
    start = len(label) - len(label.lstrip(" "))
    blanks = "␣" * start, "␣" * (len(label) - len(inner) - start)
    text = blanks[0] + "".join(map(_visible_character, inner)) + blanks[1]
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _visible_character(character: str) -> str:
    if character == " " or character.isprintable():
        return character
    return _VISIBLE.get(character, character.encode("unicode_escape").decode())


def step_between(count: int, fits: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that leaves at most `fits` of `count` labels.

    Example:
        >>> [step_between(count, 20) for count in (20, 21, 64, 1000)]
        [1, 2, 5, 50]
    """
    wanted = count / max(fits, 1)
    power = 10 ** max(math.floor(math.log10(wanted)), 0) if wanted > 1 else 1
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= wanted)


def head_names(labels: Any, is_single: bool, N: int) -> list[str]:
    """What stands above the panels of N heads."""
    panel_count(N, "head")
    given = labels_of("head_labels", labels, N, "N")
    return given or ([""] if is_single else [f"head {n}" for n in range(N)])
