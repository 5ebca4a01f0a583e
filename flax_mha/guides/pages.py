"""The guides: a Markdown page a topic, beside this file; listed, read and printed."""

import importlib.resources
import importlib.util
import sys
from typing import Any

from flax_mha.core import checks

WIDEST = 100  # the columns beyond which a line is hard to follow


def topics() -> dict[str, str]:
    """Each topic with the sentence that its page begins with.

    Example:
        >>> topics()["masks"]
        'Which masks there are, what shape each has, and what True means.'
    """
    return {topic: _sentence(page) for topic, page in sorted(_pages().items())}


def text(topic: str) -> str:
    """The page of a topic as Markdown; in its name, hyphens count as underscores.

    Example:
        >>> text("long-context").splitlines()[0]
        '# Long context'
    """
    pages = _pages()
    name = topic.replace("-", "_")
    checks.known_names("The topic of a guide", [name], sorted(pages))
    return pages[name]


def show(topic: str) -> None:
    """Prints the page of a topic: set by rich in a terminal, else the Markdown as it is."""
    page = text(topic)
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        _set(page, Console())
    else:
        print(page, end="")


def _set(page: str, console: Any) -> None:
    """Prints Markdown on a rich console; links keep their addresses in sight."""
    from rich.markdown import Markdown

    console.print(Markdown(page, hyperlinks=False), width=min(console.width, WIDEST))


def _pages() -> dict[str, str]:
    """The pages that lie beside this file, by topic."""
    files = importlib.resources.files("flax_mha.guides").iterdir()
    pages = [file for file in files if file.name.endswith(".md")]
    return {file.name.removesuffix(".md"): file.read_text(encoding="utf-8") for file in pages}


def _sentence(page: str) -> str:
    """The paragraph below the title."""
    return " ".join(page.split("\n\n")[1].split())
