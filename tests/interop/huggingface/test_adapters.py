"""PEFT's adapter files, made of NumPy arrays: the kernels that they mean, bad ones by name.

The law of every layout: `merge_lora` of what is loaded = the layer of the checkpoint whose kernels
had scale B A added in the file itself. test_adapters_peft.py has the peft package beside it.
"""

import json
import math
import os
import pathlib
import tracemalloc

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import PATHS, D, H, K, N, numpy_files

import flax_mha
from flax_mha.interop.huggingface import (
    AttentionAdapter,
    load_adapter,
    load_attention,
    save_adapter,
)
from flax_mha.interop.huggingface.adapter_names import renamed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEARS = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
Q = f"base_model.model.{PATHS[0]}.q_proj"
FIELDS = {"peft_type": "LORA", "r": 3, "lora_alpha": 5}


def pair(module, shape, rank=3, dtype="float32", seed=0):
    """lora_A and lora_B of a Linear [out, in]."""
    random = np.random.default_rng([seed, *module.encode()])
    sides = {"A": (rank, shape[1]), "B": (shape[0], rank)}
    return {
        f"base_model.model.{module}.lora_{side}.weight": random.normal(size=size).astype(dtype)
        for side, size in sides.items()
    }


def pairs(which=LINEARS, paths=PATHS, before="", **options):
    made = [
        pair(f"{before}{path}.{name}", LINEARS[name], **options) for path in paths for name in which
    ]
    return {name: array for each in made for name, array in each.items()}


def write(folder, arrays, **fields):
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**FIELDS, **fields}))
    numpy_files.save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path):
    return checkpoints.write(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path):
    return write(tmp_path / "tuned", pairs())


def files(folder):
    return numpy_files.load_file(pathlib.Path(folder) / WEIGHTS)


def same_arrays(first, second):
    first, second = files(first), files(second)
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name].dtype, first[name].shape) == (second[name].dtype, second[name].shape)
        assert first[name].tobytes() == second[name].tobytes(), name


# --- the kernels that a file means --------------------------------------------------------------

GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 2, "vocab_size": 11}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
    "num_hidden_layers": 2,
}
LATENT = {
    "model_type": "deepseek_v3",
    "hidden_size": 20,
    "num_attention_heads": 3,
    "q_lora_rank": 7,
    "kv_lora_rank": 5,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "num_hidden_layers": 1,
    "rope_theta": 53.0,
    "rope_interleave": True,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "global_head_dim": 8,
    "num_hidden_layers": 2,
    "attention_k_eq_v": True,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}


def vit(layers=1):
    fields = {"hidden_size": 20, "num_attention_heads": 4, "num_hidden_layers": layers}
    return {"model_type": "vit", "image_size": 8, "patch_size": 4, **fields}


# A config; the modules' paths and kernels; biases and norms beside them; Conv1Ds are [in, out].
LAYOUTS = {
    "llama": (checkpoints.CONFIG, {f"{PATHS[0]}.{x}": y for x, y in LINEARS.items()}, {}),
    "gpt2": (
        GPT2,
        {"h.1.attn.c_attn": (24, 72), "h.1.attn.c_proj": (24, 24)},
        {"h.1.attn.c_attn.bias": (72,), "h.1.attn.c_proj.bias": (24,)},
    ),
    "falcon": (
        FALCON,
        {"h.0.self_attention.query_key_value": (48, 24), "h.0.self_attention.dense": (24, 24)},
        {},
    ),
    "latent": (
        LATENT,
        {
            "model.layers.0.self_attn.q_a_proj": (7, 20),
            "model.layers.0.self_attn.q_b_proj": (30, 7),
            "model.layers.0.self_attn.kv_a_proj_with_mqa": (9, 20),
            "model.layers.0.self_attn.kv_b_proj": (42, 5),
            "model.layers.0.self_attn.o_proj": (20, 24),
        },
        {
            "model.layers.0.self_attn.q_a_layernorm.weight": (7,),
            "model.layers.0.self_attn.kv_a_layernorm.weight": (5,),
        },
    ),
    "keys that are values": (
        GEMMA4,
        {
            "model.layers.1.self_attn.q_proj": (32, 20),
            "model.layers.1.self_attn.k_proj": (16, 20),
            "model.layers.1.self_attn.o_proj": (20, 32),
        },
        {
            "model.layers.1.self_attn.q_norm.weight": (8,),
            "model.layers.1.self_attn.k_norm.weight": (8,),
        },
    ),
}
OF_THE_OTHER = {
    "llama": {f"{PATHS[1]}.{x}.weight": y for x, y in LINEARS.items()},
    "gpt2": {"c_attn.weight": (24, 72), "c_proj.weight": (24, 24)}
    | {"c_attn.bias": (72,), "c_proj.bias": (24,)},
    "falcon": {"query_key_value.weight": (48, 24), "dense.weight": (24, 24)},
    "latent": {},
    "keys that are values": {"q_proj.weight": (24, 20), "k_proj.weight": (12, 20)}
    | {"v_proj.weight": (12, 20), "o_proj.weight": (20, 24)}
    | {"q_norm.weight": (6,), "k_norm.weight": (6,)},
}
OTHERS = {"gpt2": "h.0.attn.", "falcon": "h.1.self_attention."}
OTHERS["keys that are values"] = "model.layers.0.self_attn."


def arrays_of(layout):
    random = np.random.default_rng(4)
    _, kernels, beside = LAYOUTS[layout]
    shapes = {f"{name}.weight": shape for name, shape in kernels.items()} | beside
    shapes |= {OTHERS.get(layout, "") + x: y for x, y in OF_THE_OTHER[layout].items()}
    return {name: random.normal(size=shape).astype("float32") for name, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by_root", [False, True])
def test_what_is_loaded_is_scale_b_a_in_the_file(layout, by_root, tmp_path):
    config, kernels, _ = LAYOUTS[layout]
    is_turned, arrays = layout == "gpt2", arrays_of(layout)
    base = checkpoints.write(tmp_path / "base", config, arrays)
    adapter = {}
    for module, shape in kernels.items():
        adapter |= pair(module, shape[::-1] if is_turned else shape)
    write(tmp_path / "tuned", adapter, use_rslora=by_root, fan_in_fan_out=is_turned)
    scale = 5 / math.sqrt(3) if by_root else 5 / 3
    for module in kernels:
        A, B = (adapter[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        change = scale * (B @ A)
        arrays[f"{module}.weight"] = arrays[f"{module}.weight"] + (
            change.T if is_turned else change
        ).astype("float32")
    changed = load_attention(checkpoints.write(tmp_path / "changed", config, arrays))
    layers, adapters = load_attention(base), load_adapter(tmp_path / "tuned", like=base)
    (name,) = adapters
    assert adapters[name].scale == pytest.approx(scale, rel=1e-12)
    merged = flax_mha.merge_lora(layers[name].params, *adapters[name])
    near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, merged, changed[name].params)
    save_adapter(tmp_path / "again", adapters, like=base)
    same_arrays(tmp_path / "tuned", tmp_path / "again")
    assert load_adapter(tmp_path / "again", like=base)[name].scale == pytest.approx(scale)
    written = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert written["fan_in_fan_out"] is is_turned


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("which", [["q_proj"], ["k_proj", "o_proj"], list(LINEARS)])
def test_arrays_come_back_bit_for_bit(base, tmp_path, dtype, which):
    tuned = write(tmp_path / "tuned", pairs(which, dtype=dtype))
    adapters = load_adapter(tuned, like=base)
    assert list(adapters) == PATHS
    assert {str(x.dtype) for x in jax.tree.leaves(adapters[PATHS[0]].lora)} == {dtype}
    (tmp_path / "again").mkdir()  # an empty folder may stand there
    save_adapter(tmp_path / "again", adapters, like=base)
    same_arrays(tuned, tmp_path / "again")
    left = [x.name for x in tmp_path.iterdir()]
    assert sorted(left) == ["again", "base", "tuned"]


def test_ranks_and_alphas_by_patterns(base, tmp_path):
    """The first that fits; r is the arrays', the scale by module."""
    arrays = pairs(["q_proj"], PATHS[:1]) | pairs(["q_proj"], PATHS[1:], rank=6)
    arrays |= pairs(["o_proj"], PATHS[1:], rank=6)
    ranks = {r"layers\.[1-9]+\.self_attn\.[qo]_proj": 6}
    alphas = {r"layers\.1\.self_attn\.q_proj": 12, "q_proj": 9, "layers.1.*": 24}
    tuned = write(tmp_path / "tuned", arrays, rank_pattern=ranks, alpha_pattern=alphas)
    adapters = load_adapter(tuned, like=base)
    assert [adapters[path].scale for path in PATHS] == [9 / 3, 24 / 6]
    B = arrays[f"base_model.model.{PATHS[1]}.q_proj.lora_B.weight"]
    b = adapters[PATHS[1]].lora["query"]["b"]
    np.testing.assert_array_equal(b, B.T.reshape(6, N, H) / 2)  # 12 / 24
    save_adapter(tmp_path / "again", adapters, like=base)
    again = load_adapter(tmp_path / "again", like=base)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_a_model_around_the_base_has_one_prefix_more(base, tmp_path):
    arrays = pairs(before="pretrained.")
    there = load_adapter(write(tmp_path / "tuned", arrays), like=base)
    assert list(there) == PATHS
    save_adapter(tmp_path / "again", there, like=base, prefix="pretrained.")
    same_arrays(tmp_path / "tuned", tmp_path / "again")


def test_the_base_around_the_model_has_one_prefix_more(base, tmp_path):
    paths = [path.removeprefix("model.") for path in PATHS]
    there = load_adapter(write(tmp_path / "tuned", pairs(paths=paths)), like=base)
    assert list(there) == PATHS


@pytest.mark.parametrize("is_new", [False, True])
def test_modules_by_their_old_and_new_names(tmp_path, is_new):
    """transformers 5 calls a ViT's modules otherwise; its files do not."""
    old = {"attention.query": "q_proj", "attention.value": "v_proj", "output.dense": "o_proj"}
    every = [f"attention.{x}" for x in ("query", "key", "value")] + ["output.dense"]
    shapes = {f"{x}.weight": (20, 20) for x in every} | {f"{x}.bias": (20,) for x in every}
    path = "vit.encoder.layer.0.attention"
    weights = checkpoints.arrays(shapes=shapes, paths=[path])
    base = checkpoints.write(tmp_path / "base", vit(), weights)
    arrays = {}
    for name, new in old.items():
        module = f"vit.layers.0.attention.{new}" if is_new else f"{path}.{name}"
        arrays |= pair(module, (20, 20))
    adapters = load_adapter(write(tmp_path / "tuned", arrays), like=base)
    assert list(adapters[path].lora) == ["query", "value", "attention_output"]
    save_adapter(tmp_path / "again", adapters, like=base)
    assert "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight" in files(
        tmp_path / "again"
    )


# As transformers 5.24 saves them, and names its modules.
RENAMED = [
    ("llava", "language_model.model.layers.0.self_attn.q_proj"),
    ("gemma3", "language_model.model.layers.0.self_attn.q_proj"),
    ("qwen2_vl", "model.layers.0.self_attn.q_proj"),
    ("qwen2_vl", "model.language_model.layers.0.self_attn.q_proj"),
    ("llama4", "model.language_model.layers.0.self_attn.q_proj"),
]


@pytest.mark.parametrize(("model_type", "saved"), RENAMED)
def test_towers_by_the_names_of_modules(model_type, saved):
    expected = "model.language_model.layers.0.self_attn.q_proj"
    assert renamed(saved, model_type) == expected
    assert renamed(expected, model_type) == expected
    if model_type in ("llava", "gemma3"):
        live = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
        for before in ("vision_tower.", "vision_tower.vision_model."):
            assert renamed(f"{before}encoder.layers.0.self_attn.q_proj", model_type) == live


@pytest.mark.slow
def test_some_of_a_fused_module(tmp_path):
    """Of query and value, each with an a of its own, in one module that holds the key too."""
    base = checkpoints.write(tmp_path / "base", FALCON, arrays_of("falcon"))
    name = "h.0.self_attention"
    layer = load_attention(base)[name]
    lora = flax_mha.lora_params(jax.random.key(0), layer.config, (1, 24), rank=2)
    keys = iter(jax.random.split(jax.random.key(1)))
    lora = {x: {**y, "b": jax.random.normal(next(keys), y["b"].shape)} for x, y in lora.items()}
    save_adapter(tmp_path / "tuned", {name: AttentionAdapter(lora, 0.75)}, like=base)
    A, B = (
        files(tmp_path / "tuned")[f"base_model.model.{name}.query_key_value.lora_{x}.weight"]
        for x in "AB"
    )
    assert (A.shape, B.shape) == ((4, 24), (48, 4))
    again = load_adapter(tmp_path / "tuned", like=base)[name]
    assert not again.lora["key"]["b"].any()
    expected = flax_mha.merge_lora(layer.params, lora, 0.75)
    found = flax_mha.merge_lora(layer.params, *again)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_above_that_of_a_part(tmp_path, dtype):
    """What nothing reads is left out: a key of 6 features, an adapter of rank 8 for all three."""
    fields = {**FALCON, "new_decoder_architecture": False, "multi_query": True}
    shapes = {"query_key_value.weight": (36, 24), "dense.weight": (24, 24)}
    paths = ["h.0.self_attention", "h.1.self_attention"]
    weights = checkpoints.arrays(shapes=shapes, paths=paths)
    base = checkpoints.write(tmp_path / "base", fields, weights)
    made = pair(f"{paths[0]}.query_key_value", (36, 24), rank=8, dtype=dtype)
    B = made[f"base_model.model.{paths[0]}.query_key_value.lora_B.weight"]
    B[24:30, 3:] = 0  # the key reads three of eight
    with pytest.raises(ValueError, match=r"rank of an adapter of 'value' must be in \[1, 6\].*8"):
        load_adapter(write(tmp_path / "tuned", made, r=8), like=base)
    B[30:, 5:] = 0
    lora = load_adapter(write(tmp_path / "tuned", made, r=8), like=base)[paths[0]].lora
    assert [x["a"].shape[-1] for x in lora.values()] == [8, 3, 5]


# --- what is refused ----------------------------------------------------------------------------


def with_array(name, shape, dtype="float32"):
    return {**pairs(), f"base_model.model.{name}": np.ones(shape, dtype)}


MLP = pairs() | pair("model.layers.0.mlp.up_proj", (7, D))
WITHOUT_B = {x: y for x, y in pairs().items() if x != f"{Q}.lora_B.weight"}
BAD_FIELDS = [
    ({"peft_type": "IA3"}, r"`peft_type` is not supported: only LoRA's.*'IA3'.*merge_and_unload"),
    ({"peft_type": None}, r"`peft_type` is not supported.*None"),
    ({"peft_type": "ADALORA"}, r"`peft_type` is not supported.*ADALORA"),
    ({"use_dora": True}, r"`use_dora` is not supported: DoRA divides"),
    ({"lora_bias": True}, r"`lora_bias` is not supported: its adapters add a bias"),
    ({"use_qalora": True}, r"`use_qalora` is not supported"),
    ({"use_bdlora": {"nblocks": 2}}, r"`use_bdlora` is not supported"),
    ({"layer_replication": [[0, 2], [1, 2]]}, r"`layer_replication` is not supported"),
    ({"megatron_config": {"a": 1}}, r"`megatron_config` is not supported"),
    ({"alora_invocation_tokens": [3, 4]}, r"`alora_invocation_tokens` is not supported"),
    ({"arrow_config": {"top_k": 2}}, r"`arrow_config` is not supported"),
    ({"kasa_config": {"beta": 1}}, r"`kasa_config` is not supported"),
    ({"monteclora_config": {"n": 1}}, r"`monteclora_config` is not supported"),
    ({"target_parameters": ["mlp.experts.up"]}, r"`target_parameters`.*ignore_modules=\[\"exp"),
    ({"init_lora_weights": "pissa"}, r"`init_lora_weights`.*path_initial_model_for_weight_conv"),
    ({"init_lora_weights": "pissa_niter_16"}, r"`init_lora_weights` is not supported.*other kern"),
    ({"init_lora_weights": "olora"}, r"`init_lora_weights` is not supported"),
    ({"init_lora_weights": "corda"}, r"`init_lora_weights` is not supported"),
    ({"init_lora_weights": "loftq"}, r"`init_lora_weights` is not supported"),
    ({"init_lora_weights": 1}, r"`init_lora_weights` is not supported"),
    ({"a_field_of_2031": [1]}, r"`a_field_of_2031` is not supported: it is not known here.*\[1\]"),
    ({"a_field_of_2031": 0.5}, r"`a_field_of_2031` is not supported"),
    ({"r": 0}, r"`r` must be a positive integer.*0"),
    ({"r": True}, r"`r` must be a positive integer.*True"),
    ({"r": 4}, r"lora_A.weight` must be \[r, in\] = \(4, 20\).*\(3, 20\).*r is adapter_config"),
    ({"r": "8"}, r"`r` must be a positive integer"),
    ({"lora_alpha": "16"}, r"`lora_alpha` must be a number"),
    ({"lora_alpha": 1e300}, r"`lora_alpha` must be a number"),
    ({"use_rslora": "yes"}, r"`use_rslora` must be true or false"),
    ({"rank_pattern": [3]}, r"`rank_pattern` must be an object"),
    ({"rank_pattern": {"q_proj": 5}}, r"lora_A.weight` must be \[r, in\] = \(5, 20\)"),
    ({"rank_pattern": {"q_proj": -1}}, r"`q_proj` must be a positive integer"),
    ({"alpha_pattern": {"(a+)+b": 5}}, r"`alpha_pattern` must be patterns that repeat at most"),
    ({"alpha_pattern": {"(a|a)*b": 5}}, r"`alpha_pattern` must be patterns that repeat at most"),
    ({"alpha_pattern": {"a*a*a*b": 5}}, r"`alpha_pattern` must be patterns that repeat at most"),
    ({"alpha_pattern": {f"{x}+": 5 for x in range(101)}}, r"must be at most 10000 patterns, 100"),
    ({"alpha_pattern": {"(q_proj": 5}}, r"`alpha_pattern` must be regular expressions"),
    ({"alpha_pattern": {"q_proj": None}}, r"`q_proj` must be a number.*None"),
    ({"target_modules": ["v_proj"]}, r"`target_modules` must name every module.*self_attn.[qko]_"),
]
BAD_ARRAYS = [
    (MLP, r"must be one of attention layers.*mlp.up_proj.*ignore_modules=\['mlp'\]"),
    (with_array("lm_head.weight", (5, D)), r"'lm_head.weight'.*modules_to_save.*\['lm_head'\]"),
    (WITHOUT_B, r"must have both lora_A and lora_B.*q_proj.lora_A.weight"),
    (with_array(f"{PATHS[0]}.q_proj.bias", (24,)), r"arrays of an attention layer.*q_proj.bias"),
    (with_array(f"{PATHS[0]}.q_norm.weight", (6,)), r"arrays of an attention layer.*q_norm"),
    (with_array(f"{PATHS[0]}.q_proj.lora_B.bias", (24,)), r"lora_B.bias.*`lora_bias`"),
    (with_array(f"{PATHS[0]}.q_proj.lora_magnitude_vector", (24,)), r"the lengths of DoRA"),
    (with_array("model.embed_tokens.lora_embedding_A", (3, 11)), r"an adapter of a table"),
    (pair("model.layers.7.self_attn.q_proj", (24, D)), r"must be one of attention.*layers.7"),
    (pair("encoder.block.0.q_proj", (24, D)), r"must be one of attention layers.*Is `like` its"),
    (pair("q_proj", (24, D)), r"'q_proj' must be that of one module.*model.layers.0"),
    ({"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((3, D))}, r"must be named base_mod"),
    (pairs(["q_proj"], PATHS[:1]) | pairs(["q_proj"], PATHS[1:], before="x."), r"by one prefix"),
    (pairs() | pairs(before="x."), r"must differ from those of `like` by one prefix"),
    (pair(f"{PATHS[0]}.q_proj", (23, D)), r"\[out, r\] = \(24, 3\) of 'model.layers.0.self_attn"),
    (pair(f"{PATHS[0]}.q_proj", (24, D + 1)), r"\[r, in\] = \(3, 20\).*\(3, 21\).*of this base"),
    (pair(f"{PATHS[0]}.q_proj", (24, D), dtype="float64"), r"is float64, which needs JAX's"),
    ({}, r"must hold arrays of attention layers"),
    (pairs(before="x" * 300), r"names of arrays must have at most 300 characters"),
]


@pytest.mark.parametrize(("fields", "pattern"), BAD_FIELDS, ids=lambda x: str(x)[:40])
def test_fields_that_change_the_numbers(base, tmp_path, fields, pattern):
    with pytest.raises(ValueError, match=pattern):
        load_adapter(write(tmp_path / "tuned", pairs(), **fields), like=base)


@pytest.mark.parametrize(("arrays", "pattern"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_arrays_that_have_no_place(base, tmp_path, arrays, pattern):
    with pytest.raises(ValueError, match=pattern):
        load_adapter(write(tmp_path / "tuned", arrays), like=base)


NULL = """
    auto_mapping revision exclude_modules layers_to_transform layers_pattern megatron_config
    trainable_token_indices eva_config corda_config lora_ga_config velora_config use_bdlora
    alora_invocation_tokens monteclora_config layer_replication target_parameters arrow_config
    kasa_config modules_to_save
"""
FALSE = "use_dora use_qalora lora_bias ensure_weight_tying use_rslora fan_in_fan_out"


def test_what_peft_writes_besides_is_known(base, tmp_path):
    """All fields of peft 0.21, at what it writes for plain LoRA."""
    fields = dict.fromkeys(NULL.split())
    fields |= dict.fromkeys(FALSE.split(), False)
    fields |= {"task_type": "CAUSAL_LM", "peft_version": "0.21.2", "lora_dropout": 0.1}
    fields |= {"base_model_name_or_path": "x/y", "inference_mode": True, "bias": "all"}
    fields |= {"megatron_core": "megatron.core", "loftq_config": {}, "qalora_group_size": 16}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": list(LINEARS)}
    for start in (True, False, "gaussian", "eva", "orthogonal"):
        folder = write(tmp_path / "tuned", pairs(), **fields, init_lora_weights=start)
        assert load_adapter(folder, like=base)[PATHS[0]].scale == 5 / 3


def test_what_is_no_attention_is_left_out_where_the_caller_says_so(base, tmp_path):
    tuned = write(tmp_path / "tuned", MLP | with_array("score.weight", (5, D)))
    adapters = load_adapter(tuned, like=base, ignore_modules=["mlp", "score"])
    assert list(adapters) == PATHS
    with pytest.raises(ValueError, match=r"modules that are no attention.*k_proj"):
        load_adapter(tuned, like=base, ignore_modules=["mlp", "score", "k_proj"])
    with pytest.raises(TypeError, match="`ignore_modules` must be a list"):
        load_adapter(tuned, like=base, ignore_modules="mlp")
    with pytest.raises(ValueError, match="must be one of attention layers"):
        load_adapter(tuned, like=base, ignore_modules=["ml", "score"])
    experts = write(tmp_path / "experts", pairs(), target_parameters=["mlp.experts.up"])
    assert list(load_adapter(experts, like=base, ignore_modules=["experts"])) == PATHS


def test_integers_are_no_adapters(base, tmp_path):
    arrays = pairs() | {f"{Q}.lora_A.weight": np.ones((3, D), "int8")}
    with pytest.raises(TypeError, match=r"q_proj.lora_A.weight` must have one of the dtypes.*I8"):
        load_adapter(write(tmp_path / "tuned", arrays), like=base)


# --- folders that are damaged or hostile --------------------------------------------------------


def test_folders_that_are_none(base, tuned, tmp_path):
    with pytest.raises(ValueError, match=r"must be the folder of an adapter.*Nothing is down"):
        load_adapter(tmp_path / "none", like=base)
    with pytest.raises(ValueError, match=r"must hold adapter_config.json.*whole checkpoint"):
        load_adapter(base, like=base)
    with pytest.raises(ValueError, match=r"must hold a config.json"):
        load_adapter(tuned, like=tuned)
    (tuned / WEIGHTS).rename(tuned / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"must hold adapter_model.safetensors.*is a pickle"):
        load_adapter(tuned, like=base)


def test_a_pickle_under_another_name(base, tuned):
    (tuned / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="to load a pickle is to run the code"):
        load_adapter(tuned, like=base)


@pytest.mark.parametrize("length", [0, 4, 100, -8])
def test_a_file_that_is_cut_short(base, tuned, length):
    data = (tuned / WEIGHTS).read_bytes()
    (tuned / WEIGHTS).write_bytes(data[:length])
    with pytest.raises(ValueError, match=r"must be a whole .safetensors file.*cut short"):
        load_adapter(tuned, like=base)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_out_of_the_folder(base, tuned, tmp_path, name):
    (tuned / name).rename(tmp_path / "outside")
    os.symlink(tmp_path / "outside", tuned / name)
    with pytest.raises(ValueError, match=r"must lie in the folder.*a link to"):
        load_adapter(tuned, like=base)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("{", r"adapter_config.json must be JSON.*cut short"),
        ("[1]", r"adapter_config.json must hold an object.*list"),
        ('{"lora_alpha": NaN}', r"must be JSON.*NaN"),
        ("[" * 100_000, r"must be JSON"),
        (" " * (2**24 + 1), r"must have at most 16777216 bytes"),
    ],
    ids=["cut", "list", "nan", "deep", "large"],
)
def test_a_config_that_is_none(base, tuned, text, pattern):
    (tuned / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=pattern):
        load_adapter(tuned, like=base)


def test_nothing_large_is_read_of_a_file_that_does_not_fit(base, tmp_path):
    """Shapes are the header's: a module of 40 MB is refused before its data."""
    arrays = pairs() | {f"{Q}.lora_A.weight": np.ones((3, 3_000_000), "float32")}
    tuned = write(tmp_path / "tuned", arrays)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"\(3, 3000000\)"):
        load_adapter(tuned, like=base)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


# --- three that nobody thinks of ----------------------------------------------------------------


def test_an_alpha_below_zero_and_of_zero(base, tmp_path):
    """Subtracting an adapter, and switching one off, are numbers as others."""
    tuned = write(tmp_path / "tuned", pairs(), lora_alpha=-6, alpha_pattern={"k_proj": 0})
    adapter = load_adapter(tuned, like=base)[PATHS[0]]
    assert adapter.scale == -2
    assert not adapter.lora["key"]["b"].any()
    assert adapter.lora["value"]["b"].any()


def test_alphas_that_16_bits_cannot_hold_in_one_scale(base, tmp_path):
    """2 / 3 of a bfloat16 would lose digits in silence; halves do not."""
    arrays = pairs(dtype="bfloat16")
    tuned = write(tmp_path / "tuned", arrays, lora_alpha=6, alpha_pattern={"v_proj": 4})
    with pytest.raises(ValueError, match=r"must have one alpha / rank.*float32"):
        load_adapter(tuned, like=base)
    tuned = write(tmp_path / "tuned", arrays, lora_alpha=6, alpha_pattern={"v_proj": 3})
    adapter = load_adapter(tuned, like=base)[PATHS[0]]
    B = arrays[f"base_model.model.{PATHS[0]}.v_proj.lora_B.weight"]
    expected = B.astype("float32").T.reshape(3, K, H) / 2
    np.testing.assert_array_equal(np.asarray(adapter.lora["value"]["b"], "float32"), expected)


def test_layer_1_is_not_layer_11(tmp_path):
    """Patterns and suffixes of paths end at a dot."""
    paths = [f"model.layers.{layer}.self_attn" for layer in range(12)]
    weights = checkpoints.arrays(paths=paths)
    base = checkpoints.write(tmp_path / "base", None, weights, num_hidden_layers=12)
    arrays = pairs(["q_proj"], [paths[1], paths[11]])
    alphas = {"1.self_attn.q_proj": 30}
    tuned = write(tmp_path / "tuned", arrays, alpha_pattern=alphas)
    adapters = load_adapter(tuned, like=base)
    assert {name: x.scale for name, x in adapters.items()} == {paths[1]: 10, paths[11]: 5 / 3}
    save_adapter(tmp_path / "again", adapters, like=base)
    again = load_adapter(tmp_path / "again", like=base)
    assert {name: x.scale for name, x in again.items()} == {paths[1]: 10, paths[11]: 5 / 3}


# --- what cannot be saved -----------------------------------------------------------------------


def test_what_cannot_be_saved(base, tuned, tmp_path):
    adapters = load_adapter(tuned, like=base)
    adapter = adapters[PATHS[0]]
    out = tmp_path / "out"

    def refused(pattern, changed, error=ValueError, target=out):
        with pytest.raises(error, match=pattern):
            save_adapter(target, changed, like=base)
        assert not out.exists()

    refused(r"must not exist, or be an empty folder", adapters, target=base)
    refused(r"must not exist, or be an empty folder", adapters, target=tuned / CONFIG)
    refused(
        r"A layer in `adapters` must be among.*Did you mean", {"model.layers.0.self_atn": adapter}
    )
    refused(r"must hold AttentionAdapters.*dict", {PATHS[0]: adapter.lora}, TypeError)
    refused(r"`lora_scale` must be a finite", {PATHS[0]: adapter._replace(scale=math.inf)})
    refused(r"must hold an adapter", {})
    wrong = {**adapter.lora, "query": adapter.lora["attention_output"]}
    refused(r"`lora\['query'\]` must be a \[D, r\]", {PATHS[0]: adapter._replace(lora=wrong)})
    unknown = {"gate": adapter.lora["query"]}
    refused(r"adapters are of this layer's proj", {PATHS[0]: adapter._replace(lora=unknown)})


def test_a_module_that_serves_twice(tmp_path):
    """Gemma 4's key that is its value too has one adapter in PEFT."""
    base = checkpoints.write(tmp_path / "base", GEMMA4, arrays_of("keys that are values"))
    name = "model.layers.1.self_attn"
    config = load_attention(base)[name].config
    lora = flax_mha.lora_params(jax.random.key(0), config, (1, D), which=["key"], rank=2)
    for changed in (lora, {**lora, "value": jax.tree.map(lambda x: x + 1, lora["key"])}):
        with pytest.raises(ValueError, match=r"k_proj` serves the layer twice.*the same a and b"):
            save_adapter(tmp_path / "out", {name: AttentionAdapter(changed, 1.0)}, like=base)
    save_adapter(
        tmp_path / "out", {name: AttentionAdapter({**lora, "value": lora["key"]}, 1.0)}, like=base
    )


def test_parts_of_one_module_have_one_dtype(tmp_path):
    base = checkpoints.write(tmp_path / "base", FALCON, arrays_of("falcon"))
    name = "h.0.self_attention"
    config = load_attention(base)[name].config
    lora = flax_mha.lora_params(jax.random.key(0), config, (1, 24), rank=2)
    lora["value"] = jax.tree.map(lambda x: x.astype("bfloat16"), lora["value"])
    with pytest.raises(TypeError, match=r"query_key_value' must have one dtype.*bfloat16"):
        save_adapter(tmp_path / "out", {name: AttentionAdapter(lora, 1.0)}, like=base)
