"""Figures that are kept in a file, and whether those of today have grown beyond them."""

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flax_mha.bench.aot.compile import libtpu_version
from flax_mha.bench.aot.figures import Figure
from flax_mha.bench.command import BenchError

LIMIT = 1.05


def compilers() -> dict[str, str]:
    """The versions that the figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {**versions, "libtpu": libtpu_version()}


def write(figures: Iterable[Figure], path: Path) -> None:
    """Keeps the cycles of the figures that were read."""
    kept = {_key(x): [x.whole, x.masked] for x in figures if x.whole is not None}
    path.write_text(json.dumps({"compilers": compilers(), "cycles": kept}, indent=2) + "\n")


def read(path: Path) -> dict[str, Any]:
    """What a file keeps.

    Raises:
        BenchError: there is no such file, or it is another one.
    """
    try:
        kept = json.loads(path.read_text())
        found = {name: dict(kept[name]) for name in ("compilers", "cycles")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} holds no kept figures: {error!r}") from error
    if not found["cycles"]:
        raise BenchError(f"{path} holds no kept figures: its cycles are empty")
    return found


def wanted(kept: dict[str, Any]) -> dict[str, list[str]]:
    """The topologies, cases and contenders of a file, each once."""
    parts = zip(*(key.split("|") for key in kept["cycles"]))
    return dict(zip(("topology", "case", "contender"), (list(dict.fromkeys(x)) for x in parts)))


def other_compiler(kept: dict[str, Any]) -> str | None:
    """Why the figures of today cannot be held against those of a file; None where they can."""
    here = compilers()
    if here == kept["compilers"]:
        return None
    then, now = (", ".join(f"{n} {v}" for n, v in x.items()) for x in (kept["compilers"], here))
    return f"another compiler counts otherwise: the file is of {then}, this is {now}"


def changes(kept: dict[str, Any], figures: Iterable[Figure]) -> Iterator[tuple[str, bool]]:
    """(a sentence, whether it is a failure) of every figure that is not as it was kept."""
    found = {_key(figure): [figure.whole, figure.masked] for figure in figures}
    for key, before in kept["cycles"].items():
        if key not in found or None in found[key]:
            yield f"{_words(key)}: cannot be read any more", True
            continue
        for body, old, new in zip(("whole", "masked"), before, found[key]):
            change = (
                f"{_words(key)}, {body}: {new:.0f} cycles, {new / old:.3f} x the {old:.0f} kept"
            )
            if new > LIMIT * old:
                yield f"{change}, at most {LIMIT:g}", True
            elif new < old / LIMIT:
                yield f"{change}: write the file anew to keep it so", False


def _key(figure: Figure) -> str:
    passes = "FB" if figure.gradient else "F"
    return "|".join((figure.topology, figure.case, figure.contender, passes))


def _words(key: str) -> str:
    return key.replace("|", " ")
