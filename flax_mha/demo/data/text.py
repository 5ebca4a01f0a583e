"""The text, its held-out part, and random windows of it.

Python's library: the .py files in sorted order, tests left out; every k-th file is held out whole,
and the first `held_out_bytes` of those files, joined, are what is predicted and compressed.
Another file: its last `held_out_bytes`, or its last tenth if that is less, are held out.
"""

import dataclasses
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flax_mha.demo.settings import DemoError, number

_LEFT_OUT = {
    *("__pycache__", "dist-packages", "site-packages"),  # not the library
    *("idle_test", "lib2to3", "test", "tests", "turtledemo"),
    *("encodings", "ensurepip", "idlelib", "pydoc_data"),  # tables, archives, an application
}


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What is read, and how much of it is held out."""

    file: str = ""  # the text; none = Python's standard library
    max_bytes: int = 12_000_000  # read at most
    held_out_bytes: int = number(65_536, least=2)  # compressed and predicted, never trained on
    held_out_every: int = number(20, least=2)  # of the files, every so many-th is held out


@dataclasses.dataclass(frozen=True)
class Split:
    """Bytes to learn from and bytes to be judged on."""

    train: np.ndarray  # uint8
    held_out: np.ndarray  # uint8
    source: str


def load_split(settings: TextSettings) -> Split:
    """The text of `settings.file`, or of Python's own standard library.

    Raises:
        DemoError: the file cannot be read, or there is too little text.
    """
    split = _from_file(settings) if settings.file else _from_library(settings)
    if len(split.train) < 2 or len(split.held_out) < 2:
        sizes = f"{len(split.train)} training and {len(split.held_out)} held-out bytes"
        raise DemoError(f"too little text in {split.source}: {sizes}. Use a longer file.")
    return split


def library_files() -> list[Path]:
    """The .py files of Python's standard library, sorted, without tests and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in relative if _LEFT_OUT.isdisjoint(path.parts)]


def windows(
    text: np.ndarray, length: int, batch_size: int, seed: int, done: int = 0
) -> Iterator[np.ndarray]:
    """Endless batches `[batch_size, length]` of contiguous bytes at random places.

    The first `done` batches are drawn and left out: what follows is what would have followed them.
    """
    if len(text) < length:
        remedy = "Use a longer file, or a smaller model.context."
        raise DemoError(f"{len(text)} training bytes hold no window of {length}. {remedy}")
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, len(text) - length + 1, size=(batch_size, 1))  # noqa: E731
    for _ in range(done):
        draw()
    while True:
        yield text[draw() + np.arange(length)]


def _from_library(settings: TextSettings) -> Split:
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    left = settings.max_bytes
    for i, path in enumerate(library_files()):
        content = path.read_bytes()[:left]
        left -= len(content)
        parts[i % settings.held_out_every == 0].append(content)
    held_out = b"".join(parts[True])[: settings.held_out_bytes]
    return Split(_array(b"".join(parts[False])), _array(held_out), "Python's standard library")


def _from_file(settings: TextSettings) -> Split:
    path = Path(settings.file)
    try:
        with path.open("rb") as file:
            content = file.read(settings.max_bytes)
    except OSError as error:
        raise DemoError(f"cannot read the text: {error}") from error
    cut = len(content) - min(settings.held_out_bytes, len(content) // 10)
    return Split(_array(content[:cut]), _array(content[cut:]), path.name)


def _array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)
