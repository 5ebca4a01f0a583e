"""What is printed: by rich, which is imported where it is used, as it is an optional extra."""

from collections.abc import Iterable, Sequence
from typing import Any

from flax_mha.demo.extras import require


class Screen:
    """Prints lines, tables and a progress bar; markup in what is printed is not obeyed.

    A quiet one prints nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        """Finds out how wide the terminal is."""
        require("rich", "the terminal output")
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, quiet=quiet)

    def say(self, text: str = "") -> None:
        """Text as it is; long lines are the terminal's to break."""
        self.console.print(printable(text), soft_wrap=True)

    def rule(self, title: str = "") -> None:
        """A line across the terminal."""
        self.console.rule(title)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; all columns but the first are numbers."""
        from rich.table import Table

        table = Table(title=title)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def bar(self, unit: str) -> Any:
        """A progress bar whose tasks have a field `speed`, in units a second."""
        from rich import progress

        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[speed]:,.0f} " + unit + "/s"),
            progress.TimeRemainingColumn(),
            console=self.console,
        )


def printable(text: str) -> str:
    """Control characters as escapes: what a model writes must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
