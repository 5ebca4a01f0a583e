"""Where each array of a Keras file's layer goes: all of them have a place, or are refused by name.

Keras's own kernels are `[D, N, H]`; those of KerasHub's Gemma are `[N, D, H]`. Where the sizes do
not tell which, the caller does.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Shape
from flax_mha.interop.keras.arrays import places_of
from flax_mha.interop.keras.layers import LEAVES, Layer
from flax_mha.interop.keras.tree import Stored, read_array

KERAS_AXES, GEMMA_AXES = "DNH", "NDH"
# Plain arrays of KerasHub's layers (Qwen 3, gpt-oss), by their path below the layer's.
EXTRAS = {
    "_query_dense_layer_norm/vars/0": ("query_norm", "scale"),
    "_key_dense_layer_norm/vars/0": ("key_norm", "scale"),
    "vars/0": ("sinks", "logits"),
}


class Place(NamedTuple):
    """One array in the file, and whether its first two axes are to be swapped."""

    path: str
    stored: Stored
    swapped: bool

    @property
    def shape(self) -> Shape:
        """As in the parameters."""
        shape = self.stored.shape
        return (shape[1], shape[0], *shape[2:]) if self.swapped else shape

    def read(self) -> np.ndarray:
        return self.turned(read_array(self.path, self.stored))

    def turned(self, array: np.ndarray) -> np.ndarray:
        """From the file's axes to those of the parameters, or back."""
        return np.ascontiguousarray(array.swapaxes(0, 1)) if self.swapped else array


def placed(
    layer: Layer, config: MultiHeadAttentionConfig, kernel_axes: str | None, is_keras_s: bool
) -> dict[tuple[str, str], Place]:
    """The layer's arrays by (projection, leaf), every one of which has a place in the config."""
    wanted = places_of(config)
    homeless = [name for name in layer.others if EXTRAS.get(name) not in wanted]
    if homeless:
        rule = f"Every array that lies with {layer.path!r} must have a place in the config."
        checks.fail(ValueError, rule, _shapes(layer, homeless), _remedy(homeless))
    axes = _axes(layer, config, kernel_axes, is_keras_s)
    places = {}
    for (projection, leaf), (path, stored) in layer.arrays.items():
        turns = axes == GEMMA_AXES and leaf == "kernel" and projection != "attention_output"
        places[projection, leaf] = Place(path, stored, turns)
    extras = {EXTRAS[name]: Place(*stored, False) for name, stored in layer.others.items()}
    return places | extras


def _shapes(layer: Layer, names: list[str]) -> str:
    return ", ".join(f"{name!r} {list(layer.others[name][1].shape)}" for name in names)


def _remedy(names: list[str]) -> str:
    places = {EXTRAS[name][0] for name in names if name in EXTRAS}
    fields = {"sinks": "use_sinks=True", "query_norm": "qk_norm='rms'", "key_norm": "qk_norm='rms'"}
    given = sorted({fields[place] for place in places})
    remedy = f"For KerasHub's Qwen 3 and gpt-oss: `config` with {' and '.join(given)}. "
    return (remedy if given else "") + (
        "What is none of this package's goes by hand: `read_keras_arrays`, `from_keras_weights`."
    )


def check_ordinary(layer: Layer) -> None:
    """Every projection has floats for a kernel, and maybe a bias: no scales, no adapters."""
    for (projection, leaf), (path, stored) in layer.arrays.items():
        if leaf not in LEAVES.values() or not jnp.issubdtype(stored.dtype, jnp.floating):
            rule = f"{projection!r} of {layer.path!r} must be a kernel and maybe a bias, of floats."
            remedy = "Is it quantized? Save the model before it is."
            checks.fail(ValueError, rule, f"{path!r} of dtype {stored.dtype}", remedy)


def _axes(
    layer: Layer, config: MultiHeadAttentionConfig, kernel_axes: str | None, is_keras_s: bool
) -> str:
    """The order of the input kernels' axes: told, known of Keras's own, or seen in the sizes."""
    if kernel_axes is not None:
        return checks.one_of("kernel_axes", kernel_axes, (KERAS_AXES, GEMMA_AXES))
    if is_keras_s:
        return KERAS_AXES
    N, K = config.dims[:2]
    heads = {"query": N, "key": K, "value": K, "gate": N}
    shapes = {n: layer.arrays[n, "kernel"][1].shape for n in heads if (n, "kernel") in layer.arrays}
    first, second = (
        all(shape[axis : axis + 1] == (heads[name],) for name, shape in shapes.items())
        for axis in (0, 1)
    )
    if first and second:
        rule = f"The kernels of {layer.path!r} must tell heads from features by their sizes."
        remedy = "Pass `kernel_axes='NDH'` for KerasHub's Gemma, 'DNH' for Keras's own order."
        checks.fail(ValueError, rule, f"{shapes}", remedy)
    return GEMMA_AXES if first else KERAS_AXES
