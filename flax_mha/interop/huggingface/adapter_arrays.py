"""lora_A [r, in] and lora_B [out, r] of a module, as a layer's a and b, by the kernel's layout.

lora_B is a kernel that reads r features, so it is parted, turned and rolled as the layer's own: of
query, key and value in one Linear each takes its part of lora_B, and all of lora_A.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Shape
from flax_mha.interop.huggingface.find import Found
from flax_mha.interop.layout import Entry, groups_of
from flax_mha.interop.torch.packing import packed, rolled, unpacked
from flax_mha.interop.torch.safetensors import Header
from flax_mha.params.tree import INPUT_RANK, letters, places, sizes_of

_FLOATS = ("F64", "F32", "F16", "BF16")
Pair = dict[str, Any]


class Linear(NamedTuple):
    """A module that holds kernels of one layer.

    Attributes:
        layer: the layer.
        array: the name of its kernel below the layer's path.
        shape: (out, in), as the checkpoint says.
        is_turned: whether the kernel is [in, out], a Conv1D's.
        kernels: the layer's kernels in it; our shape of each.
    """

    layer: Found
    array: str
    shape: tuple[int, int]
    is_turned: bool
    kernels: dict[str, Shape]

    @property
    def module(self) -> str:
        """Its path in the checkpoint: of two names for one array, the array's own."""
        return self.layer.sources[self.array].removesuffix(".weight")


def linears_of(layer: Found, headers: Mapping[str, Header]) -> list[Linear]:
    """The layer's modules that may have an adapter."""
    there = places(layer.config)
    found: dict[str, list[Entry]] = {}
    for entry in layer.layout.table:
        if entry.place[1] == "kernel" and entry.place in there and entry.name is not None:
            found.setdefault(entry.name.partition("[")[0], []).append(entry)
    if not all(array.endswith(".weight") for array in found):
        return []  # torch.nn.MultiheadAttention, which reads its arrays and calls no module
    return [
        _linear(layer, array, entries, headers)
        for array, entries in found.items()
        if array in layer.sources
    ]


def kernels_of(linears: list[Linear]) -> dict[str, dict[str, Any]]:
    """The shapes of the kernels that may have an adapter, as `check_lora` takes them."""
    return {
        name: {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
        for linear in linears
        for name, shape in linear.kernels.items()
    }


def _linear(
    layer: Found, array: str, entries: list[Entry], headers: Mapping[str, Header]
) -> Linear:
    name = layer.sources[array]
    shape = headers[name].shape
    if len(shape) != 2:
        checks.fail(ValueError, f"`{name}` must have two axes.", f"shape {shape}")
    is_turned = _output_axis(layer, entries[0]) == 1
    outputs, inputs = shape[::-1] if is_turned else shape
    kernels = {
        entry.place[0]: _kernel(layer, entry, len(entries) > 1, outputs, inputs)
        for entry in entries
    }
    rank = {projection: INPUT_RANK[projection] for projection in kernels}
    total = sum(math.prod(x[rank[projection] :]) for projection, x in kernels.items())
    read = {math.prod(x[: rank[projection]]) for projection, x in kernels.items()}
    if total != outputs or read != {inputs}:
        rule = f"`{name}` must have the shape that config.json says: {kernels}."
        checks.fail(ValueError, rule, f"shape {shape}")
    return Linear(layer, array, (outputs, inputs), is_turned, kernels)


def _letters(layer: Found, entry: Entry) -> tuple[str, str]:
    """Of its inputs, and of its outputs."""
    projection, leaf = entry.place
    spelled, rank = letters(layer.config)[projection][leaf], INPUT_RANK[projection]
    return spelled[:rank], spelled[rank:]


def _output_axis(layer: Found, entry: Entry) -> int:
    return groups_of(entry.axes).index(_letters(layer, entry)[1])


def _kernel(layer: Found, entry: Entry, is_part: bool, outputs: int, inputs: int) -> Shape:
    """Our shape; only the features outside are not in the config."""
    sizes = sizes_of(layer.config)
    ours, theirs = _letters(layer, entry)
    first = tuple(sizes.get(x, inputs) for x in ours)
    return first + tuple(sizes.get(x, outputs) for x in theirs)


# --- in -----------------------------------------------------------------------------------------


def check_headers(linear: Linear, rank: int, sides: Mapping[str, str], headers: Any) -> None:
    """Shapes and dtypes, before data are read."""
    outputs, inputs = linear.shape
    expected = {"A": (rank, inputs), "B": (outputs, rank)}
    for side, name in sides.items():
        dtype, shape = headers[name]
        if shape != expected[side]:
            axes = {"A": "[r, in]", "B": "[out, r]"}[side]
            rule = f"`{name}` must be {axes} = {expected[side]} of {linear.module!r} in `like`."
            remedy = "Is it an adapter of this base? r is adapter_config.json's, by its patterns."
            checks.fail(ValueError, rule, f"shape {shape}", remedy)
        if dtype not in _FLOATS:
            rule = f"`{name}` must have one of the dtypes {list(_FLOATS)}."
            checks.fail(TypeError, rule, f"dtype {dtype}")
        if dtype == "F64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            rule = f"`{name}` is float64, which needs JAX's 64-bit mode."
            remedy = "Call `jax.config.update('jax_enable_x64', True)` first."
            checks.fail(ValueError, rule, f"dtype {dtype}", remedy)


def to_pairs(linear: Linear, A: np.ndarray, B: np.ndarray) -> dict[str, Pair]:
    """`{projection: {"a": [*inputs, r], "b": [r, *outputs]}}` of one module's two arrays."""
    layout, config = linear.layer.layout, linear.layer.config
    B = B.T if linear.is_turned else B
    parts = {linear.array: B}
    if linear.array in layout.packed:
        packing = layout.packed[linear.array]
        parts = unpacked(linear.array, B, packing, layout.table, config)
    elif linear.array in layout.shared_last:
        parts = {linear.array: rolled(B, config, shared_first=True)}
    pairs = {}
    for projection, name in _names(linear).items():
        b = parts[name] if linear.is_turned else parts[name].T
        pairs[projection] = _pair(linear.kernels[projection], INPUT_RANK[projection], A, b)
    return pairs


def _pair(kernel: Shape, inputs: int, A: np.ndarray, b: np.ndarray) -> Pair:
    """Where r is above what the kernel can have, numbers that nothing reads are left out."""
    most = min(math.prod(kernel[:inputs]), math.prod(kernel[inputs:]))
    if len(A) > most:
        used = np.flatnonzero(b.any(1))
        used = used if len(used) else np.array([0])
        A, b = A[used], b[used]
    rank = len(A)
    return {
        "a": jnp.array(A.T.reshape(*kernel[:inputs], rank)),
        "b": jnp.array(b.reshape(rank, *kernel[inputs:])),
    }


def _names(linear: Linear) -> dict[str, str]:
    """The table's name of each of its kernels."""
    return {
        entry.place[0]: entry.name or ""
        for entry in linear.layer.layout.table
        if entry.place[1] == "kernel" and (entry.name or "").partition("[")[0] == linear.array
    }


# --- out ----------------------------------------------------------------------------------------


def from_pairs(linear: Linear, lora: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """lora_A and lora_B of one module, of those of its kernels that have an adapter.

    Kernels whose a differ each get numbers of their own between input and output: lora_A holds the
    different a, and lora_B is zero where a kernel reads another's.
    """
    own = {name: lora[name] for name in linear.kernels if name in lora}
    _expect_one_dtype(linear, own)
    a = {name: _flat_a(np.asarray(x["a"])) for name, x in own.items()}
    different = {_bits(x): x for x in a.values()}
    starts = dict(zip(different, np.cumsum([0, *(len(x) for x in different.values())])))
    rank = sum(len(x) for x in different.values())
    A = np.concatenate(list(different.values()))
    dtype = next(iter(own.values()))["b"].dtype
    parts = {}
    for projection, name in _names(linear).items():
        kernel, inputs = linear.kernels[projection], INPUT_RANK[projection]
        b = np.zeros((rank, math.prod(kernel[inputs:])), dtype)
        if projection in own:
            start = starts[_bits(a[projection])]
            rows = np.asarray(own[projection]["b"])
            b[start : start + len(rows)] = rows.reshape(len(rows), -1)
        parts[name] = b if linear.is_turned else b.T
    B = _joined(linear, parts)
    return np.ascontiguousarray(A), np.ascontiguousarray(B.T if linear.is_turned else B)


def _joined(linear: Linear, parts: dict[str, np.ndarray]) -> np.ndarray:
    layout, config = linear.layer.layout, linear.layer.config
    if linear.array in layout.packed:
        packing = layout.packed[linear.array]
        return packed(linear.array, parts, packing, layout.table, config)[linear.array]
    (B,) = parts.values()
    return rolled(B, config, shared_first=False) if linear.array in layout.shared_last else B


def _flat_a(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, a.shape[-1]).T


def _bits(x: np.ndarray) -> tuple[Shape, bytes]:
    return x.shape, np.ascontiguousarray(x).tobytes()


def _expect_one_dtype(linear: Linear, own: Mapping[str, Any]) -> None:
    for leaf in ("a", "b"):
        if len(dtypes := {str(x[leaf].dtype) for x in own.values()}) > 1:
            rule = f"The {leaf} of what stands in {linear.module!r} must have one dtype."
            checks.fail(TypeError, rule, f"{sorted(dtypes)} of {list(own)}")
