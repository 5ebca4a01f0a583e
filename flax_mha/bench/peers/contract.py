"""The one interface of all contenders.

A peer's file has one function, `build(case, data) -> Contender`. It raises `Unserved` with the
reason where its layer has no way to serve the case.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_mha.bench.textbook import Expected


class Absent(Exception):
    """This contender cannot take part at all; the message is the reason."""


class Unserved(Exception):
    """This contender cannot serve this case; the message is the reason."""


def require(package: str, distribution: str) -> None:
    """Looks for a package, as it is imported and as it is installed.

    Raises:
        Absent: it is not there.
    """
    if importlib.util.find_spec(package) is None:
        raise Absent(f"not installed: pip install {distribution}")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One layer of one case, compiled where it compiles, with our weights in its own layout.

    Args:
        run: the timed call: computes F or FB, and waits for the results.
        exact: F's output, or FB's gradients of parameters and input, without dropout.
        own_layout: what `exact` must return, from the textbook's numbers.
        noisy: the output with dropout.
        compile: traces and compiles afresh, and returns the seconds; None for eager frameworks.
        temp_bytes: of the compiled program, besides arguments and results; None where unknown.
        compile_seconds: what the first compilation took.
    """

    run: Callable[[], Any]
    exact: Callable[[], list[np.ndarray]]
    own_layout: Callable[[Expected], list[np.ndarray]]
    noisy: Callable[[], np.ndarray]
    compile: Callable[[], float] | None = None
    temp_bytes: int | None = None
    compile_seconds: float | None = None
