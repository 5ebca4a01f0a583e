"""No other framework's layer has a score function: weights that leave go without, or not at all."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import normal

from flax_mha import MultiHeadAttentionConfig, init_params, multi_head_attention
from flax_mha.interop.equinox import to_equinox
from flax_mha.interop.flax import to_flax_params, to_nnx_state
from flax_mha.interop.keras import (
    from_keras_weights,
    save_keras_weights,
    to_keras_weights,
)
from flax_mha.interop.torch import from_torch_state_dict, to_linear_layers, to_torch_state_dict
from flax_mha.positions import Score

D = 8


@dataclasses.dataclass(frozen=True)
class Halved(Score):
    def __call__(self, logits, b, n, t, s):
        return logits / 2


class Tempered(Score):
    def param_sizes(self, num_heads):
        return {"temperature": {"N": num_heads}}

    def __call__(self, logits, b, n, t, s, temperature):
        return logits * temperature[n]


NAMES = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
WAYS = {
    "torch": to_torch_state_dict,
    "llama": lambda params, config: to_torch_state_dict(params, config, layout="llama"),
    "linear layers": lambda params, config: to_linear_layers(params, config, names=NAMES),
    "Keras": to_keras_weights,
    "a Keras file": lambda params, config: save_keras_weights(
        "nowhere.weights.h5", {"layers/multi_head_attention": (config, params)}
    ),
    "linen": to_flax_params,
    "nnx": to_nnx_state,
}


@pytest.mark.parametrize("score", [Halved(), Tempered()], ids=["plain", "with parameters"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_with_a_score_do_not_leave(way, score):
    config = MultiHeadAttentionConfig(2, 4, score=score, use_bias=way != "llama")
    params = init_params(jax.random.key(0), config, (1, D))
    with pytest.raises(ValueError, match=r"no `score`.*None in the config.*(Halved|Tempered)"):
        WAYS[way](params, config)


def test_an_equinox_module_has_none():
    equinox = pytest.importorskip("equinox")
    config = MultiHeadAttentionConfig(2, 4, score=Halved(), use_bias=False)
    params = init_params(jax.random.key(0), config, (1, D))
    module = equinox.nn.MultiheadAttention(2, D, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"equinox has no `score`"):
        to_equinox(params, config, module)


def test_weights_come_in_beside_a_score_without_parameters():
    """The layer computes something else with them, and its config says so."""
    config = MultiHeadAttentionConfig(2, 4, score=Halved())
    plain = config.replace(score=None)
    params = init_params(jax.random.key(0), plain, (1, D))
    x = normal(1, 2, 5, D)
    for tree in (
        from_torch_state_dict(to_torch_state_dict(params, plain), config),
        from_keras_weights(to_keras_weights(params, plain), config),
    ):
        output = multi_head_attention(tree, x, x, config=config)
        half = multi_head_attention(params, x, x, config=plain.replace(scale=0.25))
        np.testing.assert_allclose(output, half, rtol=1e-5, atol=1e-6)


def test_parameters_that_no_file_has_are_asked_for():
    config = MultiHeadAttentionConfig(2, 4, score=Tempered())
    plain = config.replace(score=None)
    params = init_params(jax.random.key(0), plain, (1, D))
    with pytest.raises(ValueError, match="'score'"):
        from_torch_state_dict(to_torch_state_dict(params, plain), config)
    with pytest.raises(ValueError, match="'score'"):
        from_keras_weights(to_keras_weights(params, plain), config)


def test_a_folder_of_transformers_keeps_its_config(tmp_path):
    import json

    import safetensors.numpy

    from flax_mha.interop.huggingface import load_attention, save_attention

    fields = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
    arrays = {
        f"model.layers.0.self_attn.{x}_proj.weight": np.ones((16, 16), "float32") for x in "qkvo"
    }
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    safetensors.numpy.save_file(arrays, old / "model.safetensors")
    ((name, layer),) = load_attention(old).items()
    changed = layer._replace(config=layer.config.replace(score=Halved()))
    with pytest.raises(ValueError, match=r"no `score`"):
        save_attention(tmp_path / "new", {name: changed}, like=old)
    assert not (tmp_path / "new").exists()
