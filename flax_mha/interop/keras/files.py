"""Keras files, `.keras` and `.weights.h5`, read and written without Keras."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks, file_checks
from flax_mha.core.typing import Params, ParamsLike, Shape
from flax_mha.interop.keras.archive import open_keras_file
from flax_mha.interop.keras.arguments import Options, checked
from flax_mha.interop.keras.arrays import (
    check,
    params_from,
    places_of,
    tree_of,
    without_scales,
)
from flax_mha.interop.keras.hub import check_known
from flax_mha.interop.keras.layer_config import call_of, config_of, told_of
from flax_mha.interop.keras.layers import Contents, Layer, any_layer, attention_layer, contents
from flax_mha.interop.keras.places import check_ordinary, placed
from flax_mha.interop.keras.save import write_copy, write_new
from flax_mha.interop.keras.tree import read_array
from flax_mha.interop.keras.weights import to_keras_weights
from flax_mha.interop.loaded import AttentionLayer

PathLike = str | os.PathLike[str]


class KerasLayer(NamedTuple):
    """One attention layer of a file, as `list_keras_layers` finds it.

    Attributes:
        path: where it stands in the file: `layers/multi_head_attention_1`.
        name: the user's, such as `encoder/attention`; None where the file does not tell.
        class_name: "MultiHeadAttention" or "GroupQueryAttention", by what its parts are called;
            its class may be another, of the same parts.
        shapes: the arrays' shapes by "query/kernel" and so on; of arrays that Keras's own layer
            does not have, by their path below the layer's.

    Example:
        >>> KerasLayer("layers/x", None, "MultiHeadAttention", {"query/kernel": (8, 2, 4)}).path
        'layers/x'
    """

    path: str
    name: str | None
    class_name: str
    shapes: dict[str, Shape]


def list_keras_layers(path: PathLike) -> list[KerasLayer]:
    """The attention layers in a `.keras` or `.weights.h5` file.

    Args:
        path: the file.

    Returns:
        One `KerasLayer(path, name, class_name, shapes)` each, in order of path. Layers of any
        class with the arrays of Keras's attention are found, KerasHub's for example.

    Raises:
        ValueError: a damaged or hostile file, or one of another format.
        ImportError: h5py is not installed.

    Example:
        >>> import os, tempfile, jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=4)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.weights.h5")
        >>> save_keras_weights(path, {"layers/multi_head_attention": (config, params)})
        >>> [layer.path for layer in list_keras_layers(path)]
        ['layers/multi_head_attention']
    """
    with open_keras_file(path) as file:
        layers = contents(file).attention.values()
        return [KerasLayer(x.path, x.name, x.class_name, x.shapes) for x in layers]


def load_keras_file(
    path: PathLike,
    layer: str | None = None,
    config: MultiHeadAttentionConfig | None = None,
    *,
    kernel_axes: str | None = None,
) -> tuple[MultiHeadAttentionConfig, Params]:
    """(config, params) of one attention layer in a `.keras` or `.weights.h5` file.

    Nothing in the file is executed, unpickled or extracted; its arrays are read into memory only
    if the file is as large as they are.

    Args:
        path: the file, or the folder that KerasHub's `save_to_preset` writes.
        layer: the layer's name in Keras, `attention` or below its models' names
            `encoder/attention`; or its path in the file, `layers/multi_head_attention_1`. None:
            the only attention layer of the file.
        config: the layer's config; None reads it from the archive's config.json, of a model of
            KerasHub by the layer's class (see `load_attention`), or, for a `.weights.h5` file,
            infers it: num_heads, key_dim, value_dim, use_bias, output_shape, use_gate,
            num_kv_heads and param_dtype follow from the shapes. **Nothing tells** of
            `attention_axes` and `sliding_window`, which change the numbers, nor of dropout,
            initializers, regularizers, constraints and seed: these get their defaults. None is
            refused for weights alone of another class, which the file shows by its group's name
            in a list of layers, or by parts that Keras's own has not (a rotary embedding, norms),
            as KerasHub's Llama, Qwen 3, Gemma and gpt-oss. A config then tells what they cannot:
            position, window, norms, sinks. A class derived from Keras's that holds nothing more,
            as an attribute, cannot be told from it: pass its config.
        kernel_axes: of query, key, value and gate: "DNH" as in Keras, "NDH" as in KerasHub's
            Gemma. None: as the sizes tell.

    Returns:
        The config, and the parameters bit for bit. Of KerasHub's layers the norms' scales (Qwen 3,
        Gemma 3) come with `qk_norm`, the sinks of gpt-oss with `use_sinks`, the table of T5 with
        `position=RelativeBias()`; kernels `[N, D, H]` and `[D, N H]` are turned.

    Raises:
        ValueError: no such layer or several, with a list of the file's attention layers; a config
            that does not fit, or is needed, with what the shapes tell; an array that lies with the
            layer and has no place in the config; kernels whose axes the sizes do not tell; a
            damaged or hostile file.
        ImportError: h5py is not installed.

    Example:
        >>> import os, tempfile, jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=4, value_dim=3)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.weights.h5")
        >>> save_keras_weights(path, {"layers/multi_head_attention": (config, params)})
        >>> found, loaded = load_keras_file(path)
        >>> found == config, bool((loaded["key"]["kernel"] == params["key"]["kernel"]).all())
        (True, True)
    """
    with open_keras_file(path) as file:
        model = contents(file)
        found = attention_layer(layer, model)
        check_ordinary(found)
        config = config_of(found, model) if config is None else config
        return config, _params(found, model, config, kernel_axes)


def _params(
    layer: Layer, model: Contents, config: MultiHeadAttentionConfig, kernel_axes: str | None = None
) -> Params:
    places = placed(layer, config, told_of(layer, model, kernel_axes))
    dtypes = {place: array.stored.dtype for place, array in places.items()}
    structs = {k: jax.ShapeDtypeStruct(x.shape, dtypes[k]) for k, x in places.items()}
    check(tree_of(without_scales(structs)), config)  # before anything is read
    return params_from({place: array.read() for place, array in places.items()}, config)


def load_attention(
    path: PathLike, *, max_length: int | None = None, ignore: Sequence[str] = ()
) -> dict[str, AttentionLayer]:
    """Every attention layer of the model in a `.keras` file: config, parameters, what calls pass.

    A model of KerasHub (Llama, Mistral, Qwen, Gemma, gpt-oss, Phi-3, T5, GPT-2, Bert, Whisper and
    their kin; a task such as `LlamaCausalLM` too) tells its layers' configs by their classes;
    Keras's own layers are described one by one, and a functional model tells their calls.

    Args:
        path: the `.keras` file, or the folder that KerasHub's `save_to_preset` writes.
        max_length: the longest text that will be given; Phi-3's long variants need it.
        ignore: names of a model's fields that would be refused, to be passed over: each layer is
            then as without it. A `dropout` that is not of the weights has no effect at inference.

    Returns:
        An `AttentionLayer(config, params, call)` each by its path in the file, in the file's
        order. Call it as `multi_head_attention(params, query, value, config=config, **call)`,
        with the padding as its masks; `save_keras_weights(..., like=path)` takes the dict.

    Raises:
        ValueError: a model of KerasHub that is not known, or one of its fields that is set and not
            known, by name; a layer about which the file does not tell enough, then
            `load_keras_file` takes each layer with a config of yours; a damaged or hostile file.
        TypeError: a `max_length` that is no int; an `ignore` that is one string.
        ImportError: h5py is not installed.

    Differs from Keras: (1) initializers are those of this package. (2) The sliding windows of
    Qwen 2 and 3 are those of the file; keras_hub 0.32 leaves them out on JAX and PyTorch.

    Example:
        >>> import json, os, tempfile, jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=3, key_dim=8)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 24))
        >>> folder, path = tempfile.mkdtemp(), "layers/transformer_decoder/_self_attention_layer"
        >>> weights = os.path.join(folder, "model.weights.h5")
        >>> save_keras_weights(weights, {path: (config, params)})
        >>> gpt = {"class_name": "GPT2Backbone", "registered_name": "keras_hub>GPT2Backbone",
        ...        "config": {"num_heads": 3, "dropout": 0.1, "num_layers": 1}}
        >>> with open(os.path.join(folder, "config.json"), "w") as file:
        ...     json.dump(gpt, file)
        >>> layer = load_attention(folder)[path]
        >>> layer.config.dims, layer.config.dropout, layer.call
        (HeadDims(N=3, K=3, H=8, V=8), 0.1, {'use_causal_mask': True})
    """
    options = checked(max_length, ignore)
    with open_keras_file(path) as file:
        model = contents(file)
        check_known(model)
        return {name: _loaded(layer, model, options) for name, layer in model.attention.items()}


def _loaded(layer: Layer, model: Contents, options: Options) -> AttentionLayer:
    check_ordinary(layer)
    config, call = config_of(layer, model, options), call_of(layer, model)
    return AttentionLayer(config, _params(layer, model, config), call)


def read_keras_arrays(path: PathLike, layer: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a `.keras` or `.weights.h5` file, of any layers: to port the rest of a model.

    Args:
        path: the file.
        layer: a layer's or inner model's name or path, as in `load_keras_file`; None = everything,
            the optimizer's state too.

    Returns:
        Arrays by their path in the file (below the layer's, if one is named), in Keras's order:
        of a Dense layer `{"vars/0": kernel, "vars/1": bias}`.

    Raises:
        ValueError: no such layer, or several; a damaged or hostile file.
        ImportError: h5py is not installed.

    Example:
        >>> import os, tempfile, jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=4, use_bias=False)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.weights.h5")
        >>> save_keras_weights(path, {"attention": (config, params)})
        >>> list(read_keras_arrays(path, "attention"))[0]
        'key_dense/vars/0'
    """
    with open_keras_file(path) as file:
        model = contents(file)
        prefix = ""
        if layer is not None:
            prefix = any_layer(layer, model) + "/"
        arrays = {p: x for p, x in model.tree.arrays.items() if p.startswith(prefix)}
        return {p.removeprefix(prefix): read_array(p, stored) for p, stored in arrays.items()}


def save_keras_weights(
    path: PathLike,
    layers: Mapping[str, tuple[MultiHeadAttentionConfig, ParamsLike]],
    like: PathLike | None = None,
    *,
    kernel_axes: str | None = None,
) -> None:
    """Writes attention layers to a file that Keras loads.

    Args:
        path: the file to write, or to replace when all is written.
        layers: `{layer: (config, params)}`.
        like: an existing `.keras` or `.weights.h5` file, which is copied with these layers' numbers
            replaced; then a layer is named as in `load_keras_file`. None: a new `.weights.h5` of
            these layers alone, by their paths in the file: the layers of a functional or
            sequential model are `layers/multi_head_attention`, `layers/multi_head_attention_1`
            and so on in the model's order, whatever their names;
            `layers/grouped_query_attention` where `num_kv_heads` is set. A bias that `use_bias`
            does not name is written as zeros, which is exact: Keras's layer has all or none.
        kernel_axes: of the layers in `like`, as in `load_keras_file`.

    Raises:
        ValueError: parameters that do not fit their config or the layer in `like`, or, without
            `like`, that Keras's layer lacks (norms, sinks); a `score`; an unknown layer, a file
            name with another ending, a damaged or hostile `like`.
        TypeError: a path or `layers` that are none.
        ImportError: h5py is not installed.

    Differs from Keras: (1) with `like` the archive's config.json stays as it is, so a changed
    dropout or sliding window is not written; (2) the file is replaced at once, never half written.

    Example:
        >>> import os, tempfile, jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=4)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.weights.h5")
        >>> save_keras_weights(path, {"layers/multi_head_attention": (config, params)})
        >>> save_keras_weights(path, {"layers/multi_head_attention": (config, params)}, like=path)
    """
    target = file_checks.new_file("path", path)
    file_checks.by_name("layers", layers, tuple)
    arrays = {}
    for name, layer in layers.items():
        if len(layer) < 2:
            rule = "`layers` must hold (config, params) for each name."
            checks.fail(ValueError, rule, f"layers[{name!r}] of length {len(layer)}")
        config, params = layer[:2]
        weights = to_keras_weights(params, config)
        arrays[name] = (config, dict(zip(places_of(config), weights)))
    if like is None:
        write_new(target, arrays)
    else:
        write_copy(target, arrays, like, kernel_axes)
