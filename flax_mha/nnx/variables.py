"""A layer's arrays as nnx's variables: `nnx.Param`s of its projections, `nnx.LoRAParam`s beside."""

import contextlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from flax_mha.core.typing import Array, ParamsLike
from flax_mha.sharding.initial import Boxes, places_nowhere


def _metadata(array: Array, names: Any) -> nnx.VariableMetadata[Any]:
    """The names under the key of the installed Flax; without "mesh", which it would not look up."""
    made: Any = nnx.with_partitioning(lambda: array, names)()
    named = {key: value for key, value in made.metadata.items() if key != "mesh"}
    return nnx.VariableMetadata(array, metadata=named)


def _placing(value: Any) -> Any:
    """Without a mesh names are kept, and nothing is placed; flax before 0.12 never places."""
    eager = getattr(nnx, "use_eager_sharding", None)
    return eager(False) if eager and places_nowhere(value) else contextlib.nullcontext()


BOXES = Boxes("flax.nnx", _metadata)


class Projection(nnx.Module):
    """One linear map's parameters: `kernel`, and `bias` where it has one, as `nnx.Param`s.

    A quantized kernel is a module, of variables that are not trained.
    """

    def __init__(self, arrays: ParamsLike):
        for leaf, array in arrays.items():
            with _placing(array):
                made = Quantized(array) if isinstance(array, Mapping) else nnx.Param(array)
                setattr(self, leaf, made)


class QuantizedVariable(nnx.Variable[Any]):
    """An array that no optimizer of `nnx.Param`s meets."""


class Quantized(nnx.Module):
    """A kernel of small numbers, `value` and `scale`."""

    def __init__(self, arrays: Mapping[str, Array]):
        self.value, self.scale = (QuantizedVariable(arrays[x]) for x in ("value", "scale"))


class Adapter(nnx.Module):
    """The low-rank adapter of one kernel, `a` and `b`, as `nnx.LoRAParam`s."""

    def __init__(self, arrays: ParamsLike):
        self.a, self.b = nnx.LoRAParam(arrays["a"]), nnx.LoRAParam(arrays["b"])


class Adapters(nnx.Module):
    """Those of a layer, by the names of its projections."""

    def __init__(self, tree: ParamsLike):
        for name, arrays in tree.items():
            setattr(self, name, Adapter(arrays))


def tree_of(module: nnx.Module, names: Any) -> dict[str, Any]:
    """The arrays of those parts that a module has, as a tree."""
    there = [name for name in names if hasattr(module, name)]
    return {name: nnx.to_pure_dict(nnx.state(getattr(module, name))) for name in there}
