"""A checkpoint's folder: its config.json, and where each array lies; headers are read, no data."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from flax_mha.core import checks, file_checks
from flax_mha.interop.torch import load_safetensors
from flax_mha.interop.torch.safetensors import Header, read_headers

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_LARGEST = {_INDEX: 2**28}  # bytes; a real one has millions, other files thousands
_LARGEST_OF_OTHERS = 2**24
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_CONVERT = (
    "Convert it once, where the folder is trusted: `AutoModel.from_pretrained(directory)."
    "save_pretrained(other)` of the transformers library writes .safetensors."
)


class Folder(NamedTuple):
    """A checkpoint that was looked into.

    Attributes:
        path: the folder.
        fields: what config.json holds.
        headers: dtype and shape of each array.
        files: the file that holds each array.
    """

    path: pathlib.Path
    fields: dict[str, Any]
    headers: Mapping[str, Header]
    files: Mapping[str, pathlib.Path]

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """These arrays; one file is open at a time."""
        by_file: dict[pathlib.Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        arrays: dict[str, np.ndarray] = {}
        for file, held in by_file.items():
            arrays |= load_safetensors(file, held)
        return arrays


def open_folder(directory: str | os.PathLike[str], name: str = "directory") -> Folder:
    """The folder's config and the headers of its weights; `name` is what the caller calls it."""
    path = file_checks.path(name, directory)
    if not path.is_dir():
        rule = f"`{name}` must be the folder of a checkpoint, with its config.json."
        remedy = "Nothing is downloaded: `huggingface-cli download NAME` gives a folder."
        checks.fail(ValueError, rule, f"{str(directory)!r}, which is none", remedy)
    _expect_config(path)
    fields = read_json(path, _CONFIG)
    files = _files(path)
    return Folder(path, fields, *_headers(files))


def _expect_config(path: pathlib.Path) -> None:
    if (path / _CONFIG).exists():
        return
    rule = f"The folder {path.name!r} must hold a config.json."
    names = sorted(entry.name for entry in path.iterdir())
    if "adapter_config.json" in names:
        remedy = "It holds an adapter alone: `load_adapter(folder, like=)` reads it."
    elif any(name.endswith(".gguf") for name in names):
        remedy = "A .gguf file holds quantised weights: take the original checkpoint."
    else:
        remedy = "Is it the folder above, or below?"
    checks.fail(ValueError, rule, f"{names[:8]}", remedy)


# --- JSON ---------------------------------------------------------------------------------------


def read_json(path: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in one of the folder's JSON files; its size is looked at before it is read."""
    file = within(path, name)
    size, most = file.stat().st_size, _LARGEST.get(name, _LARGEST_OF_OTHERS)
    if size > most:
        rule = f"{name} must have at most {most} bytes."
        checks.fail(ValueError, rule, f"{size} bytes")
    try:
        values = json.loads(file.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        checks.fail(ValueError, f"{name} must be JSON.", f"{error}", "Was it cut short?")
    if not isinstance(values, dict):
        checks.fail(ValueError, f"{name} must hold an object.", f"a {type(values).__name__}")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON number")


def within(path: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the folder: its name is no path, and it is no link that leads elsewhere.

    The hub's cache keeps `snapshots/REVISION/name` as links into the `blobs` beside `snapshots`.
    """
    if not isinstance(name, str) or not name or name != pathlib.PurePath(name).name or name == "..":
        rule = "A file of weights must stand in the checkpoint's folder itself."
        checks.fail(ValueError, rule, f"{name!r} in {_INDEX}")
    if "\\" in name or ":" in name:
        checks.fail(ValueError, "A file of weights must have a plain name.", f"{name!r}")
    file = path / name
    if not file.is_file():
        rule = f"The folder must hold {name!r}."
        remedy = "Was the download cut short?"
        checks.fail(ValueError, rule, f"{path.name!r} without it", remedy)
    expect_inside(path, file)
    return file


def expect_inside(path: pathlib.Path, file: pathlib.Path) -> None:
    """A file below the folder is there itself, or a link into the hub cache's blobs."""
    folder, target = path.resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs"
    if not target.is_relative_to(folder) and target.parent != blobs:
        rule = f"{file.name!r} must lie in the folder, or be a link into the hub cache's blobs."
        checks.fail(ValueError, rule, f"a link to {str(target)!r}")


# --- weights ------------------------------------------------------------------------------------


def _files(path: pathlib.Path) -> Mapping[pathlib.Path, list[str] | None]:
    """The files of weights, each with the arrays that the index says it holds; None = all."""
    if (path / _INDEX).exists():
        return _indexed(path)
    if (path / _WEIGHTS).exists():
        return {within(path, _WEIGHTS): None}
    rule = f"The folder must hold {_WEIGHTS}, or {_INDEX} with its files."
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.startswith(_PICKLES) for name in names):
        remedy = f"A .bin file is a pickle: to load it is to run the code in it. {_CONVERT}"
    elif any(name.startswith("adapter_model") for name in names):
        remedy = "It holds an adapter alone: `load_adapter(folder, like=)` reads it."
    elif any(name.endswith(".gguf") for name in names):
        remedy = "A .gguf file holds quantised weights: take the original checkpoint."
    else:
        remedy = "Was the download cut short?"
    checks.fail(ValueError, rule, f"{names[:8]}", remedy)


def _indexed(path: pathlib.Path) -> Mapping[pathlib.Path, list[str] | None]:
    places = read_json(path, _INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        rule = f'{_INDEX} must hold a "weight_map", the file of each array.'
        checks.fail(ValueError, rule, f"{type(places).__name__}")
    held: dict[str, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str):
            checks.fail(ValueError, f"{_INDEX} must name files.", f"{file!r} for {name!r}")
        held.setdefault(file, []).append(name)
    return {within(path, file): names for file, names in held.items()}


def _headers(
    files: Mapping[pathlib.Path, list[str] | None],
) -> tuple[dict[str, Header], dict[str, pathlib.Path]]:
    """Dtype and shape of each array, and its file; index and files must agree."""
    headers: dict[str, Header] = {}
    places: dict[str, pathlib.Path] = {}
    for file, expected in files.items():
        found = read_headers(file)
        for name in expected or ():
            if name not in found:
                rule = f"{_INDEX} must name arrays where they are."
                checks.fail(ValueError, rule, f"{name!r}, which {file.name!r} does not hold")
        for name in found:
            if name in places:
                rule = "Each array must stand in one file."
                evidence = f"{name!r} in {places[name].name!r} and {file.name!r}"
                checks.fail(ValueError, rule, evidence)
        headers |= found
        places |= dict.fromkeys(found, file)
    return headers, places
