"""The config of an attention layer in a Keras file: as far as the file tells it, and no further."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.interop.keras.config import GQA, MHA, entry_by_name, kind, name_of, nearest
from flax_mha.interop.keras.layers import CLASS_IN_PATH, Contents, Layer

_UNTOLD = (
    "position, sliding_window, attention_axes, soft_cap, qk_norm (here with epsilon 1e-6), "
    "use_sinks, dropout, a scale other than 1 / sqrt(key_dim)"
)


def config_of(layer: Layer, model: Contents) -> MultiHeadAttentionConfig:
    """config.json's; of weights alone what the shapes tell, unless the class is another's."""
    inferred = inferred_config(layer)
    if "" not in model.described:
        if not is_keras_s(layer, model):
            rule = f"Without `config=`, a layer must be Keras's own {MHA} or {GQA}."
            _ask(inferred, rule, f"{layer.path!r}, of another class{_beside(layer)}")
        return inferred
    entry = entry_of(layer, model)
    if entry is None:
        rule = "config.json must describe the layer as one of Keras's own."
        evidence = f"nothing about {layer.path!r} ({layer.name!r}), which a custom class may hold"
        _ask(inferred, rule, evidence + _beside(layer))
    try:
        return config_from_fields(layer.class_name, entry["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        rule = f"config.json's description of {layer.path!r} must be one that can be used here."
        _ask(inferred, rule, f"{type(error).__name__}: {error}".rstrip("."))


def is_keras_s(layer: Layer, model: Contents) -> bool:
    """Whether the layer is of Keras's own two classes, for all that the file shows.

    Weights alone show the parts, and the class of what stands in a model's list of layers; of an
    attribute they show its name.
    """
    if layer.foreign or layer.others:
        return False
    if "" in model.described:
        return entry_of(layer, model) is not None
    above, _, group = layer.path.rpartition("/")
    return above.rpartition("/")[2] != "layers" or bool(re.fullmatch(CLASS_IN_PATH, group))


def _beside(layer: Layer) -> str:
    """What the layer holds that Keras's own does not: it shows what it computes."""
    own = {name for name in layer.others if name.partition("/")[0] not in layer.foreign}
    parts = sorted(layer.foreign | own)
    return f" with {parts}" if parts else ""


def _ask(inferred: MultiHeadAttentionConfig, rule: str, evidence: str) -> NoReturn:
    """Refuses, and says what the shapes tell and what nothing tells."""
    fields = inferred.to_dict()
    told = {name: value for name, value in fields.items() if value != _DEFAULTS[name]}
    remedy = f"Pass `config=`: the shapes tell MultiHeadAttentionConfig(**{told}). "
    checks.fail(ValueError, rule, evidence, f"{remedy}Nothing tells {_UNTOLD}.")


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
    N, V, *E = output.shape
    heads = 1 if query.shape[1] == N else 0  # the axis of heads; first in KerasHub's Gemma
    H, K = query.shape[2], key.shape[heads]
    return MultiHeadAttentionConfig(
        num_heads=N,
        key_dim=H,
        value_dim=None if V == H else V,
        use_bias=tuple(name for name, leaf in layer.arrays if leaf == "bias"),
        output_shape=None if [query.shape[1 - heads]] == E else tuple(E),
        use_gate=("gate", "kernel") in layer.arrays,
        num_kv_heads=K if layer.class_name == GQA or K != N else None,
        param_dtype=query.dtype,
    )
