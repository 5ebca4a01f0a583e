"""The config of an attention layer in a Keras file: as far as the file tells it, and no further."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.interop.keras.arguments import NO_OPTIONS, Options
from flax_mha.interop.keras.backbones import MODELS
from flax_mha.interop.keras.calls import causal_in_calls
from flax_mha.interop.keras.classes import CAUSAL, Words
from flax_mha.interop.keras.config import (
    GQA,
    MHA,
    Entry,
    entry_by_name,
    kind,
    name_of,
    nearest,
    registered,
)
from flax_mha.interop.keras.hub import found_in_table, hub_call, hub_config, table_of
from flax_mha.interop.keras.layers import CLASS_IN_PATH, Contents, Layer
from flax_mha.interop.keras.places import Told
from flax_mha.interop.keras.quantized import check_policy, float_dtype, is_packed
from flax_mha.interop.keras.tree import Stored

_UNTOLD = (
    "position, sliding_window, attention_axes, soft_cap, qk_norm, use_sinks, dropout, "
    "a scale other than 1 / sqrt(key_dim)"
)


def config_of(
    layer: Layer, model: Contents, options: Options = NO_OPTIONS
) -> MultiHeadAttentionConfig:
    """config.json's; of weights alone what the shapes tell, unless the class is another's."""
    if "" not in model.described:
        if not is_keras_s(layer, model):
            rule = f"Without `config=`, a layer must be Keras's own {MHA} or {GQA}."
            _ask(layer, rule, f"{layer.path!r}, of another class{_beside(layer)}")
        if is_packed("query", layer.arrays):
            rule = "Without `config=`, kernels must be [D, N, H]."
            _ask(layer, rule, f"int4 at {layer.path!r}, two numbers a byte")
        return inferred_config(layer)
    entry = entry_of(layer, model)
    if entry is None and (found := found_in_table(layer, model, options)) is not None:
        return hub_config(found, options)
    if entry is None:
        rule = "config.json must describe the layer as one of Keras's own or of KerasHub's."
        evidence = f"nothing about {layer.path!r} ({layer.name!r}), which a custom class may hold"
        _ask(layer, rule, evidence + _beside(layer))
    if not is_packed("query", layer.arrays):
        check_kernels(layer)
    try:
        config = config_from_fields(layer.class_name, entry["config"])
        check_policy(entry["config"], layer.arrays)
        return config
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        rule = f"config.json's description of {layer.path!r} must be one that can be used here."
        _ask(layer, rule, f"{type(error).__name__}: {error}".rstrip("."))


def call_of(layer: Layer, model: Contents) -> Words:
    """What every call of the layer must pass, if config.json tells it."""
    entry = entry_of(layer, model) if "" in model.described else None
    if entry is None and "" in model.described:
        found = found_in_table(layer, model)
        if found is not None:
            return hub_call(found)
    if entry is None or layer.path not in model.described:
        rule = "config.json must tell how the layer is called."
        evidence = f"nothing about {layer.path!r}, which a custom class or weights alone may hold"
        checks.fail(ValueError, rule, evidence, "Take it with `load_keras_file`, and say so.")
    return CAUSAL if causal_in_calls(entry, default=False) else {}


def told_of(layer: Layer, model: Contents, kernel_axes: str | None = None) -> Told:
    """What the caller, the class and the file say of the layer's arrays."""
    own = is_keras_s(layer, model)
    if own or "" not in model.described:
        return Told(kernel_axes, own)
    found = found_in_table(layer, model) if registered_above(layer, model) in MODELS else None
    if found is None:
        return Told(kernel_axes, own)
    return Told(kernel_axes or found.row.kernel_axes, own, table_of(found, model))


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


def _ask(layer: Layer, rule: str, evidence: str) -> NoReturn:
    """Refuses, and says what the shapes tell and what nothing tells."""
    remedy = f"Pass `config=`: {_shapes_tell(layer)}. "
    checks.fail(ValueError, rule, evidence, f"{remedy}Nothing tells {_UNTOLD}.")


def _shapes_tell(layer: Layer) -> str:
    if all(len(layer.arrays[name, "kernel"][1].shape) == 2 for name in ("query", "key", "value")):
        return f"kernels [D, N H] do not tell heads from features: {layer.shapes}"
    fields = inferred_config(layer).to_dict()
    told = {name: value for name, value in fields.items() if value != _DEFAULTS[name]}
    return f"the shapes tell MultiHeadAttentionConfig(**{told})"


_DEFAULTS = MultiHeadAttentionConfig(num_heads=1, key_dim=1).to_dict()


def entry_of(layer: Layer, model: Contents) -> Mapping[str, Any] | None:
    """The layer's entry in config.json; None where it has none that is surely its own.

    A layer that is an attribute of a custom class has no place in a list of layers. It is then
    known by its name, if that is unique in the entry of the described layer that holds it.
    """
    named, described = model.tree.names, model.described
    entry, name = described.get(layer.path), named.get(layer.path)
    if entry is not None and name in (None, name_of(entry)):
        return entry if is_described(entry, layer) else None
    if name is None:
        return None
    above = nearest(layer.path, described)
    rivals = [p for p in model.attention if named.get(p) == name and p not in described]
    if [path for path in rivals if nearest(path, described) == above] != [layer.path]:
        return None
    return entry_by_name(described[above], name, layer.class_name)


def is_described(entry: Entry, layer: Layer) -> bool:
    """Whether the entry is of one of Keras's two classes, or of KerasHub's that adds a cache."""
    cached = registered(entry) == "CachedMultiHeadAttention" and layer.class_name == MHA
    return cached or kind(entry) == layer.class_name


def registered_above(layer: Layer, model: Contents) -> str | None:
    return registered(model.described[nearest(layer.path, model.described)])


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
    query, key, output = check_kernels(layer)
    N, V, *E = output.shape
    heads = 1 if query.shape[1] == N else 0  # the axis of heads; first in KerasHub's Gemma
    H, K = query.shape[2], key.shape[heads]
    dtype = float_dtype("query", layer.arrays)
    return MultiHeadAttentionConfig(
        num_heads=N,
        key_dim=H,
        value_dim=None if V == H else V,
        use_bias=tuple(name for name, leaf in layer.arrays if leaf == "bias"),
        output_shape=None if [query.shape[1 - heads]] == E else tuple(E),
        use_gate=("gate", "kernel") in layer.arrays,
        num_kv_heads=K if layer.class_name == GQA or K != N else None,
        param_dtype=dtype,
        **_computed_in(layer, dtype),
    )


def _computed_in(layer: Layer, dtype: Any) -> dict[str, Any]:
    """A narrow scale is read into float32, in which a call is not to compute for that."""
    narrow = ("query", "scale") in layer.arrays and dtype.itemsize < 4
    return {"dtype": dtype} if narrow else {}


def check_kernels(layer: Layer) -> tuple[Stored, Stored, Stored]:
    """The kernels of query, key and output, if all have the axes that Keras gives them."""
    query, key, value, output = (
        layer.arrays[name, "kernel"][1] for name in ("query", "key", "value", "attention_output")
    )
    if not (len(query.shape) == len(key.shape) == len(value.shape) == 3 <= len(output.shape)):
        rule = (
            "The kernels must be query [D, N, H], key [C, K, H], value [M, K, V], output [N, V, E]."
        )
        checks.fail(ValueError, rule, f"{layer.shapes} at {layer.path!r}")
    return query, key, output
