"""The calls that are compiled: their shapes, and what each asks for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

T_OF_SCHEDULES = 2048  # a tile's cycles do not depend on it
LENGTHS = (4096, 8192, 16384, 32768)  # for memory


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention; B = 1, S = T, V = H. A gradient is of all floats, biases too.

    `by_functions`: the same window, segments and soft cap as functions of a pair of query and key,
    and for a bias of distances that of ALiBi, with a slope for each head.
    """

    name: str
    dtype: str = "bfloat16"
    N: int = 8
    K: int = 8
    H: int = 128
    is_causal: bool = True
    window: int | None = None  # keys before the query
    segments: bool = False
    padding: bool = False
    soft_cap: float | None = None
    bias: bool = False
    distance_bias: bool = False
    dropout: float = 0.0
    by_functions: bool = False

    def data(self, T: int) -> dict[str, Any]:
        """Shapes and dtypes of the call's arrays, by name; those of `floats` have a gradient."""
        struct = jax.ShapeDtypeStruct
        query, keys = (1, T, self.N, self.H), (1, T, self.K, self.H)
        arrays = {
            name: struct(shape, jnp.dtype(self.dtype))
            for name, shape in (("query", query), ("key", keys), ("value", keys))
        }
        if self.bias:
            arrays["bias"] = struct((1, self.N, T, T), jnp.dtype(self.dtype))
        if self.distance_bias:
            distances = (self.N,) if self.by_functions else (self.N, 2 * T - 1)
            arrays["distances"] = struct(distances, jnp.dtype("float32"))
        if self.segments:
            arrays["ids"] = struct((1, T), jnp.dtype("int32"))
        if self.padding:
            arrays["real"] = struct((1, T), jnp.dtype("bool"))
        if self.dropout:
            arrays["words"] = struct((2,), jnp.dtype("uint32"))
        return arrays


CASES = {
    case.name: case
    for case in (
        Case("causal"),
        Case("full", is_causal=False),
        Case("H=64", H=64),
        Case("H=256", H=256),
        Case("float32", dtype="float32"),
        Case("window=1023", window=1023),
        Case("segments", segments=True),
        Case("padding", padding=True),
        Case("soft_cap", soft_cap=30.0),
        Case("bias", bias=True),
        Case("distance_bias", distance_bias=True),
        Case("dropout=0.1", dropout=0.1),
        Case("grouped", K=2),
        Case("f: causal", by_functions=True),
        Case("f: window=1023", window=1023, by_functions=True),
        Case("f: segments", segments=True, by_functions=True),
        Case("f: soft_cap", soft_cap=30.0, by_functions=True),
        Case("f: ALiBi", distance_bias=True, by_functions=True),
    )
}
