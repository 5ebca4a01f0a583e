"""The guides: a Markdown page a topic, beside this file; listed, read and printed."""

import difflib
import importlib.resources
import importlib.util
import sys
from typing import Any

WIDEST = 100  # the columns beyond which a line is hard to follow


def topics() -> dict[str, str]:
    """The topics, in the order of the alphabet, each with the sentence that its page begins with.

    Args: none.

    Returns:
        Topic -> sentence, on one line.

    Raises: nothing.

    Example:
        >>> topics()["masks"]
        'Which masks there are, what shape each has, and what True means.'
    """
    return {topic: _sentence(page) for topic, page in sorted(_pages().items())}


def text(topic: str) -> str:
    """The page of a topic, as Markdown.

    Args:
        topic: one of `topics()`; hyphens count as underscores.

    Returns:
        The whole page.

    Raises:
        ValueError: there is no such topic; the message lists those that there are.

    Example:
        >>> print(text("long-context").splitlines()[0])
        # Long context
    """
    pages = _pages()
    name = topic.replace("-", "_")
    if name not in pages:
        raise ValueError(_unknown(topic, sorted(pages)))
    return pages[name]


def show(topic: str) -> None:
    """Prints the page of a topic: set by rich in a terminal, else the Markdown as it is.

    Args:
        topic: one of `topics()`; hyphens count as underscores.

    Raises:
        ValueError: there is no such topic.

    Example:
        >>> show("masks")  # doctest: +ELLIPSIS
        # Masks
        ...
    """
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


def _unknown(topic: str, known: list[str]) -> str:
    """What to say of a topic that is not there."""
    near = difflib.get_close_matches(topic.lower().replace("-", "_"), known, n=1)
    hint = (
        f"Did you mean {near[0]!r}?" if near else "`python -m flax_mha guide` says what each holds."
    )
    return f"`topic` must be one of {', '.join(known)}. Received: {topic!r}. {hint}"
