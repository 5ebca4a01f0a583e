"""Weights into Keras's files: a new `.weights.h5`, or a copy with some layers replaced."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.interop.keras.archive import (
    WEIGHTS,
    copy_member,
    import_h5py,
    open_archive,
    open_keras_file,
    weights_of,
)
from flax_mha.interop.keras.arrays import places_of
from flax_mha.interop.keras.config import GQA, MHA
from flax_mha.interop.keras.layer_config import told_of
from flax_mha.interop.keras.layers import GROUPS, attention_layer, contents
from flax_mha.interop.keras.places import FIELDS, TABLE, Place, placed
from flax_mha.interop.keras.quantized import LEAVES
from flax_mha.interop.keras.tree import BFLOAT16
from flax_mha.interop.layout import zero_bias

Arrays = Mapping[tuple[str, str], np.ndarray]
Path = pathlib.Path


def write_new(path: Path, layers: Mapping[str, tuple[MultiHeadAttentionConfig, Arrays]]) -> None:
    """A `.weights.h5` with these layers alone, each in the group of its path."""
    _ends_in(path, ".weights.h5")
    for group, (config, _) in layers.items():
        _group_path(group, layers)
        _writable(group, config)
    indices = {leaf: index for index, leaf in LEAVES.items()}
    h5py = import_h5py()
    with _replacing(path) as target, h5py.File(target, "w") as h5:
        for group, (config, arrays) in layers.items():
            parts = GROUPS[_class_of(config)]
            for (projection, leaf), values in _with_all_biases(arrays, config).items():
                vars_group = h5.require_group(f"{group}/{parts[projection]}/vars")
                dataset = vars_group.create_dataset(indices[leaf], data=_raw(values))
                if values.dtype == BFLOAT16:
                    dataset.attrs["dtype"] = "bfloat16"


def write_copy(
    path: Path,
    layers: Mapping[str, tuple[MultiHeadAttentionConfig, Arrays]],
    like: str | os.PathLike[str],
    kernel_axes: str | None,
) -> None:
    """A copy of `like`, in which nothing differs but these layers' numbers."""
    with open_keras_file(like, "like") as file:
        is_archive = file.config is not None and not os.path.isdir(like)
        _ends_in(path, ".keras" if is_archive else ".weights.h5")
        model = contents(file)
        replaced: dict[str, np.ndarray] = {}
        tables: dict[str, Any] = {}
        for name, (config, arrays) in layers.items():
            layer = attention_layer(name, model)
            places = placed(layer, config, told_of(layer, model, kernel_axes))
            has_biases = all(place in places for place in _biases(config.projections))
            given = _with_all_biases(arrays, config) if has_biases else arrays
            replaced |= _replacements(layer.path, places, given, replaced)
            tables[layer.path] = (places.get(TABLE), given.get(TABLE))
        _same_tables(tables, replaced)
    if is_archive:
        _patch_archive(path, replaced, like)
        return
    with _replacing(path) as target:
        shutil.copyfile(weights_of(like), target)
        _patch(target, replaced)


def _patch_archive(
    path: Path, replaced: Mapping[str, np.ndarray], like: str | os.PathLike[str]
) -> None:
    """Member by member, in the archive's order."""
    name = Path(like).name
    with open(like, "rb") as file, open_archive(file, name) as source, _replacing(path) as target:
        weights = target.with_name(WEIGHTS)
        with open(weights, "wb") as stream:
            copy_member(source, WEIGHTS, stream)
        _patch(weights, replaced)
        with zipfile.ZipFile(target, "w") as archive:
            for name in source.namelist():
                if name == WEIGHTS:
                    archive.write(weights, WEIGHTS)
                else:
                    with archive.open(name, "w", force_zip64=True) as stream:
                        copy_member(source, name, stream)


def _patch(target: Path, replaced: Mapping[str, np.ndarray]) -> None:
    with import_h5py().File(target, "r+") as h5:
        for name, values in replaced.items():
            h5[name][...] = _raw(values)


def _replacements(
    layer: str, places: Mapping[tuple[str, str], Place], arrays: Arrays, replaced: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The layer's new numbers by path in the file, if each is of the shape and dtype there."""
    there = {place: (x.shape, x.stored.dtype) for place, x in places.items()}
    given = {place: (values.shape, values.dtype) for place, values in arrays.items()}
    if there != given:
        rule = f"The layer {layer!r} must keep its arrays: {_spelled(there)}."
        checks.fail(ValueError, rule, _spelled(given), "Cast or choose the layer accordingly.")
    own = {place: x for place, x in places.items() if x.path.startswith(f"{layer}/")}
    paths = {x.path: x.turned(arrays[place]) for place, x in own.items()}
    if set(paths) & set(replaced):
        rule = "Every layer must be given once."
        checks.fail(ValueError, rule, f"two values for {layer!r}")
    return paths


def _same_tables(
    tables: Mapping[str, tuple[Place | None, Any]], replaced: Mapping[str, np.ndarray]
) -> None:
    """A table of distances that several layers use is written once, by the layer that owns it."""
    for layer, (place, values) in tables.items():
        if place is None or place.path.startswith(f"{layer}/"):
            continue
        there = replaced[place.path] if place.path in replaced else place.read()
        if there.tobytes() != values.tobytes():
            rule = f"The table of distances of {layer!r} must be that of its owner."
            remedy = "Give both layers the same table."
            checks.fail(ValueError, rule, f"another than at {place.path!r}", remedy)


def _biases(projections: Iterable[str]) -> list[tuple[str, str]]:
    return [(projection, "bias") for projection in projections]


def _with_all_biases(arrays: Arrays, config: MultiHeadAttentionConfig) -> Arrays:
    """Zeros where a layer with some biases has none: Keras's own has all of them or none."""
    absent = _biases(set(config.projections) - set(config.biases)) if config.biases else []
    return {**arrays, **{p: zero_bias(p[0], arrays[p[0], "kernel"]) for p in absent}}


def _spelled(arrays: Mapping[tuple[str, str], tuple[Any, Any]]) -> str:
    return ", ".join(f"{'/'.join(k)} {list(shape)} {dtype}" for k, (shape, dtype) in arrays.items())


def _raw(values: np.ndarray) -> np.ndarray:
    """HDF5 has no bfloat16: Keras writes its two bytes as they are."""
    return values.view("V2") if values.dtype == BFLOAT16 else values


def _class_of(config: MultiHeadAttentionConfig) -> str:
    return MHA if config.num_kv_heads is None else GQA


def _writable(group: str, config: MultiHeadAttentionConfig) -> None:
    """Keras's layer of grouped heads has fewer arguments."""
    names = ("value_dim", "output_shape", "attention_axes")
    extra = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if extra.get("value_dim") == config.key_dim:
        del extra["value_dim"]
    lacking = sorted({FIELDS[name] for name, _ in places_of(config) if name in FIELDS})
    if lacking:
        rule = f"Keras's layer {group!r} has no place for {lacking}."
        remedy = "Write into a copy of KerasHub's file: `like=`."
        checks.fail(ValueError, rule, f"{config}", remedy)
    if _class_of(config) == GQA and extra:
        rule = f"With `num_kv_heads` set, {group!r} is a {GQA}, which lacks {list(extra)}."
        checks.fail(ValueError, rule, f"{extra}")


def _group_path(group: str, groups: Mapping[str, Any]) -> None:
    parts = group.split("/")
    if not all(parts) or {".", "..", "vars"} & set(parts) or "\0" in group:
        rule = "A layer's path in the file must be names joined by single slashes."
        checks.fail(ValueError, rule, repr(group), "E.g. 'layers/multi_head_attention_1'.")
    for other in groups:
        if other.startswith(f"{group}/"):
            rule = "A layer's path must not lie in another's."
            checks.fail(ValueError, rule, f"{other!r} in {group!r}")


def _ends_in(path: Path, suffix: str) -> None:
    if not path.name.endswith(suffix):
        rule = f"The new file's name must end in {suffix!r}, by which Keras knows its format."
        checks.fail(ValueError, rule, repr(str(path)))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when it is finished, and not before."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".flax_mha-") as folder:
        target = pathlib.Path(folder, path.name)
        yield target
        os.replace(target, path)
