"""Many processes that train one model: how they begin, agree, and end when one of them is lost.

The command is two processes. The one that was called watches; its child trains. For where a process
is lost JAX ends the others by SIGABRT, at once or when its heart was not heard for ten seconds, and
no `except` catches that: only another process can still say what happened, and how to go on.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mha.demo.settings import DemoError

LOST, INTERRUPTED = 3, 130  # exit codes; 2 is a user's mistake
_ORDERLY = (0, 2, INTERRUPTED)
_HEARTBEAT_SECONDS = 10  # JAX's own 100 would leave the others waiting that long
_PATIENCE_SECONDS = 60  # with processes that were not started yet
_SHOWN = 5  # differences
_COUNT = "the N of --process I/N"


class Place(NamedTuple):
    """Which of how many processes this is, and where they meet: at process 0."""

    coordinator: str
    number: int
    total: int

    @property
    def name(self) -> str:
        """As "process 1 of 4"; the first is 0."""
        return f"process {self.number} of {self.total}"

    @property
    def options(self) -> str:
        """What to type."""
        return f"--coordinator {self.coordinator} --process {self.number}/{self.total}"


def supervise(
    work: Callable[..., int],
    arguments: tuple[Any, ...],
    place: Place,
    how_to_go_on: Callable[[], str],
) -> int:
    """Runs `work(*arguments)` in a child; returns its exit code, or LOST and says what happened."""
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(work, *arguments))
    child.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child.pid, number))  # type: ignore[arg-type]
    child.join()
    code = int(child.exitcode or 0)
    if code in _ORDERLY:
        return code
    print(f"\nerror: {place.name} {_ended(code)}. {how_to_go_on()}", file=sys.stderr)
    return LOST


def join(place: Place | None) -> None:
    """Meets the other processes; to be called before any device is asked for."""
    if place is not None:
        jax.distributed.initialize(
            place.coordinator,
            place.total,
            place.number,
            cluster_detection_method="deactivate",
            initialization_timeout=_PATIENCE_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )


def agree(place: Place | None, mine: Mapping[str, Any]) -> None:
    """All processes must hold the same under the same names, and be as many as each believes.

    They tell each other by the store in which JAX's processes find each other: it asks for no
    device, and serves where they do not agree on how many they are.

    Raises:
        DemoError: they differ. All raise it, and all have before the first of them ends.
    """
    if place is None:
        return
    # The one way to it; multihost_utils needs the devices, and as many in every process.
    from jax._src import distributed

    store: Any = distributed.global_state.client
    mine = {_COUNT: place.total, **mine}
    store.key_value_set(f"demo/{place.number}", json.dumps(mine))
    found: list[str] = []
    for other in range(place.total):
        text = store.blocking_key_value_get(f"demo/{other}", _PATIENCE_SECONDS * 1000)
        theirs = json.loads(text)
        found += differences(mine, theirs, place.number, other)
        if theirs[_COUNT] != place.total:
            break  # who believes that there are more must not wait for them
    store.wait_at_barrier("demo/agreed", _PATIENCE_SECONDS * 1000)
    if found:
        rule = "all processes of a run must have the same settings, data and JAX"
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DemoError(
            f"{rule}. Received: {'; '.join(found[:_SHOWN])}{more}. "
            "Start all of them by the same command, but for the number of --process."
        )


def differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], number: int, other: int
) -> list[str]:
    """One entry a name under which two processes do not hold the same.

    Example:
        >>> differences({"train.steps": 60, "seed": 0}, {"train.steps": 70, "seed": 0}, 1, 0)
        ['train.steps is 70 in process 0 and 60 in process 1']
    """
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return [
        f"{name} is {theirs.get(name)} in process {other} and {mine.get(name)} in process {number}"
        for name in names
    ]


def is_first() -> bool:
    """Whether this process prints and writes: one of them does."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether it is set in any process; all of them must ask."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def part() -> None:
    """Ends the meeting, when all do; the first process would else take it from under the others."""
    jax.distributed.shutdown()


def _child(work: Callable[..., int], *arguments: Any) -> None:
    """An orderly end is that of all; any other must not wait for them."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent, which hands it on: once
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    atexit.register(os._exit, 1)  # behind the traceback of an exception
    code = work(*arguments)
    if code != INTERRUPTED:
        part()
    sys.stdout.flush()
    os._exit(code)


def _end_with_the_parent() -> None:
    """Whatever ended it, and be it SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(LOST)


def _ended(code: int) -> str:
    """What an exit code says."""
    if code == -signal.SIGABRT:
        return "was ended by JAX: another process is gone, or did not come"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "ended by the error above: another process is gone, or it is an error of its own"
