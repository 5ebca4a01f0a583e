"""A Keras layer's `get_weights()`, and a live layer: arrays in Keras's order, with its axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params, ParamsLike
from flax_mha.interop.adapters import AttentionAdapter
from flax_mha.interop.keras.adapted import adapters_of, is_changed, params_of
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
    if not isinstance(weights, list | tuple):
        rule = "`weights` must be a list of arrays, as `layer.get_weights()` returns."
        checks.fail(TypeError, rule, f"{type(weights).__name__}")
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
    checks.floating_params(params)
    without_score(config)
    if isinstance(config.sliding_window, Neighborhood):
        rule = "Keras's windows lie along the raster: `sliding_window` must be an int or None."
        remedy = "The weights alone: `config.replace(sliding_window=None)`."
        checks.fail(ValueError, rule, f"sliding_window={config.sliding_window}", remedy)
    return [np.asarray(params[projection][leaf]) for projection, leaf in places_of(config)]


def from_keras_layer(
    layer: Any, *, adapters: str | None = None
) -> tuple[MultiHeadAttentionConfig, Params]:
    """(config, params) of a built attention layer of Keras, or of KerasHub.

    Args:
        layer: Keras's `MultiHeadAttention` or `GroupQueryAttention`, of which only the class's
            name, `get_config()`, `get_weights()` and the projections' weights are read; or one of
            KerasHub's that `load_attention` knows in a file, by its class, attributes and weights.
        adapters: of Keras's layer with `enable_lora`: "merged", in the kernels as a file has them,
            the sum in float32; "apart", left out: `from_keras_adapters` gives them. None: there
            may be none.

    Returns:
        The config, with the layer's dtype policy as `dtype` and `param_dtype`, and the parameters:
        after `quantize("int8")`, or int4 with `Int4QuantizationConfig(block_size=-1)`, kernels as
        of `quantize_params`. Keras divides by its scale: ours is the inverse, in float32.

    Raises:
        ValueError: the layer is not built, or has what this package lacks: adapters of which
            `adapters` says nothing, or that are to be merged into a quantized kernel; another
            quantization, or one of KerasHub's layer; a custom initializer, an
            `activity_regularizer` with grouped heads, a table of distances that another layer owns
            (T5).
        TypeError: another layer, a class derived from Keras's two included.

    Differs from Keras: (1) `flash_attention` is not taken over; see `implementation`. (2) Axes
    stay as Keras resolved them at build, e.g. `attention_axes=(1,)`. (3) Keras's int8 rounds the
    inputs of each projection too, where no config takes its `activation_quantizer` away; here
    the weights alone are rounded.

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
    if adapters is not None:
        checks.one_of("adapters", adapters, ("apart", "merged"))
    if type(layer).__module__.split(".")[0] == "keras_hub":
        _is_built(layer)
        return from_hub_layer(layer)
    class_name = _class_of(layer)
    _is_built(layer)
    config = config_from_fields(class_name, layer.get_config())
    if is_changed(layer):
        return config, params_of(layer, config, adapters)
    return config, from_keras_weights(layer.get_weights(), config)


def from_keras_adapters(layer: Any) -> AttentionAdapter:
    """The adapters (`enable_lora`) of a live layer of Keras: for `lora=` and `lora_scale=`.

    Keras's are a `[D, N, r]` and b `[r, H]`, of rank r for each head. The same product is one of
    rank N r for all heads, whose b is zero between heads; training moves those zeros too. Of
    attention_output, a `[N, V, r]` and b `[r, E]`, it is the same arrays.

    Args:
        layer: Keras's layer; `from_keras_layer(layer, adapters="apart")` gives what they stand
            beside, quantized or not.

    Returns:
        `AttentionAdapter(lora, scale)`, of the projections that have one, in Keras's float32. scale
        is lora_alpha / lora_rank; where projections differ, the largest, and b holds the rest:
        exact by powers of two, else to float32's last bit.

    Raises:
        ValueError: a layer without adapters; one whose rank for all heads together the kernel has
            not, which can be merged.
        TypeError: another layer, a class derived from Keras's two and KerasHub's included.

    Guide: `python -m flax_mha guide lora`.

    Example:
        >>> import numpy as np
        >>> from types import SimpleNamespace as Thing
        >>> class Array(np.ndarray):  # in earnest, a built keras.layers.MultiHeadAttention(2, 4)
        ...     name = ""
        >>> def named(name, shape):
        ...     array = np.ones(shape, "float32").view(Array)
        ...     array.name = name
        ...     return array
        >>> pair = [named("lora_kernel_a", (8, 2, 1)), named("lora_kernel_b", (1, 4))]
        >>> class MultiHeadAttention:
        ...     __module__, built, name = "keras", True, "attention"
        ...     query_dense = Thing(weights=pair, lora_enabled=True, lora_alpha=3, lora_rank=1)
        >>> lora, scale = from_keras_adapters(MultiHeadAttention())
        >>> scale, {leaf: x.shape for leaf, x in lora["query"].items()}
        (3.0, {'a': (8, 2), 'b': (2, 2, 4)})
    """
    _class_of(layer)
    _is_built(layer)
    return adapters_of(layer)


def _class_of(layer: Any) -> str:
    """Which of Keras's two layers it is."""
    cls = type(layer)
    class_name = CLASSES.get(cls.__name__)
    if class_name is None or cls.__module__.split(".")[0] != "keras":
        rule = (
            "`layer` must be keras.layers.MultiHeadAttention or keras.layers.GroupQueryAttention."
        )
        remedy = "A derived class may compute something else: use `from_keras_weights`."
        checks.fail(TypeError, rule, f"{cls.__module__}.{cls.__qualname__}", remedy)
    return class_name


def _is_built(layer: Any) -> None:
    if not layer.built:
        remedy = "Call it, or `layer.build(query_shape, value_shape)`."
        checks.fail(ValueError, "The Keras layer must be built.", f"{layer.name!r}", remedy)
