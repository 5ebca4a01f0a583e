"""Where each array of a Keras file's layer goes: all of them have a place, or are refused by name.

Keras's own kernels are `[D, N, H]`; those of KerasHub's Gemma are `[N, D, H]`, those of its T5
`[D, N H]`. Where the sizes do not tell which of the first two, the caller does.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Shape
from flax_mha.interop.keras import quantized
from flax_mha.interop.keras.arrays import places_of
from flax_mha.interop.keras.layers import Layer
from flax_mha.interop.keras.quantized import LEAVES, SCALE
from flax_mha.interop.keras.tree import Stored, read_array

KERAS_AXES, GEMMA_AXES = "DNH", "NDH"
TABLE, OUTPUT = ("relative_bias", "embedding"), "attention_output"
# Plain arrays of KerasHub's layers, by their path below the layer's, and what each may be: of
# Qwen 3, of Gemma 3, of gpt-oss or T5.
EXTRAS = {
    "_query_dense_layer_norm/vars/0": [("query_norm", "scale")],
    "_key_dense_layer_norm/vars/0": [("key_norm", "scale")],
    "query_norm/vars/0": [("query_norm", "scale")],
    "key_norm/vars/0": [("key_norm", "scale")],
    "vars/0": [("sinks", "logits"), TABLE],
}
Places = dict[tuple[str, str], "Place"]


class Told(NamedTuple):
    """What is known of a layer beside its arrays: the axes of its input kernels, None = as their
    sizes tell; whether it is of Keras's own classes; a table of distances that another layer owns.
    """

    kernel_axes: str | None = None
    is_keras_s: bool = False
    table: tuple[str, Stored] | None = None


class Place(NamedTuple):
    """One array in the file, its `shape` in the parameters, and whether its first axes swap.

    Of a quantized kernel, whether two numbers are in a byte; of its scale, that it divides.
    """

    path: str
    stored: Stored
    shape: Shape
    swapped: bool = False
    packed: bool = False
    divides: bool = False

    def read(self) -> np.ndarray:
        array = read_array(self.path, self.stored)
        array = quantized.unpacked(array, self.shape) if self.packed else array
        array = quantized.inverse(self.path, array) if self.divides else array
        array = array.swapaxes(0, 1) if self.swapped else array
        return np.ascontiguousarray(array.reshape(self.shape))

    def turned(self, array: np.ndarray) -> np.ndarray:
        """From the parameters' axes to those of the file."""
        array = array.swapaxes(0, 1) if self.swapped else array
        return np.ascontiguousarray(array.reshape(self.stored.shape))


def placed(layer: Layer, config: MultiHeadAttentionConfig, told: Told) -> Places:
    """The layer's arrays by (projection, leaf), every one of which has a place in the config."""
    wanted = places_of(config)
    options = {name: [p for p in EXTRAS.get(name, ()) if p in wanted] for name in layer.others}
    homeless = [name for name, found in options.items() if not found]
    if homeless:
        rule = f"Every array that lies with {layer.path!r} must have a place in the config."
        checks.fail(ValueError, rule, _shapes(layer, homeless), _remedy(homeless))
    swapped = _axes(layer, config, told) == GEMMA_AXES
    places = {
        (name, leaf): _place((name, leaf), *array, config, swapped, told.is_keras_s)
        for (name, leaf), array in layer.arrays.items()
        if leaf != SCALE
    }
    for name in [name for name, leaf in layer.arrays if leaf == SCALE]:
        places |= _of_quantized(name, layer, config, places[name, "kernel"])
    for name, found in options.items():
        path, stored = layer.others[name]
        places[found[0]] = Place(path, stored, stored.shape)
    if told.table is not None and TABLE in wanted:
        places.setdefault(TABLE, Place(*told.table, told.table[1].shape))
    return places


def _place(
    place: tuple[str, str],
    path: str,
    stored: Stored,
    config: MultiHeadAttentionConfig,
    swapped: bool,
    is_keras_s: bool,
) -> Place:
    """The axes of a kernel in the parameters; all else is as it is."""
    projection, leaf = place
    shape = stored.shape
    if leaf != "kernel" or is_keras_s:
        return Place(path, stored, shape)
    if len(shape) == 2:
        return Place(path, stored, _unfolded(projection, path, shape, config))
    if swapped and projection != OUTPUT:
        return Place(path, stored, (shape[1], shape[0], *shape[2:]), swapped)
    return Place(path, stored, shape)


def _of_quantized(
    name: str, layer: Layer, config: MultiHeadAttentionConfig, kernel: Place
) -> Places:
    """A kernel of small numbers, and its scale."""
    path, scale = layer.arrays[name, SCALE]
    packed = quantized.is_packed(name, layer.arrays)
    if packed:
        shape = quantized.unpacked_shape(name, kernel.path, kernel.stored, scale, config)
        kernel = kernel._replace(shape=shape, packed=True)
        outputs = shape[quantized.INPUT_RANK[name] :]
    else:
        outputs = quantized.check_scale(name, path, scale, kernel.shape)
    return {
        (name, "kernel"): kernel,
        (name, SCALE): Place(path, scale, outputs, divides=True),
    }


def _unfolded(projection: str, path: str, shape: Shape, config: MultiHeadAttentionConfig) -> Shape:
    """`[D, N H]` as `[D, N, H]`, `[N V, E]` as `[N, V, E]`."""
    N, K, H, V = config.dims
    heads = {"query": (N, H), "key": (K, H), "value": (K, V), "gate": (N, V), OUTPUT: (N, V)}
    pair, axis = heads[projection], 0 if projection == OUTPUT else 1
    if shape[axis] != pair[0] * pair[1]:
        rule = f"The kernel of {projection!r} must have {pair[0]} heads of {pair[1]} features."
        checks.fail(ValueError, rule, f"{list(shape)} at {path!r}")
    return (*pair, shape[1]) if axis == 0 else (shape[0], *pair)


def _shapes(layer: Layer, names: list[str]) -> str:
    return ", ".join(f"{name!r} {list(layer.others[name][1].shape)}" for name in names)


# What Keras's own layers have no place for: the field of the config that asks for it.
FIELDS = {
    "sinks": "use_sinks",
    "query_norm": "qk_norm",
    "key_norm": "qk_norm",
    "value_norm": "value_norm",
    "relative_bias": "position",
}
_VALUES = {"use_sinks": True, "qk_norm": "rms", "position": "relative_bias"}


def _remedy(names: list[str]) -> str:
    fields = {FIELDS[place] for name in names for place, _ in EXTRAS.get(name, ())}
    given = [f"{field}={_VALUES[field]!r}" for field in sorted(fields)]
    remedy = f"For KerasHub's layers: `config` with {' or '.join(given)}. " if given else ""
    return remedy + (
        "What is none of this package's goes by hand: `read_keras_arrays`, `from_keras_weights`."
    )


def check_ordinary(layer: Layer) -> None:
    """Every projection has a kernel of floats, or of int8 and a scale, and maybe a bias."""
    for (projection, leaf), (path, stored) in layer.arrays.items():
        small = leaf == "kernel" and quantized.is_small(stored)
        known = leaf in (*LEAVES.values(), SCALE)
        whole = (projection, SCALE) in layer.arrays
        if not known or not ((small and whole) or jnp.issubdtype(stored.dtype, jnp.floating)):
            rule = (
                f"{projection!r} of {layer.path!r} must be a kernel and maybe a bias, of floats, "
            )
            rule += "or an int8 kernel with its scale."
            remedy = f"Is it quantized? {quantized.REMEDY}"
            checks.fail(ValueError, rule, f"{path!r} of dtype {stored.dtype}", remedy)


def _axes(layer: Layer, config: MultiHeadAttentionConfig, told: Told) -> str:
    """The order of the input kernels' axes: told, known of Keras's own, or seen in the sizes."""
    if told.kernel_axes is not None:
        return checks.one_of("kernel_axes", told.kernel_axes, (KERAS_AXES, GEMMA_AXES))
    if told.is_keras_s:
        return KERAS_AXES
    N, K = config.dims[:2]
    heads = {"query": N, "key": K, "value": K, "gate": N}
    shapes = {n: layer.arrays[n, "kernel"][1].shape for n in heads if (n, "kernel") in layer.arrays}
    if all(len(shape) == 2 for shape in shapes.values()):
        return KERAS_AXES  # joined: see `_unfolded`
    first, second = (
        all(shape[axis : axis + 1] == (heads[name],) for name, shape in shapes.items())
        for axis in (0, 1)
    )
    if first and second:
        rule = f"The kernels of {layer.path!r} must tell heads from features by their sizes."
        remedy = "Pass `kernel_axes='NDH'` for KerasHub's Gemma, 'DNH' for Keras's own order."
        checks.fail(ValueError, rule, f"{shapes}", remedy)
    return GEMMA_AXES if first else KERAS_AXES
