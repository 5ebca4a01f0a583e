"""The tree of groups and arrays in Keras's HDF5 file: every object checked before one is read.

Keras writes hard links, and arrays that are contiguous and unfiltered. Whatever else HDF5 can do
(links to other files, arrays made of other files, compressed arrays that unfold without end) is
refused by name, and an array may not claim more bytes than the file has.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Shape
from flax_mha.interop.keras.archive import KerasFile, import_h5py, intact

MAX_PATH, MAX_NAME = 1024, 1024
BFLOAT16 = jnp.dtype("bfloat16")  # which HDF5 does not know: two opaque bytes, and an attribute


class Stored(NamedTuple):
    """One array of the file, not read yet."""

    dataset: Any
    shape: Shape
    dtype: Any


class Tree(NamedTuple):
    """`arrays` by path, in order of path; the user's `names` of layers by their group's path.

    `groups` are the paths of all groups, those without an array too.
    """

    arrays: dict[str, Stored]
    names: dict[str, str]
    groups: frozenset[str]


def checked_tree(file: KerasFile) -> Tree:
    """Every array and every name in the file, none of the arrays read."""
    h5py = import_h5py()
    arrays: dict[str, Stored] = {}
    names: dict[str, str] = {}
    groups: set[str] = set()
    seen: set[Any] = set()
    pending: list[tuple[str, Any]] = [("", file.h5)]
    while pending:
        path, item = pending.pop()
        _only_once(h5py, path, item, seen)
        if isinstance(item, h5py.Dataset):
            arrays[path] = _stored(h5py, path, item)
            continue
        groups.add(path)
        if path.rpartition("/")[2] == "vars" and (name := _text(h5py, path, item, "name")):
            names[path.removesuffix("vars").removesuffix("/")] = name
        pending += _children(h5py, path, item)
    _no_more_than_the_file(arrays, file.size)
    ordered = {path: arrays[path] for path in sorted(arrays, key=_natural)}
    return Tree(ordered, names, frozenset(groups))


def read_array(path: str, stored: Stored) -> np.ndarray:
    """The array's numbers, in the machine's byte order; bfloat16 as such."""
    with intact(f"The array {path!r}"):
        values = stored.dataset[()]
    if stored.dtype == BFLOAT16:
        return np.asarray(values).view(BFLOAT16)
    return np.asarray(values, stored.dtype)


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """`vars/2` before `vars/10`."""
    ordinals = [part if part.isascii() and part.isdecimal() else "" for part in path.split("/")]
    return [(not o, int(o or 0), part) for o, part in zip(ordinals, path.split("/"))]


def _children(h5py: Any, path: str, group: Any) -> list[tuple[str, Any]]:
    children = []
    with intact(f"The group {path!r}"):
        links = [(name, group.get(name, getlink=True)) for name in group]
    for name, link in links:
        child = f"{path}/{name}" if path else name
        if len(child) > MAX_PATH:
            rule = f"The path of a group or array must be of at most {MAX_PATH} characters."
            checks.fail(ValueError, rule, f"one of {len(child)} below {child[:60]!r}")
        if type(link) is not h5py.HardLink:
            rule = "A Keras file must hold its own groups and arrays, without links elsewhere."
            evidence = f"{child!r}, of type {type(link).__name__}"
            checks.fail(ValueError, rule, evidence, "Keras never writes one: do not trust it.")
        with intact(f"The object {child!r}"):
            children.append((child, group[name]))
    return children


def _only_once(h5py: Any, path: str, item: Any, seen: set[Any]) -> None:
    """Hard links can make a cycle, or a thousand arrays out of one."""
    if not isinstance(item, h5py.Group | h5py.Dataset):
        rule = "A Keras file must hold groups and arrays only."
        checks.fail(ValueError, rule, f"{path!r}, of type {type(item).__name__}")
    with intact(f"The object {path!r}"):
        address = h5py.h5o.get_info(item.id).addr
    if address in seen:
        rule = "Every object of a Keras file must be in one place."
        checks.fail(ValueError, rule, f"{path!r}, which has another path too")
    seen.add(address)


def _text(h5py: Any, path: str, item: Any, name: str) -> str | None:
    """A short string in an attribute; None where there is none."""
    with intact(f"The attributes of {path!r}"):
        if name not in item.attrs:
            return None
        kind = item.attrs.get_id(name)
        is_text = kind.shape == () and h5py.check_string_dtype(kind.dtype) is not None
        value = item.attrs[name] if is_text else None
    if not isinstance(value, str) or len(value) > MAX_NAME:
        rule = f"The attribute {name!r} of {path!r} must be a string of at most {MAX_NAME}."
        checks.fail(ValueError, rule, f"shape {kind.shape}, dtype {kind.dtype}")
    return value


def _stored(h5py: Any, path: str, dataset: Any) -> Stored:
    """The array's shape and dtype, if all its numbers lie in this file as they are."""
    with intact(f"The array {path!r}"):
        shape, dtype = dataset.shape, dataset.dtype
        plist = dataset.id.get_create_plist()
        tricks = {
            "external storage": plist.get_external_count() > 0,
            "a virtual array": plist.get_layout() == h5py.h5d.VIRTUAL,
            "a filter (compression)": plist.get_nfilters() > 0,
        }
        stored = dataset.id.get_storage_size()
    for trick in (name for name, used in tricks.items() if used):
        rule = f"The array {path!r} must lie in the file, contiguous and unfiltered."
        remedy = "Keras writes it so; `h5repack -f NONE` undoes compression."
        checks.fail(ValueError, rule, trick, remedy)
    if dtype.kind == "V" and _text(h5py, path, dataset, "dtype") == "bfloat16":
        dtype = BFLOAT16 if dtype.itemsize == 2 else dtype
    if shape is None or (dtype.kind not in "fiub" and dtype != BFLOAT16) or dtype.itemsize > 8:
        checks.fail(ValueError, f"{path!r} must be an array of numbers.", f"dtype {dtype}")
    declared = math.prod(shape) * dtype.itemsize
    if declared > stored:
        rule = f"The array {path!r} of shape {shape} must have its {declared} bytes in the file."
        checks.fail(ValueError, rule, f"{stored} bytes", "The file is damaged or hostile.")
    return Stored(dataset, tuple(shape), dtype.newbyteorder("="))


def _no_more_than_the_file(arrays: dict[str, Stored], size: int) -> None:
    total = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
    if total > size:
        rule = f"The arrays must have no more bytes than the file, which has {size}."
        checks.fail(ValueError, rule, f"{total} bytes declared", "It is damaged or hostile.")
