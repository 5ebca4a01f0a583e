"""A Keras layer's `get_weights()`, and a live layer: arrays in Keras's order, with its axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params, ParamsLike
from flax_mha.interop.keras.arrays import check, params_from, places_of
from flax_mha.interop.keras.config import CLASSES
from flax_mha.interop.keras.layer_config import config_from_fields
from flax_mha.interop.keras.live import from_hub_layer
from flax_mha.interop.layout import without_score
from flax_mha.masks import Neighborhood


def from_keras_weights(weights: Sequence[Any], config: MultiHeadAttentionConfig) -> Params:
    """The parameter tree from `layer.get_weights()` of a Keras layer with this config.

    Args:
        weights: arrays in Keras's order: query, key, [gate,] value, attention_output; of each the
            kernel and, with `use_bias`, the bias. The gate stands between key and value. What
            Keras's layer lacks stands as in KerasHub's: the norms' scales (`qk_norm`) behind query
            and key as in Qwen 3, a table of distances first as in T5, then sinks as in gpt-oss.
        config: the layer; `num_kv_heads` is set for a `GroupQueryAttention`. A list has no names:
            kernels `[N, D, H]`, as of KerasHub's Gemma, are to be transposed to `[D, N, H]` first.

    Returns:
        The tree of `param_shapes`, bit for bit the same numbers and dtypes.

    Raises:
        ValueError: too many or too few arrays, or a shape that does not fit, by name.
        TypeError: arrays of integers, as of a quantized layer.

    Example:
        >>> import numpy as np
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=4, use_bias=False)
        >>> kernels = [np.ones((8, 2, 4), "float32")] * 3 + [np.ones((2, 4, 8), "float32")]
        >>> params = from_keras_weights(kernels, config)
        >>> [array.shape for array in to_keras_weights(params, config)]
        [(8, 2, 4), (8, 2, 4), (8, 2, 4), (2, 4, 8)]
    """
    places = places_of(config)
    if len(weights) != len(places):
        rule = f"`weights` must be {len(places)} arrays: {['/'.join(place) for place in places]}."
        evidence = f"{len(weights)} arrays of shapes {[np.shape(array) for array in weights]}"
        remedy = (
            "Do `use_bias`, `use_gate`, `qk_norm`, `use_sinks` agree? Is it quantized, or are "
            "adapters (LoRA) not merged?"
        )
        checks.fail(ValueError, rule, evidence, remedy)
    return params_from({place: np.asarray(array) for place, array in zip(places, weights)}, config)


def to_keras_weights(params: ParamsLike, config: MultiHeadAttentionConfig) -> list[np.ndarray]:
    """What `layer.set_weights` of a built Keras layer takes: the inverse of `from_keras_weights`.

    Args:
        params: the layer's parameters.
        config: the layer.

    Returns:
        NumPy arrays in the order of `from_keras_weights`, and no others: where `use_bias` names
        projections, the rest have no bias, as in KerasHub's Whisper. Keras's own layer has all
        biases or none: give it zeros.

    Raises:
        ValueError: parameters that do not fit the config; a table of distances; a `score`; a window
            in several axes, which neither Keras's layer nor KerasHub's has.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=4)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        >>> len(to_keras_weights(params, config))
        8
    """
    check(params, config)
    without_score(config)
    if isinstance(config.sliding_window, Neighborhood):
        rule = "Keras's windows lie along the raster: `sliding_window` must be an int or None."
        remedy = "The weights alone: `config.replace(sliding_window=None)`."
        checks.fail(ValueError, rule, f"sliding_window={config.sliding_window}", remedy)
    return [np.asarray(params[projection][leaf]) for projection, leaf in places_of(config)]


def from_keras_layer(layer: Any) -> tuple[MultiHeadAttentionConfig, Params]:
    """(config, params) of a built attention layer of Keras, or of KerasHub.

    Args:
        layer: Keras's `MultiHeadAttention` or `GroupQueryAttention`, of which only the class's
            name, `get_config()` and `get_weights()` are read; or one of KerasHub's that
            `load_attention` knows in a file, by its class, attributes and weights.

    Returns:
        The config, with the layer's dtype policy as `dtype` and `param_dtype`, and the parameters.

    Raises:
        ValueError: the layer is not built, or has what this package lacks: adapters,
            quantization, a custom initializer, an `activity_regularizer` with grouped heads, a
            table of distances that another layer owns (T5).
        TypeError: another layer, a class derived from Keras's two included.

    Differs from Keras: (1) `flash_attention` is not taken over; see `implementation`. (2) Axes
    stay as Keras resolved them at build, e.g. `attention_axes=(1,)`.

    Example:
        >>> import numpy as np
        >>> kernel, output = np.ones((8, 2, 4), "float32"), np.ones((2, 4, 8), "float32")
        >>> class MultiHeadAttention:  # in earnest, a built keras.layers.MultiHeadAttention(2, 4)
        ...     __module__, built = "keras", True
        ...     get_config = lambda self: {"num_heads": 2, "key_dim": 4, "use_bias": False}
        ...     get_weights = lambda self: [kernel, kernel, kernel, output]
        >>> config, params = from_keras_layer(MultiHeadAttention())
        >>> config.dims, params["query"]["kernel"].shape
        (HeadDims(N=2, K=2, H=4, V=4), (8, 2, 4))
    """
    cls = type(layer)
    class_name = CLASSES.get(cls.__name__)
    if cls.__module__.split(".")[0] == "keras_hub":
        _is_built(layer)
        return from_hub_layer(layer)
    if class_name is None or cls.__module__.split(".")[0] != "keras":
        rule = (
            "`layer` must be keras.layers.MultiHeadAttention or keras.layers.GroupQueryAttention."
        )
        remedy = "A derived class may compute something else: use `from_keras_weights`."
        checks.fail(TypeError, rule, f"{cls.__module__}.{cls.__qualname__}", remedy)
    _is_built(layer)
    config = config_from_fields(class_name, layer.get_config())
    return config, from_keras_weights(layer.get_weights(), config)


def _is_built(layer: Any) -> None:
    if not layer.built:
        remedy = "Call it, or `layer.build(query_shape, value_shape)`."
        checks.fail(ValueError, "The Keras layer must be built.", f"{layer.name!r}", remedy)
