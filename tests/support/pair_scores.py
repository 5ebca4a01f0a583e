"""Scores as functions of pairs: as a user writes them, and by Python's own numbers.

A case is one entry of `SCORES`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from pair_masks import id_pairs, normal
from pair_oracles import Example


def score(function, loops, arrays=lambda z, rng: {}, **how):
    return Example(function, loops, arrays, kind="score", **how)


def far(x, t, s):
    """How far apart, in the logit's dtype: JAX may be told to promote nothing."""
    return jnp.abs(t - s).astype(x.dtype)


def t5_bucket(distance):
    """T5, both ways, 8 buckets up to a distance of 16, by its definition."""
    d = abs(distance)
    bucket = d if d < 2 else min(2 + int(math.log(d / 2) / math.log(8) * 2), 3)
    return bucket + (4 if distance > 0 else 0)


def t5_formula(a):
    def score(x, b, n, t, s):
        distance = s - t
        d = jnp.maximum(jnp.abs(distance), 1).astype("float32")
        large = 2 + (jnp.log(d / 2) / math.log(8) * 2).astype("int32")
        near = jnp.where(jnp.abs(distance) < 2, jnp.abs(distance), jnp.minimum(large, 3))
        return x + a.table[near + jnp.where(distance > 0, 4, 0), n]

    return score


def t5_arrays(z, rng):
    buckets = [t5_bucket(distance) for distance in range(1 - z.T, z.S)]
    return {"table": normal(rng, 8, z.N), "buckets": np.array(buckets)}


def swin(a):
    """A learned number for each difference of rows and of columns."""
    rows, columns = a.grid

    def score(x, b, n, t, s):
        row = t // columns - s // columns + rows - 1
        column = t % columns - s % columns + columns - 1
        return x + a.table[row * (2 * columns - 1) + column, n]

    return score


def swin_by_loops(a, x, b, n, t, s):
    (rows, columns), (i, j), (k, m) = a.grid, divmod(t, a.grid[1]), divmod(s, a.grid[1])
    table = a.table.reshape(2 * rows - 1, 2 * columns - 1, -1)
    return x + table[i - k + rows - 1, j - m + columns - 1, n]


def beit_entry(t, s, rows, columns):
    """BEiT's entry: token 0 is no patch, and its three kinds of pair stand last."""
    entries = (2 * rows - 1) * (2 * columns - 1)
    if t == 0 or s == 0:
        return entries + {(True, True): 2, (True, False): 0, (False, True): 1}[t == 0, s == 0]
    (i, j), (k, m) = divmod(t - 1, columns), divmod(s - 1, columns)
    return (i - k + rows - 1) * (2 * columns - 1) + j - m + columns - 1


def beit_arrays(z, rng):
    rows, columns = z.grid
    index = [[beit_entry(t, s, rows, columns) for s in range(z.S)] for t in range(z.T)]
    entries = (2 * rows - 1) * (2 * columns - 1) + 3
    return {"table": normal(rng, entries, z.N), "index": np.array(index)}


def sandwich(a):
    """The cosines of sinusoidal positions alone, by distance."""

    def score(x, b, n, t, s):
        angles = (t - s).astype(x.dtype) * a.frequencies
        return x + jnp.cos(angles).sum() * a.scales[n]

    return score


def features(z, rng, **shapes):
    return {name: 0.5 * normal(rng, *shape) for name, shape in shapes.items()}


def positive(rng, *shape):
    return np.exp(0.3 * rng.normal(size=shape))


SCORES = {
    "the same": score(lambda a: lambda x, b, n, t, s: x, lambda a, x, b, n, t, s: x),
    "ALiBi": score(
        lambda a: lambda x, b, n, t, s: x - a.slopes[n] * far(x, t, s),
        lambda a, x, b, n, t, s: x - a.slopes[n] * abs(t - s),
        lambda z, rng: {"slopes": positive(rng, z.N)},
    ),
    "ALiBi of powers": score(
        lambda a: lambda x, b, n, t, s: (
            x + (s - t).astype(x.dtype) * jnp.exp2(-8 * (n + 1).astype(x.dtype) / a.N)
        ),
        lambda a, x, b, n, t, s: x + (s - t) * 2 ** (-8 * (n + 1) / a.N),
    ),
    "ALiBi by document": score(
        lambda a: lambda x, b, n, t, s: jnp.where(
            a.query_ids[b, t] == a.key_ids[b, s], x - a.slopes[n] * far(x, t, s), x
        ),
        lambda a, x, b, n, t, s: (
            x - (a.slopes[n] * abs(t - s) if a.query_ids[b, t] == a.key_ids[b, s] else 0)
        ),
        lambda z, rng: {"slopes": positive(rng, z.N), **id_pairs(z, rng)},
    ),
    "T5": score(
        lambda a: lambda x, b, n, t, s: x + a.table[a.buckets[s - t + a.T - 1], n],
        lambda a, x, b, n, t, s: x + a.table[t5_bucket(s - t), n],
        t5_arrays,
    ),
    "T5 by formula": score(
        t5_formula,
        lambda a, x, b, n, t, s: x + a.table[t5_bucket(s - t), n],
        lambda z, rng: {"table": normal(rng, 8, z.N)},
    ),
    "relative table": score(
        lambda a: lambda x, b, n, t, s: x + a.table[n, s - t + a.T - 1],
        lambda a, x, b, n, t, s: x + a.table[n][(s - t) + (a.T - 1)],
        lambda z, rng: {"table": normal(rng, z.N, z.T + z.S - 1)},
    ),
    "relative table, from its end": score(  # a negative index counts from the end
        lambda a: lambda x, b, n, t, s: x + a.table[n, s - t],
        lambda a, x, b, n, t, s: x + a.table[n].tolist()[s - t],
        lambda z, rng: {"table": normal(rng, z.N, z.T + z.S)},
    ),
    "relative table, clipped": score(
        lambda a: lambda x, b, n, t, s: x + a.table[n, jnp.clip(s - t, -4, 4) + 4],
        lambda a, x, b, n, t, s: x + a.table[n][max(-4, min(4, s - t)) + 4],
        lambda z, rng: {"table": normal(rng, z.N, 9)},
    ),
    "soft cap": score(
        lambda a: lambda x, b, n, t, s: 0.7 * jnp.tanh(x / 0.7),
        lambda a, x, b, n, t, s: 0.7 * math.tanh(x / 0.7),
    ),
    "learned cap": score(
        lambda a: lambda x, b, n, t, s: a.cap[n] * jnp.tanh(x / a.cap[n]),
        lambda a, x, b, n, t, s: a.cap[n] * math.tanh(x / a.cap[n]),
        lambda z, rng: {"cap": positive(rng, z.N)},
    ),
    "clip": score(
        lambda a: lambda x, b, n, t, s: jnp.clip(x, -0.5, 0.5),
        lambda a, x, b, n, t, s: min(max(x, -0.5), 0.5),
    ),
    "cubic": score(
        lambda a: lambda x, b, n, t, s: x + 0.1 * x**3,
        lambda a, x, b, n, t, s: x + 0.1 * x * x * x,
    ),
    "leaky": score(
        lambda a: lambda x, b, n, t, s: jnp.where(x > 0, x, a.slopes[n] * x),
        lambda a, x, b, n, t, s: x if x > 0 else a.slopes[n] * x,
        lambda z, rng: {"slopes": positive(rng, z.N)},
    ),
    "softmax of a ReLU": score(  # a function with a derivative of its own
        lambda a: lambda x, b, n, t, s: jnp.log(jax.nn.relu(x) + 1),
        lambda a, x, b, n, t, s: math.log(max(x, 0) + 1),
    ),
    "temperature": score(
        lambda a: lambda x, b, n, t, s: x * a.temperature[n],
        lambda a, x, b, n, t, s: x * a.temperature[n],
        lambda z, rng: {"temperature": positive(rng, z.N)},
    ),
    "one number": score(
        lambda a: lambda x, b, n, t, s: x * a.scale,
        lambda a, x, b, n, t, s: x * a.scale,
        lambda z, rng: {"scale": positive(rng)},
    ),
    "query and key biases": score(
        lambda a: lambda x, b, n, t, s: x + a.of_query[b, n, t] * 0.5 + a.of_key[n, s],
        lambda a, x, b, n, t, s: x + a.of_query[b, n, t] / 2 + a.of_key[n, s],
        lambda z, rng: {"of_query": normal(rng, z.B, z.N, z.T), "of_key": normal(rng, z.N, z.S)},
    ),
    "query gains": score(
        lambda a: lambda x, b, n, t, s: x * a.gain[b, t, n],
        lambda a, x, b, n, t, s: x * a.gain[b][t][n],
        lambda z, rng: {"gain": positive(rng, z.B, z.T, z.N)},
    ),
    "forgetting": score(  # decays summed up to either token
        lambda a: lambda x, b, n, t, s: x + a.of_query[b, t, n] - a.of_key[b, s, n],
        lambda a, x, b, n, t, s: x + a.of_query[b, t, n] - a.of_key[b, s, n],
        lambda z, rng: {
            "of_query": normal(rng, z.B, z.T, z.N).cumsum(1),
            "of_key": normal(rng, z.B, z.S, z.N).cumsum(1),
        },
    ),
    "place alone": score(  # the query and the key have no say, and no gradient
        lambda a: lambda x, b, n, t, s: a.of_query[b, n, t] * a.of_key[n, s],
        lambda a, x, b, n, t, s: a.of_query[b, n, t] * a.of_key[n, s],
        lambda z, rng: {"of_query": normal(rng, z.B, z.N, z.T), "of_key": normal(rng, z.N, z.S)},
    ),
    "decay by example": score(
        lambda a: lambda x, b, n, t, s: x - a.rate[b] * far(x, t, s),
        lambda a, x, b, n, t, s: x - a.rate[b] * abs(t - s),
        lambda z, rng: {"rate": positive(rng, z.B)},
    ),
    "quadratic": score(
        lambda a: lambda x, b, n, t, s: x - a.weight[n] * ((t - s) ** 2).astype(x.dtype),
        lambda a, x, b, n, t, s: x - a.weight[n] * (t - s) ** 2,
        lambda z, rng: {"weight": 0.01 * positive(rng, z.N)},
    ),
    "inverse square root": score(
        lambda a: lambda x, b, n, t, s: x * jax.lax.rsqrt(1 + far(x, t, s)),
        lambda a, x, b, n, t, s: x / math.sqrt(1 + abs(t - s)),
    ),
    "learned power": score(
        lambda a: lambda x, b, n, t, s: x * (1 + far(x, t, s)) ** -a.power[n],
        lambda a, x, b, n, t, s: x / (1 + abs(t - s)) ** a.power[n],
        lambda z, rng: {"power": positive(rng, z.N)},
    ),
    "KERPLE": score(
        lambda a: lambda x, b, n, t, s: x - a.one[n] * jnp.log1p(a.two[n] * far(x, t, s)),
        lambda a, x, b, n, t, s: x - a.one[n] * math.log(1 + a.two[n] * abs(t - s)),
        lambda z, rng: {"one": positive(rng, z.N), "two": positive(rng, z.N)},
    ),
    "Sandwich": score(
        sandwich,
        lambda a, x, b, n, t, s: (
            x + a.scales[n] * math.fsum(math.cos((t - s) * w) for w in a.frequencies)
        ),
        lambda z, rng: {"frequencies": 0.1 * positive(rng, 3), "scales": normal(rng, z.N)},
    ),
    "forbids": score(
        lambda a: lambda x, b, n, t, s: jnp.where(s % 3 == 2, -jnp.inf, x * a.temperature[n]),
        lambda a, x, b, n, t, s: -math.inf if s in range(2, a.S, 3) else x * a.temperature[n],
        lambda z, rng: {"temperature": positive(rng, z.N)},
    ),
    "forbids all of some rows": score(
        lambda a: lambda x, b, n, t, s: jnp.where((t % 4 == 1) | (s > t + 5), -jnp.inf, x),
        lambda a, x, b, n, t, s: -math.inf if t % 4 == 1 or s > t + 5 else x,
    ),
    "Swin": score(
        swin,
        swin_by_loops,
        lambda z, rng: {"table": normal(rng, (2 * z.grid[0] - 1) * (2 * z.grid[1] - 1), z.N)},
        grid=True,
    ),
    "BEiT": score(
        lambda a: lambda x, b, n, t, s: x + a.table[a.index[t, s], n],
        lambda a, x, b, n, t, s: x + a.table[beit_entry(t, s, *a.grid), n],
        beit_arrays,
        grid=True,
        extra=1,
    ),
    "table of pairs": score(
        lambda a: lambda x, b, n, t, s: x + a.table[b, n, t, s],
        lambda a, x, b, n, t, s: x + a.table[b][n][t][s],
        lambda z, rng: {"table": normal(rng, z.B, z.N, z.T, z.S)},
    ),
    "Graphormer": score(  # a number for each head and length of the shortest path
        lambda a: lambda x, b, n, t, s: x + a.table[n, a.steps[b, t, s]],
        lambda a, x, b, n, t, s: x + a.table[n][a.steps[b][t][s]],
        lambda z, rng: {
            "table": normal(rng, z.N, 5),
            "steps": rng.integers(0, 5, size=(z.B, z.T, z.S)),
        },
    ),
    "features": score(
        lambda a: lambda x, b, n, t, s: x + a.of_query[b, t] @ a.of_key[b, s],
        lambda a, x, b, n, t, s: x + sum(a.of_query[b, t, i] * a.of_key[b, s, i] for i in range(3)),
        lambda z, rng: features(z, rng, of_query=(z.B, z.T, 3), of_key=(z.B, z.S, 3)),
    ),
    "DeBERTa": score(
        lambda a: lambda x, b, n, t, s: x + a.places[s - t + a.T - 1] @ a.of_query[b, t],
        lambda a, x, b, n, t, s: (
            x + sum(p * q for p, q in zip(a.places[s - t + a.T - 1], a.of_query[b, t]))
        ),
        lambda z, rng: features(z, rng, places=(z.T + z.S - 1, 3), of_query=(z.B, z.T, 3)),
    ),
    "branches": score(
        lambda a: lambda x, b, n, t, s: jax.lax.cond(
            s > t, lambda x: x * a.temperature[n], lambda x: x + 1, x
        ),
        lambda a, x, b, n, t, s: x * a.temperature[n] if s > t else x + 1,
        lambda z, rng: {"temperature": positive(rng, z.N)},
    ),
    "branches by head": score(
        lambda a: lambda x, b, n, t, s: jax.lax.switch(
            n % 2, [lambda x: x, lambda x: x - a.slopes[n] * far(x, t, s)], x
        ),
        lambda a, x, b, n, t, s: x - (n % 2) * a.slopes[n] * abs(t - s),
        lambda z, rng: {"slopes": positive(rng, z.N)},
    ),
}  # fmt: skip
