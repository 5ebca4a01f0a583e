"""The linen module's training step compiled for TPUs: the kernels are in it, and no [T, S].

So are calls with functions of pairs, and every step that such a function may take.

Compiled by libtpu for chips that are not here: nothing is said of numbers or of time.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu", reason="libtpu: not installed: pip install 'jax[tpu]'")
from ahead_of_time import beyond_arguments, compile, devices_of, steps_of
from training_steps import KINDS, H, N, training_step

from flax_mha import Mask, dot_product_attention

pytestmark = pytest.mark.slow

LENGTHS = (4096, 32768)
# Steps of a linear program: each array of it is at most as long as T times all features.
BYTES_A_TOKEN = 4 * N * H
TOPOLOGIES = ["v5p:2x2x1", "v6e:2x2"]


def largest(compiled):
    return max(step.bytes for step in steps_of(compiled))


def kernels(compiled):
    text = compiled.as_text()
    return [
        x for x in ("forward", "backward", "bias", "distances", "score") if f"flax_mha_{x}" in text
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_holds_the_kernels_and_nothing_quadratic(kind):
    step, types = training_step(kind)
    T = LENGTHS[-1]
    program = compile(step, types(T))
    assert kernels(program) == ["forward", "backward", *(["bias"] if kind == "bias" else [])]
    assert largest(program) <= BYTES_A_TOKEN * T, largest(program)


def test_the_peak_is_linear_in_the_length():
    step, types = training_step("causal")
    few, many = (beyond_arguments(compile(step, types(T))) for T in LENGTHS)
    print(f"beyond the arguments {few >> 20} and {many >> 20} MiB")
    assert many <= 1.1 * few * LENGTHS[1] / LENGTHS[0]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_chip_takes_the_kernels_at_32768(topology):
    step, types = training_step("causal")
    program = compile(step, types(32768), topology)
    assert kernels(program) == ["forward", "backward"]
    assert largest(program) <= BYTES_A_TOKEN * 32768


def test_the_control_is_quadratic():
    step, types = training_step("causal", "reference")
    program = compile(step, types(4096))
    assert kernels(program) == []
    assert largest(program) > BYTES_A_TOKEN * 4096


@pytest.mark.parametrize(
    ("kind", "sizes"), [("padding", (4, 1)), ("causal", (1, 4)), ("dropout", (2, 2))], ids=str
)
def test_on_four_chips_each_has_examples_and_heads_of_its_own(kind, sizes):
    """A mesh of explicit axes: batch over the first, heads over the second."""
    chips = np.array(devices_of("v5e:2x2")).reshape(sizes)
    mesh = Mesh(chips, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    step, types = training_step(kind)
    params, x, bias, arrays = types(4096, B=4)

    def on(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))

    def of_param(path, x):
        name = jax.tree_util.keystr(path)
        is_output, is_kernel = "attention_output" in name, "kernel" in name
        if is_output:
            return on(x, "model") if is_kernel else on(x)
        return on(x, None, "model") if is_kernel else on(x, "model")

    params = jax.tree_util.tree_map_with_path(of_param, params)
    arrays = {n: on(x, "data") if n != "key" else on(x) for n, x in arrays.items()}
    with jax.set_mesh(mesh):
        program = jax.jit(step).lower(params, on(x, "data"), on(bias), arrays).compile()
    assert kernels(program) == ["forward", "backward"]
    per_chip = math.ceil(4 / sizes[0]) * 4096
    assert largest(program) <= BYTES_A_TOKEN * per_chip


# --- functions of pairs -------------------------------------------------------------------------


def far(x, t, s):
    return jnp.abs(t - s).astype(x.dtype)


FUNCTIONS = {
    "window": lambda ids, floats: dict(
        mask=Mask.function(lambda b, n, t, s: (s <= t) & (t - s < 256))
    ),
    "document": lambda ids, floats: dict(
        mask=Mask.function(lambda b, n, t, s: (ids[b, t] == ids[b, s]) & (s <= t))
    ),
    "prefix-LM": lambda ids, floats: dict(mask=Mask.causal() | Mask.prefix(ids[:, 0])),
    "ALiBi": lambda ids, floats: dict(
        is_causal=True, score=lambda x, b, n, t, s: x - floats[n, 0] * far(x, t, s)
    ),
    "soft cap": lambda ids, floats: dict(
        is_causal=True, score=lambda x, b, n, t, s: 30 * jnp.tanh(x / 30)
    ),
    "forgetting": lambda ids, floats: dict(
        is_causal=True, score=lambda x, b, n, t, s: x + floats[n, t] - floats[n, s]
    ),
}
OF_FLOATS = ("ALiBi", "forgetting")


def call_of(name, T, heads=2):
    """The gradient of a call with functions of pairs, and its arguments."""
    x = jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    floats = jax.ShapeDtypeStruct((heads, T), jnp.float32)

    def loss(q, k, v, floats, ids):
        call = FUNCTIONS[name](ids, floats)
        context = dot_product_attention(q, k, v, implementation="pallas_tpu", **call)
        return context.astype("float32").sum()

    return jax.grad(loss, (0, 1, 2, 3)), (x, x, x, floats, ids)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_pairs_are_in_the_kernels(name):
    T = 16384
    program = compile(*call_of(name, T))
    more = ["score"] if name in OF_FLOATS else []
    assert kernels(program) == ["forward", "backward", *more]
    assert largest(program) <= 4 * 2 * 128 * T, largest(program)


UNARY = """
    abs bitwise_not ceil clz cos erf_inv exp exp2 floor is_finite log log1p logistic neg
    population_count round rsqrt sign sin sqrt square tan tanh
"""
BINARY = """
    add bitwise_and bitwise_or bitwise_xor div eq ge gt le lt max min mul ne pow rem shift_left
    shift_right_arithmetic shift_right_logical sub
"""


def steps_of_dtype(dtype):
    """Functions (x, y) -> booleans, one for each step that takes numbers of this dtype."""
    steps = [lambda x, y, of=of: of(x) for of in (getattr(lax, n) for n in UNARY.split())]
    steps += [getattr(lax, name) for name in BINARY.split()]
    steps += [lambda x, y, to=to: x.astype(to) for to in DTYPES if is_served(dtype, to)]
    steps += [
        lambda x, y, n=n: lax.select_n(
            (x > y) if n == 2 else (x > y).astype("int32"), *[x, y, x][:n]
        )
        for n in (2, 3)
    ]
    if dtype != "bool":
        steps += [lambda x, y: lax.clamp(y, x, y), lambda x, y: x**3]
    number = jax.ShapeDtypeStruct((), jnp.dtype(dtype))
    return [step for step in steps if takes(step, number)]


DTYPES = ("bool", "int32", "uint32", "float32", "bfloat16")
FLOATS = ("float32", "bfloat16")


def is_served(*dtypes):
    """Whether numbers of the one become numbers of the other."""
    return not ("uint32" in dtypes and any(x in FLOATS for x in dtypes))


def takes(step, number):
    try:
        jax.eval_shape(step, number, number)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_step_that_is_served_compiles(dtype):
    """All of one dtype in one mask: each step's result is compared with the key's number."""
    steps = steps_of_dtype(dtype)
    assert len(steps) > 12

    def mask(b, n, t, s):
        x, y = ((i > 5) if dtype == "bool" else i.astype(dtype) for i in (t - s, t + s))
        results = [step(x, y) for step in steps]
        answers = [z if z.dtype == bool else z > jnp.asarray(0, z.dtype) for z in results]
        return functools.reduce(operator.xor, answers)

    x = jax.ShapeDtypeStruct((1, 256, 1, 128), jnp.bfloat16)
    call = dict(implementation="pallas_tpu", block_sizes=(128, 128))
    attend = lambda x: dot_product_attention(x, x, x, mask=Mask.function(mask), **call)
    assert kernels(compile(attend, (x,))) == ["forward"]
