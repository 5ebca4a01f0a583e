"""What a model's layer has beside its four maps, and the biases it lacks: both stay so."""

import types

import jax
import numpy as np
import optax
import pytest
from helpers import H, N, normal, relaxed
from torch_bridge import NAMES, assert_same_bits, params_of

from flax_mha import MultiHeadAttentionConfig, multi_head_attention
from flax_mha.interop import torch as interop
from flax_mha.positions import RelativeBias

CONFIG = MultiHeadAttentionConfig(num_heads=N, key_dim=H)
LLAMA = MultiHeadAttentionConfig(num_heads=6, key_dim=H, num_kv_heads=2, use_bias=False)
BESIDE = {"q_norm.weight": H, "k_norm.weight": H, "sinks": N, "relative_attention_bias.weight": 9}
SUB = {name: f"self.{linear}" for name, linear in NAMES.items()} | {"attention_output": "out.dense"}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_linear_layers_is_refused_by_name(name):
    """In the module of the inputs' Linears; beside the output's may be a norm of the block."""
    state = interop.to_linear_layers(params_of(CONFIG), CONFIG, names=SUB, prefix="a.")
    state |= {"a.out.LayerNorm.weight": 0, "a.ln.weight": 0, "b.self.sinks": 0}
    back = interop.from_linear_layers(state, CONFIG, names=SUB, prefix="a.")
    assert_same_bits(back, params_of(CONFIG))
    state[f"a.self.{name}"] = np.ones(BESIDE[name], "float32")
    message = rf"unknown \['self.{name}'\].*`names`, where the config has its place.*`ignore`"
    with pytest.raises(ValueError, match=message):
        interop.from_linear_layers(state, CONFIG, names=SUB, prefix="a.")
    module = f"self.{name.removesuffix('.weight')}"
    interop.from_linear_layers(state, CONFIG, names=SUB, prefix="a.", ignore=[module])
    with pytest.raises(ValueError, match="unknown"):
        interop.from_linear_layers(state, CONFIG, names=SUB, prefix="a.", ignore=[module[:-1]])
    with pytest.raises(TypeError, match="`ignore` must be a list of names"):
        interop.from_linear_layers(state, CONFIG, names=SUB, prefix="a.", ignore=module)


def test_what_the_config_has_comes_by_its_name():
    position = RelativeBias(num_buckets=8)
    config = CONFIG.replace(qk_norm="rms", use_sinks=True, position=position)
    params = params_of(config)
    names = NAMES | {"query_norm": "q_norm", "key_norm": "k_norm", "sinks": "s"}
    with pytest.raises(ValueError, match=r"`names` must name .*'relative_bias', 'sinks'"):
        interop.to_linear_layers(params, config, names=names)
    names["relative_bias"] = "rel"
    state = interop.to_linear_layers(params, config, names=names)
    assert (state["q_norm.weight"] == params["query_norm"]["scale"]).all()
    assert (state["rel.weight"] == params["relative_bias"]["embedding"]).all()
    assert_same_bits(interop.from_linear_layers(state, config, names=names), params)
    wide = {**state, "q_norm.weight": np.ones(N * H, "float32")}  # OLMo 2's
    with pytest.raises(ValueError, match=r"`q_norm.weight` must be \[H\] = \(11\)"):
        interop.from_linear_layers(wide, config, names=names)


def test_qwen3_and_gpt_oss():
    config = LLAMA.replace(qk_norm="rms")
    params = params_of(config)
    state = interop.to_torch_state_dict(params, config, layout="qwen3")
    assert (state["self_attn.k_norm.weight"] == params["key_norm"]["scale"]).all()
    assert_same_bits(interop.from_torch_state_dict(state, config, layout="qwen3"), params)
    for wanted in (LLAMA, config):  # which may be Gemma 3's, w - 1
        with pytest.raises(ValueError, match=r"unknown \['self_attn.q_norm.*layout='qwen3'"):
            interop.from_torch_state_dict(state, wanted, layout="llama")
    config = LLAMA.replace(use_sinks=True)
    params = params_of(config)
    state = interop.to_torch_state_dict(params, config, layout="llama")
    assert_same_bits(interop.from_torch_state_dict(state, config, layout="llama"), params)
    with pytest.raises(ValueError, match=r"unknown \['self_attn.sinks'\].*use_sinks=True"):
        interop.from_torch_state_dict(state, LLAMA, layout="llama")


# --- biases that the model lacks ----------------------------------------------------------------


def after_a_step(params, config):
    """Adam moves every entry that has a gradient, however small."""
    x = normal(0, 2, 5, params["query"]["kernel"].shape[0])
    loss = lambda params: (multi_head_attention(params, x, x, config=config) ** 2).mean()
    optimizer, gradients = optax.adam(1e-2), jax.jit(jax.grad(loss))(params)
    with relaxed():
        updates, _ = optimizer.update(gradients, optimizer.init(params))
    return optax.apply_updates(params, updates)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "lacking"), [("qwen2", ["attention_output"]), (None, ["key"])])
def test_what_came_without_a_bias_goes_out_after_a_step(layout, lacking):
    """Qwen 2's output, Whisper's key."""
    options = {"layout": layout} if layout else {"names": NAMES}
    read, write = (
        (interop.from_torch_state_dict, interop.to_torch_state_dict)
        if layout
        else (interop.from_linear_layers, interop.to_linear_layers)
    )
    config = CONFIG.replace(use_bias=[n for n in CONFIG.projections if n not in lacking])
    state = write(params_of(config), config, **options)
    assert sum("bias" in name for name in state) == 3
    trained = after_a_step(read(state, config, **options), config)
    gone_out = write(trained, config, **options)
    assert gone_out.keys() == state.keys()
    assert all((gone_out[name] != state[name]).any() for name in state)
    assert_same_bits(read(gone_out, config, **options), trained)
    # A config of all biases still takes it, with zeros, and says why it cannot go out.
    whole = CONFIG
    if layout is None:
        options["without_bias"] = lacking
    trained = after_a_step(read(state, whole, **options), whole)
    with pytest.raises(ValueError, match=r"must be zero.*`use_bias` names the biases that the mo"):
        write(trained, whole, **options)


def test_a_bias_that_the_config_lacks_is_not_dropped():
    config = CONFIG.replace(use_bias=["query", "key", "value"])
    state = interop.to_linear_layers(params_of(CONFIG), CONFIG, names=NAMES)
    with pytest.raises(ValueError, match=r"unknown \['out_lin.bias'\].*`use_bias`"):
        interop.from_linear_layers(state, config, names=NAMES)


@pytest.mark.parametrize("layout", ["torch", "gpt2"])
def test_layers_of_all_biases_get_zeros(layout):
    """Their biases are packed; one that the config lacks is exactly one of zeros."""
    sizes = MultiHeadAttentionConfig(3, 4, use_bias=["value"])
    params = params_of(sizes, 12)
    state = interop.to_torch_state_dict(params, sizes, layout=layout)
    bias, output = {
        "torch": ("in_proj_bias", "out_proj.bias"),
        "gpt2": ("attn.c_attn.bias", "attn.c_proj.bias"),
    }[layout]
    assert not state[bias][:24].any()
    assert (state[bias][24:] == params["value"]["bias"].reshape(12)).all()
    assert not state[output].any()
    assert_same_bits(interop.from_torch_state_dict(state, sizes, layout=layout), params)
    state[bias][3] = 1
    with pytest.raises(ValueError, match=r"bias\[query\]` has no place in the config's `use_bias`"):
        interop.from_torch_state_dict(state, sizes, layout=layout)


@pytest.mark.models
def test_a_module_s_biases_come_as_they_are():
    config = MultiHeadAttentionConfig(2, 4)
    state = interop.to_torch_state_dict(params_of(config, 8), config)
    module = types.SimpleNamespace(embed_dim=8, num_heads=2, dropout=0.0, add_zero_attn=False)
    module.in_proj_bias, module.state_dict = state["in_proj_bias"], lambda: dict(state)
    assert interop.from_torch_module(module)[0].use_bias is True
    del state["out_proj.bias"]
    config, params = interop.from_torch_module(module)
    assert config.use_bias == ("query", "key", "value")
    assert params["attention_output"].keys() == {"kernel"}
