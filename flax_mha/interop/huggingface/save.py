"""A checkpoint's folder out: the bytes of the old one, the attention's arrays in their places."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks, file_checks
from flax_mha.interop.huggingface.find import Found, find
from flax_mha.interop.huggingface.folder import Folder, expect_inside, open_folder
from flax_mha.interop.huggingface.new_folder import expect_free, new_folder
from flax_mha.interop.layout import without_score
from flax_mha.interop.loaded import AttentionLayer
from flax_mha.interop.torch.layouts import to_layout

# Fields that change nothing of what config.json says.
_OF_A_RUN = (
    "dropout",
    "dtype",
    "param_dtype",
    "precision",
    "implementation",
    "context_axis",
    "seed",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "activity_regularizer",
    "kernel_constraint",
    "bias_constraint",
)
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def save_attention(
    directory: str | os.PathLike[str],
    layers: Mapping[str, AttentionLayer],
    *,
    like: str | os.PathLike[str],
    max_length: int | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """The checkpoint `like` again, with these attention layers, in a new folder.

    All files of `like` are copied, byte for byte; then the attention's arrays are written in their
    places. So layers that were not changed give the same files.

    Memory: one layer's arrays.

    Args:
        directory: where to write; nothing may stand there, or an empty folder. `like` itself cannot
            be written to: a crash half way would leave neither.
        layers: what `load_attention` returned, or some of it, trained on; the others stay those of
            `like`.
        like: the folder that they were loaded from.
        max_length: as in `load_attention`.
        ignore: as in `load_attention`.

    Raises:
        ValueError: a layer that `like` does not have, a config that says something else than its
            config.json, arrays of another shape, layers that disagree about an array that they
            share, a folder that is not empty; otherwise as `load_attention`.
        TypeError: arrays of another dtype than those of `like`.

    Example:
        >>> import json, pathlib, tempfile, numpy as np, safetensors.numpy
        >>> from flax_mha.interop.huggingface import load_attention, save_attention
        >>> config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4,
        ...           "num_hidden_layers": 1}
        >>> arrays = {f"model.layers.0.self_attn.{x}_proj.weight": np.ones((16, 16), "float32")
        ...           for x in "qkvo"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     old, new = pathlib.Path(folder, "old"), pathlib.Path(folder, "new")
        ...     old.mkdir()
        ...     _ = (old / "config.json").write_text(json.dumps(config))
        ...     safetensors.numpy.save_file(arrays, old / "model.safetensors")
        ...     save_attention(new, load_attention(old), like=old)
        ...     sorted(x.name for x in new.iterdir() if x.read_bytes() == (old/x.name).read_bytes())
        ['config.json', 'model.safetensors']
    """
    target, folder = file_checks.path("directory", directory), open_folder(like, "like")
    file_checks.by_name("layers", layers, AttentionLayer)
    _expect_other(target, folder.path)
    expect_free(target)
    there = {layer.name: layer for layer in find(folder, max_length, ignore).layers}
    checks.known_names("A layer in `layers`", layers, there)
    for name, layer in layers.items():
        checks.instance(f"layers[{name!r}].config", layer.config, MultiHeadAttentionConfig)
        _expect_same_config(name, layer.config, there[name].config)
    with new_folder(target) as made:
        _write(made, folder, there, layers)


def _expect_other(target: pathlib.Path, like: pathlib.Path) -> None:
    if target.resolve() == like.resolve():
        rule = "`directory` must be another folder than `like`, whose bytes are copied."
        checks.fail(ValueError, rule, f"{str(target)!r} for both")


def _expect_same_config(
    name: str, ours: MultiHeadAttentionConfig, theirs: MultiHeadAttentionConfig
) -> None:
    without_score(ours)
    for field, value in theirs.to_dict().items():
        given = ours.to_dict()[field]
        if field not in _OF_A_RUN and given != value:
            rule = f"The config of {name!r} must be that of `like`, whose config.json stays."
            evidence = f"{field}={given!r}, there {value!r}"
            checks.fail(ValueError, rule, evidence)


def _write(
    made: pathlib.Path,
    folder: Folder,
    there: Mapping[str, Found],
    layers: Mapping[str, AttentionLayer],
) -> None:
    _copy(folder.path, made)
    written: dict[str, bytes] = {}
    owners = _owners(there)
    for name, layer in layers.items():
        arrays = _arrays(there[name], layer)
        for full, array in arrays.items():
            _expect_fits(folder, full, array)
        _expect_agreement(name, arrays, written, owners)
        _write_arrays(made, folder, arrays)
    _expect_all_of_shared(folder, owners, layers, written)


def _copy(path: pathlib.Path, made: pathlib.Path) -> None:
    """Every file below the folder; no link leads the copy elsewhere."""
    for above, folders, files in os.walk(path):
        for name in (*folders, *files):
            expect_inside(path, pathlib.Path(above, name))
        target = made / pathlib.Path(above).relative_to(path)
        target.mkdir(exist_ok=True)
        for name in files:
            shutil.copyfile(pathlib.Path(above, name), target / name)


def _arrays(found: Found, layer: AttentionLayer) -> dict[str, np.ndarray]:
    """The layer's arrays under their names in the files."""
    state = to_layout(found.layout, layer.params, found.config, "")
    arrays: dict[str, np.ndarray] = {}
    for name, array in state.items():
        full = found.sources[name]
        if arrays.setdefault(full, array).tobytes() != array.tobytes():
            rule = f"`{full}` serves the layer twice: what is made of it must agree."
            checks.fail(ValueError, rule, f"another array for {name!r} in {found.name!r}")
    return arrays


def _expect_fits(folder: Folder, name: str, array: np.ndarray) -> None:
    dtype, shape = folder.headers[name]
    if _CODES.get(array.dtype.name) != dtype:
        rule = f"`{name}` must have the dtype of `like`, {dtype}."
        checks.fail(TypeError, rule, f"dtype {array.dtype}", "Cast the parameters.")
    if array.shape != shape:
        rule = f"`{name}` must have the shape of `like`, {shape}."
        checks.fail(ValueError, rule, f"shape {array.shape}")


# --- arrays that several layers share -----------------------------------------------------------


def _owners(there: Mapping[str, Found]) -> dict[str, list[str]]:
    """The layers that read an array, of each that more than one reads."""
    owners: dict[str, list[str]] = {}
    for layer in there.values():
        for full in layer.sources.values():
            owners.setdefault(full, []).append(layer.name)
    return {full: names for full, names in owners.items() if len(names) > 1}


def _expect_agreement(
    name: str,
    arrays: dict[str, np.ndarray],
    written: dict[str, bytes],
    owners: Mapping[str, list[str]],
) -> None:
    for full in set(arrays) & set(owners):
        data = arrays[full].tobytes()
        if written.setdefault(full, data) != data:
            rule = f"`{full}` is one array for {len(owners[full])} layers, which must agree on it."
            checks.fail(ValueError, rule, f"another in {name!r} than in a layer before it")


def _expect_all_of_shared(
    folder: Folder,
    owners: Mapping[str, list[str]],
    layers: Mapping[str, AttentionLayer],
    written: Mapping[str, bytes],
) -> None:
    for full, data in written.items():
        absent = [name for name in owners[full] if name not in layers]
        if absent and folder.read([full])[full].tobytes() != data:
            rule = f"`{full}` is one array for {len(owners[full])} layers: to change it, pass all."
            checks.fail(ValueError, rule, f"without {absent[:4]}")


# --- bytes --------------------------------------------------------------------------------------


def _write_arrays(made: pathlib.Path, folder: Folder, arrays: Mapping[str, np.ndarray]) -> None:
    by_file: dict[str, list[str]] = {}
    for name in arrays:
        by_file.setdefault(folder.files[name].name, []).append(name)
    for file, names in by_file.items():
        with (made / file).open("r+b") as stream:
            start, header = _header(stream)
            for name in names:
                stream.seek(start + header[name]["data_offsets"][0])
                stream.write(np.ascontiguousarray(arrays[name]).tobytes())


def _header(stream: Any) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and where each array is: the file was read before, and is sound."""
    length = int.from_bytes(stream.read(8), "little")
    return 8 + length, json.loads(stream.read(length))
