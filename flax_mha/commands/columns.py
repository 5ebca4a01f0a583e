"""Text in a terminal: a heading, then names with their lines beside them."""

import textwrap
from collections.abc import Iterator, Mapping

WIDTH = 80
NAMES = 26  # the columns of a name, before its line


def section(heading: str, entries: Mapping[str, str], names: int = NAMES) -> Iterator[str]:
    """A heading, then each name with its line beside it, or below where the name is long."""
    yield from ("", *textwrap.wrap(heading, WIDTH))
    for name, line in entries.items():
        label = f"  {name}".ljust(names)
        if not label.endswith(" "):
            yield label
            label = ""
        yield from textwrap.wrap(
            line, WIDTH, initial_indent=label.ljust(names), subsequent_indent=" " * names
        )
