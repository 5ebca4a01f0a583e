"""Sizes that a choice needs and that no one knows: refused with the rule, the size, the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, random_params
from jax import export

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    dot_product_attention,
    explain,
    multi_head_attention,
    param_shapes,
)

B, N, H, D = 2, 3, 8, 16
CONFIG = MultiHeadAttentionConfig(N, H)
PARAMS = random_params(param_shapes(CONFIG, (B, D)))
# The rule, the size, both remedies: a name, or a constraint.
MESSAGE = r"(?s)96 x 96.*Received: .*\b{}\b.*implementation=.*symbolic_shape\(.*>= \d+"


def layer(query, value=None, params=PARAMS, config=CONFIG):
    return multi_head_attention(params, query, query if value is None else value, config=config)


def symbolic(sizes, *constraints):
    """Inputs [b, t, D] of these symbols or numbers, such as "b, 128"."""
    return jax.ShapeDtypeStruct(
        (*export.symbolic_shape(sizes, constraints=constraints), D), jnp.float32
    )


def exported(function, *inputs):
    return export.export(jax.jit(function))(*inputs)


def heads(x, T, features=H):
    return jax.ShapeDtypeStruct((x.shape[0], T, N, features), jnp.float32)


def attention(query, key, value):
    return dot_product_attention(query, key, value)


@pytest.mark.parametrize("sizes", ["2, t", "b, t"])
@pytest.mark.parametrize("constraints", [(), ("t >= 8",), ("t >= 95",), ("t <= 200",)])
def test_no_choice_without_the_length(sizes, constraints):
    """Every one of these holds for lengths on both sides of the rule."""
    with pytest.raises(ValueError, match=MESSAGE.format("t")):
        exported(layer, symbolic(sizes, *constraints))


def test_no_choice_without_the_keys():
    with pytest.raises(ValueError, match=MESSAGE.format("s")):
        exported(layer, jnp.zeros((B, 96, D)), symbolic("2, s"))


def test_no_choice_without_the_queries():
    with pytest.raises(ValueError, match=MESSAGE.format("t")):
        exported(layer, symbolic("2, t"), jnp.zeros((B, 4096, D)))


def test_no_choice_in_a_module():
    module = MultiHeadAttention(num_heads=N, key_dim=H)
    with pytest.raises(ValueError, match=MESSAGE.format("t")):
        exported(lambda x: module.apply({"params": PARAMS}, x, x), symbolic("2, t"))


def test_no_choice_for_arrays():
    x = symbolic("2, t")
    qkv = [heads(x, x.shape[1])] * 3
    with pytest.raises(ValueError, match=MESSAGE.format("t")):
        exported(attention, *qkv)


def test_no_choice_in_a_derivative():
    """The gradient and the tangent are refused as the call is, with the same words."""
    loss = lambda x: (layer(x) ** 2).sum()
    for function in (jax.grad(loss), lambda x: jax.jvp(loss, (x,), (x,))):
        with pytest.raises(ValueError, match=MESSAGE.format("t")):
            exported(function, symbolic("b, t"))


def test_explain_says_that_nothing_can_be_chosen():
    """A named implementation can serve the call, and None cannot choose: `explain` tells both."""
    seen = []

    def look(query, key, value):
        seen.append(explain(query, key, value))
        return query

    x = symbolic("2, t")
    try:
        exported(look, *[heads(x, x.shape[1])] * 3)
    except ValueError as error:
        seen.append(str(error))
    assert all(name in str(seen[0]) for name in ("reference", "blockwise"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "constraints", "T"),
    [
        ("b, 16", (), 16),
        ("b, 128", (), 128),
        ("2, t", ("t >= 96",), 128),
        ("b, t", ("t >= 96",), 300),
        ("b, t", ("t <= 64",), 16),
        ("b, t", ("t <= 7",), 5),
    ],
)
def test_what_is_known_is_chosen(sizes, constraints, T):
    """The remedy works: with the constraint that the message asks for, None chooses."""
    x = normal(1, B, T, D)
    program = exported(layer, symbolic(sizes, *constraints))
    error = np.abs(program.call(x) - layer(x, config=CONFIG.replace(implementation="reference")))
    assert error.max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_the_other_remedy_works(implementation):
    """A name: it serves lengths on both sides of the rule with one program."""
    config = CONFIG.replace(implementation=implementation)
    program = exported(lambda x: layer(x, config=config), symbolic("b, t"))
    for T in (1, 16, 130):
        x = normal(1, B, T, D)
        right = layer(x, config=CONFIG.replace(implementation="reference"))
        assert np.abs(program.call(x) - right).max() < 1e-5


def test_a_name_is_kept_under_a_symbolic_length():
    """The program of a named implementation is that one's: blockwise loops, the reference not."""
    texts = {}
    for name in ("reference", "blockwise"):
        config = CONFIG.replace(implementation=name)
        function = lambda x, config=config: layer(x, config=config)
        texts[name] = exported(function, symbolic("2, t")).mlir_module()
    assert "stablehlo.while" in texts["blockwise"]
    assert "stablehlo.while" not in texts["reference"]
