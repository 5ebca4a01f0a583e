"""Masks joined by `&`, `|` and `~`, and by sets of keys. A case is one entry of `JOINED`."""

import jax.numpy as jnp
import numpy as np
from pair_masks import equal, flags, id_pairs
from pair_oracles import Example

from flax_mha import Mask


def joined(function, loops, arrays=lambda z, rng: {}):
    return Example(function, loops, arrays, kind="mask")


def segments(a):
    return Mask.segments(a.query_ids, a.key_ids)


def same(a, b, t):
    return equal(a, a.key_ids, b, a.query_ids[b, t])


def all_keys(a):
    return {*range(a.S)}


def two_ids(z, rng):
    other = {f"other_{name}": ids for name, ids in id_pairs(z, rng).items()}
    return id_pairs(z, rng) | other


def real_keys(z, rng):
    return {"real": flags(rng, z.B, z.S, share=0.7)}


def global_token(a):
    return Mask.function(lambda b, n, t, s: (s == 2) | (t == 3))


def one_of_both(one, other):
    return (one & ~other) | (~one & other)


JOINED = {
    "prefix-LM": joined(
        lambda a: Mask.causal() | Mask.prefix(a.prefix),
        lambda a, b, n, t: {*range(t + 1), *range(a.prefix[b])},
        lambda z, rng: {"prefix": rng.integers(2, 9, size=z.B)},
    ),
    "prefix-LM of a number": joined(
        lambda a: Mask.causal() | Mask.prefix(5),
        lambda a, b, n, t: range(max(t + 1, 5)),
    ),
    "prefix alone": joined(
        lambda a: Mask.prefix(a.prefix),
        lambda a, b, n, t: range(a.prefix[b]),
        lambda z, rng: {"prefix": np.array([0, z.S - 3])},
    ),
    "far": joined(
        lambda a: ~Mask.window(3, 2),
        lambda a, b, n, t: all_keys(a) - {*range(t - 3, t + 3)},
    ),
    "later": joined(
        lambda a: ~Mask.causal(),
        lambda a, b, n, t: range(t + 1, a.S),
    ),
    "far and causal": joined(
        lambda a: Mask.causal() & ~Mask.window(3, 3),
        lambda a, b, n, t: range(t - 3),
    ),
    "window or global": joined(
        lambda a: Mask.window(3, 3) | global_token(a),
        lambda a, b, n, t: all_keys(a) if t == 3 else {2, *range(t - 3, t + 4)},
    ),
    "either document": joined(
        lambda a: segments(a) | Mask.segments(a.other_query_ids, a.other_key_ids),
        lambda a, b, n, t: same(a, b, t) | equal(a, a.other_key_ids, b, a.other_query_ids[b, t]),
        two_ids,
    ),
    "another document": joined(
        lambda a: ~segments(a), lambda a, b, n, t: all_keys(a) - same(a, b, t), id_pairs
    ),
    "De Morgan": joined(
        lambda a: ~(Mask.causal() & segments(a)),
        lambda a, b, n, t: {*range(t + 1, a.S)} | (all_keys(a) - same(a, b, t)),
        id_pairs,
    ),
    "complement twice": joined(
        lambda a: ~~(Mask.causal() & segments(a)),
        lambda a, b, n, t: {*range(t + 1)} & same(a, b, t),
        id_pairs,
    ),
    "one of both": joined(
        lambda a: one_of_both(Mask.causal(), segments(a)),
        lambda a, b, n, t: {*range(t + 1)} ^ same(a, b, t),
        id_pairs,
    ),
    "padding or causal": joined(
        lambda a: Mask.padding(key=a.real) | Mask.causal(),
        lambda a, b, n, t: {*np.flatnonzero(a.real[b]), *range(t + 1)},
        real_keys,
    ),
    "not padding": joined(
        lambda a: ~Mask.padding(key=a.real),
        lambda a, b, n, t: np.flatnonzero(~a.real[b]),
        real_keys,
    ),
    "dense or causal": joined(
        lambda a: Mask.dense(a.table) | Mask.causal(),
        lambda a, b, n, t: {*np.flatnonzero(a.table[n, t]), *range(t + 1)},
        lambda z, rng: {"table": flags(rng, z.N, z.T, z.S, share=0.2)},
    ),
    "not dense": joined(
        lambda a: ~Mask.dense(a.table) & Mask.window(7, 7),
        lambda a, b, n, t: {*np.flatnonzero(~a.table[n, 0])} & {*range(t - 7, t + 8)},
        lambda z, rng: {"table": flags(rng, z.N, 1, z.S)},
    ),
    "two offsets": joined(
        lambda a: Mask.causal(a.one) | (Mask.causal(a.other) & segments(a)),
        lambda a, b, n, t: (
            {*range(t + a.one[b] + 1)} | (same(a, b, t) & {*range(t + a.other[b] + 1)})
        ),
        lambda z, rng: {**id_pairs(z, rng), "one": np.array([0, -3]), "other": np.array([3, 2])},
    ),
    "of nothing": joined(
        lambda a: ~Mask(),
        lambda a, b, n, t: (),
    ),
    "or nothing": joined(
        lambda a: ~Mask() | Mask.causal(),
        lambda a, b, n, t: range(t + 1),
    ),
    "or everything": joined(
        lambda a: Mask() | Mask.causal(),
        lambda a, b, n, t: range(a.S),
    ),
    "function or function": joined(
        lambda a: (
            Mask.function(lambda b, n, t, s: jnp.abs(t - s) <= a.widths[n])
            | Mask.function(lambda b, n, t, s: s < a.lengths[b])
        ),
        lambda a, b, n, t: {*range(t - a.widths[n], t + a.widths[n] + 1), *range(a.lengths[b])},
        lambda z, rng: {"widths": np.array([0, 2, 5, 1]), "lengths": np.array([3, 0])},
    ),
    "not a function": joined(
        lambda a: ~Mask.function(lambda b, n, t, s: a.query_ids[b, t] == a.key_ids[b, s]),
        lambda a, b, n, t: all_keys(a) - same(a, b, t),
        id_pairs,
    ),
    "function and structure": joined(
        lambda a: (
            Mask.function(lambda b, n, t, s: (t + s) % 2 == 0)
            & Mask.causal()
            & segments(a)
            & Mask.padding(key=a.real)
        ),
        lambda a, b, n, t: (
            {*range(t % 2, t + 1, 2)} & same(a, b, t) & {*np.flatnonzero(a.real[b])}
        ),
        lambda z, rng: {**id_pairs(z, rng), **real_keys(z, rng)},
    ),
    "nested": joined(
        lambda a: (segments(a) & Mask.causal()) | (Mask.prefix(a.prefix) & ~Mask.window(2, 2)),
        lambda a, b, n, t: (
            (same(a, b, t) & {*range(t + 1)}) | ({*range(a.prefix[b])} - {*range(t - 2, t + 3)})
        ),
        lambda z, rng: {**id_pairs(z, rng), "prefix": rng.integers(2, 9, size=z.B)},
    ),
    "as the README writes it": joined(
        lambda a: Mask.causal() | Mask.prefix(a.prefix) & segments(a),  # `&` binds first
        lambda a, b, n, t: {*range(t + 1)} | ({*range(a.prefix[b])} & same(a, b, t)),
        lambda z, rng: {**id_pairs(z, rng), "prefix": rng.integers(2, 9, size=z.B)},
    ),
}  # fmt: skip
