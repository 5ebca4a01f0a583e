"""Sizes, data, tolerances and the bridge to the installed Keras, shared by the tests.

The sizes are pairwise distinct primes, so that two axes that are swapped do not fit.
"""

import contextlib
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

B, T, S = 2, 5, 7
N, H, V = 3, 11, 13
D, C, M, E = 17, 19, 23, 29

# The largest error of an array's entries, relative to the array's largest entry (or to 1).
# float32: the figure, some 80 roundings. bfloat16 and float16 keep 8 and 11 bits (a
# spacing of 7.8e-3 and 9.8e-4), and a layer rounds about ten times between input and output or
# gradient; five spacings hold on every case here and are far below the 1 of a wrong entry.
# Slopes by finite differences carry the error of the differences, in float64 too.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3, "slope": 1e-8}


def assert_close(actual, expected, dtype, what="", scale=0.0):
    """`actual` equals `expected` to the one tolerance of `dtype`, entry by entry."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    bound = TOLERANCES[str(dtype)] * max(1.0, scale, np.abs(expected).max(initial=0.0))
    error = np.abs(actual - expected).max(initial=0.0)
    assert error <= bound, f"{what}: error {error:.3g} is above {bound:.3g}"


def assert_trees_close(actual, expected, dtype, what=""):
    """The same structure, and `assert_close` for every leaf.

    A leaf is measured by the largest entry of its own dict. The key bias's gradient is zero, for
    it shifts a row of logits; what is computed is the rounding error of the key kernel's terms.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected), what
    scales = {}
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for path, leaf in leaves:
        largest = np.abs(np.asarray(leaf).astype(np.float64)).max(initial=0.0)
        scales[path[:-1]] = max(scales.get(path[:-1], 0.0), largest)
    for (path, leaf), ours in zip(leaves, jax.tree.leaves(actual), strict=True):
        name = what + jax.tree_util.keystr(path)
        assert_close(ours, leaf, dtype, name, scale=scales[path[:-1]])


def x64():
    """A context in which JAX computes in float64, under both names that JAX has given it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64(True)


def normal(seed, *shape, dtype="float32"):
    """Seeded numbers of standard deviation 1, rounded to `dtype`, as a JAX array."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.dtype(dtype))


def booleans(seed, *shape, share=0.7):
    """A seeded boolean array in which about `share` of the entries are True."""
    return jnp.asarray(np.random.default_rng(seed).random(shape) < share)


def open_rows(mask):
    """The mask with the first key open to everyone, so that no row is fully masked."""
    return jnp.asarray(np.asarray(mask) | (np.arange(mask.shape[-1]) == 0))


def random_params(shapes, seed=0, dtype="float32"):
    """Kernels and biases (not zero) of these shapes: a tree of arrays like `param_shapes`."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        is_bias = path[-1].key == "bias"
        fan_in = 4 if is_bias else np.prod(shape.shape[: 2 if "output" in path[0].key else 1])
        return jnp.asarray(rng.normal(size=shape.shape) / np.sqrt(fan_in), jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def pairwise(axes):
    """Few rows in which every pair of values of two axes occurs; the same rows on every run.

    Greedy: a row starts from a pair still missing, and takes, axis by axis, the value that meets
    most of the others; values tie in turns.
    """
    names = list(axes)
    missing = {
        (one, a, two, b)
        for one, two in itertools.combinations(names, 2)
        for a, b in itertools.product(range(len(axes[one])), range(len(axes[two])))
    }
    rows = []
    while missing:
        one, a, two, b = min(missing, key=lambda pair: (names.index(pair[0]), pair))
        row = {one: a, two: b}
        for name in names:
            if name not in row:
                count = len(axes[name])
                turns = [(len(rows) + i) % count for i in range(count)]
                gains = [len(missing & pairs_of({**row, name: i}, names)) for i in turns]
                row[name] = turns[gains.index(max(gains))]
        missing -= pairs_of(row, names)
        rows.append({name: axes[name][row[name]] for name in names})
    return rows


def pairs_of(row, names):
    """The pairs of values that a (partial) row contains."""
    known = [name for name in names if name in row]
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(known, 2)}


@contextlib.contextmanager
def relaxed():
    """Keras's own code promotes and warns; ours must not. Every call into Keras goes in here."""
    with (
        warnings.catch_warnings(action="ignore", category=DeprecationWarning),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
