"""A live layer of KerasHub: read as if it were in a file, by the same rows."""

from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params
from flax_mha.interop.keras.arguments import Arguments
from flax_mha.interop.keras.arrays import params_from
from flax_mha.interop.keras.classes import ROWS
from flax_mha.interop.keras.config import MHA
from flax_mha.interop.keras.layer_config import config_from_fields
from flax_mha.interop.keras.layers import SPELLINGS, Layer
from flax_mha.interop.keras.places import EXTRAS, Told, placed
from flax_mha.interop.keras.quantized import LEAVES
from flax_mha.interop.keras.tree import Stored
from flax_mha.keras.policies import policy_dtypes

CACHED, WHISPER = "CachedMultiHeadAttention", "WhisperCachedMultiHeadAttention"


def from_hub_layer(layer: Any) -> tuple[MultiHeadAttentionConfig, Params]:
    """(config, params) of a built attention layer of KerasHub."""
    name = type(layer).__name__
    if name not in ROWS:
        rule = f"A KerasHub layer must be among {[x for x in ROWS if ',' not in x]}."
        evidence = f"{type(layer).__module__}.{name}"
        checks.fail(TypeError, rule, evidence, "Use `from_keras_weights`.")
    record = _as_in_a_file(layer)
    is_plain = name in (CACHED, WHISPER)
    config = _plain_config(layer) if is_plain else _config(layer, name, record)
    places = placed(record, config, Told(ROWS[name].kernel_axes))
    return config, params_from({place: x.read() for place, x in places.items()}, config)


def _plain_config(layer: Any) -> MultiHeadAttentionConfig:
    config = config_from_fields(MHA, layer.get_config())
    biases = ("query", "value", "attention_output")  # the key of Whisper has none
    return config.replace(use_bias=biases) if type(layer).__name__ == WHISPER else config


def _config(layer: Any, name: str, record: Layer) -> MultiHeadAttentionConfig:
    axis = 1 if ROWS[name].kernel_axes == "NDH" else 0
    given = {"hidden_dim": record.arrays["query", "kernel"][1].shape[axis]}
    if name == "T5MultiHeadAttention":
        given["dropout"] = layer.dropout_layer.rate
        name = name if layer.use_relative_attention_bias else _t5_without_table(layer)
    arguments = Arguments.of_layer(layer, **given)
    words = ROWS[name].config(arguments) | policy_dtypes(layer.dtype_policy.name)
    for field, why in arguments.refused.items():
        rule = f"`{field}` of the layer must have a counterpart here: {why}."
        remedy = f"Without it: `from_keras_weights` with a config of {words}."
        checks.fail(ValueError, rule, f"{field}={arguments[field]!r}", remedy)
    return MultiHeadAttentionConfig(**words)


def _t5_without_table(layer: Any) -> str:
    if layer.name != "cross_attention":
        rule = "T5's table of distances must be the layer's own: the later layers are given theirs."
        checks.fail(ValueError, rule, f"{layer.name!r}", "Take the layers from a file.")
    return "T5MultiHeadAttention, cross"


def _as_in_a_file(layer: Any) -> Layer:
    """Its arrays by the attributes that hold them, which are the names of a file's groups."""
    record = Layer(layer.name, layer.name, MHA, {}, {}, set())
    for projection, spellings in SPELLINGS.items():
        part = next((part for part in spellings if hasattr(layer, part)), "")
        for index, array in enumerate(_arrays(layer, part)):
            place = (projection, LEAVES.get(str(index), str(index)))
            record.arrays[place] = (f"{part}/vars/{index}", _stored(array))
    for path in EXTRAS:
        part = path.rpartition("/vars/")[0]
        for array in _arrays(layer, part) if part else _own(layer):
            record.others[path] = (path, _stored(array))
    there, known = len(layer.get_weights()), len(record.arrays) + len(record.others)
    if known != there:
        rule = "Every array of the layer must be one of its projections, norms or sinks."
        remedy = "Is it quantized, or are adapters not merged?"
        checks.fail(ValueError, rule, f"{there} arrays, of which {known} are known", remedy)
    return record


def _arrays(layer: Any, part: str) -> list[Any]:
    return getattr(layer, part).get_weights() if hasattr(layer, part) else []


def _own(layer: Any) -> list[Any]:
    """The variables that the layer itself holds."""
    names = ("sinks", "relative_attention_bias")
    return [getattr(layer, name) for name in names if hasattr(layer, name)]


def _stored(array: Any) -> Stored:
    values = np.asarray(array)
    return Stored(values, values.shape, values.dtype)
