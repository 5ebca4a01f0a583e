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
from typing import Any, NamedTuple, TypeAlias

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


# The parameters of one layer, as a plain dict, which is what optimizers are typed to take. Linear
# maps have a `kernel` and, in a layer with biases, a `bias`; what belongs to an option is absent
# without it.
#     query DNH, NH   key CKH, KH   value MKV, KV   gate DNV, NV   attention_output NVE, E
#     behind a latent: query_latent DQ, Q   latent CL, L   shared_key CW, W
#                      query QNH            key LKU        value LKV
#     {"scale"}: query_latent_norm Q   latent_norm L   query_norm H   key_norm H   value_norm V
#     relative_bias {"embedding": XN}   sinks {"logits": N}
Params: TypeAlias = dict[str, Any]

# What functions take: any mapping of that form, a FrozenDict or a dict of ShapeDtypeStructs too.
ParamsLike: TypeAlias = Mapping[str, Any]
