"""Checkpoints: orbax writes the arrays, and a list says what they are and that they are whole.

    checkpoints/200/       what orbax wrote after step 200
    checkpoints/200.json   the shape of every array, the SHA-256 of every file; it appears last

A checkpoint without its list was cut off while it was written: it does not count, and the next
save removes it. One with a list that its files do not agree with is refused: orbax alone would
restore an array with a flipped bit.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_mha.demo.processes import is_first
from flax_mha.demo.settings import DemoError

_KEPT = 2


def save(directory: Path, step: int, state: Any) -> None:
    """Writes a pytree of arrays; the two newest checkpoints are kept.

    All processes of a run must call it: each writes its part, the first one all else.

    Raises:
        OSError: the disk does not take it; the checkpoints before it stay.
    """
    target = directory / str(step)
    if _list_file(target).exists():
        return
    if is_first():
        _clear_unlisted(directory)
    try:
        with _told_once(), contextlib.closing(_checkpointer()) as checkpointer:
            checkpointer.save(target.absolute(), state)
            checkpointer.wait_until_finished()
    except ValueError as error:  # how tensorstore says that the disk is full
        raise OSError(" ".join(str(error).split())) from error
    if is_first():
        _enlist(directory, target, state)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """An error that is raised is not printed as well by orbax's threads, some of them later."""
    levels = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    before = sys.unraisablehook
    sys.unraisablehook = lambda what: None if _is_late(what.exc_value) else before(what)
    yield  # where this raises, all of it stays, for threads that have not ended yet
    sys.unraisablehook = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _is_late(error: BaseException | None) -> bool:
    """Of a write that ended after the save that it is a part of had failed."""
    return isinstance(error, RuntimeError) and "loop is closed" in str(error)


def _enlist(directory: Path, target: Path, state: Any) -> None:
    """From here on the checkpoint counts."""
    listed = {"arrays": _arrays(state), "sha256": _sums(target)}
    write_at_once(_list_file(target), json.dumps(listed, indent=1) + "\n")
    for old in steps(directory)[:-_KEPT]:
        _list_file(directory / str(old)).unlink()
    _clear_unlisted(directory)


def steps(directory: Path) -> list[int]:
    """The steps of the whole checkpoints, in order."""
    return sorted(int(path.stem) for path in directory.glob("*.json") if path.stem.isdecimal())


def restore(directory: Path, step: int, like: Any, shardings: Any = None) -> Any:
    """The pytree that was saved after `step`, of the structure, shapes and dtypes of `like`.

    It lies as `shardings` say, which need not be those that it was saved with; without any, its
    arrays are NumPy's.

    Raises:
        DemoError: a file is missing, cut off or changed; or the arrays are those of another model.
    """
    source = directory / str(step)
    _check(source, like)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: here, like) if shardings is None else shardings
    struct = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)  # noqa: E731
    with contextlib.closing(_checkpointer()) as checkpointer:
        found = checkpointer.restore(source.absolute(), jax.tree.map(struct, like, places))
    return jax.tree.map(np.asarray, found) if shardings is None else found


def write_at_once(path: Path, text: str) -> None:
    """The file has either its old content or the new one, whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _checkpointer() -> Any:
    """orbax takes most of a second to import: only who saves or restores waits for it."""
    import orbax.checkpoint

    return orbax.checkpoint.StandardCheckpointer()


def _list_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.json")


def _check(checkpoint: Path, like: Any) -> None:
    """Before orbax reads: it does not see all damage, and leaves reads behind where it fails."""
    listed = _read_list(checkpoint)
    if listed["arrays"] != _arrays(like):
        rule = f"the checkpoint {checkpoint} does not fit the run's settings"
        raise DemoError(f"{rule}: they describe other parameters. Was settings.json edited?")
    expected, found = listed["sha256"], _sums(checkpoint)
    differing = sorted(
        name for name in {*expected, *found} if expected.get(name) != found.get(name)
    )
    if differing:
        evidence = f"{len(differing)} of its files are not as they were saved, as {differing[0]}"
        raise _damaged(checkpoint, evidence)


def _read_list(checkpoint: Path) -> dict[str, dict[str, str]]:
    try:
        listed = json.loads(_list_file(checkpoint).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(checkpoint, f"its list is not valid JSON: {error}") from error
    keys = ("arrays", "sha256")
    if not isinstance(listed, dict) or not all(isinstance(listed.get(k), dict) for k in keys):
        raise _damaged(checkpoint, "its list does not hold arrays and sha256")
    return listed


def _damaged(checkpoint: Path, evidence: str) -> DemoError:
    remedy = f"Delete {_list_file(checkpoint)} to go back to the checkpoint before it"
    return DemoError(f"the checkpoint {checkpoint} is damaged: {evidence}. {remedy}.")


def _arrays(tree: Any) -> dict[str, str]:
    """`path: dtype[shape]` of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _sums(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its name in the checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {
        path.relative_to(checkpoint).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _clear_unlisted(directory: Path) -> None:
    """Removes what was cut off, and what is no longer kept."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if path.is_dir() and not _list_file(path).exists():
            shutil.rmtree(path)
