"""A checkpoint's folder: each layer's config, arrays and call; what config.json says, by hand."""

import json

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import CONFIG, PATHS, D, H, K, N

from flax_mha import Latent, MultiHeadAttentionConfig, multi_head_attention
from flax_mha.interop.huggingface import AttentionRecord, list_attention, load_attention
from flax_mha.interop.torch import from_linear_layers
from flax_mha.norms import LayerNorm, RMSNorm
from flax_mha.positions import (
    AxialRotary,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    YarnScaling,
)

NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_output": "o_proj"}


def equal(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def config_of(tmp_path, layer=0, weights=None, config=None, **fields):
    folder = checkpoints.write(tmp_path, config=config, weights=weights, **fields)
    return list(load_attention(folder).values())[layer].config


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama(tmp_path, shards, dtype):
    weights = checkpoints.arrays(dtype)
    layers = load_attention(checkpoints.write(tmp_path, weights=weights, shards=shards))
    assert list(layers) == PATHS
    expected = MultiHeadAttentionConfig(
        N, H, num_kv_heads=K, use_bias=False, position=Rotary(53.0), param_dtype=dtype
    )
    for path, layer in layers.items():
        assert layer.config == expected
        assert layer.call == {"use_causal_mask": True}
        names = {x: f"{path}.{y}" for x, y in NAMES.items()}
        assert equal(layer.params, from_linear_layers(weights, expected, names=names))
    x = np.ones((2, 5, D), dtype)
    output = multi_head_attention(layer.params, x, x, config=layer.config, **layer.call)
    assert output.shape == (2, 5, D)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model."])
def test_layers_are_found_under_any_prefix(tmp_path, prefix):
    paths = [f"{prefix}layers.{layer}.self_attn" for layer in range(2)]
    weights = checkpoints.arrays(paths=paths)
    assert list(load_attention(checkpoints.write(tmp_path, weights=weights))) == paths


def test_layers_stand_in_the_order_of_the_model(tmp_path):
    paths = [f"model.layers.{layer}.self_attn" for layer in range(12)]
    weights = dict(sorted(checkpoints.arrays(paths=paths).items()))
    folder = checkpoints.write(tmp_path, weights=weights, num_hidden_layers=12)
    assert list(load_attention(folder)) == paths  # 10 not before 2


def test_layers_that_predict_further_ahead_are_left_out(tmp_path):
    extra = checkpoints.arrays(paths=["mtp.layers.0.self_attn"])
    folder = checkpoints.write(tmp_path / "a", weights={**checkpoints.arrays(), **extra})
    assert list(load_attention(folder)) == PATHS
    beyond = checkpoints.arrays(paths=["model.layers.2.self_attn"])
    folder = checkpoints.write(tmp_path / "b", weights={**checkpoints.arrays(), **beyond})
    assert list(load_attention(folder)) == PATHS
    left_out = list_attention(folder).left_out
    assert left_out == {"model.layers.2.self_attn": "beyond the layers that config.json says"}


# --- fields --------------------------------------------------------------------------------------


def mistral(**fields):
    return {**CONFIG, "model_type": "mistral", **fields}


def test_a_field_that_is_absent_has_the_default_of_its_family(tmp_path):
    plain = {x: y for x, y in CONFIG.items() if x != "rope_theta"}
    assert config_of(tmp_path / "a", config=plain).position == Rotary(10000.0)
    weights = checkpoints.arrays()
    assert config_of(tmp_path / "b", weights=weights, config=mistral()).sliding_window == 4096


def test_a_field_that_is_null_says_that_there_is_none(tmp_path):
    assert config_of(tmp_path, config=mistral(sliding_window=None)).sliding_window is None


def test_a_field_of_two_spellings(tmp_path):
    new = {x: y for x, y in CONFIG.items() if x != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 53.0}
    assert config_of(tmp_path / "a", config=new) == config_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        ({"rope_type": "linear", "factor": 4}, LinearScaling(4.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 64,
            },
            Llama3Scaling(2.0, 1.5, 3.0, 64),
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            YarnScaling(2.0, 64),
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "truncate": False, "attention_factor": 0.7},
            YarnScaling(2.0, 2048, attention_factor=0.7, truncate=False),
        ),
        ({"rope_type": "default"}, None),
    ],
)
def test_scalings_of_rotary_positions(tmp_path, scaling, expected):
    position = config_of(tmp_path, rope_scaling=scaling).position
    assert position == Rotary(53.0, scaling=expected)


LONGROPE = {"type": "longrope", "short_factor": [1.0, 2.0, 3.0], "long_factor": [4.0, 5.0, 6.0]}


@pytest.mark.parametrize(("length", "factors"), [(64, (1.0, 2.0, 3.0)), (65, (4.0, 5.0, 6.0))])
def test_longrope_is_chosen_by_the_longest_text(tmp_path, length, factors):
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    folder = checkpoints.write(tmp_path, rope_scaling=LONGROPE, **lengths)
    with pytest.raises(ValueError, match="'longrope' depend on the longest text"):
        load_attention(folder)
    layer = load_attention(folder, max_length=length)[PATHS[0]]
    assert layer.config.position.scaling == LongRopeScaling(factors, 4.0, 64)


def test_dynamic_scaling(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    folder = checkpoints.write(tmp_path, rope_scaling=scaling, max_position_embeddings=64)
    layer = load_attention(folder, max_length=100)[PATHS[0]]
    assert layer.config.position.scaling == DynamicScaling(2.0, 64, 100)


def test_yarn_by_two_mscales(tmp_path):
    """Their logits grow by the ratio; equal ones leave them as they are."""
    both = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert config_of(tmp_path, rope_scaling=both).position.scaling.magnitude() == 1.0


def test_norms_and_windows(tmp_path):
    norms = {"q_norm.weight": (H,), "k_norm.weight": (H,)}
    shapes = {**{f"{x}.weight": shape for x, shape in checkpoints.SHAPES.items()}, **norms}
    fields = {"model_type": "qwen3", "rms_norm_eps": 0.25, "use_sliding_window": True}
    folder = checkpoints.write(
        tmp_path,
        weights=checkpoints.arrays(shapes=shapes),
        **fields,
        sliding_window=3,
        max_window_layers=1,
    )
    first, second = (layer.config for layer in load_attention(folder).values())
    assert first.qk_norm == second.qk_norm == RMSNorm(0.25)
    assert (first.sliding_window, second.sliding_window) == (None, 3)


def test_one_array_a_head(tmp_path):
    norms = {
        f"{x}_layernorm.norms.{i}.weight": (H,) for x, n in (("q", N), ("k", K)) for i in range(n)
    }
    shapes = {**{f"{x}.weight": shape for x, shape in checkpoints.SHAPES.items()}, **norms}
    weights = checkpoints.arrays(shapes=shapes)
    config = {x: y for x, y in CONFIG.items() if x != "head_dim"}
    folder = checkpoints.write(
        tmp_path,
        config=config,
        weights=weights,
        model_type="stablelm",
        head_dim=H,
        qk_layernorm=True,
        layer_norm_eps=0.25,
        partial_rotary_factor=1.0,
    )
    layer = load_attention(folder)[PATHS[0]]
    assert layer.config.qk_norm == LayerNorm(0.25, per_head=True)
    scale = np.asarray(layer.params["key_norm"]["scale"])
    name = f"{PATHS[0]}.k_layernorm.norms.1.weight"
    assert (scale[1] == weights[name]).all()
    assert scale.shape == (K, H)


def test_kinds_of_layers_without_softmax_are_left_out_and_said(tmp_path):
    shapes = {
        "q_proj.weight": (2 * N * H, D),
        "k_proj.weight": (K * H, D),
        "v_proj.weight": (K * H, D),
        "o_proj.weight": (D, N * H),
        "q_norm.weight": (H,),
        "k_norm.weight": (H,),
    }
    weights = checkpoints.arrays(shapes=shapes, paths=PATHS[1:])
    weights["model.layers.0.linear_attn.conv1d.weight"] = np.zeros((3, 3), "float32")
    folder = checkpoints.write(
        tmp_path,
        weights=weights,
        model_type="qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        partial_rotary_factor=0.7,
    )
    (layer,) = load_attention(folder).values()
    assert layer.config.use_gate
    assert layer.config.position.dim == 4
    # query and gate of a head stand one after the other
    fused = weights[f"{PATHS[1]}.q_proj.weight"].reshape(N, 2, H, D)
    assert (np.asarray(layer.params["query"]["kernel"]) == fused[:, 0].transpose(2, 0, 1)).all()
    assert (np.asarray(layer.params["gate"]["kernel"]) == fused[:, 1].transpose(2, 0, 1)).all()
    listed = list_attention(folder)
    assert list(listed.left_out) == ["model.layers.0.self_attn"]
    assert "model.layers.0.self_attn  left out: linear_attention" in str(listed)


# --- several towers ------------------------------------------------------------------------------


def llava(folder, **fields):
    text = {x: y for x, y in CONFIG.items() if x != "vocab_size"}
    image = {"model_type": "clip_vision_model", "hidden_size": D, "num_attention_heads": 4}
    image |= {"num_hidden_layers": 1, "image_size": 8}
    config = {"model_type": "llava", "text_config": text, "vision_config": image, **fields}
    paths = [path.replace("model.", "language_model.model.") for path in PATHS]
    linears = {f"{x}_proj.weight": (D, D) for x in ("q", "k", "v", "out")}
    linears |= {f"{x}_proj.bias": (D,) for x in ("q", "k", "v", "out")}
    tower = ["vision_tower.vision_model.encoder.layers.0.self_attn"]
    images = checkpoints.arrays(paths=tower, shapes=linears)
    weights = {**checkpoints.arrays(paths=paths), **images}
    return checkpoints.write(folder, config=config, weights=weights), paths, tower


def test_each_tower_has_a_row_of_its_own(tmp_path):
    folder, texts, images = llava(tmp_path)
    layers = load_attention(folder)
    assert list(layers) == texts + images
    assert layers[texts[0]].call == {"use_causal_mask": True}
    assert layers[images[0]].call == {}
    assert layers[images[0]].config.dims.H == D // 4
    assert list(load_attention(folder, ignore=["vision_config"])) == texts


def test_a_tower_without_a_row_is_refused_or_left_out(tmp_path):
    folder, texts, _ = llava(tmp_path, vision_config={"model_type": "new_vision"})
    pattern = (
        r"`vision_config.model_type` must be among.*'new_vision'.*`ignore=\['vision_config'\]`"
    )
    with pytest.raises(ValueError, match=pattern):
        load_attention(folder)
    assert list(load_attention(folder, ignore=["vision_config"])) == texts


def test_the_fields_of_a_tower_beside_those_of_the_whole(tmp_path):
    """Qwen2-VL's files on the hub are flat; newer ones have an object of the text's fields."""
    text = {**CONFIG, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}
    del text["model_type"]
    image = {"model_type": "qwen2_vl", "depth": 1, "embed_dim": 8, "num_heads": 2, "in_chans": 3}
    shapes = {f"{x}.weight": shape for x, shape in checkpoints.SHAPES.items()}
    shapes |= {f"{x}.bias": shapes[f"{x}.weight"][:1] for x in ("q_proj", "k_proj", "v_proj")}
    tower = {"qkv.weight": (24, 8), "qkv.bias": (24,), "proj.weight": (8, 8), "proj.bias": (8,)}
    weights = {
        **checkpoints.arrays(shapes=shapes),
        **checkpoints.arrays(paths=["visual.blocks.0.attn"], shapes=tower),
    }
    whole = {"model_type": "qwen2_vl", "vision_config": image, "image_token_id": 3}
    nested = checkpoints.write(tmp_path / "a", {**whole, "text_config": text}, weights)
    flat = checkpoints.write(tmp_path / "b", {**whole, **text}, weights)
    layers = load_attention(nested)
    assert list(layers) == list(load_attention(flat)) == [*PATHS, "visual.blocks.0.attn"]
    for name, layer in load_attention(flat).items():
        assert layer.config == layers[name].config
    assert layers[PATHS[0]].config.position == AxialRotary(53.0, sections=(1, 1, 1))
    checkpoints.write(flat, {**whole, **text, "attention_of_2031": 1}, weights)
    with pytest.raises(ValueError, match=r"not known for qwen2_vl_text.*`attention_of_2031`"):
        load_attention(flat)


def test_a_field_of_a_tower_is_named_by_its_path(tmp_path):
    folder, _, _ = llava(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_of_2031"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`text_config.attention_of_2031`: 1.*ignore="):
        load_attention(folder)
    assert len(load_attention(folder, ignore=["text_config.attention_of_2031"])) == 3


# --- the list ------------------------------------------------------------------------------------


def test_the_list_reads_no_array(tmp_path, monkeypatch):
    from flax_mha.interop.huggingface import folder as room

    monkeypatch.setattr(room, "load_safetensors", None)
    folder = checkpoints.write(tmp_path, shards=3)
    records = list_attention(folder)
    assert [record.name for record in records] == PATHS
    assert records[0].shapes["k_proj.weight"] == (K * H, D)
    assert str(records).splitlines() == [
        f"{path}  4 heads of 6, 2 of keys  Rotary(base=53.0)  causal" for path in PATHS
    ]
    assert str(records[0]) == str(records).splitlines()[0]


def test_some_layers_are_read_alone(tmp_path):
    folder = checkpoints.write(tmp_path, shards=2)
    for shard in folder.glob("*.safetensors"):
        arrays = checkpoints.numpy_files.load_file(shard)
        shapes = {n: x if PATHS[0] in n else x[:1] for n, x in arrays.items()}
        checkpoints.numpy_files.save_file(shapes, shard)
    with pytest.raises(ValueError, match=rf"`{PATHS[1]}.q_proj.weight` must be \[N H, D\]"):
        load_attention(folder)
    assert list(load_attention(folder, [PATHS[0]])) == [PATHS[0]]
    assert load_attention(folder, []) == {}
    with pytest.raises(ValueError, match=rf"A layer in `names`.*Did you mean '{PATHS[1]}'"):
        load_attention(folder, ["model.layers.1.self_attention"])
    with pytest.raises(TypeError, match="`names` must be a list of names"):
        load_attention(folder, PATHS[0])


def test_the_list_tells_all_that_changes_the_numbers():
    norm, numbers = RMSNorm(offset=1.0), {"scale": 1 / 3, "soft_cap": 50}
    flags = {"use_sinks": True, "use_gate": True}
    config = MultiHeadAttentionConfig(4, 16, qk_norm=norm, value_norm=norm, **numbers, **flags)
    line = str(AttentionRecord("layer", config, {}, {}))
    assert line.endswith("qk RMSNorm, v RMSNorm, scale 0.3333, cap 50, sinks, gate")
    latent = MultiHeadAttentionConfig(4, 16, clip_qkv=None, latent=Latent(rank=32, shared_dim=8))
    assert str(AttentionRecord("layer", latent, {}, {})).endswith("latents of 32")
    clipped = MultiHeadAttentionConfig(4, 16, clip_qkv=8)
    assert str(AttentionRecord("layer", clipped, {}, {})).endswith("clip 8")
