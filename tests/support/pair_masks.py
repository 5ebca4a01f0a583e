"""Masks as functions of pairs: as a user writes them, and by loops.

The two say the same in different words: the function asks of one pair, the loops list the keys of
one query. A case is one entry of `MASKS`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from pair_oracles import Example

# --- arrays that the functions close over -------------------------------------------------------


def normal(rng, *shape):
    return rng.normal(size=shape)


def packed(rng, B, L, documents=4):
    """Ids of sequences one after the other, [B, L]."""
    return np.sort(rng.integers(0, documents, size=(B, L)), axis=1)


def id_pairs(z, rng):
    return {"query_ids": packed(rng, z.B, z.T), "key_ids": packed(rng, z.B, z.S)}


def flags(rng, *shape, share=0.5):
    return rng.random(shape) < share


def intervals(rng, B, L, end):
    """(first, past) [B, L]: an interval within 0 ... end each, some of them empty."""
    bounds = np.sort(rng.integers(0, end + 1, size=(2, B, L)), axis=0)
    return {"first": bounds[0], "past": bounds[1]}


def equal(a, ids, b, i):
    """The places of `ids` [B, L] that hold what `i` is."""
    return set(np.flatnonzero(ids[b] == i))


def blocks_of(row, size=4):
    """The places within the blocks that `row` marks."""
    return {s for i in np.flatnonzero(row) for s in range(size * i, size * i + size)}


# --- masks --------------------------------------------------------------------------------------


def neighborhood(a):
    """NATTEN: a window of 3 x 3 around the query, moved inwards at the borders."""
    rows, columns = a.grid

    def mask(b, n, t, s):
        row = jnp.clip(t // columns, 1, rows - 2)
        column = jnp.clip(t % columns, 1, columns - 2)
        return (jnp.abs(s // columns - row) <= 1) & (jnp.abs(s % columns - column) <= 1)

    return mask


def nearest(place, length, window, dilation=1):
    """The places of one axis that a query at `place` sees: of its own remainder, the nearest."""
    group = list(range(place % dilation, length, dilation))
    start = group.index(place) - window // 2
    start = min(max(start, 0), len(group) - window)
    return group[start : start + window]


def neighbors(a, t, window, dilation=(1, 1)):
    (rows, columns), (row, column) = a.grid, divmod(t, a.grid[1])
    return {
        r * columns + c
        for r in nearest(row, rows, window[0], dilation[0])
        for c in nearest(column, columns, window[1], dilation[1])
    }


def dilated_neighborhood(a):
    """A window of 3 x 3 among the columns of the query's parity."""
    rows, columns = a.grid

    def within(i, j, length, window, dilation):
        members = (length - i % dilation + dilation - 1) // dilation
        start = jnp.clip(i // dilation - window // 2, 0, members - window)
        inside = (j // dilation >= start) & (j // dilation < start + window)
        return (i % dilation == j % dilation) & inside

    def mask(b, n, t, s):
        by_row = within(t // columns, s // columns, rows, 3, 1)
        return by_row & within(t % columns, s % columns, columns, 3, 2)

    return mask


def sliding_tiles(a):
    """STA: tokens stand tile after tile (2 x 2); a tile sees itself and its neighbours in a row."""
    tile_columns = a.grid[1] // 2

    def mask(b, n, t, s):
        query_tile, key_tile = t // 4, s // 4
        centre = jnp.clip(query_tile % tile_columns, 1, tile_columns - 2)
        same_row = query_tile // tile_columns == key_tile // tile_columns
        return same_row & (jnp.abs(key_tile % tile_columns - centre) <= 1)

    return mask


def sliding_tiles_by_loops(a, b, n, t):
    columns = a.grid[1] // 2
    row, column = divmod(t // 4, columns)
    seen = np.zeros(a.S, bool)
    seen[[row * columns + c for c in nearest(column, columns, 3)]] = True
    return blocks_of(seen[: a.S // 4])


def block_diffusion(a):
    """BD3-LM: noised tokens, then the clean ones; blocks of 4."""
    half = a.T // 2

    def mask(b, n, t, s):
        query_noised, key_noised = t < half, s < half
        query_block, key_block = t % half // 4, s % half // 4
        own = (query_block == key_block) & (query_noised == key_noised)
        earlier = query_noised & ~key_noised & (query_block > key_block)
        causal = ~query_noised & ~key_noised & (query_block >= key_block)
        return own | earlier | causal

    return mask


def block_diffusion_by_loops(a, b, n, t):
    half = a.T // 2
    block = t % half // 4
    if t < half:
        return {*range(half)} & {*range(4 * block, 4 * block + 4)} | {
            *range(half, half + 4 * block)
        }
    return {*range(half, min(half + 4 * block + 4, 2 * half))}


def bigbird(a):
    """Blocks of 4: the neighbours, the first, and some at random."""

    def mask(b, n, t, s):
        i, j = t // 4, s // 4
        return (jnp.abs(i - j) <= 1) | (i == 0) | (j == 0) | a.table[i, j]

    return mask


def bigbird_by_loops(a, b, n, t):
    i = t // 4
    row = a.table[i].copy()
    row[0] = True
    row[max(i - 1, 0) : i + 2] = True
    return range(a.S) if i == 0 else blocks_of(row)


def shared_prefix(a):
    """A document is causal and sees the whole one that it continues."""

    def mask(b, n, t, s):
        document = a.query_ids[b, t]
        prefix = a.prefix_of[document]
        causal = (a.key_ids[b, s] == document) & (s <= t)
        return causal | ((prefix != document) & (a.key_ids[b, s] == prefix))

    return mask


def shared_prefix_by_loops(a, b, n, t):
    document = a.query_ids[b, t]
    seen = equal(a, a.key_ids, b, document) & {*range(t + 1)}
    prefix = a.prefix_of[document]
    return seen if prefix == document else seen | equal(a, a.key_ids, b, prefix)


def block_table(z, rng):
    return {"table": flags(rng, -(-z.T // 4), -(-z.S // 4), share=0.3)}


def wrapped(x):
    """An integer as 32 bits hold it."""
    return (x + 2**31) % 2**32 - 2**31


MASKS = {
    "causal": Example(
        lambda a: lambda b, n, t, s: s <= t,
        lambda a, b, n, t: range(t + 1),
    ),
    "everybody": Example(
        lambda a: lambda b, n, t, s: t >= 0,
        lambda a, b, n, t: range(a.S),
    ),
    "nobody": Example(
        lambda a: lambda b, n, t, s: s < 0,
        lambda a, b, n, t: (),
    ),
    "one answer for all": Example(
        lambda a: lambda b, n, t, s: jnp.array(True),
        lambda a, b, n, t: range(a.S),
    ),
    "long ago": Example(
        lambda a: lambda b, n, t, s: s < t - 3,
        lambda a, b, n, t: range(t - 3),
    ),
    "sliding window": Example(
        lambda a: lambda b, n, t, s: (s <= t) & (t - s < 6),
        lambda a, b, n, t: range(t - 5, t + 1),
    ),
    "prefix-LM": Example(
        lambda a: lambda b, n, t, s: (s <= t) | (s < a.prefix[b]),
        lambda a, b, n, t: {*range(t + 1), *range(a.prefix[b])},
        lambda z, rng: {"prefix": rng.integers(2, 9, size=z.B)},
    ),
    "document": Example(
        lambda a: lambda b, n, t, s: a.query_ids[b, t] == a.key_ids[b, s],
        lambda a, b, n, t: equal(a, a.key_ids, b, a.query_ids[b, t]),
        id_pairs,
    ),
    "document, causal": Example(
        lambda a: lambda b, n, t, s: (a.query_ids[b, t] == a.key_ids[b, s]) & (s <= t),
        lambda a, b, n, t: equal(a, a.key_ids, b, a.query_ids[b, t]) & {*range(t + 1)},
        id_pairs,
    ),
    "buckets in any order": Example(  # LSH attention: ids that are not sorted
        lambda a: lambda b, n, t, s: a.query_ids[b, n, t] == a.key_ids[b, n, s],
        lambda a, b, n, t: np.flatnonzero(a.key_ids[b, n] == a.query_ids[b, n, t]),
        lambda z, rng: {
            "query_ids": rng.integers(0, 5, size=(z.B, z.N, z.T)),
            "key_ids": rng.integers(0, 5, size=(z.B, z.N, z.S)),
        },
    ),
    "shared prefix": Example(
        shared_prefix,
        shared_prefix_by_loops,
        lambda z, rng: {**id_pairs(z, rng), "prefix_of": np.array([0, 0, 2, 0])},
    ),
    "chunks": Example(
        lambda a: lambda b, n, t, s: (t // 6 == s // 6) & (s <= t),
        lambda a, b, n, t: range(t // 6 * 6, t + 1),
    ),
    "dilated window": Example(
        lambda a: lambda b, n, t, s: (s <= t) & (t - s <= 8) & ((t - s) % 2 == 0),
        lambda a, b, n, t: range(t - 8, t + 1, 2),
    ),
    "strided": Example(  # Sparse Transformer
        lambda a: lambda b, n, t, s: (s <= t) & ((t - s < 5) | ((t - s) % 5 == 0)),
        lambda a, b, n, t: {*range(t - 4, t + 1), *range(t % 5, t + 1, 5)},
    ),
    "fixed": Example(  # Sparse Transformer: the last of every 5 sums up its chunk
        lambda a: lambda b, n, t, s: (s <= t) & ((s // 5 == t // 5) | (s % 5 == 4)),
        lambda a, b, n, t: {*range(t // 5 * 5, t + 1), *range(4, t + 1, 5)},
    ),
    "global and window": Example(  # Longformer
        lambda a: lambda b, n, t, s: (
            (jnp.abs(t - s) <= 3) | a.query_is_global[t] | a.key_is_global[s]
        ),
        lambda a, b, n, t: (
            range(a.S)
            if a.query_is_global[t]
            else {*range(t - 3, t + 4), *np.flatnonzero(a.key_is_global)}
        ),
        lambda z, rng: {
            "query_is_global": flags(rng, z.T, share=0.1),
            "key_is_global": flags(rng, z.S, share=0.1),
        },
    ),
    "BigBird": Example(bigbird, bigbird_by_loops, block_table),
    "random blocks": Example(
        lambda a: lambda b, n, t, s: a.table[t // 4, s // 4],
        lambda a, b, n, t: blocks_of(a.table[t // 4]),
        block_table,
    ),
    "neighbourhood": Example(
        neighborhood, lambda a, b, n, t: neighbors(a, t, (3, 3)), grid=True
    ),
    "dilated neighbourhood": Example(
        dilated_neighborhood, lambda a, b, n, t: neighbors(a, t, (3, 3), (1, 2)), grid=True
    ),
    "disc": Example(
        lambda a: lambda b, n, t, s: (
            (t // a.grid[1] - s // a.grid[1]) ** 2 + (t % a.grid[1] - s % a.grid[1]) ** 2 <= 4
        ),
        lambda a, b, n, t: [
            s
            for s in range(a.S)
            if math.dist(divmod(t, a.grid[1]), divmod(s, a.grid[1])) < 2.1
        ],
        grid=True,
    ),
    "axial": Example(
        lambda a: lambda b, n, t, s: (
            jnp.where(n < 2, t // a.grid[1] == s // a.grid[1], t % a.grid[1] == s % a.grid[1])
        ),
        lambda a, b, n, t: (
            range(t - t % a.grid[1], t - t % a.grid[1] + a.grid[1])
            if n < 2
            else range(t % a.grid[1], a.S, a.grid[1])
        ),
        grid=True,
    ),
    "sliding tiles": Example(sliding_tiles, sliding_tiles_by_loops, grid=True),
    "block diffusion": Example(block_diffusion, block_diffusion_by_loops, grid=True),
    "checkerboard": Example(
        lambda a: lambda b, n, t, s: (t + s) % 2 == 0,
        lambda a, b, n, t: range(t % 2, a.S, 2),
    ),
    "flamingo": Example(  # text sees the one image that came last, of 4 tokens; at first none
        lambda a: lambda b, n, t, s: a.image[b, t] == s // 4,
        lambda a, b, n, t: range(4 * a.image[b, t], 4 * a.image[b, t] + 4),
        lambda z, rng: {"image": packed(rng, z.B, z.T, -(-z.S // 4) + 1) - 1},
    ),
    "flamingo, counted": Example(  # a sum over an axis that is no pair's
        lambda a: lambda b, n, t, s: (
            (a.starts[b] <= t).sum(dtype="int32") - 1 == s // 4
        ),
        lambda a, b, n, t: [
            s for s in range(a.S) if s // 4 == sum(start <= t for start in a.starts[b]) - 1
        ],
        lambda z, rng: {"starts": packed(rng, z.B, 3, z.T) + 1},
    ),
    "widths of heads": Example(
        lambda a: lambda b, n, t, s: jnp.abs(t - s) <= a.widths[n],
        lambda a, b, n, t: range(t - a.widths[n], t + a.widths[n] + 1),
        lambda z, rng: {"widths": np.array([0, 2, 5, 11])},
    ),
    "heads of two kinds": Example(
        lambda a: lambda b, n, t, s: jnp.where(n % 2 == 0, s <= t, jnp.abs(t - s) < 3),
        lambda a, b, n, t: range(t + 1) if n % 2 == 0 else range(t - 2, t + 3),
    ),
    "direction by example": Example(
        lambda a: lambda b, n, t, s: jnp.where(b == 0, s <= t, s >= t),
        lambda a, b, n, t: range(t + 1) if b == 0 else range(t, a.S),
    ),
    "lengths": Example(
        lambda a: lambda b, n, t, s: s < a.lengths[b],
        lambda a, b, n, t: range(a.lengths[b]),
        lambda z, rng: {"lengths": np.array([z.S - 2, 5])},
    ),
    "jagged": Example(
        lambda a: lambda b, n, t, s: (t < a.queries[b]) & (s < a.keys[b]),
        lambda a, b, n, t: range(a.keys[b] if t < a.queries[b] else 0),
        lambda z, rng: {"queries": np.array([z.T - 4, 0]), "keys": np.array([7, z.S])},
    ),
    "intervals of rows": Example(
        lambda a: lambda b, n, t, s: (a.first[b, t] <= s) & (s < a.past[b, t]),
        lambda a, b, n, t: range(a.first[b, t], a.past[b, t]),
        lambda z, rng: intervals(rng, z.B, z.T, z.S),
    ),
    "intervals of columns": Example(  # FlashMask
        lambda a: lambda b, n, t, s: (a.first[b, s] <= t) & (t < a.past[b, s]),
        lambda a, b, n, t: [s for s in range(a.S) if t in range(a.first[b, s], a.past[b, s])],
        lambda z, rng: intervals(rng, z.B, z.S, z.T),
    ),
    "places in any order": Example(
        lambda a: lambda b, n, t, s: a.key_places[s] <= a.query_places[t],
        lambda a, b, n, t: np.flatnonzero(a.key_places <= a.query_places[t]),
        lambda z, rng: {
            "query_places": rng.permutation(z.T),
            "key_places": rng.permutation(z.S),
        },
    ),
    "times": Example(  # floats of which a mask has no slope
        lambda a: lambda b, n, t, s: jnp.abs(a.query_times[b, t] - a.key_times[b, s]) < 0.5,
        lambda a, b, n, t: np.flatnonzero(abs(a.query_times[b, t] - a.key_times[b]) < 0.5),
        lambda z, rng: {
            "query_times": np.sort(normal(rng, z.B, z.T)),
            "key_times": np.sort(normal(rng, z.B, z.S)),
        },
    ),
    "images in text": Example(  # causal, and both ways within an image
        lambda a: lambda b, n, t, s: (
            (s <= t) | ((a.query_ids[b, t] == a.key_ids[b, s]) & (a.query_ids[b, t] % 2 == 1))
        ),
        lambda a, b, n, t: (
            {*range(t + 1)}
            | (equal(a, a.key_ids, b, a.query_ids[b, t]) if a.query_ids[b, t] % 2 else set())
        ),
        id_pairs,
    ),
    "table of pairs": Example(
        lambda a: lambda b, n, t, s: a.table[n, t, s],
        lambda a, b, n, t: np.flatnonzero(a.table[n, t]),
        lambda z, rng: {"table": flags(rng, z.N, z.T, z.S)},
    ),
    "table of distances": Example(
        lambda a: lambda b, n, t, s: a.table[t - s + a.S],
        lambda a, b, n, t: [s for s in range(a.S) if a.table[t - s + a.S]],
        lambda z, rng: {"table": flags(rng, z.T + z.S)},
    ),
    "bits": Example(
        lambda a: lambda b, n, t, s: (a.bits[b, t] >> (s % 8)) & 1 == 1,
        lambda a, b, n, t: [s for s in range(a.S) if f"{a.bits[b, t]:08b}"[::-1][s % 8] == "1"],
        lambda z, rng: {"bits": rng.integers(0, 256, size=(z.B, z.T))},
    ),
    "exclusive or": Example(
        lambda a: lambda b, n, t, s: (s <= t) ^ (s % 3 == 0),
        lambda a, b, n, t: {*range(t + 1)} ^ {*range(0, a.S, 3)},
    ),
    "not": Example(
        lambda a: lambda b, n, t, s: ~((s <= t) & (s % 2 == 1)),
        lambda a, b, n, t: {*range(a.S)} - {*range(1, t + 1, 2)},
    ),
    # What a bound by intervals must not get wrong: integers that wrap around, and floors.
    "unsigned": Example(
        lambda a: lambda b, n, t, s: (t - s).astype("uint32") < 6,
        lambda a, b, n, t: range(t - 5, t + 1),
    ),
    "hash": Example(
        lambda a: lambda b, n, t, s: ((t * 73856093) ^ (s * 19349663)) % 5 < 2,
        lambda a, b, n, t: [
            s for s in range(a.S) if (wrapped(t * 73856093) ^ wrapped(s * 19349663)) % 5 < 2
        ],
    ),
    "floors": Example(
        lambda a: lambda b, n, t, s: (t - s) // 4 % 2 == 0,
        lambda a, b, n, t: [s for s in range(a.S) if math.floor((t - s) / 4) % 2 == 0],
    ),
    "truncated remainder": Example(
        lambda a: lambda b, n, t, s: jax.lax.rem(t - s, jnp.int32(3)) == 1,
        lambda a, b, n, t: [s for s in range(a.S) if math.fmod(t - s, 3) == 1],
    ),
    "products of both signs": Example(
        lambda a: lambda b, n, t, s: (t - 7) * (s - 9) > 12,
        lambda a, b, n, t: [s for s in range(a.S) if (t - 7) * (s - 9) > 12],
    ),
    "floats of places": Example(
        lambda a: lambda b, n, t, s: jnp.log1p(t.astype(float)) * 4 >= s.astype(float),
        lambda a, b, n, t: [s for s in range(a.S) if 4 * math.log(1 + t) >= s],
    ),
}  # fmt: skip
