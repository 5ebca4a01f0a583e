"""Attention calls with extreme numbers.

Where the softmax hangs on the last digits of huge logits, the numbers lie on a grid on which every
product and sum is exact, so that float32 has no excuse.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, Any]
DROPOUT_KEY = jax.random.key(3)
MAX, TINY = (float(getattr(np.finfo("float32"), name)) for name in ("max", "tiny"))
INPUTS = ("query", "key", "value")
ONE_HEAD = (1, 3, 2**16 + 1, 1, 1, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extreme:
    """A call: `make(rng, sizes)` gives its float arrays, and `d_context`, the cotangent.

    Attributes:
        sizes: B, T, S, N, K, H; values have H features too, as jax.nn demands.
        call: further arguments of `dot_product_attention`, as pairs; a rate of dropout has its key.
        beside: whether jax.nn computes it too, to something that is right.
        hidden: absolute errors that the smallest normal number may hide behind, in multiples of it:
            XLA's CPU takes what is smaller for 0.
    """

    make: Callable[[Any, tuple[int, ...]], Arrays]
    sizes: tuple[int, ...] = (2, 5, 7, 2, 1, 4)
    dtype: str = "float32"
    call: tuple[tuple[str, Any], ...] = ()
    beside: bool = True
    hidden: float = 64.0

    def arrays(self) -> Arrays:
        """The arrays by name, rounded to the dtype; biases and sinks are float32."""
        made = self.make(np.random.default_rng(0), self.sizes)
        dtype = lambda name: "float32" if name in ("bias", "sinks") else self.dtype
        return {name: jnp.asarray(np.asarray(x), dtype(name)) for name, x in made.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """What a result has: the context, and a gradient of each array."""
        return ("context", *(name for name in self.arrays() if name != "d_context"))


# --- the numbers --------------------------------------------------------------------------------


def power(x: float) -> float:
    """The power of two next to it: a factor that rounds nothing."""
    return float(2.0 ** round(np.log2(x)))


def whole(rng: Any, *shape: int) -> Any:
    """Whole numbers of -4 to 4, whose products and sums are exact."""
    return rng.integers(-4, 4, shape, endpoint=True).astype(float)


def shapes(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    B, T, S, N, K, H = sizes
    keys, queries = (B, S, K, H), (B, T, N, H)
    return {"query": queries, "key": keys, "value": keys, "d_context": queries}


def numbers(*, change: Any = None, **factors: float) -> Any:
    """Whole numbers times a factor each; `change(arrays, rng, sizes)` sees them last."""

    def make(rng: Any, sizes: tuple[int, ...]) -> Arrays:
        made = {n: whole(rng, *x) * factors.get(n, 1.0) for n, x in shapes(sizes).items()}
        if change is not None:
            change(made, rng, sizes)
        return made

    return make


def of(change: Any = None, **more: Any) -> Extreme:
    """A case: fields of `Extreme`, arguments of the call, and factors of the arrays."""
    fields = {f.name for f in dataclasses.fields(Extreme)} & set(more)
    given = {name: more.pop(name) for name in fields}
    factors = {name: more.pop(name) for name in (*INPUTS, "d_context") if name in more}
    return Extreme(make=numbers(change=change, **factors), call=tuple(more.items()), **given)


def any_numbers(arrays: Arrays, rng: Any, sizes: Any) -> None:
    """Values and cotangents on no grid."""
    for name in ("value", "d_context"):
        arrays[name] = rng.normal(size=arrays[name].shape)


def no_ties(arrays: Arrays, rng: Any, sizes: Any) -> None:
    """Of each query one key is far ahead: the softmax is certain, and its gradient 0."""
    any_numbers(arrays, rng, sizes)
    S, largest = sizes[2], np.abs(arrays["key"]).max()
    arrays["key"][:] = largest * rng.permutation(1 + np.arange(S))[:, None, None]
    arrays["query"][:] = np.abs(arrays["query"]).max()


def all_equal(arrays: Arrays, rng: Any, sizes: Any) -> None:
    """Every key weighs the same, and the values are above 0 so that no mean is near it."""
    arrays["query"][:] = 0
    arrays["value"] = np.abs(arrays["value"]) + np.abs(arrays["value"]).max() / 4


def one_key_of(name: str, factor: float) -> Any:
    def change(arrays: Arrays, rng: Any, sizes: Any) -> None:
        arrays[name][:, 3] *= factor

    return change


def biased(at: Any) -> Any:
    """With a bias of whole numbers and, in row 1 and half of row 2, of `at`."""

    def change(arrays: Arrays, rng: Any, sizes: Any) -> None:
        B, T, S, N = sizes[:4]
        arrays["bias"] = whole(rng, B, N, T, S)
        arrays["bias"][:, :, 1] = at
        arrays["bias"][:, :, 2, : S // 2] = at

    return change


def least_or_most(arrays: Arrays, rng: Any, sizes: Any) -> None:
    B, T, S, N = sizes[:4]
    arrays["bias"] = np.where(rng.random((B, N, T, S)) < 0.5, MAX, -MAX)


def with_sinks(sink: float, change: Any = None) -> Any:
    def also(arrays: Arrays, rng: Any, sizes: Any) -> None:
        arrays["sinks"] = np.full(sizes[3], sink)
        if change is not None:
            change(arrays, rng, sizes)

    return also


def cotangent_of(factor: float) -> Any:
    def change(arrays: Arrays, rng: Any, sizes: Any) -> None:
        arrays["d_context"] *= factor

    return change


def huge(logit: float, **more: Any) -> Extreme:
    return of(query=power(logit**0.5), key=power(logit**0.5), **more)


ALONE = {"beside": False}  # jax.nn has no such argument, or is NaN there
CASES: dict[str, Extreme] = {
    **{f"logits {x:g}": huge(x, change=any_numbers) for x in (1e4, 1e8, 1e15, 1e21, 1e30)},
    **{f"logits {x:g}, no ties": huge(x, change=no_ties) for x in (1e4, 1e8, 1e15, 1e21, 1e30)},
    # A product beyond float32 that its scale brings back: the query is scaled first.
    "products 1e39": of(query=power(1e19), key=power(4e18), scale=2.0**-123, **ALONE),
    **{f"subnormal {name}": of(**{name: 2.0**-133}) for name in (*INPUTS, "d_context")},
    **{f"{name} of 1e-36": of(**{name: power(1e-36)}) for name in (*INPUTS, "d_context")},
    "values of 1e30": of(value=power(1e30)),
    "cotangents of 1e30": of(d_context=power(1e30)),
    "values near the largest": of(value=MAX / 4, d_context=1e-3),
    "equal logits": of(all_equal),
    "equal logits, values near the largest": of(all_equal, value=MAX / 9, d_context=1e-3),
    "one huge key": of(one_key_of("key", power(1e6))),
    "one huge value": of(one_key_of("value", power(1e30))),
    "bias of finfo.min": of(biased(-MAX)),
    "bias of -inf": of(biased(-np.inf), **ALONE),
    "bias of finfo.min and max": of(least_or_most),
    **{f"soft cap {x:g}": of(soft_cap=x, **ALONE) for x in (1e-30, 1e4, 1e30)},
    "soft cap 1, logits 1e30": huge(1e30, soft_cap=1.0, **ALONE),
    **{
        f"sink {x:g}": of(with_sinks(x), **ALONE)
        for x in (1e2, -1e2, 1e30, MAX, -MAX, -np.inf)
    },
    "sink 1e30, logits 1e30": huge(1e30, change=with_sinks(2.0**100), **ALONE),
    "sink finfo.max, bias of finfo.min": of(with_sinks(MAX, biased(-MAX)), **ALONE),
    "sink and bias of -inf": of(with_sinks(-np.inf, biased(-np.inf)), **ALONE),
    "dropout 1e-7": of(dropout_rate=1e-7, **ALONE),
    "dropout 1 - 1e-7": of(dropout_rate=1 - 1e-7, **ALONE),
    "dropout 0.999": of(dropout_rate=0.999, sizes=(1, 61, 67, 2, 1, 4), **ALONE),
    **{
        f"T = {t}, S = {s}": of(sizes=(2, t, s, 2, 1, 4), beside=t * s > 0)
        for t, s in ((0, 3), (3, 0), (0, 0), (1, 1), (1, 7), (7, 1))
    },
    "131 x 257": of(sizes=(1, 131, 257, 2, 1, 4)),
    "131 x 257, causal": of(sizes=(1, 131, 257, 2, 1, 4), is_causal=True),
    **{f"2^16 + 1 keys, {x}": of(sizes=ONE_HEAD, dtype=x) for x in ("float32", "bfloat16")},
    **{
        f"2^16 + 1 equal keys, {x}": of(all_equal, sizes=ONE_HEAD, dtype=x)
        for x in ("float32", "bfloat16", "float16")
    },
    **{
        f"{x}, {name}": of(dtype=x, **fields)
        for x in ("float16", "bfloat16")
        for name, fields in {
            "whole numbers": {},
            "products 1e5": dict(query=128.0, key=128.0),
            "products 1e5, scaled back": dict(query=128.0, key=128.0, scale=2.0**-16),
            "values 1e4": dict(value=4096.0, d_context=2.0**-8),
            "cotangents 1e4": dict(d_context=2048.0, key=2.0**-8, value=2.0**-4),
            "cotangents 1e-4": dict(d_context=2.0**-12),
        }.items()
    },
}  # fmt: skip
