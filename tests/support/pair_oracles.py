"""Attention by functions of pairs, said twice without the package.

By loops over numpy numbers in float64, which a person can verify; and by `jax.vmap` of the user's
own function over all indices, which has the gradients. The tests hold the two against each other,
then every implementation against them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import x64

from flax_mha import Mask, dot_product_attention

NAMES = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call; of a grid's tokens, T = S = rows * columns + `extra`."""

    T: int
    S: int
    B: int = 2
    N: int = 4
    K: int = 2
    H: int = 8
    V: int = 6
    grid: tuple[int, int] | None = None


# Neither length is a multiple of a block's, on purpose.
SIZES = {"small": Sizes(19, 23), "large": Sizes(200, 260)}
GRIDS = {"small": (4, 6), "large": (12, 18)}


@dataclasses.dataclass(frozen=True)
class Example:
    """A kind of attention: as a user writes it, and by loops.

    `function(a)` closes over `a`: the sizes, and the arrays of `arrays(sizes, rng)`. It gives a
    mask function, a score function, or (`kind` "mask") a `Mask` made of several.

    `loops` of a mask is `(a, b, n, t) -> the keys that this query sees`; what lies beyond the last
    key counts for nothing. `loops` of a score is `(a, x, b, n, t, s) -> the new logit`.
    """

    function: Callable[[Any], Any]
    loops: Callable[..., Any]
    arrays: Callable[[Sizes, Any], dict[str, Any]] = lambda sizes, rng: {}
    kind: str = "mask function"
    grid: bool = False
    extra: int = 0  # tokens beside those of the grid

    def sizes(self, scale="small") -> Sizes:
        if not self.grid:
            return SIZES[scale]
        rows, columns = GRIDS[scale]
        L = rows * columns + self.extra
        return dataclasses.replace(SIZES[scale], T=L, S=L, grid=(rows, columns))

    def all_arrays(self, scale="small", dtype="float32", sizes=None) -> dict[str, np.ndarray]:
        """query, key, value and what the function closes over, of one seed."""
        sizes = self.sizes(scale) if sizes is None else sizes
        rng = np.random.default_rng(sizes.T)
        shapes = {"query": (sizes.T, sizes.N, sizes.H), "key": (sizes.S, sizes.K, sizes.H)}
        shapes["value"] = (sizes.S, sizes.K, sizes.V)
        given = {name: rng.normal(size=(sizes.B, *shape)) for name, shape in shapes.items()}
        given |= self.arrays(sizes, rng)
        return {name: kept(x, dtype if name in NAMES else "float32") for name, x in given.items()}

    def call(self, sizes: Sizes, closed: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `dot_product_attention` that say it."""
        function = self.function(namespace(sizes, closed))
        if self.kind == "score":
            return {"score": function}
        return {"mask": function if self.kind == "mask" else Mask.function(function)}


def kept(x, dtype):
    """Integers of 32 bits; floats rounded to `dtype`."""
    x = np.asarray(x)
    if x.dtype.kind == "f":
        return x.astype(jnp.dtype(dtype))
    return x.astype("int32") if x.dtype.kind == "i" else x


def namespace(sizes, closed):
    return SimpleNamespace(**vars(sizes), **closed)


def split(arrays):
    """(query, key, value), and what is closed over."""
    closed = {name: x for name, x in arrays.items() if name not in NAMES}
    return [arrays[name] for name in NAMES], closed


def floating(arrays):
    """What has a gradient, and the rest."""
    is_float = {name: jnp.issubdtype(x.dtype, jnp.floating) for name, x in arrays.items()}
    return [
        {name: x for name, x in arrays.items() if is_float[name] is one} for one in (True, False)
    ]


def wide(arrays):
    """The same numbers with floats of 64 bits."""
    to_wide = lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return {name: to_wide(np.asarray(x)) for name, x in arrays.items()}


def attend(example, sizes, arrays, **options):
    """The package's own attention of these arrays."""
    qkv, closed = split(arrays)
    return dot_product_attention(*qkv, **example.call(sizes, closed), **options)


# --- by loops -----------------------------------------------------------------------------------


def allowed_by_loops(example, sizes, closed):
    """Booleans [B, N, T, S], one row of keys at a time."""
    allowed = np.zeros((sizes.B, sizes.N, sizes.T, sizes.S), bool)
    if example.kind == "score":
        return ~allowed
    a = namespace(sizes, closed)
    for b, n, t in itertools.product(*map(range, allowed.shape[:3])):
        for s in example.loops(a, b, n, t):
            if 0 <= s < sizes.S:
                allowed[b, n, t, s] = True
    return allowed


def logits_by_loops(example, sizes, arrays):
    """Float64 [B, N, T, S]: the scaled products, each through the score."""
    (query, key, _), closed = split(arrays)
    key = key.repeat(sizes.N // sizes.K, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(sizes.H)
    if example.kind != "score":
        return logits
    a = namespace(sizes, closed)
    for index in itertools.product(*map(range, logits.shape)):
        logits[index] = example.loops(a, logits[index], *index)
    return logits


def attention_by_loops(example, sizes, arrays):
    """(context [B, T, N, V], weights [B, N, T, S]) in float64; nowhere to attend is all zeros."""
    arrays = wide(arrays)
    allowed = allowed_by_loops(example, sizes, split(arrays)[1])
    logits = logits_by_loops(example, sizes, arrays)
    weights = np.zeros(logits.shape)
    for row in itertools.product(*map(range, logits.shape[:3])):
        seen = np.flatnonzero(allowed[row] & (logits[row] > -np.inf))
        if len(seen):
            powers = np.exp(logits[row][seen] - logits[row][seen].max())
            weights[row][seen] = powers / powers.sum()
    value = arrays["value"].repeat(sizes.N // sizes.K, axis=2)
    return np.einsum("bnts,bsnv->btnv", weights, value), weights


# --- by vmap ------------------------------------------------------------------------------------


def over_pairs(function, sizes, *leading):
    """`function` at every (b, n, t, s); `leading` are arrays [B, N, T, S], one number for each."""
    for place in (3, 2, 1, 0):
        axes = [0 if place == i else None for i in range(4)]
        function = jax.vmap(function, (*[0] * len(leading), *axes))
    indices = (jnp.arange(size, dtype="int32") for size in (sizes.B, sizes.N, sizes.T, sizes.S))
    return function(*leading, *indices)


def attention_by_vmap(example, sizes, arrays, allowed=None):
    """(context, weights) of the user's own function, dense; of a `Mask` the loops say `allowed`."""
    (query, key, value), closed = split(arrays)
    key, value = (jnp.repeat(x, sizes.N // sizes.K, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(sizes.H)
    if example.kind == "score":
        logits = over_pairs(example.function(namespace(sizes, closed)), sizes, logits)
    elif example.kind == "mask function":
        allowed = over_pairs(example.function(namespace(sizes, closed)), sizes)
    weights = softmax(logits if allowed is None else jnp.where(allowed, logits, -jnp.inf))
    return jnp.einsum("bnts,bsnv->btnv", weights, value), weights


def softmax(logits):
    """Over the last axis; a row of -inf is a row of zeros."""
    shift = jax.lax.stop_gradient(logits.max(-1, keepdims=True, initial=-jnp.inf))
    powers = jnp.exp(logits - jnp.where(jnp.isneginf(shift), 0, shift))
    total = powers.sum(-1, keepdims=True)
    return powers / jnp.where(total == 0, 1, total)


def probe_of(sizes):
    return np.random.default_rng(3).normal(size=(sizes.B, sizes.T, sizes.N, sizes.V))


def with_gradients(attention, arrays, probe):
    """{context, and the gradient of each array of floats} of a function of all arrays."""
    moving, fixed = floating(arrays)

    def loss(moving):
        context = attention(moving | fixed)
        return (context.astype(probe.dtype) * probe).sum(), context

    gradients, context = jax.grad(loss, has_aux=True)(moving)
    return {"context": context} | {f"d_{name}": x for name, x in gradients.items()}


def expected(example, scale="small", dtype="float32", sizes=None):
    """What every implementation must give: the context of the loops, the gradients of the vmap."""
    sizes = example.sizes(scale) if sizes is None else sizes
    return _expected(example, sizes, dtype)


@functools.cache
def _expected(example, sizes, dtype):
    arrays = wide(example.all_arrays(dtype=dtype, sizes=sizes))
    is_mask = example.kind == "mask"
    allowed = allowed_by_loops(example, sizes, split(arrays)[1]) if is_mask else None
    with x64():
        dense = lambda arrays: attention_by_vmap(example, sizes, arrays, allowed)[0]
        arrays_64 = {name: jnp.asarray(x) for name, x in arrays.items()}
        run = jax.jit(lambda arrays: with_gradients(dense, arrays, probe_of(sizes)))
        results = {name: np.asarray(x) for name, x in run(arrays_64).items()}
    return results | {"context": attention_by_loops(example, sizes, arrays)[0]}
