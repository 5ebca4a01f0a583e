"""The adapters of a run, each in a folder of its own: they fit this run's parameters alone.

    adapters/NAME/600/          what orbax wrote after 600 steps, with its list: checkpoint.py
    adapters/NAME/adapter.json  what they were trained from, how, and what came of it

The last is written last, and they are given their name when they are whole: a process that is
killed leaves those that were there.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_mha import Lora, merge_lora
from flax_mha.demo import checkpoint
from flax_mha.demo.config_file import settings_from
from flax_mha.demo.directory import RunDirectory
from flax_mha.demo.settings import DemoError, Settings
from flax_mha.demo.tasks.contract import Task, at

_HELD = {"base", "settings", "lora", "results"}
_NEW, _OLD = ".new", ".old"  # while they are written, and while those before them are let go of


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Adapters of the attention layers, and what it takes to use and to judge them.

    Attributes:
        rule: the layers' `lora`.
        settings: the run's, with the text and the training of the adapters.
        arrays: the collection "lora" of the model.
    """

    rule: Lora
    settings: Settings
    arrays: Any


def check_language(run: RunDirectory, settings: Settings) -> None:
    """The other tasks have no other text that could be learned."""
    if settings.task != "language":
        rule = f"adapters are of language models, and {run.path} is one of {settings.task}"
        raise DemoError(f"{rule}. Train one: configs/python_lm.toml.")


def fingerprint(params: Any) -> str:
    """Of names, dtypes, shapes and every bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def initial(task: Task, rule: Lora, init_key: Any) -> Any:
    """New adapters, which change nothing yet.

    Raises:
        DemoError: the layers have no such projections, or none of that rank.
    """
    model: Any = task.model.clone(lora=rule)
    make = lambda key: model.init(key, *task.inputs(task.example()))["lora"]  # noqa: E731
    try:
        return jax.jit(make)(init_key)
    except ValueError as error:
        raise DemoError(f"[adapters] {error}") from error


def merged(task: Task, params: Any, adapter: Adapter) -> Any:
    """The parameters with the adapters in the attention layers' kernels."""
    return task.change_attention(
        params, lambda path, x: merge_lora(x, at(adapter.arrays, path), adapter.rule.scale)
    )


def with_adapter(path: Path, task: Task, params: Any, name: str) -> tuple[Task, Any]:
    """A run with adapters in its parameters; its text is the adapters'."""
    adapter = load(RunDirectory(path), task, params, name)
    return type(task)(adapter.settings), merged(task, params, adapter)


def name_for(file: Path) -> str:
    """What adapters are called unless the user says: as their text, in letters safe for a folder.

    Example:
        >>> name_for(Path("plays/King Lear (1623).txt"))
        'King-Lear-1623'
    """
    return re.sub(r"[^\w.]+", "-", file.stem, flags=re.ASCII).strip("-.") or "adapter"


def names(run: RunDirectory) -> list[str]:
    """Those that are whole."""
    found = (path.parent.name for path in run.adapters.glob("*/adapter.json"))
    return sorted(name for name in found if name not in (_NEW, _OLD))


def check_free(run: RunDirectory, name: str, overwrite: bool) -> None:
    """What bears the name is replaced only where that was asked for."""
    folder = run.adapters / name
    if folder.exists() and not overwrite:
        whole = f"adapters {name!r} already"
        held = whole if name in names(run) else f"a folder {name!r} that holds no whole adapters"
        remedy = "Choose another name with --name NAME, or replace them with --overwrite"
        raise DemoError(f"{run.path} has {held}. {remedy}.")


def save(run: RunDirectory, name: str, base: Any, adapter: Adapter, results: Any) -> int:
    """Writes adapters, and then lets go of those that were there; returns the bytes of files."""
    folder, new, old = (run.adapters / at for at in (name, _NEW, _OLD))
    held = {
        "base": fingerprint(base),
        "settings": adapter.settings.to_dict(),
        "lora": dataclasses.asdict(adapter.rule),
        "results": results,
    }
    try:
        _remove(new)  # left by a process that was killed
        checkpoint.save(new, adapter.settings.train.steps, adapter.arrays)
        checkpoint.write_at_once(_file(new), json.dumps(held, indent=1) + "\n")
        if folder.exists():
            _remove(old)
            folder.rename(old)
        new.rename(folder)
        _remove(old)
    except OSError as error:
        raise DemoError(f"cannot write the adapters: {error}") from error
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def load(run: RunDirectory, task: Task, params: Any, name: str) -> Adapter:
    """Adapters of a run whose parameters are `params`.

    Raises:
        DemoError: there are none of this name, or they are damaged, or another run's.
    """
    check_language(run, task.settings)
    if name not in names(run):
        known = ", ".join(names(run)) or "none; `adapt RUN --data FILE` trains some"
        raise DemoError(f"{run.path} has no adapters {name!r}. It has: {known}.")
    held = _read(_file(run.adapters / name))
    if held["base"] != fingerprint(params):
        rule = f"the adapters {name!r} are not of the parameters that {run.path} has now"
        raise DemoError(f"{rule}: of another run, or of other steps. Train them by `adapt`.")
    settings = settings_from(held["settings"])
    layers_lora = Lora(**held["lora"])
    like = jax.eval_shape(lambda: initial(task, layers_lora, jax.random.key(0)))
    arrays = checkpoint.restore(run.adapters / name, settings.train.steps, like)
    return Adapter(layers_lora, settings, arrays)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _file(folder: Path) -> Path:
    return folder / "adapter.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DemoError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(held, dict) or set(held) != _HELD:
        raise DemoError(f"{file} must hold {', '.join(sorted(_HELD))}. Train them by `adapt`.")
    return held
