"""Days in many spellings: what an encoder-decoder learns to write as ISO 8601.

Every spelling is unambiguous by its form. With slashes the month comes before the day, unless the
year comes first; with dots and with names of months the day may come first. A year of two digits
is one of `FIRST_YEAR` to `FIRST_YEAR + 99`.
"""

import datetime
import itertools
from collections.abc import Callable
from typing import NamedTuple

FIRST_YEAR = 1950
LONGEST = len("Wednesday, the 22nd of September 1950")
CHARACTERS = "".join(
    sorted({*"0123456789 ,./-'", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"})
)

# Not `strftime`: its names follow the locale.
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
Day = datetime.date

STYLES: dict[str, Callable[[Day], str]] = {
    "1987-03-21": lambda d: d.isoformat(),
    "19870321": lambda d: d.isoformat().replace("-", ""),
    "1987/3/21": lambda d: f"{d.year}/{d.month}/{d.day}",
    "03/21/1987": lambda d: f"{d.month:02}/{d.day:02}/{d.year}",
    "3/21/1987": lambda d: f"{d.month}/{d.day}/{d.year}",
    "03/21/87": lambda d: f"{d.month:02}/{d.day:02}/{_short(d)}",
    "21.03.1987": lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    "21.3.87": lambda d: f"{d.day}.{d.month}.{_short(d)}",
    "21-Mar-87": lambda d: f"{d.day}-{_month(d)[:3]}-{_short(d)}",
    "21 March 1987": lambda d: f"{d.day} {_month(d)} {d.year}",
    "21 Mar '87": lambda d: f"{d.day} {_month(d)[:3]} '{_short(d)}",
    "21st of March, 1987": lambda d: f"{_ordinal(d)} of {_month(d)}, {d.year}",
    "the 21st of March 1987": lambda d: f"the {_ordinal(d)} of {_month(d)} {d.year}",
    "March 21, 1987": lambda d: f"{_month(d)} {d.day}, {d.year}",
    "March 21st, 1987": lambda d: f"{_month(d)} {_ordinal(d)}, {d.year}",
    "Mar 21 1987": lambda d: f"{_month(d)[:3]} {d.day} {d.year}",
    "March the 21st, 1987": lambda d: f"{_month(d)} the {_ordinal(d)}, {d.year}",
}
WEEKDAYS: dict[str, Callable[[Day], str]] = {
    "": lambda d: "",
    "Tue ": lambda d: f"{_WEEKDAYS[d.weekday()][:3]} ",
    "Tuesday, ": lambda d: f"{_WEEKDAYS[d.weekday()]}, ",
}
CASES: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "lower": str.lower,
    "upper": str.upper,
}


class Spelling(NamedTuple):
    """One of the ways to write a day: keys of `STYLES`, `WEEKDAYS` and `CASES`."""

    style: str
    weekday: str = ""
    case: str = "as it is"

    def write(self, day: Day) -> str:
        """The day, so written.

        Example:
            >>> day = datetime.date(1987, 3, 3)
            >>> Spelling("21st of March, 1987").write(day)
            '3rd of March, 1987'
            >>> Spelling("03/21/87", "Tue ", "upper").write(day)
            'TUE 03/03/87'
        """
        return CASES[self.case](WEEKDAYS[self.weekday](day) + STYLES[self.style](day))


SPELLINGS = [Spelling(*parts) for parts in itertools.product(STYLES, WEEKDAYS, CASES)]


def _short(day: Day) -> str:
    return f"{day.year % 100:02}"


def _month(day: Day) -> str:
    return _MONTHS[day.month - 1]


def _ordinal(day: Day) -> str:
    """1st, 2nd, 3rd, 4th, ... 11th, 12th, 13th, ... 21st."""
    teens = 10 < day.day < 20
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return f"{day.day}{ending}"
