"""PyTorch's weights: the layout of every array, the numbers of real modules, both ways.

The layouts are written out once more as loops over heads, and each model's attention as a few lines
of float64 NumPy in that model's own terms; torch and transformers, where installed, say the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, C, D, H, M, N, S, T, V, assert_close, normal
from torch_bridge import (
    NAMES,
    E,
    assert_same_bits,
    installed_torch,
    params_of,
    run,
    torch_module,
)

from flax_mha import MultiHeadAttentionConfig, multi_head_attention
from flax_mha.interop import torch as interop

CONFIG = MultiHeadAttentionConfig(num_heads=N, key_dim=H)
GROUPED = MultiHeadAttentionConfig(num_heads=6, key_dim=H, num_kv_heads=2)
PLAIN = GROUPED.replace(use_bias=False)


def without_output_bias(params):
    output = params["attention_output"]
    return {**params, "attention_output": {**output, "bias": jnp.zeros_like(output["bias"])}}


# One row a layout: the config, the sizes of query, value and key, the parameters.
LAYOUTS = {
    "torch": (CONFIG, params_of(CONFIG)),
    "torch, separate": (CONFIG, params_of(CONFIG, E, M, C)),
    "torch, no bias": (CONFIG.replace(use_bias=False), params_of(CONFIG.replace(use_bias=False))),
    "bert": (CONFIG, params_of(CONFIG)),
    "llama": (PLAIN, params_of(PLAIN, D)),
    "llama, biases": (GROUPED, params_of(GROUPED, D)),
    "qwen2": (GROUPED, without_output_bias(params_of(GROUPED, D))),
    "gpt2": (CONFIG, params_of(CONFIG)),
}


def exported(case, **changes):
    config, params = LAYOUTS[case]
    return interop.to_torch_state_dict(params, config, layout=case.split(",")[0], **changes)


# --- layouts, array by array --------------------------------------------------------------------


def heads(kernel):
    """The rows of a Linear: head after head, feature after feature."""
    kernel = np.asarray(kernel)
    return [kernel[:, n, h] for n in range(kernel.shape[1]) for h in range(kernel.shape[2])]


def output_rows(kernel):
    """The rows of the output's Linear, one for each feature; in it head after head."""
    kernel = np.asarray(kernel)
    return [
        [kernel[n, v, e] for n in range(kernel.shape[0]) for v in range(kernel.shape[1])]
        for e in range(kernel.shape[2])
    ]


def flat(bias):
    return [x for row in np.asarray(bias) for x in row]


def test_multihead_attention_packed():
    params = LAYOUTS["torch"][1]
    state = exported("torch")
    assert list(state) == ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    projections = [params[name] for name in ("query", "key", "value")]
    rows = [row for projection in projections for row in heads(projection["kernel"])]
    assert (state["in_proj_weight"] == np.array(rows)).all()
    assert (state["in_proj_bias"] == [b for p in projections for b in flat(p["bias"])]).all()
    assert (state["out_proj.weight"] == output_rows(params["attention_output"]["kernel"])).all()
    assert (state["out_proj.bias"] == params["attention_output"]["bias"]).all()


def test_multihead_attention_with_other_features_of_key_and_value():
    params = LAYOUTS["torch, separate"][1]
    state = exported("torch, separate")
    assert state["in_proj_bias"].shape == (3 * E,)
    for name, features in (("query", E), ("key", C), ("value", M)):
        weight = state[f"{name[0]}_proj_weight"]
        assert weight.shape == (E, features)
        assert (weight == heads(params[name]["kernel"])).all()


def test_multihead_attention_without_biases():
    assert list(exported("torch, no bias")) == ["in_proj_weight", "out_proj.weight"]


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        ("bert", ["attention.self.query", "attention.self.key", "attention.self.value"]),
        ("llama, biases", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ],
)
def test_four_linear_layers(case, layers):
    params, state = LAYOUTS[case][1], exported(case)
    for name, layer in zip(("query", "key", "value"), layers):
        assert (state[f"{layer}.weight"] == heads(params[name]["kernel"])).all()
        assert (state[f"{layer}.bias"] == flat(params[name]["bias"])).all()
    output = {"bert": "attention.output.dense"}.get(case, "self_attn.o_proj")
    rows = output_rows(params["attention_output"]["kernel"])
    assert (state[f"{output}.weight"] == rows).all()
    assert len(state) == 8


def test_llama_and_qwen2_have_the_biases_that_they_have():
    layers = [f"self_attn.{x}_proj" for x in "qkvo"]
    assert set(exported("llama")) == {f"{layer}.weight" for layer in layers}
    biases = {f"{layer}.bias" for layer in layers[:3]}
    assert set(exported("qwen2")) == {f"{layer}.weight" for layer in layers} | biases
    with pytest.raises(ValueError, match=r"\['attention_output'\]\['bias'\] has no place"):
        interop.to_torch_state_dict(params_of(GROUPED, D), GROUPED, layout="qwen2")


def test_gpt2_is_packed_and_not_transposed():
    params, state = LAYOUTS["gpt2"][1], exported("gpt2")
    columns = [c for name in ("query", "key", "value") for c in heads(params[name]["kernel"])]
    assert state["attn.c_attn.weight"].shape == (E, 3 * E)
    assert (np.array(columns) == state["attn.c_attn.weight"].T).all()
    rows = np.array(output_rows(params["attention_output"]["kernel"]))
    assert (state["attn.c_proj.weight"] == rows.T).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_the_round_trip_is_exact(case, dtype):
    config, params = LAYOUTS[case]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    params["query"]["kernel"] = params["query"]["kernel"].at[0, 0, 0].set(jnp.nan)
    layout = case.split(",")[0]
    state = interop.to_torch_state_dict(params, config, layout=layout, prefix="a.b.")
    for array in state.values():
        assert array.flags.writeable
        assert array.flags.c_contiguous
    state |= {"a.c.in_proj_weight": None, "in_proj_weight": None, "attn.c_attn.weight": None}
    back = interop.from_torch_state_dict(state, config, layout=layout, prefix="a.b.")
    assert_same_bits(back, params)


def test_linear_layers_under_any_names():
    gated = MultiHeadAttentionConfig(N, H, V, output_shape=29, use_gate=True)
    for config in (gated, gated.replace(use_gate=False), gated.replace(use_bias=False)):
        params = params_of(config, D, M, C)
        names = NAMES | ({"gate": "gate_lin"} if config.use_gate else {})
        state = interop.to_linear_layers(params, config, names=names, prefix="layer.3.")
        assert (state["layer.3.v_lin.weight"] == heads(params["value"]["kernel"])).all()
        state["layer.3.norm.weight"] = None  # beside the layer: not looked at, for so it was told
        call = {"names": names, "prefix": "layer.3.", "ignore": ["norm"]}
        back = interop.from_linear_layers(state, config, **call)
        assert_same_bits(back, params)


def test_linear_layers_some_of_which_have_no_bias():
    params = params_of(CONFIG, dtype="bfloat16")
    params["key"]["bias"] = jnp.zeros_like(params["key"]["bias"])
    options = {"names": NAMES, "without_bias": ["key"]}
    state = interop.to_linear_layers(params, CONFIG, **options)
    assert "k_lin.bias" not in state
    assert_same_bits(interop.from_linear_layers(state, CONFIG, **options), params)


# --- the same numbers ---------------------------------------------------------------------------


def numpy_attention(q, k, v, allowed, num_heads):
    """softmax(q k / sqrt(H)) v in float64; q `[B, T, N * H]`, k and v with as many heads."""
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = np.where(allowed, q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), -np.inf)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    context = powers / powers.sum(-1, keepdims=True) @ v
    return context.transpose(0, 2, 1, 3).reshape(*q.shape[:1], q.shape[2], -1)


def bert(state, x, allowed):
    def linear(name, x):
        return x @ state[f"attention.{name}.weight"].T + state[f"attention.{name}.bias"]

    q, k, v = (linear(f"self.{name}", x) for name in ("query", "key", "value"))
    return linear("output.dense", numpy_attention(q, k, v, allowed, N))


def llama(state, x, allowed):
    def linear(name, x):
        bias = state.get(f"self_attn.{name}.bias", 0.0)
        return x @ state[f"self_attn.{name}.weight"].T + bias

    def repeated(
        x,
    ):  # repeat_kv: each of the 2 heads serves 3 queries' heads that follow each other
        return x.reshape(*x.shape[:2], 2, H).repeat(3, axis=2).reshape(*x.shape[:2], 6 * H)

    q, k, v = linear("q_proj", x), repeated(linear("k_proj", x)), repeated(linear("v_proj", x))
    return linear("o_proj", numpy_attention(q, k, v, allowed, 6))


def gpt2(state, x, allowed):
    qkv = x @ state["attn.c_attn.weight"] + state["attn.c_attn.bias"]
    context = numpy_attention(*np.split(qkv, 3, axis=-1), allowed, N)
    return context @ state["attn.c_proj.weight"] + state["attn.c_proj.bias"]


@pytest.mark.parametrize(
    ("case", "model"),
    [("bert", bert), ("llama", llama), ("llama, biases", llama), ("qwen2", llama), ("gpt2", gpt2)],
)
def test_a_models_layer_gives_its_numbers(case, model):
    """The weights are drawn under the model's names, so that nothing of ours made them."""
    config = LAYOUTS[case][0]
    rng = np.random.default_rng(3)
    state = {name: rng.normal(size=x.shape) / 4 for name, x in exported(case).items()}
    x = rng.normal(size=(B, T, LAYOUTS[case][1]["query"]["kernel"].shape[0]))
    expected = model(state, x, np.tri(T, dtype=bool))
    single = {name: array.astype("float32") for name, array in state.items()}
    params = interop.from_torch_state_dict(single, config, layout=case.split(",")[0])
    x = jnp.asarray(x, "float32")
    actual = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    assert_close(actual, expected, "float32")


@pytest.mark.models
@pytest.mark.parametrize(
    ("features", "bias"),
    [
        ({}, False),
        ({"kdim": C, "vdim": M}, True),
        pytest.param({}, True, marks=pytest.mark.slow),
        pytest.param({"kdim": C, "vdim": M}, False, marks=pytest.mark.slow),
        pytest.param({"vdim": M}, True, marks=pytest.mark.slow),
    ],
)
def test_the_modules_numbers(features, bias):
    with torch_module(E, N, bias=bias, dropout=0.25, **features) as (torch, module):
        config, params = interop.from_torch_module(module)
        assert (config.dims, config.dropout, config.use_bias) == (CONFIG.dims, 0.25, bias)
        query = normal(1, B, T, E)
        key = normal(2, B, S, features.get("kdim", E))
        value = normal(3, B, S, features.get("vdim", E))
        output, scores = multi_head_attention(
            params, query, value, key, config=config, return_attention_scores=True
        )
        expected, weights = run(torch, module, query, key, value)
        assert_close(output, expected, "float32")
        assert_close(scores, weights, "float32")
        state = interop.to_torch_state_dict(params, config)
        assert state.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            assert state[name].tobytes() == tensor.numpy().tobytes()


@pytest.mark.models
def test_the_fast_path_gives_the_same_numbers():
    """Torch's fused kernel serves an even number of heads, self-attention, no gradient."""
    with torch_module(2 * H, 2) as (torch, module):
        config, params = interop.from_torch_module(module)
        x, padding = normal(1, B, T, 2 * H), np.arange(T) >= np.array([[T], [3]])
        real = interop.mask_from_torch(key_padding_mask=padding)
        output = multi_head_attention(params, x, x, config=config, **real)
        with pytest.MonkeyPatch.context() as patch:
            fused, calls = torch._native_multi_head_attention, []
            spy = lambda *args: calls.append(args) or fused(*args)
            patch.setattr(torch, "_native_multi_head_attention", spy)
            expected, _ = run(torch, module, x, masks={"key_padding_mask": padding})
        assert len(calls) == 1
        assert_close(output, expected, "float32")


@pytest.mark.models
def test_tensors_of_any_kind():
    torch = installed_torch()
    state = {name: torch.from_numpy(array) for name, array in exported("torch").items()}
    for dtype in ("float32", "bfloat16", "float16"):
        tensors = {
            name: torch.nn.Parameter(tensor.to(getattr(torch, dtype)))
            for name, tensor in state.items()
        }
        params = interop.from_torch_state_dict(tensors, CONFIG)
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), LAYOUTS["torch"][1])
        assert_same_bits(params, cast)
    state = {f"a.{name}": tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    with pytest.raises(
        TypeError, match=r"`a\.in_proj_weight` must be a dense .*float8_e4m3fn.*float"
    ):
        interop.from_torch_state_dict(state, CONFIG, prefix="a.")


@pytest.mark.models
def test_bfloat16_goes_back_as_the_docstring_says():
    torch = installed_torch()
    params = jax.tree.map(lambda x: x.astype("bfloat16"), LAYOUTS["torch"][1])
    config = CONFIG.replace(param_dtype="bfloat16")
    state = {
        name: torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        for name, array in interop.to_torch_state_dict(params, config).items()
    }
    module = torch.nn.MultiheadAttention(E, N, dtype=torch.bfloat16)
    module.load_state_dict(state)
    loaded, back = interop.from_torch_module(module)
    assert loaded.param_dtype == "bfloat16"
    assert_same_bits(back, params)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "llama", "qwen2", "gpt2"])
def test_real_models_of_transformers(model):
    """A tiny random model; the input of its attention and the output are taken by hooks."""
    torch = installed_torch()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 7, "num_hidden_layers": 2, "attn_implementation": "eager"}
    rotary = {**sizes, "hidden_size": 24, "intermediate_size": 5, "num_attention_heads": 6}
    rotary |= {"num_key_value_heads": 2}
    configs = {
        "bert": lambda: transformers.BertConfig(
            **sizes, hidden_size=33, num_attention_heads=3, intermediate_size=5
        ),
        "llama": lambda: transformers.LlamaConfig(**rotary),
        "qwen2": lambda: transformers.Qwen2Config(**rotary),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=7, n_embd=33, n_head=3, n_layer=2, attn_implementation="eager"
        ),
    }
    torch.manual_seed(0)
    module = transformers.AutoModel.from_config(configs[model]()).eval()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    prefix, path = {
        "bert": ("encoder.layer.1.", "encoder.layer.1.attention.self"),
        "llama": ("layers.1.", "layers.1.self_attn"),
        "qwen2": ("layers.1.", "layers.1.self_attn"),
        "gpt2": ("h.1.", "h.1.attn"),
    }[model]
    seen = {}
    inside = module.get_submodule(path)

    def hook(module, args, kwargs, result):
        seen["x"] = (args[0] if args else kwargs["hidden_states"]).numpy()
        seen["output"] = result[0].numpy()

    inside.register_forward_hook(hook, with_kwargs=True)
    if model in ("llama", "qwen2"):  # no rotation: cos 1, sin 0
        module.rotary_emb.forward = lambda x, position_ids: (
            torch.ones(1, 5, 4),
            torch.zeros(1, 5, 4),
        )
    with torch.no_grad():
        module(torch.arange(5)[None])
        if model == "bert":
            dense = module.get_submodule("encoder.layer.1.attention.output.dense")
            seen["output"] = dense(torch.from_numpy(seen["output"])).numpy()
    config = {
        "bert": CONFIG,
        "gpt2": CONFIG,
        "llama": MultiHeadAttentionConfig(6, 4, num_kv_heads=2, use_bias=False),
        "qwen2": MultiHeadAttentionConfig(6, 4, num_kv_heads=2),
    }[model]
    state = module.state_dict()
    params = interop.from_torch_state_dict(state, config, layout=model, prefix=prefix)
    x = jnp.asarray(seen["x"])
    output = multi_head_attention(params, x, x, config=config, use_causal_mask=model != "bert")
    assert_close(output, seen["output"], "float32")
    back = interop.to_torch_state_dict(params, config, layout=model, prefix=prefix)
    for name, array in back.items():
        assert array.tobytes() == state[name].numpy().tobytes()


# --- what is refused ----------------------------------------------------------------------------


def changed(case, **changes):
    """The arrays of a case, some of them replaced (by a function of the array) or added."""
    state = exported(case)
    for name, change in changes.items():
        state[name] = change(state[name]) if callable(change) else change
    return state


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("torch", {"in_proj_weight": np.transpose}, r"33 \+ 33 \+ 33 = 99\. .*\(33, 99\).*transp"),
        (
            "torch",
            {"in_proj_weight": lambda x: x[:33]},
            r"`in_proj_weight` .*\(33, 33\).*num_heads",
        ),
        ("torch", {"in_proj_bias": lambda x: x[1:]}, r"`in_proj_bias` must hold .*\(98,\)"),
        ("torch", {"bias_k": np.zeros((1, 1, E))}, r"`bias_k` is not supported: add_bias_kv=True"),
        ("torch", {"linear_Q.weight": 0}, r"unknown \['linear_Q.weight'\]"),
        (
            "torch, separate",
            {"k_proj_weight": np.transpose},
            r"\[K H, C\] = \(33, \?\).*transposed",
        ),
        (
            "llama",
            {"self_attn.q_proj.weight": lambda x: np.tile(x, (3, 1))},
            r"\(198, 17\).*packed",
        ),
        ("bert", {"attention.self.distance_embedding.weight": 0}, r"unknown .*distance_embedding"),
        ("llama", {"self_attn.q_norm.weight": 0}, r"unknown \['self_attn.q_norm.weight'\]"),
        ("llama", {"self_attn.q_proj.bias": 0}, r"unknown .*q_proj.bias.*`use_bias`"),
        (
            "llama",
            {"self_attn.o_proj.weight": np.transpose},
            r"\[E, N V\] = \(\?, 66\).*transposed",
        ),
        ("llama", {"self_attn.k_proj.weight": lambda x: x[:H]}, r"\[K H, C\] = \(22, \?\).*num_kv"),
        ("llama", {"self_attn.q_proj.weight": lambda x: x.astype(int)}, "floating-point array"),
        (
            "gpt2",
            {"attn.c_attn.weight": np.transpose},
            r"along axis 1.*transposed\? A Linear keeps",
        ),
        ("gpt2", {"attn.c_proj.weight": lambda x: x[:-1]}, r"c_proj.*\[N V, E\] = \(33, \?\)"),
        ("gpt2", {"attn.c_attn.weight": lambda x: x[1:]}, r"\[N, V, E\] = \(3, 11, 32\)"),
    ],
)
def test_arrays_that_do_not_fit(case, changes, message):
    config, layout = LAYOUTS[case][0], case.split(",")[0]
    with pytest.raises((ValueError, TypeError), match=message):
        interop.from_torch_state_dict(changed(case, **changes), config, layout=layout)


def test_arrays_that_are_no_weights_of_the_layer_may_stand_below_it():
    for case, name in (
        ("bert", "attention.output.LayerNorm.weight"),
        ("gpt2", "attn.bias"),
        ("llama", "self_attn.rotary_emb.inv_freq"),
    ):
        config, params = LAYOUTS[case]
        state = changed(case, **{name: np.ones(3)})
        assert_same_bits(interop.from_torch_state_dict(state, config, layout=case), params)


def test_missing_names_come_with_the_prefixes_that_there_are():
    state = exported("bert", prefix="bert.encoder.layer.0.") | {"x": 0}
    message = r"missing \['attention.self.query.weight', .*stand under \['bert.encoder.layer.0.'\]"
    with pytest.raises(ValueError, match=message):
        interop.from_torch_state_dict(state, CONFIG, layout="bert", prefix="encoder.layer.0.")
    del state["bert.encoder.layer.0.attention.self.key.bias"]
    with pytest.raises(ValueError, match=r"missing \['attention.self.key.bias'\], unknown \[\]"):
        interop.from_torch_state_dict(state, CONFIG, layout="bert", prefix="bert.encoder.layer.0.")
    many = {f"layer.{i}": 0 for i in range(1000)}
    with pytest.raises(ValueError, match=r"unknown \['layer.0', .*, \.\.\.\]") as caught:
        interop.from_torch_state_dict(many, CONFIG)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("layout", "config", "sizes", "message"),
    [
        ("torch", CONFIG.replace(value_dim=V), (E,), r"has V = H.*13 and 11"),
        ("torch", GROUPED, (66,), r"has K = N.*2 and 6"),
        ("torch", CONFIG, (D,), r"has N H = D.*33 and 17"),
        (
            "torch",
            CONFIG.replace(output_shape=(3, 11)),
            (E,),
            r"one axis of output features.*\(3, 11\)",
        ),
        ("torch", CONFIG.replace(use_gate=True), (E,), r"no place for a gate.*use_gate=True"),
        ("bert", CONFIG, (E, M), r"has C = D.*23 and 33"),
        ("gpt2", CONFIG.replace(output_shape=5), (E,), r"has D = E.*33 and 5"),
        ("gpt3", CONFIG, (E,), r"`layout` must be one of \['torch', 'bert', 'llama', 'qwen2'"),
    ],
)
def test_layers_that_such_a_model_cannot_hold(layout, config, sizes, message):
    with pytest.raises(ValueError, match=message):
        interop.to_torch_state_dict(params_of(config, *sizes), config, layout=layout)


def test_other_refusals():
    state = exported("bert")
    gated = CONFIG.replace(use_gate=True)
    with pytest.raises(ValueError, match=r"no place for a gate.*from_linear_layers"):
        interop.from_torch_state_dict(state, gated, layout="bert")
    with pytest.raises(ValueError, match=r"\['attention_output'\]\['kernel'\] must be \[N, V, E\]"):
        interop.from_torch_state_dict(state, CONFIG.replace(output_shape=5), layout="bert")
    with pytest.raises(TypeError, match=r"`state` must be a mapping. Received: str.*state_dict"):
        interop.from_torch_state_dict("model.safetensors", CONFIG)
    mixed = {**LAYOUTS["torch"][1]}
    mixed["key"] = {leaf: array.astype("bfloat16") for leaf, array in mixed["key"].items()}
    with pytest.raises(TypeError, match=r"`in_proj_weight` holds .* one dtype.*float32, bfloat16"):
        interop.to_torch_state_dict(mixed, CONFIG)


@pytest.mark.parametrize(
    ("names", "without", "config", "message"),
    [
        (
            {**NAMES, "gate": "g"},
            (),
            CONFIG,
            r"`names` must name .*\['query', 'key', 'value', 'att",
        ),
        (NAMES, (), CONFIG.replace(use_gate=True), r"`names` must name .*'gate', 'attention_out"),
        (NAMES, ["output"], CONFIG, r"`without_bias` must be among .*'output'"),
        (NAMES, ["key"], CONFIG.replace(use_bias=False), r"`without_bias` names exceptions"),
    ],
)
def test_names_of_linear_layers(names, without, config, message):
    with pytest.raises(ValueError, match=message):
        interop.from_linear_layers({}, config, names=names, without_bias=without)


def test_an_adapter_below_a_linear_layer_is_refused():
    state = interop.to_linear_layers(params_of(CONFIG), CONFIG, names=NAMES)
    with pytest.raises(ValueError, match=r"unknown \['q_lin.lora_A.weight'\]"):
        interop.from_linear_layers({**state, "q_lin.lora_A.weight": 0}, CONFIG, names=NAMES)


@pytest.mark.models
def test_modules_that_are_refused():
    torch = installed_torch()
    with pytest.raises(ValueError, match="`add_zero_attn=True` is not supported"):
        interop.from_torch_module(torch.nn.MultiheadAttention(E, N, add_zero_attn=True))
    with pytest.raises(ValueError, match="`bias_k` is not supported: add_bias_kv=True"):
        interop.from_torch_module(torch.nn.MultiheadAttention(E, N, add_bias_kv=True))
    with pytest.raises(TypeError, match=r"must be a torch.nn.MultiheadAttention. Received: Linear"):
        interop.from_torch_module(torch.nn.Linear(3, 4))
