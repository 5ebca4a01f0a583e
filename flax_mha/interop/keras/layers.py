"""Which groups of a Keras file are attention layers, how they are called, and their configs."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Shape
from flax_mha.interop.keras.archive import KerasFile
from flax_mha.interop.keras.config import (
    GQA,
    MHA,
    described_layers,
    entry_by_name,
    kind,
    name_of,
    nearest,
)
from flax_mha.interop.keras.tree import Stored, Tree, checked_tree

_DENSE = ("query_dense", "key_dense", "_gate_dense", "value_dense", "output_dense")
_PROJECTIONS = ("query", "key", "gate", "value", "attention_output")
GROUPS = {
    MHA: dict(zip(_PROJECTIONS, _DENSE)),
    GQA: dict(zip(_PROJECTIONS, ("_" + name.lstrip("_") for name in _DENSE))),
}
LEAVES = {"0": "kernel", "1": "bias"}


class Layer(NamedTuple):
    """One attention layer in a file; `arrays` by (projection, leaf), not read yet."""

    path: str
    name: str | None
    class_name: str
    arrays: dict[tuple[str, str], tuple[str, Stored]]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by `query/kernel` and so on, in Keras's order."""
        return {"/".join(place): stored.shape for place, (_, stored) in self.arrays.items()}


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
        match = re.fullmatch(r"(.+)/(_?)query_dense/vars", group)
        if match:
            path, class_name = match[1], GQA if match[2] else MHA
            parts = {name: f"{path}/{part}/vars" for name, part in GROUPS[class_name].items()}
            if all("0" in indices.get(parts[name], ()) for name in parts if name != "gate"):
                arrays = _arrays(tree, parts, indices)
                found[path] = Layer(path, full_name(path, names), class_name, arrays)
    return found


def _arrays(
    tree: Tree, parts: Mapping[str, str], indices: Mapping[str, list[str]]
) -> dict[tuple[str, str], tuple[str, Stored]]:
    """The layer's arrays in Keras's order, under our names; what is more keeps its index."""
    return {
        (projection, LEAVES.get(index, index)): (
            f"{group}/{index}",
            tree.arrays[f"{group}/{index}"],
        )
        for projection, group in parts.items()
        for index in indices.get(group, ())
    }


def check_ordinary(layer: Layer) -> None:
    """Every projection has floats for a kernel, and maybe a bias: no scales, no adapters."""
    for (projection, leaf), (path, stored) in layer.arrays.items():
        if leaf not in LEAVES.values() or not jnp.issubdtype(stored.dtype, jnp.floating):
            rule = f"{projection!r} of {layer.path!r} must be a kernel and maybe a bias, of floats."
            remedy = "Is it quantized? Save the model before it is."
            checks.fail(ValueError, rule, f"{path!r} of dtype {stored.dtype}", remedy)


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


# --- configs ------------------------------------------------------------------------------------


def config_of(layer: Layer, model: Contents) -> MultiHeadAttentionConfig:
    """config.json's; of weights alone what the shapes tell."""
    inferred = inferred_config(layer)
    if "" not in model.described:
        return inferred
    told = {name: value for name, value in inferred.to_dict().items() if value != _DEFAULTS[name]}
    remedy = f"Pass `config=`: the shapes tell MultiHeadAttentionConfig(**{told})."
    entry = entry_of(layer, model)
    if entry is None:
        rule = "config.json must describe the layer as one of Keras's own."
        evidence = f"nothing about {layer.path!r} ({layer.name!r}), which a custom class may hold"
        checks.fail(ValueError, rule, evidence, remedy)
    try:
        return config_from_fields(layer.class_name, entry["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        rule = f"config.json's description of {layer.path!r} must be one that can be used here."
        checks.fail(ValueError, rule, f"{type(error).__name__}: {error}".rstrip("."), remedy)


_DEFAULTS = MultiHeadAttentionConfig(num_heads=1, key_dim=1).to_dict()


def entry_of(layer: Layer, model: Contents) -> Mapping[str, Any] | None:
    """The layer's entry in config.json; None where it has none that is surely its own.

    A layer that is an attribute of a custom class has no place in a list of layers. It is then
    known by its name, if that is unique in the entry of the described layer that holds it.
    """
    named, described = model.tree.names, model.described
    entry, name = described.get(layer.path), named.get(layer.path)
    if entry is not None and name in (None, name_of(entry)):
        return entry if kind(entry) == layer.class_name else None
    if name is None:
        return None
    above = nearest(layer.path, described)
    rivals = [p for p in model.attention if named.get(p) == name and p not in described]
    if [path for path in rivals if nearest(path, described) == above] != [layer.path]:
        return None
    return entry_by_name(described[above], name, layer.class_name)


def config_from_fields(class_name: str, fields: Mapping[str, Any]) -> MultiHeadAttentionConfig:
    """From `get_config()` of either layer."""
    if class_name == GQA:
        fields = _grouped(fields)
    return MultiHeadAttentionConfig.from_keras_config(fields)


def _grouped(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("activity_regularizer") is not None:
        rule = (
            f"{GQA} counts the `activity_regularizer` of its output twice, which is not done here."
        )
        remedy = "Pass a config of your own, with the regularizer that you want."
        checks.fail(ValueError, rule, repr(fields["activity_regularizer"]), remedy)
    theirs = {"head_dim": "key_dim", "num_query_heads": "num_heads"}
    theirs["num_key_value_heads"] = "num_kv_heads"
    return {theirs.get(name, name): value for name, value in fields.items()}


def inferred_config(layer: Layer) -> MultiHeadAttentionConfig:
    """All that shapes tell: sizes, biases, gate, output shape, parameters' dtype."""
    query, key, value, output = (
        layer.arrays[name, "kernel"][1] for name in ("query", "key", "value", "attention_output")
    )
    if not (len(query.shape) == len(key.shape) == len(value.shape) == 3 <= len(output.shape)):
        rule = (
            "The kernels must be query [D, N, H], key [C, K, H], value [M, K, V], output [N, V, E]."
        )
        checks.fail(ValueError, rule, f"{layer.shapes} at {layer.path!r}")
    D, N, H = query.shape
    E = output.shape[2:]
    return MultiHeadAttentionConfig(
        num_heads=N,
        key_dim=H,
        value_dim=None if value.shape[2] == H else value.shape[2],
        use_bias=("query", "bias") in layer.arrays,
        output_shape=None if E == (D,) else E,
        use_gate=("gate", "kernel") in layer.arrays,
        num_kv_heads=key.shape[1] if layer.class_name == GQA or key.shape[1] != N else None,
        param_dtype=query.dtype,
    )
