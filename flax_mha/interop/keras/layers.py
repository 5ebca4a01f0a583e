"""Which groups of a Keras file are attention layers, what lies in them, and their names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax_mha.core import checks
from flax_mha.core.typing import Shape
from flax_mha.interop.keras.archive import KerasFile
from flax_mha.interop.keras.config import GQA, MHA, described_layers, name_of
from flax_mha.interop.keras.quantized import leaves_of
from flax_mha.interop.keras.tree import Stored, Tree, checked_tree

_DENSE = ("query_dense", "key_dense", "_gate_dense", "value_dense", "output_dense")
_PROJECTIONS = ("query", "key", "gate", "value", "attention_output")
GROUPS = {
    MHA: dict(zip(_PROJECTIONS, _DENSE)),
    GQA: dict(zip(_PROJECTIONS, ("_" + name.lstrip("_") for name in _DENSE))),
}
# KerasHub mixes the two spellings, and its T5 has one of its own.
SPELLINGS = {
    name: (part.lstrip("_"), f"_{part.lstrip('_')}", part.replace("dense", "projector"))
    for name, part in GROUPS[MHA].items()
}
# Keras's own layers hold nothing else; neither part has numbers that a call depends on.
_WEIGHTLESS = {"vars", "_softmax", "_dropout_layer"}
CLASS_IN_PATH = r"(multi_head|grouped_query)_attention(_\d+)?"


class Layer(NamedTuple):
    """One attention layer in a file.

    `arrays` by (projection, leaf) and, by their path below the layer's, the `others` that lie with
    them, not read yet; `foreign` are the parts that neither of Keras's own classes has.
    """

    path: str
    name: str | None
    class_name: str
    arrays: dict[tuple[str, str], tuple[str, Stored]]
    others: dict[str, tuple[str, Stored]]
    foreign: set[str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by `query/kernel` and so on, in Keras's order; then of what lies beside."""
        shapes = {"/".join(place): stored.shape for place, (_, stored) in self.arrays.items()}
        return shapes | {name: stored.shape for name, (_, stored) in self.others.items()}


class Contents(NamedTuple):
    """A file's tree, config.json's entries and the user's names by path, the attention layers."""

    tree: Tree
    described: dict[str, Mapping[str, Any]]
    names: dict[str, str]
    attention: dict[str, Layer]


def contents(file: KerasFile) -> Contents:
    """What is in an open file, found and checked without reading an array."""
    tree = checked_tree(file)
    described = described_layers(file.config, groups_of(tree))
    told = {path: name_of(entry) for path, entry in described.items()}
    names = {path: name for path, name in {**told, **tree.names}.items() if name}
    return Contents(tree, described, names, _attention_layers(tree, names))


def _attention_layers(tree: Tree, names: Mapping[str, str]) -> dict[str, Layer]:
    """Every group with the arrays of an attention layer, whatever its class is called."""
    indices: dict[str, list[str]] = {}
    for path in tree.arrays:
        group, _, index = path.rpartition("/")
        indices.setdefault(group, []).append(index)
    found = {}
    for group in indices:
        match = re.fullmatch(r"(.+)/(_?query_dense|query_projector)/vars", group)
        parts = _parts_of(match[1], indices) if match else {}
        if match and all(name in parts for name in _PROJECTIONS if name != "gate"):
            path, class_name = match[1], GQA if match[2].startswith("_") else MHA
            arrays = _arrays(tree, parts, indices)
            found[path] = Layer(path, full_name(path, names), class_name, arrays, {}, set())
    _note_what_lies_with(tree, found)
    return found


def _parts_of(path: str, indices: Mapping[str, list[str]]) -> dict[str, str]:
    """The group of each projection's arrays in the layer at a path, of those that are there."""
    found: dict[str, str] = {}
    for name, spellings in SPELLINGS.items():
        for group in (f"{path}/{part}/vars" for part in spellings):
            if "0" in indices.get(group, ()):
                found.setdefault(name, group)
    return found


def _note_what_lies_with(tree: Tree, layers: Mapping[str, Layer]) -> None:
    """Fills in `others` and `foreign` of every layer, in one pass over the file."""
    for group in tree.groups:
        for layer, part in _above(group, layers):
            part = part.partition("/")[0]
            if part not in {*_WEIGHTLESS, *GROUPS[layer.class_name].values()}:
                layer.foreign.add(part)
    for path, stored in tree.arrays.items():
        for layer, part in _above(path, layers):
            known = path in [name for name, _ in layer.arrays.values()]
            if not known and "seed_generator" not in part.split("/"):  # random numbers' states
                layer.others[part] = (path, stored)


def _above(path: str, layers: Mapping[str, Layer]) -> Iterator[tuple[Layer, str]]:
    """The layers in whose groups the path lies, and what it is called below each."""
    parts = path.split("/")
    for n in range(1, len(parts)):
        above = "/".join(parts[:n])
        if above in layers:
            yield layers[above], "/".join(parts[n:])


def _arrays(
    tree: Tree, parts: Mapping[str, str], indices: Mapping[str, list[str]]
) -> dict[tuple[str, str], tuple[str, Stored]]:
    """The layer's arrays in Keras's order, under our names; what is more keeps its index."""
    found = {}
    for projection, group in parts.items():
        paths = {index: f"{group}/{index}" for index in indices[group]}
        leaves = leaves_of({index: tree.arrays[path] for index, path in paths.items()})
        for index, path in paths.items():
            found[projection, leaves[index]] = (path, tree.arrays[path])
    return found


# --- names --------------------------------------------------------------------------------------


def full_name(path: str, names: Mapping[str, str]) -> str | None:
    """`encoder/attention`: the names along the path, the model's own left out."""
    if path not in names:
        return None
    parts = path.split("/")
    above = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
    return "/".join(names[group] for group in above if group in names)


def attention_layer(layer: str | None, model: Contents) -> Layer:
    """The attention layer that `layer` means, a path or a name; None = the only one."""
    candidates = {path: found.name for path, found in model.attention.items()}
    shapes = {path: found.shapes for path, found in model.attention.items()}
    details = {
        path: f"query {shape['query/kernel']}, value {shape['value/kernel']}"
        for path, shape in shapes.items()
    }
    return model.attention[_select(layer, candidates, "attention layer", details)]


def any_layer(layer: str, model: Contents) -> str:
    """The path of the group, of any kind of layer, that `layer` means."""
    groups = {path: full_name(path, model.names) for path in sorted(groups_of(model.tree))}
    return _select(layer, groups, "layer", {})


def _select(
    layer: str | None,
    candidates: Mapping[str, str | None],
    what: str,
    details: Mapping[str, str],
) -> str:
    """The path of the one candidate that `layer` means: its path, its name or the name's end."""
    if not isinstance(layer, str | None):
        rule = "`layer` must be None or a string: a name or a path."
        checks.fail(TypeError, rule, f"layer of type {type(layer).__name__}")
    if layer is None:
        paths = list(candidates)
    elif layer in candidates:
        paths = [layer]
    else:
        paths = [p for p, name in candidates.items() if name and f"/{name}".endswith(f"/{layer}")]
    if len(paths) == 1:
        return paths[0]
    known = [_spelled(path, candidates[path], details) for path in paths or candidates]
    means = "means several" if paths else "is none"
    rule = f"`layer` must be the path or the name of one {what} of the file."
    evidence = f"layer={layer!r}, which {means} of: {'; '.join(known[:30]) or '(there is none)'}"
    checks.fail(ValueError, rule, evidence, "A path means one layer." if paths else "")


def _spelled(path: str, name: str | None, details: Mapping[str, str]) -> str:
    parts = [f"{name!r}"] if name else []
    parts += [details[path]] if path in details else []
    return f"{path} ({', '.join(parts)})" if parts else path


def groups_of(tree: Tree) -> set[str]:
    """The paths of all groups that hold an array at any depth."""
    groups: set[str] = set()
    for path in tree.arrays:
        while (path := path.rpartition("/")[0]) and path not in groups:
            groups.add(path)
    return groups
