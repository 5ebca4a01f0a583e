"""Random masks as nested tuples: what they are for the package, and said again in NumPy.

    (("causal",), ("or", ("window", 1, 2), ("not", ("prefix", True))))

The outermost tuple is joined by `&`. Arrays come of the call's seed and of a part's own number, so
that the tuples alone, printed, are an example.
"""

import dataclasses
import functools
import operator

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from flax_mha import Mask

# f(b, n, t, s, table) of whole numbers, for JAX and NumPy alike; `table` holds small numbers.
FUNCTIONS = {
    "sparse": lambda b, n, t, s, table: (t + 2 * s + n + b) % 3 > 0,
    "stairs": lambda b, n, t, s, table: s <= t + 2 * n - b,
    "far": lambda b, n, t, s, table: s - t >= 3,
    "tree": lambda b, n, t, s, table: (table[s] <= table[t]) & (s <= t + 4),
    "pairs": lambda b, n, t, s, table: (table[t] + table[s] + s) % 4 != 1,
}
TABLE = 64  # longer than any T and S


def generator(call, kind, number):
    return np.random.default_rng([call.seed, number, *kind.encode()])


def has_band(parts):
    """Whether a band stands at the top, whose offset then counts for all bands of the call."""
    return any(part[0] in ("causal", "window") for part in parts)


def rows(call, kind, full, number, length, make):
    """An array `[B or 1, length]` of a part."""
    return make(generator(call, kind, number), (call.sizes[0] if full else 1, length))


def real(random, shape):
    return random.random(shape) < 0.75


def sequences(count):
    """Ids of sequences: packed one behind the other, or, of an even count, anyhow."""

    def make(random, shape):
        ids = random.integers(0, count, shape)
        return np.sort(ids, -1) if count % 2 else ids

    return make


def arrays_of(part, call):
    """The NumPy arrays that a part is made of."""
    kind, (B, N, T, S) = part[0], call.sizes
    if kind == "padding":
        _, query, key, full, number = part
        lengths = {"query": T if query else None, "key": S if key else None}
        return {
            name: None if length is None else rows(call, name, full, number, length, real)
            for name, length in lengths.items()
        }
    if kind == "segments":
        _, count, full, number = part
        lengths = {"query_ids": T, "key_ids": S}
        return {
            name: rows(call, name, full, number, length, sequences(count))
            for name, length in lengths.items()
        }
    if kind == "dense":
        _, full, number = part
        shape = [n if is_full else 1 for n, is_full in zip((B, N, T, S), full)]
        return {"array": generator(call, kind, number).random(shape) < 0.6}
    if kind == "prefix":
        _, full, number = part
        count = B if full else 1
        return {"lengths": generator(call, kind, number).integers(0, S + 2, count)}
    return {"table": generator(call, "table", 0).integers(0, 9, TABLE)}


def mask_of(parts, call):
    """The `Mask` of parts joined by `&`."""
    offset = call.offsets(call.offset)
    offset = None if offset is None else jnp.asarray(offset)
    return functools.reduce(operator.and_, (_mask(part, call, offset) for part in parts))


def _mask(part, call, offset):
    kind, *rest = part
    if kind == "causal":
        return Mask.causal(offset)
    if kind == "window":
        return dataclasses.replace(Mask.window(*rest), query_offset=offset)
    if kind == "not":
        return ~_mask(rest[0], call, offset)
    if kind in ("or", "and"):
        join = operator.or_ if kind == "or" else operator.and_
        return join(*(_mask(inner, call, offset) for inner in rest))
    arrays = arrays_of(part, call)
    if kind == "function":
        table = jnp.asarray(arrays["table"], "int32")
        return Mask.function(lambda b, n, t, s: FUNCTIONS[rest[0]](b, n, t, s, table))
    arrays = {name: None if x is None else jnp.asarray(x) for name, x in arrays.items()}
    make = getattr(Mask, "segments" if kind == "segments" else kind)
    return make(**arrays)


def allowed_by(parts, call):
    """Booleans that broadcast to `[B, N, T, S]`: the parts, rule by rule."""
    agreed = (_allowed(part, call) for part in parts)
    return functools.reduce(operator.and_, agreed, np.ones((1, 1, 1, 1), bool))


def _allowed(part, call):
    kind, *rest = part
    b, n, t, s = np.indices(call.sizes)
    offset = call.offsets(call.offset)
    p = t + (0 if offset is None else np.broadcast_to(offset, call.sizes[:1])[b])
    if kind == "causal":
        return s <= p
    if kind == "window":
        left, right = rest
        before = True if left is None else s >= p - left
        return before & (np.ones_like(s, bool) if right is None else s <= p + right)
    if kind == "not":
        return ~_allowed(rest[0], call)
    if kind in ("or", "and"):
        one, other = (_allowed(inner, call) for inner in rest)
        return one | other if kind == "or" else one & other
    arrays = arrays_of(part, call)
    of = lambda name, *index: np.broadcast_to(
        arrays[name], (call.sizes[0], arrays[name].shape[-1])
    )[index]
    if kind == "padding":
        query = True if arrays["query"] is None else of("query", b, t)
        return query & (np.ones_like(s, bool) if arrays["key"] is None else of("key", b, s))
    if kind == "segments":
        return of("query_ids", b, t) == of("key_ids", b, s)
    if kind == "prefix":
        return s < np.broadcast_to(arrays["lengths"], call.sizes[:1])[b]
    if kind == "dense":
        return np.broadcast_to(arrays["array"], call.sizes)
    return FUNCTIONS[rest[0]](b, n, t, s, arrays["table"])


SIDE = st.none() | st.integers(0, 12)
NUMBER = st.integers(0, 3)
PLAIN = (
    st.just(("causal",))
    | st.tuples(st.just("window"), SIDE, SIDE)
    | st.tuples(st.just("padding"), st.booleans(), st.booleans(), st.booleans(), NUMBER)
    | st.tuples(st.just("segments"), st.integers(2, 5), st.booleans(), NUMBER)
    | st.tuples(st.just("dense"), st.tuples(*[st.booleans()] * 4), NUMBER)
)
BEYOND = st.tuples(st.just("prefix"), st.booleans(), NUMBER) | st.tuples(
    st.just("function"), st.sampled_from(sorted(FUNCTIONS))
)


def nested(inner):
    joined = st.tuples(st.sampled_from(["and", "or"]), inner, inner)
    return joined | st.tuples(st.just("not"), inner)


def masks(plain_alone=False):
    """Tuples of up to three parts; `plain_alone` leaves out what only functions of pairs say."""
    part = PLAIN if plain_alone else PLAIN | BEYOND | st.recursive(PLAIN | BEYOND, nested)
    return st.lists(part, max_size=3).map(tuple)
