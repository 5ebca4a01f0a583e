"""Keras's quantized kernels, W = value / scale, as this package's, W = value scale.

By `quantize("int8")` a kernel is int8 [*inputs, *outputs] and its scale [1, ..., *outputs]; in int4
of one block it is [inputs, outputs / 2], two numbers a byte, and its scale [outputs], both flat.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Shape
from flax_mha.interop.keras.tree import Stored
from flax_mha.params.tree import INPUT_RANK

SCALE = "scale"
LEAVES = {"0": "kernel", "1": "bias"}  # and of a quantized kernel its scale, behind them
MODES = ("int8", "int4")
REMEDY = (
    "Of Keras's quantizations `int8` is read, and `int4` with "
    "`Int4QuantizationConfig(block_size=-1)`; save any other model before it is quantized."
)


def is_small(stored: Stored) -> bool:
    """Whether a kernel is of Keras's small numbers, all of which it stores as int8."""
    return stored.dtype == np.int8


def leaves_of(arrays: Mapping[str, Stored]) -> dict[str, str]:
    """The names of a projection's arrays by their index in the file; what is more keeps its own."""
    last = str(len(arrays) - 1)
    names = {index: LEAVES.get(index, index) for index in arrays}
    if is_small(arrays["0"]) and last in arrays and last in ("1", "2"):
        names[last] = SCALE
    return names


def is_packed(name: str, arrays: Mapping[tuple[str, str], tuple[str, Stored]]) -> bool:
    """Whether the kernel of a projection is int4, flat and two numbers a byte."""
    kernel, scale = arrays[name, "kernel"][1], arrays.get((name, SCALE))
    return is_small(kernel) and scale is not None and len(kernel.shape) == 2


def float_dtype(name: str, arrays: Mapping[tuple[str, str], tuple[str, Stored]]) -> Any:
    """The dtype in which a kernel is meant: that of its scale where it has one."""
    return arrays[name, SCALE if (name, SCALE) in arrays else "kernel"][1].dtype


def check_policy(entry: Mapping[str, Any], arrays: Mapping[tuple[str, str], Any]) -> None:
    """What config.json's map of dtype policies says of a projection is what its kernel is."""
    policy = entry.get("dtype")
    fields = policy.get("config", {}) if isinstance(policy, Mapping) else {}
    for path, said in fields.get("policy_map", {}).items():
        above, _, name = path.rpartition("/")
        mode = said["config"].get("mode") if isinstance(said, Mapping) else None
        kernel = arrays.get((name, "kernel"))
        mine = mode is not None and above.rpartition("/")[2] == entry.get("name")
        if mine and kernel is not None and not is_small(kernel[1]):
            rule = f"What config.json says is {mode!r} must be small numbers in the file."
            checks.fail(ValueError, rule, f"{kernel[0]!r} of dtype {kernel[1].dtype}", REMEDY)


def unpacked_shape(
    name: str, path: str, stored: Stored, scale: Stored, config: MultiHeadAttentionConfig
) -> Shape:
    """[*inputs, *outputs] of a packed kernel, as the config says."""
    N, K, H, V = config.dims
    rows, columns = stored.shape[0], math.prod(scale.shape)
    heads = {"query": (N, H), "key": (K, H), "value": (K, V), "gate": (N, V)}
    shape = (rows, *heads[name]) if name in heads else (N, V, *(config.output_shape or (columns,)))
    inputs, outputs = shape[: INPUT_RANK[name]], shape[INPUT_RANK[name] :]
    packed = (math.prod(inputs), (math.prod(outputs) + 1) // 2)
    if (stored.shape, scale.shape) != (packed, (math.prod(outputs),)):
        rule = (
            f"An int4 kernel of {name!r} at {path!r} must be {list(packed)}, two numbers a byte, "
        )
        rule += f"and its scale {[math.prod(outputs)]}."
        evidence = f"kernel {list(stored.shape)}, scale {list(scale.shape)}"
        checks.fail(ValueError, rule, evidence, REMEDY)
    return shape


def check_scale(name: str, path: str, scale: Stored, kernel: Shape) -> Shape:
    """[*outputs] of a scale of int8, which stands as the layer's output does: behind 1, ..., 1."""
    outputs = kernel[INPUT_RANK[name] :]
    ones = len(scale.shape) - len(outputs)
    if ones < 1 or scale.shape != (*[1] * ones, *outputs):
        spelled = ", ".join(map(str, outputs))
        rule = f"An int8 kernel of {name!r} must have its scale [1, ..., {spelled}] behind it."
        checks.fail(ValueError, rule, f"{list(scale.shape)} at {path!r}", REMEDY)
    return outputs


def unpacked(array: np.ndarray, shape: Shape) -> np.ndarray:
    """The numbers of a packed kernel: even columns in the lower half of a byte."""
    rows, packed = array.shape
    pairs = np.stack([np.left_shift(array, 4) >> 4, array >> 4], -1)
    columns = math.prod(shape) // max(rows, 1)
    return pairs.reshape(rows, 2 * packed)[:, :columns].astype("int4")


def inverse(path: str, array: np.ndarray) -> np.ndarray:
    """Keras divides by its scale. In float32 at least, where a quotient is off by its last bit."""
    if not (array > 0).all():
        rule = f"The scale {path!r} must be above 0 throughout."
        checks.fail(ValueError, rule, f"{array[~(array > 0)][0]}", "Was NaN in the kernel?")
    return (1 / array.astype("float64")).astype(wide_dtype(array.dtype))
