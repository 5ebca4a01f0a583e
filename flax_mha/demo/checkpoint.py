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
import os
import shutil
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
    """
    target = directory / str(step)
    if _list_file(target).exists():
        return
    if is_first():
        _clear_unlisted(directory)
    with contextlib.closing(_checkpointer()) as checkpointer:
        checkpointer.save(target.absolute(), state)
        checkpointer.wait_until_finished()
    if is_first():
        _enlist(directory, target, state)


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
    listed = json.loads(_list_file(checkpoint).read_text())
    if listed["arrays"] != _arrays(like):
        rule = f"the checkpoint {checkpoint} does not fit the run's settings"
        raise DemoError(f"{rule}: they describe other parameters. Was settings.json edited?")
    expected, found = listed["sha256"], _sums(checkpoint)
    differing = sorted(
        name for name in {*expected, *found} if expected.get(name) != found.get(name)
    )
    if differing:
        evidence = f"{len(differing)} of its files are not as they were saved, as {differing[0]}"
        remedy = f"Delete {_list_file(checkpoint)} to go back to the checkpoint before it"
        raise DemoError(f"the checkpoint {checkpoint} is damaged: {evidence}. {remedy}.")


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
