"""Derivatives of any order run over blocks: their temporaries grow with T, not with its square."""

import jax
import jax.numpy as jnp
import pytest

from flax_mha import dot_product_attention

B, N, H = 1, 2, 32
LENGTHS = (4096, 8192)
MATRIX = 4 * LENGTHS[1] ** 2  # bytes of one [T, S] of floats


def attention(implementation, what):
    call = {"is_causal": what == "causal", "implementation": implementation}
    if what == "dropout":
        call |= {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    return lambda q, k, v: dot_product_attention(q, k, v, **call)


def loss(function):
    return lambda *qkv: 0.5 * (function(*qkv) ** 2).sum()


def gradient(function):
    return jax.grad(loss(function), (0, 1, 2))


def jvp(function):
    return lambda *qkv: jax.jvp(function, qkv, qkv)


def forward_over_reverse(function):
    return lambda *qkv: jax.jvp(gradient(function), qkv, qkv)


def reverse_over_reverse(function):
    def penalty(*qkv):
        return sum((x**2).sum() for x in gradient(function)(*qkv))

    return jax.grad(penalty, (0, 1, 2))


def reverse_over_forward(function):
    return jax.grad(lambda *qkv: jax.jvp(loss(function), qkv, qkv)[1], (0, 1, 2))


DERIVATIVES = (jvp, forward_over_reverse, reverse_over_reverse, reverse_over_forward)
CASES = [
    *((derivative, "causal") for derivative in DERIVATIVES),
    *((derivative, "all") for derivative in (jvp, reverse_over_reverse)),
    *((derivative, "dropout") for derivative in (jvp, reverse_over_reverse)),
]


def temporaries(function, T):
    """Bytes; compiled, not run."""
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    return jax.jit(function).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def assert_linear(short, long):
    """Twice the length, twice the bytes; less than a third of one [T, S] matrix of floats."""
    found = f"{short / 1e6} and {long / 1e6} MB"
    assert long <= 2.3 * short, found
    assert long < MATRIX / 3, found


@pytest.mark.parametrize(("derivative", "what"), CASES)
@pytest.mark.slow
def test_linear_in_the_length(derivative, what):
    function = derivative(attention("blockwise", what))
    assert_linear(*(temporaries(function, T) for T in LENGTHS))


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.slow
def test_the_reference_is_not_linear(derivative):
    """The control: the same assertion fails, and would by either half."""
    function = derivative(attention("reference", "all"))
    short, long = (temporaries(function, T) for T in LENGTHS)
    with pytest.raises(AssertionError, match="MB"):
        assert_linear(short, long)
    assert long > 2.3 * short
    assert long > MATRIX
