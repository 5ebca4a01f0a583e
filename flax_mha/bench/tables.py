"""Lines and tables on the screen."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(console: Console, line: str) -> None:
    """A line as it is, however wide."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    """A table without rows; of the columns those at the `left` are words, which may be wrapped."""
    bold = Text(title, style="bold")
    made = Table(title=bold, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in columns:
        words = column in left
        made.add_column(column, justify="left" if words else "right", no_wrap=not words)
    return made
