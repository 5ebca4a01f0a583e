"""Pairs of a spelling and its ISO date, as tokens; days that are held out are never trained on.

Tokens of the source: 0 is padding, the characters follow. Of the target: the digits and "-", which
are predicted, then the token that stands before the first of them.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flax_mha.demo.data.spellings import CHARACTERS, FIRST_YEAR, LONGEST, SPELLINGS
from flax_mha.demo.settings import DemoError

ISO_CHARACTERS = "0123456789-"
START = len(ISO_CHARACTERS)
ISO_LENGTH = len("1987-03-21")
SOURCE_TOKENS = 1 + len(CHARACTERS)
_FIRST, _LAST = datetime.date(FIRST_YEAR, 1, 1), datetime.date(FIRST_YEAR + 99, 12, 31)
_SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class DateSettings:
    """How many of the 36,525 days from 1950 to 2049 are not learned from, in any spelling."""

    held_out: int = 3000
    validation: int = 500


class Dates(NamedTuple):
    """Spellings and the ISO dates that they mean."""

    source_BS: np.ndarray  # int32
    target_BT: np.ndarray  # int32


class Split(NamedTuple):
    """Days by their number since the first, in three disjoint parts."""

    train: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray


def split_days(settings: DateSettings) -> Split:
    """All days in a random order that is always the same, cut in three.

    Raises:
        DemoError: no day is left to learn from.
    """
    count = (_LAST - _FIRST).days + 1
    judged = settings.held_out + settings.validation
    if judged >= count:
        rule = f"data.held_out + data.validation must be below the number of days, {count}"
        raise DemoError(f"{rule}. Received: {settings.held_out} + {settings.validation}.")
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    held_out, validation, train = np.split(order, [settings.held_out, judged])
    return Split(train, validation, held_out)


class Written(NamedTuple):
    """A day, how it is spelled, and the text."""

    day: datetime.date
    style: str
    text: str


def write(days: Sequence[int] | np.ndarray, rng: np.random.Generator) -> list[Written]:
    """Each day in a random spelling."""
    chosen = rng.integers(len(SPELLINGS), size=len(days))
    dates = [date_of(day) for day in days]
    spellings = [SPELLINGS[i] for i in chosen]
    return [Written(d, s.style, s.write(d)) for d, s in zip(dates, spellings)]


def date_of(day: int) -> datetime.date:
    """The day by its number since the first."""
    return _FIRST + datetime.timedelta(int(day))


def batch_of(days: np.ndarray, size: int, seed: tuple[int, int]) -> Dates:
    """Random days in random spellings, as tokens."""
    rng = np.random.default_rng(seed)
    written = write(rng.choice(days, size), rng)
    return Dates(
        encode([w.text for w in written]), encode_iso([w.day.isoformat() for w in written])
    )


def encode(texts: Sequence[str]) -> np.ndarray:
    """`[B, S]` tokens, padded behind to the longest spelling there is.

    Raises:
        DemoError: a text is longer, empty, or has a character that no spelling has.
    """
    for text in texts:
        unknown = sorted({*text} - {*CHARACTERS})
        if unknown:
            rule = "a date is written with English letters, digits, spaces and , . / - '"
            raise DemoError(f"{rule}. Received: {unknown[0]!r} in {text!r}.")
        if not 0 < len(text) <= LONGEST:
            rule = f"a date has 1 to {LONGEST} characters"
            raise DemoError(f"{rule}. Received: {len(text)} in {text!r}.")
    token_BS = np.zeros((len(texts), LONGEST), np.int32)
    for row, text in zip(token_BS, texts):
        row[: len(text)] = [1 + CHARACTERS.index(character) for character in text]
    return token_BS


def encode_iso(texts: Sequence[str]) -> np.ndarray:
    """`[B, T]` tokens of ISO dates."""
    return np.array([[*map(ISO_CHARACTERS.index, text)] for text in texts], np.int32)


def decode_iso(token_BT: np.ndarray) -> list[str]:
    """The texts of `[B, T]` predicted tokens.

    Example:
        >>> decode_iso(encode_iso(["1987-03-21"]))
        ['1987-03-21']
    """
    return ["".join(ISO_CHARACTERS[token] for token in row) for row in token_BT]
