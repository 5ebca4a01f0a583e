"""Every implementation that can run on this machine, against float64 on its CPU.

    python -m pytest tests/accelerators

The whole table of the calls, and larger ones: forward and every gradient. The reference in float64
says what is right; of the small calls, the oracle says it too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accelerator import PLATFORM  # skips this file where there is none
from attention_cases import CASES
from helpers import assert_close, normal, x64
from implementations import SLOW
from kernel_cases import split
from large_cases import LARGE

from flax_mha import IMPLEMENTATIONS, dot_product_attention, explain
from flax_mha.attention.dropout import keep_mask, words_of

NAMES = [name for name in IMPLEMENTATIONS if name not in SLOW]
SERVE_ALL = (None, "reference", "blockwise")

# (dtype, precision): the largest error by platform, relative to the largest entry (or to 1).
# In "highest" precision float32 is float32 everywhere: 1e-5, as in all tests. The default
# multiplies float32 in fewer bits: a GPU in tf32, which keeps the 11 bits of float16; a TPU in one
# pass of bfloat16. What is 16 bits is as exact as on a CPU: five spacings of the numbers.
LIMITS = {
    ("float32", "highest"): {"gpu": 1e-5, "tpu": 1e-5, "cpu": 1e-5},
    ("float32", None): {"gpu": 5e-3, "tpu": 4e-2, "cpu": 1e-5},
    ("bfloat16", None): {"gpu": 4e-2, "tpu": 4e-2, "cpu": 4e-2},
    ("float16", None): {"gpu": 5e-3, "cpu": 5e-3},  # a TPU multiplies none
}
TABLE = {**CASES, **{f"large, {name}": case for name, case in LARGE.items()}}
# Of the small calls, whose None is the reference, what finds a wrong formula and a wrong dtype.
ROWS = [
    *((x, *pair) for pair in (("float32", "highest"), ("bfloat16", None)) for x in CASES),
    *((x, *pair) for pair in LIMITS if PLATFORM in LIMITS[pair] for x in TABLE if x not in CASES),
]


def named_arrays(case, dtype):
    """What has a gradient: query, key and value of the dtype; biases, distances, sinks as given."""
    arrays, _ = split(case.arrays(dtype), case.call)
    return jax.tree.map(jnp.asarray, arrays)


def attend(case, arrays, **options):
    """The call of a case with these arrays in place of its own."""
    call, arrays = {**case.call, **options}, dict(arrays)
    if "distances" in arrays:
        values = arrays.pop("distances")
        call["distance_bias"] = dataclasses.replace(call["distance_bias"], values=values)
    return dot_product_attention(**{**call, **arrays})


def graded(case, arrays, probe, **options):
    """(context, the gradient of each array) of the context's sum, weighed by a probe."""

    def loss(arrays):
        context = attend(case, arrays, **options)
        return (context.astype(probe.dtype) * probe).sum(), context

    (_, context), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return context, gradients


def probe_of(case):
    b, t, _, n, _, _, v = case.sizes
    return normal(31, b, t, n, v)


@functools.cache
def exact(name, dtype):
    """(context, gradients) as float64 arrays, of the numbers as they are in the dtype."""
    case, cpu = TABLE[name], jax.devices("cpu")[0]
    # Computed on the CPU: nothing of the accelerator has a part in what is right.
    move = lambda x: jax.device_put(x, cpu) if isinstance(x, jax.Array) else x
    with jax.default_device(cpu), x64():
        arrays = {key: np.asarray(x, np.float64) for key, x in named_arrays(case, dtype).items()}
        here = dataclasses.replace(case, call=jax.tree.map(move, case.call))
        probe = np.asarray(probe_of(case), np.float64)
        found = graded(here, arrays, jnp.asarray(probe), implementation="reference")
        if name in CASES:
            assert_close(found[0], case.expected(case.arrays(dtype))[0], "float64", "oracle")
    return jax.tree.map(np.asarray, found)


def close(actual, expected, limit, what):
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), f"{what}: not finite"
    error = np.abs(actual - expected).max(initial=0.0)
    bound = limit * max(1.0, np.abs(expected).max(initial=0.0))
    assert error <= bound, f"{what}: error {error:.3g} is above {bound:.3g}"


def is_refused(name, arrays, call):
    """Whether `explain` says so, and the call then raises; those that serve all refuse none."""
    if name is None:
        return False
    told = {key: x for key, x in arrays.items() if key in ("query", "key", "value")}
    answer = explain(**told, **call)[name]
    empty = 0 in (*told["query"].shape[:3], told["key"].shape[1])
    if answer.startswith("ok") or (empty and name == "pallas_tpu"):  # no program: zeros anywhere
        return False
    assert name not in SERVE_ALL, answer
    with pytest.raises(NotImplementedError, match=name):
        dot_product_attention(**told, **call, implementation=name)
    return True


@pytest.mark.parametrize(
    ("implementation", "name", "dtype", "precision"),
    [
        (implementation, *row)
        for row in ROWS
        for implementation in ([] if row[0] in CASES else [None]) + NAMES
    ],
    ids=str,
)
def test_forward_and_every_gradient(implementation, name, dtype, precision):
    limits, case = LIMITS[dtype, precision], TABLE[name]
    arrays = named_arrays(case, dtype)
    options = {} if precision is None else {"precision": precision}
    if is_refused(implementation, arrays, {**case.call, **options}):
        return
    found = graded(case, arrays, probe_of(case), implementation=implementation, **options)
    context, gradients = found
    expected, slopes = exact(name, dtype)
    assert context.dtype == dtype
    close(context, expected, limits[PLATFORM], "context")
    for key, gradient in gradients.items():
        close(gradient, slopes[key], limits[PLATFORM], f"gradient of {key}")


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("implementation", [None, *NAMES], ids=str)
def test_dropout_drops_the_same_entries_bit_for_bit(implementation, shared, dtype, rate):
    """Equal weights of values that are unit vectors: an entry of the context is a weight, or 0."""
    b, t, s, n, start = 2, 130, 257, 2, (3, 1, 64, 128)
    query, key = jnp.zeros((b, t, n, 8), dtype), jnp.zeros((b, s, n, 8), dtype)
    value = jnp.broadcast_to(jnp.eye(s, dtype=dtype)[None, :, None], (b, s, n, s))
    call = dict(dropout_rate=rate, dropout_key=jax.random.key(5), broadcast_dropout=shared)
    call |= dict(dropout_start=start)
    if is_refused(implementation, dict(query=query, key=key, value=value), call):
        return
    run = jax.jit(functools.partial(dot_product_attention, implementation=implementation, **call))
    kept = np.asarray(run(query, key, value)).swapaxes(1, 2) != 0
    with jax.default_device(cpu := jax.devices("cpu")[0]):
        words = jax.device_put(words_of(call["dropout_key"]), cpu)
        origin = jnp.asarray(start, "uint32")
        expected = keep_mask(words, rate, (b, n, t, s), shared=shared, origin_4=origin)
    np.testing.assert_array_equal(kept, np.broadcast_to(expected, kept.shape))


def test_the_named_kernel_is_in_the_program():
    x = normal(0, 2, 512, 4, 64, dtype="bfloat16")
    if is_refused("cudnn", dict(query=x, key=x, value=x), {}):
        return
    loss = lambda x: dot_product_attention(x, x, x, is_causal=True, implementation="cudnn").sum()
    text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
