"""What stands on the command line, as values; argparse prints what is wrong with it."""

import argparse
import math
import re
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 10 or not least <= int(text) < 2**31:
            rule = f"must be a whole number >= {least} and below 2**31"
            raise argparse.ArgumentTypeError(f"{rule}, not {text[:20]!r}")
        return int(text)

    return number


def of_many(text: str) -> tuple[int, int]:
    """Which of how many.

    Example:
        >>> of_many("1/4")
        (1, 4)
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, as 0/2, not {text!r}")
    return int(number), int(count)


def host_and_port(text: str) -> str:
    """Where processes meet."""
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, as 10.0.0.1:7000, not {text!r}")
    return text


def above_zero(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def folder_name(text: str) -> str:
    """A name of letters, digits, `.`, `_` and `-`, which stays inside the folder that it is put in.

    Example:
        >>> folder_name("plays-2")
        'plays-2'
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", text):
        rule = "must be letters, digits, `.`, `_` and `-`, as plays-2, not beginning by `.` or `-`"
        raise argparse.ArgumentTypeError(f"{rule}, not {text!r}")
    return text
