"""The product of matrices against the einsum it stands for: values and every derivative."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, normal
from jax import export

from flax_mha.layer.projection import contract

CASES = {
    "BTD,DNH->BTNH": ((2, 5, 17), (17, 3, 11)),
    "BTNV,NVE->BTE": ((2, 5, 3, 13), (3, 13, 29)),
    "BSC,CKH->BSKH": ((0, 5, 17), (17, 3, 11)),
}


def einsum(equation, x, kernel, precision):
    return jnp.einsum(equation, x, kernel, precision=precision)


@pytest.fixture(params=CASES)
def call(request):
    x, kernel = (normal(seed, *shape) for seed, shape in enumerate(CASES[request.param]))
    return request.param, x, kernel


def derivatives(function, equation, x, kernel):
    """Values, both gradients, forward mode, forward over reverse, and one side alone."""
    f = lambda x, kernel: function(equation, x, kernel, "highest")
    loss = lambda x, kernel: (f(x, kernel) ** 3).sum()
    tangents = (jnp.cos(x), jnp.sin(kernel))
    gradient = jax.grad(loss, argnums=(0, 1))
    return (
        f(x, kernel),
        gradient(x, kernel),
        jax.jvp(f, (x, kernel), tangents)[1],
        jax.jvp(gradient, (x, kernel), tangents)[1],
        jax.grad(loss, 0)(x, kernel),
        jax.grad(loss, 1)(x, kernel),
        jax.vmap(gradient)(jnp.stack([x, -x]), jnp.stack([kernel, kernel])),
    )


@pytest.mark.slow
def test_every_derivative_is_the_einsum_s(call):
    equation, x, kernel = call
    got, expected = (jax.jit(derivatives, static_argnums=(0, 1)) for _ in range(2))
    pairs = got(contract, equation, x, kernel), expected(einsum, equation, x, kernel)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), *pairs)


def test_only_on_cpu_a_kernel_s_gradient_is_kept_transposed():
    """The platform that it is lowered for decides, not the one that lowers."""
    equation = "BTD,DNH->BTNH"
    x, kernel = (normal(seed, *shape) for seed, shape in enumerate(CASES[equation]))
    loss = lambda kernel: contract(equation, x, kernel, None).sum()
    lower = lambda to: export.export(jax.jit(jax.grad(loss)), platforms=[to])(kernel)
    found = {to: "optimization_barrier" in lower(to).mlir_module() for to in ("cpu", "tpu", "cuda")}
    assert found == {"cpu": True, "tpu": False, "cuda": False}


def test_the_gradient_of_a_kernel_alone_multiplies_no_zeros():
    """Two products: the value, and the kernel's gradient."""
    equation = "BTD,DNH->BTNH"
    x, kernel = (normal(seed, *shape) for seed, shape in enumerate(CASES[equation]))
    loss = lambda kernel: contract(equation, x, kernel, None).sum()
    assert str(jax.make_jaxpr(jax.grad(loss))(kernel)).count("dot_general[") == 2
