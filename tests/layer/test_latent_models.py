"""Multi-head latent attention as the transformers library has it: forward and decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal

from flax_mha import Latent, MultiHeadAttentionConfig, init_cache, multi_head_attention
from flax_mha.norms import RMSNorm
from flax_mha.positions import Rotary

pytestmark = pytest.mark.models
B, T, N, D = 2, 130, 4, 32
L, Q, W, U, V = 12, 20, 8, 16, 10
SHAPES = {
    "v3": ("deepseek_v3", {"q_lora_rank": Q, "rope_interleave": True, "attention_bias": False}),
    "v3-halves": ("deepseek_v3", {"q_lora_rank": Q, "rope_interleave": False}),
    "v3-biased": ("deepseek_v3", {"q_lora_rank": Q, "attention_bias": True}),
    "v3-lite": ("deepseek_v3", {"q_lora_rank": None}),
    "v2": ("deepseek_v2", {"q_lora_rank": Q}),
    "v2-lite": ("deepseek_v2", {"q_lora_rank": None}),
}


def their_layer(name):
    """A tiny attention layer with random weights, and what turns its queries and keys."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import importlib

    family, fields = SHAPES[name]
    spelled = "DeepseekV3" if family == "deepseek_v3" else "DeepseekV2"
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configs, f"{spelled}Config")(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=N, kv_lora_rank=L,
        qk_rope_head_dim=W, qk_nope_head_dim=U, v_head_dim=V, num_hidden_layers=1,
        max_position_embeddings=256, attn_implementation="eager", **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    module = getattr(modeling, f"{spelled}Attention")(config, 0).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        for norm in (module.kv_a_layernorm, getattr(module, "q_a_layernorm", None)):
            if norm is not None:
                norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape))
    rotary = getattr(modeling, f"{spelled}RotaryEmbedding")(config)
    return module, rotary, config


def our_layer(module, config):
    rank = config.q_lora_rank
    interleaved = getattr(config, "rope_interleave", True)
    first = ("query_latent",) if rank else ()
    biases = (*first, "latent", "shared_key", "attention_output")
    norm = RMSNorm(module.kv_a_layernorm.variance_epsilon)
    ours = MultiHeadAttentionConfig(
        num_heads=N,
        key_dim=U + W,
        value_dim=V,
        use_bias=biases if config.attention_bias else False,
        position=Rotary(config.rope_parameters["rope_theta"], dim=W, interleaved=interleaved),
        latent=Latent(L, W, rank, norm),
    )
    return ours, params_of(module, rank)


def params_of(module, rank):
    weights = {name: x.detach().numpy() for name, x in module.named_parameters()}
    array = lambda name: weights[f"{name}.weight"].T
    query = array("q_b_proj" if rank else "q_proj").reshape(-1, N, U + W)
    behind = array("kv_b_proj").reshape(L, N, U + V)
    params = {
        "query": {"kernel": np.concatenate([query[..., U:], query[..., :U]], -1)},
        "latent": {"kernel": array("kv_a_proj_with_mqa")[:, :L]},
        "shared_key": {"kernel": array("kv_a_proj_with_mqa")[:, L:]},
        "latent_norm": {"scale": weights["kv_a_layernorm.weight"]},
        "key": {"kernel": behind[..., :U]},
        "value": {"kernel": behind[..., U:]},
        "attention_output": {"kernel": array("o_proj").reshape(N, V, D)},
    }
    if rank:
        params["query_latent"] = {"kernel": array("q_a_proj")}
        params["query_latent_norm"] = {"scale": weights["q_a_layernorm.weight"]}
    if "o_proj.bias" in weights:
        both = weights["kv_a_proj_with_mqa.bias"]
        biases = {"latent": both[:L], "shared_key": both[L:]}
        biases["attention_output"] = weights["o_proj.bias"]
        if rank:
            biases["query_latent"] = weights["q_a_proj.bias"]
        for name, bias in biases.items():
            params[name]["bias"] = bias
    return jax.tree.map(jnp.asarray, params)


def theirs_of(module, rotary, x, pieces):
    """Their outputs, in pieces by their own cache."""
    import torch
    from transformers.cache_utils import DynamicCache

    at = torch.arange(T)[None]
    whole, cache, outputs, first = rotary(x, at), DynamicCache(), [], 0
    for size in pieces:
        stop = first + size
        of = lambda y, first=first, stop=stop: y[:, first:stop]
        turns = tuple(map(of, whole)) if isinstance(whole, tuple) else of(whole)
        late = torch.arange(stop)[None] > torch.arange(first, stop)[:, None]
        mask = torch.zeros(late.shape).masked_fill(late, -torch.inf)[None, None]
        with torch.no_grad():
            output = module(
                x[:, first:stop], position_embeddings=turns, attention_mask=mask, cache=cache
            )
        outputs.append(output[0].numpy())
        first = stop
    return np.concatenate(outputs, 1)


@pytest.mark.parametrize("name", SHAPES)
def test_deepseek(name):
    module, rotary, config = their_layer(name)
    import torch

    ours, params = our_layer(module, config)
    x = normal(3, B, T, D)
    theirs = theirs_of(module, rotary, torch.tensor(np.asarray(x)), (T,))
    pieces = (120, *[1] * (T - 120))
    assert_close(theirs_of(module, rotary, torch.tensor(np.asarray(x)), pieces), theirs, "float32")
    for implementation in ("reference", "blockwise"):
        named = ours.replace(implementation=implementation)
        output = multi_head_attention(params, x, x, config=named, use_causal_mask=True)
        assert_close(output, theirs, "float32", implementation)
        cache, outputs, first = init_cache(named, B, T), [], 0
        for size in pieces:
            new = x[:, first : first + size]
            output, cache = multi_head_attention(params, new, new, config=named, cache=cache)
            outputs.append(output)
            first += size
        assert_close(jnp.concatenate(outputs, 1), theirs, "float32", f"{implementation}, decoding")
