"""A checkpoint's folder in: every attention layer with its config, its arrays and its call."""

import os
from collections.abc import Sequence

from flax_mha.core import checks
from flax_mha.interop.huggingface.find import Found, find
from flax_mha.interop.huggingface.folder import Folder, open_folder
from flax_mha.interop.loaded import AttentionLayer
from flax_mha.interop.torch.layouts import from_layout
from flax_mha.params.tree import features_of


def load_attention(
    directory: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, AttentionLayer]:
    """The attention layers of a checkpoint of the transformers library, by their modules' paths.

    Nothing is downloaded, no pickle is loaded, and neither torch nor transformers is needed. Each
    layer is ready for `multi_head_attention(params, x, x, config=config, **call)`; its window,
    positions, norms and scale are in its config. Layers that attend to another sequence (an
    encoder's output) take that as `value`. Padding is the caller's, as always.

    Guide: `python -m flax_mha guide your_model`.

    Memory: the arrays of the layers wanted, and those of one once more. No others are read.

    Args:
        directory: the folder, with config.json and `model.safetensors`, or its parts and their
            index.
        names: the layers wanted, as `list_attention` names them; None = all.
        max_length: the longest text that will be given. Only rotary positions of the types
            "dynamic" and "longrope" depend on it, and then it must be given.
        ignore: fields of config.json that are known to change no attention layer; a field such as
            "vision_config" leaves out the model that it describes.

    Returns:
        `{"model.layers.0.self_attn": AttentionLayer(config, params, call), ...}`, in the order of
        the model. Layers that are no softmax attention are not among them: see `list_attention`.

    Raises:
        ValueError: a model type without a row, a field that is set and not understood, arrays that
            are missing, too many or of another shape than config.json says, a file that is cut
            short or missing, quantised weights, a pickle; a name of no layer, with the closest.
        TypeError: arrays that are not floats; `names` that are one string.
        ImportError: without the safetensors package.

    Example:
        >>> import json, pathlib, tempfile, numpy as np, safetensors.numpy
        >>> from flax_mha import multi_head_attention
        >>> from flax_mha.interop.huggingface import load_attention
        >>> config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4,
        ...           "num_key_value_heads": 2, "num_hidden_layers": 1}
        >>> shapes = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
        >>> arrays = {f"model.layers.0.self_attn.{x}_proj.weight": np.ones(shapes[x], "float32")
        ...           for x in shapes}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
        ...     safetensors.numpy.save_file(arrays, folder + "/model.safetensors")
        ...     layers = load_attention(folder)
        ...     some = load_attention(folder, ["model.layers.0.self_attn"])
        >>> layer = layers["model.layers.0.self_attn"]
        >>> layer.config.dims, layer.config.position.base, layer.call
        (HeadDims(N=4, K=2, H=4, V=4), 10000.0, {'use_causal_mask': True})
        >>> x = np.ones((1, 5, 16), "float32")
        >>> multi_head_attention(layer.params, x, x, config=layer.config, **layer.call).shape
        (1, 5, 16)
    """
    folder = open_folder(directory)
    found = find(folder, max_length, ignore).layers
    if names is not None:
        names = checks.names("names", names)
        checks.known_names("A layer in `names`", names, [layer.name for layer in found])
    wanted = [layer for layer in found if names is None or layer.name in names]
    return {layer.name: read_layer(folder, layer) for layer in wanted}


def read_layer(folder: Folder, layer: Found) -> AttentionLayer:
    """The arrays of one layer, read."""
    arrays = folder.read(layer.sources.values())
    state = {f"{layer.name}.{name}": arrays[full] for name, full in layer.sources.items()}
    params = from_layout(layer.layout, state, layer.config, f"{layer.name}.")
    D = features_of(params)["query_features"]
    if layer.features != D:
        rule = (
            f"The layer {layer.name!r} must read the features of config.json, D = {layer.features}."
        )
        checks.fail(ValueError, rule, f"arrays of D = {D}")
    return AttentionLayer(layer.config, params, layer.call)
