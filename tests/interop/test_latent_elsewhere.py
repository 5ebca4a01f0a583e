"""No other framework's layer has latents: loaders and savers say so, each by name."""

import jax
import jax.numpy as jnp
import pytest

from flax_mha import Latent, MultiHeadAttentionConfig, init_params
from flax_mha.interop import flax, keras, torch

LINEARS = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
CONFIG = MultiHeadAttentionConfig(4, 16, use_bias=False, latent=Latent(6, 4))
PLAIN = CONFIG.replace(latent=None)
PARAMS, OTHERS = (init_params(jax.random.key(0), c, (2, 5, 32)) for c in (CONFIG, PLAIN))
CASES = {
    "from llama": lambda: torch.from_torch_state_dict(
        torch.to_torch_state_dict(OTHERS, PLAIN, layout="qwen2"), CONFIG, layout="qwen2"
    ),
    "to qwen2": lambda: torch.to_torch_state_dict(PARAMS, CONFIG, layout="qwen2"),
    "to torch": lambda: torch.to_torch_state_dict(PARAMS, CONFIG),
    "from linear": lambda: torch.from_linear_layers(
        torch.to_linear_layers(OTHERS, PLAIN, names=LINEARS), CONFIG, names=LINEARS
    ),
    "to linear": lambda: torch.to_linear_layers(PARAMS, CONFIG, names=LINEARS),
    "from keras": lambda: keras.from_keras_weights(keras.to_keras_weights(OTHERS, PLAIN), CONFIG),
    "to keras": lambda: keras.to_keras_weights(PARAMS, CONFIG),
    "from flax": lambda: flax.from_flax_params(flax.to_flax_params(OTHERS, PLAIN), CONFIG),
    "to flax": lambda: flax.to_flax_params(PARAMS, CONFIG),
    "to nnx": lambda: flax.to_nnx_state(PARAMS, CONFIG),
}


@pytest.mark.parametrize("name", CASES)
def test_latents_are_refused_by_name(name):
    with pytest.raises(ValueError, match="latent"):
        CASES[name]()


def test_chunks_and_growth_are_no_part_of_the_weights():
    """A config that differs in what has no parameters takes the same arrays."""
    chunked = PLAIN.replace(chunk_size=4)
    state = torch.to_torch_state_dict(OTHERS, PLAIN, layout="qwen2")
    loaded = torch.from_torch_state_dict(state, chunked, layout="qwen2")
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, loaded, OTHERS)))
    with pytest.raises(ValueError, match="no `chunk_size`"):
        flax.to_flax_params(OTHERS, chunked)
