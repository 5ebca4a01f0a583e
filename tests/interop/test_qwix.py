"""qwix (extra `test-models`): its arrays are taken, and where it would do nothing it is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relaxed

import flax_mha
import flax_mha.nnx
from flax_mha import init_params, multi_head_attention

qwix = pytest.importorskip("qwix", reason="pip install -e '.[test-models]'")

pytestmark = pytest.mark.models
X = jax.random.normal(jax.random.key(0), (2, 9, 32))
PTQ = {"weight_qtype": "int8", "act_qtype": None}
REFUSED = r"does not reach the kernels.*module_path='.*'.*quantize_params"


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="dense")(x)
        return flax_mha.MultiHeadAttention(num_heads=4, key_dim=8, name="attention")(x, x)


class OfFunction(nn.Module):
    """The function inside a module of the user's own."""

    @nn.compact
    def __call__(self, x):
        config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=8)
        params = self.param("attention", lambda key: init_params(key, config, x.shape))
        return multi_head_attention(params, x, x, config=config)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(32, 32, rngs=rngs)
        self.attention = flax_mha.nnx.MultiHeadAttention(4, 8, query_features=32, rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        return self.attention(x, x)


def ptq(model, path, *inputs):
    rule = qwix.QuantizationRule(module_path=path, **PTQ)
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), *inputs)


def lora(model, path, *inputs, **rngs):
    provider = qwix.LoraProvider(module_path=path, rank=2, alpha=4)
    return qwix.apply_lora_to_model(model, provider, *inputs, **rngs)


@pytest.mark.parametrize("wrap", [ptq, lora])
@pytest.mark.parametrize("model", [Linen(), OfFunction()], ids=["module", "function"])
def test_a_rule_that_matches_a_linen_layer_is_refused(model, wrap):
    with relaxed(), pytest.raises(NotImplementedError, match=REFUSED):
        wrap(model, ".*").init(jax.random.key(1), X)


@pytest.mark.parametrize("wrap", [ptq, lora])
def test_a_rule_that_matches_an_nnx_layer_is_refused(wrap):
    rngs = {"rngs": nnx.Rngs(1)} if wrap is lora else {}
    with relaxed(), pytest.raises(NotImplementedError, match=REFUSED):
        wrap(Nnx(nnx.Rngs(0)), ".*", X, **rngs)(X)


def test_other_parts_of_a_model_are_left_to_qwix():
    model = Linen()
    variables = model.init(jax.random.key(1), X)
    want = model.apply(variables, X)
    with relaxed():
        wrapped = lora(model, "dense")
        own = wrapped.init(jax.random.key(1), X)
        assert "kernel_lora_a" in own["params"]["dense"]
        np.testing.assert_allclose(wrapped.apply(own, X), want, atol=1e-5)
        layer = Nnx(nnx.Rngs(0))
        exact = layer(X)
        near = ptq(layer, "dense", X)(X)
    assert 0 < abs(near - exact).max() < 0.05
    np.testing.assert_allclose(model.apply(variables, X), want, atol=1e-6)  # nothing stays behind


@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_its_arrays_are_taken_as_they_are(qtype):
    config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=8, output_shape=(3, 5))
    params = init_params(jax.random.key(1), config, X.shape)
    inputs = {"attention_output": 2}
    with relaxed():
        theirs = {
            name: {
                **leaves,
                "kernel": qwix.quantize(
                    leaves["kernel"],
                    qtype,
                    channelwise_axes=range(inputs.get(name, 1), leaves["kernel"].ndim),
                ),
            }
            for name, leaves in params.items()
        }
        back = {n: {**x, "kernel": qwix.dequantize(x["kernel"])} for n, x in theirs.items()}
    got = jax.jit(lambda tree: multi_head_attention(tree, X, X, config=config))(theirs)
    np.testing.assert_allclose(got, multi_head_attention(back, X, X, config=config), atol=1e-5)
    tiled = dict(theirs)
    with relaxed():
        kernel = qwix.quantize(params["query"]["kernel"], qtype, tiled_axes={0: 8})
    tiled["query"] = {**params["query"], "kernel": kernel}
    with pytest.raises(NotImplementedError, match="one scale an output channel"):
        multi_head_attention(tiled, X, X, config=config)
    assert jnp.isfinite(got).all()
