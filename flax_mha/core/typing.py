"""The dimension key, and the aliases that the whole package shares.

    B batch (leading axes, flattened)   T target length (queries)   S source length (keys/values)
    N query heads   K key/value heads   G = N // K                  H key_dim   V value_dim
    D query features   C key features   M value features            E output features
    t, s tiles of T, S   I, J numbers of query/key blocks           P devices on the ring
    L latent features   Q those of queries   W, U of a head's H: those that all share, its own
    R chosen queries   X buckets of distances   1 broadcast axis

After validation an array's name ends in its letters (`logits_BNTS`), and an einsum string spells
them. T and S are different letters even in self-attention.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict

import jax

Array: TypeAlias = jax.Array
PRNGKey: TypeAlias = jax.Array
DType: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]


class HeadDims(NamedTuple):
    """The sizes of one layer's heads, by their letters."""

    N: int
    K: int
    H: int
    V: int


class Projection(TypedDict):
    """One linear map; `bias` is absent in a layer without biases."""

    kernel: Any
    bias: NotRequired[Any]


class Params(TypedDict):
    """The parameters of one layer; `gate` is absent in a layer without a gate."""

    query: Projection  # DNH, NH; behind a latent QNH
    key: Projection  # CKH, KH; behind a latent LKU
    value: Projection  # MKV, KV; behind a latent LKV
    gate: NotRequired[Projection]  # DNV, NV
    attention_output: Projection  # NVE, E
    query_latent: NotRequired[Projection]  # DQ, Q
    latent: NotRequired[Projection]  # CL, L
    shared_key: NotRequired[Projection]  # CW, W
    query_latent_norm: NotRequired[Any]  # {"scale": Q}
    latent_norm: NotRequired[Any]  # {"scale": L}
    query_norm: NotRequired[Any]  # {"scale": H}, or NH where heads have their own
    key_norm: NotRequired[Any]  # {"scale": H}, or KH
    value_norm: NotRequired[Any]  # {"scale": V}, or KV
    relative_bias: NotRequired[Any]  # {"embedding": XN}
    sinks: NotRequired[Any]  # {"logits": N}


# What functions take: any mapping of that form, a FrozenDict or a dict of ShapeDtypeStructs too.
ParamsLike: TypeAlias = Mapping[str, Any]
