"""Adapters beside the peft package: tiny random models of every family, their attention adapted.

A model is adapted in PEFT and saved, and loads here; adapters made here are saved, and load there.
Both ways what comes out of each attention module of PEFT's model must come out of the layer.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import flax_mha
from flax_mha.interop.huggingface import (
    AttentionAdapter,
    load_adapter,
    load_attention,
    save_adapter,
)

model_recordings = pytest.importorskip(
    "model_recordings", reason="torch, transformers or safetensors is not installed: [test-models]"
)
peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[test-models]'")
torch = model_recordings.torch
pytestmark = [
    pytest.mark.models,
    # of a library's own, about itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
FAMILIES = model_recordings.FAMILIES
LENGTHS = {"phi3-longrope": {"max_length": 130}}
REFUSED = {"deberta-v2"}  # by load_attention
# One of each layout; the others are slow.
UNLIKE = """
    llama qwen2 gpt2 gpt-neo gpt-neox falcon falcon-40b bloom phi3 bert vit swin clip t5 whisper
    gemma3 gemma4 qwen3-next deepseek-v3 qwen2-vl siglip
"""
NAMES = [
    name if name in UNLIKE.split() else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
    if name not in REFUSED
]
TOLERANCE = 1e-5  # of the largest entry
MOVES = 1e-2  # an adapter moves the output by more
RANK, ALPHA = 3, 5


@pytest.fixture(autouse=True)
def not_compiled():
    with jax.disable_jit():
        yield


def base_model(name, folder):
    family = FAMILIES[name]
    attention = model_recordings.attention_of(family)
    cls = model_recordings.model_class(family)
    return cls.from_pretrained(folder, attn_implementation=attention, dtype="float32").eval()


def targets(model, family):
    """Every Linear and Conv1D of attention, but those that torch's own module holds."""
    kinds = (torch.nn.Linear, model_recordings.transformers.pytorch_utils.Conv1D)
    found = []
    for path, module in model_recordings.attention_modules(model, family).items():
        if not isinstance(module, torch.nn.MultiheadAttention):
            inner = module.named_modules()
            found += [f"{path}.{name}" for name, x in inner if isinstance(x, kinds)]
    return found


def tuned(name, folder, **options):
    """The base with random adapters in all of its attention."""
    model = base_model(name, folder)
    names = targets(model, FAMILIES[name])
    is_turned = name == "gpt2"
    rules = {"r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": is_turned, **options}
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **rules)).eval()
    with torch.no_grad():
        for array, parameter in model.named_parameters():
            if "lora_B" in array:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def calls_of(name, model, recorded):
    """What PEFT's model gives, by the names of the file: both are in the order of the modules."""
    calls = model_recordings.record(model.base_model.model, FAMILIES[name])
    return dict(zip(recorded(name)[1], calls.values(), strict=True))


def attend(name, layer, call, params=None, **adapter):
    config = layer.config.replace(implementation="reference")
    given = model_recordings.passed(FAMILIES[name], call)
    params = layer.params if params is None else params
    return flax_mha.multi_head_attention(
        params, call.query, call.value, config=config, **layer.call, **given, **adapter
    )


def relative_error(output, call):
    return float(np.abs(np.asarray(output) - call.output).max() / np.abs(call.output).max())


def compared(name, layers, adapters, calls):
    """The worst error of the adapters beside and merged; each adapter moves its output."""
    errors = []
    for module, adapter in adapters.items():
        layer, call = layers[module], calls[module]
        lora, scale = adapter
        errors.append(relative_error(attend(name, layer, call, lora=lora, lora_scale=scale), call))
        merged = flax_mha.merge_lora(layer.params, lora, scale)
        errors.append(relative_error(attend(name, layer, call, merged), call))
        assert relative_error(attend(name, layer, call), call) > MOVES, module
    return max(errors)


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_saves_computes_the_same(recorded, name, tmp_path):
    folder, _ = recorded(name)
    model = tuned(name, folder)
    model.save_pretrained(tmp_path / "tuned")
    adapters = load_adapter(tmp_path / "tuned", like=folder, **LENGTHS.get(name, {}))
    layers = load_attention(folder, **LENGTHS.get(name, {}))
    assert set(layers) - set(adapters) <= {"vision_model.head.attention"}
    error = compared(name, layers, adapters, calls_of(name, model, recorded))
    print(f"\n{name:18} in  {len(adapters)} layers {error:.1e}")
    assert error <= TOLERANCE
    save_adapter(tmp_path / "again", adapters, like=folder, **LENGTHS.get(name, {}))
    same_arrays(tmp_path / "tuned", tmp_path / "again")


def same_arrays(folder, other):
    first, second = (load_file(x / "adapter_model.safetensors") for x in (folder, other))
    assert first.keys() == second.keys()
    for array in first:
        assert first[array].dtype == second[array].dtype
        assert first[array].shape == second[array].shape
        assert first[array].tobytes() == second[array].tobytes(), array


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_what_is_saved_here(recorded, name, tmp_path):
    """Each projection has an a of its own, also where several stand in one module."""
    folder, recordings = recorded(name)
    layers = load_attention(folder, **LENGTHS.get(name, {}))
    layers.pop("vision_model.head.attention", None)
    adapters = {module: made(layer, recordings[module]) for module, layer in layers.items()}
    save_adapter(tmp_path / "ours", adapters, like=folder, **LENGTHS.get(name, {}))
    model = peft.PeftModel.from_pretrained(base_model(name, folder), tmp_path / "ours").eval()
    error = compared(name, layers, adapters, calls_of(name, model, recorded))
    print(f"\n{name:18} out {len(adapters)} layers {error:.1e}")
    assert error <= TOLERANCE


def made(layer, call):
    """Random adapters of every projection."""
    config = layer.config
    which, shapes = config.projections, (call.query.shape, call.value.shape)
    lora = flax_mha.lora_params(jax.random.key(2), config, *shapes, rank=RANK, which=which)
    keys = iter(jax.random.split(jax.random.key(3), len(lora)))
    drawn = {x: jax.random.normal(next(keys), lora[x]["b"].shape) * 0.3 for x in which}
    lora = {x: {"a": lora[x]["a"], "b": drawn[x]} for x in which}
    if keys_are_values(layer):
        lora["value"] = lora["key"]
    return AttentionAdapter(lora, ALPHA / RANK)


def keys_are_values(layer):
    """Gemma 4 has layers whose one Linear makes both."""
    key, value = (layer.params[x]["kernel"] for x in ("key", "value"))
    return key.shape == value.shape and bool((key == value).all())


# --- ranks and scales that differ, other bases, other modules -----------------------------------

PATTERNS = {
    "rank_pattern": {r"layers\.0\.self_attn\.[qk]_proj": 2, "o_proj": 4},
    "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 7, "v_proj": 2.5},
}


@pytest.mark.parametrize("by_root", [False, True])
def test_patterns_are_read_as_peft_reads_them(recorded, tmp_path, by_root):
    folder, _ = recorded("llama")
    model = tuned("llama", folder, **PATTERNS, use_rslora=by_root)
    model.save_pretrained(tmp_path / "tuned")
    adapters, layers = load_adapter(tmp_path / "tuned", like=folder), load_attention(folder)
    calls = calls_of("llama", model, recorded)
    assert compared("llama", layers, adapters, calls) <= TOLERANCE
    # and written as it reads them: scales are a layer's own here
    save_adapter(tmp_path / "again", adapters, like=folder)
    again = peft.PeftModel.from_pretrained(base_model("llama", folder), tmp_path / "again").eval()
    assert compared("llama", layers, adapters, calls_of("llama", again, recorded)) <= TOLERANCE


def test_a_base_that_was_saved_without_its_head(recorded, tmp_path):
    folder, names = recorded("llama")
    model = tuned("llama", folder)
    model.save_pretrained(tmp_path / "tuned")
    base_model("llama", folder).model.save_pretrained(tmp_path / "bare")
    adapters = load_adapter(tmp_path / "tuned", like=tmp_path / "bare")
    calls = calls_of("llama", model, recorded)
    layers = load_attention(tmp_path / "bare")
    assert [f"model.{name}" for name in adapters] == list(names)
    calls = {name.removeprefix("model."): call for name, call in calls.items()}
    assert compared("llama", layers, adapters, calls) <= TOLERANCE
    save_adapter(tmp_path / "again", adapters, like=tmp_path / "bare", prefix="model.")
    same_arrays(tmp_path / "tuned", tmp_path / "again")


def test_adapters_of_all_linears(recorded, tmp_path):
    """PEFT's "all-linear" adapts the blocks' MLPs too, which are the caller's."""
    folder, _ = recorded("llama")
    rules = peft.LoraConfig(target_modules="all-linear", r=RANK, task_type="CAUSAL_LM")
    peft.get_peft_model(base_model("llama", folder), rules).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"mlp.*ignore_modules=\['mlp'\]"):
        load_adapter(tmp_path / "tuned", like=folder)
    assert len(load_adapter(tmp_path / "tuned", like=folder, ignore_modules=["mlp"])) == 2


@pytest.mark.filterwarnings("ignore:.*changes the base weights:UserWarning")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_training_changed(recorded, tmp_path, start):
    """Refused as it is; as an adapter of the base itself it is one of twice the rank."""
    folder, _ = recorded("llama")
    rules = peft.LoraConfig(target_modules=["q_proj"], r=RANK, init_lora_weights=start)
    model = peft.get_peft_model(base_model("llama", folder), rules).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documents say
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for array, parameter in model.named_parameters():
            if "lora_B" in array:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match=r"`init_lora_weights`.*path_initial_model_for_weight"):
        load_adapter(tmp_path / "changed", like=folder)
    calls = calls_of("llama", model, recorded)
    initial = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "whole", path_initial_model_for_weight_conversion=initial)
    adapters = load_adapter(tmp_path / "whole", like=folder)
    assert {x.lora["query"]["a"].shape[-1] for x in adapters.values()} == {2 * RANK}
    assert compared("llama", load_attention(folder), adapters, calls) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # a bias has one axis
@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}]
)
def test_what_is_more_than_lora(recorded, tmp_path, options):
    folder, _ = recorded("opt")
    tuned("opt", folder, **options).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"(use_dora|lora_bias|an attention layer.*bias)"):
        load_adapter(tmp_path / "tuned", like=folder)


def test_other_methods(recorded, tmp_path):
    folder, _ = recorded("llama")
    methods = [peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])]
    methods += [peft.LoHaConfig(target_modules=["q_proj"])]
    for number, rules in enumerate(methods):
        model = peft.get_peft_model(base_model("llama", folder), rules)
        model.save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match="`peft_type` is not supported"):
            load_adapter(tmp_path / str(number), like=folder)


def test_a_key_that_is_the_value_too(tmp_path):
    """Gemma 4's full layers may have one Linear for both."""
    family = FAMILIES["gemma4"]
    family = family._replace(config={**family.config, "attention_k_eq_v": True})
    recording = model_recordings.build(family, tmp_path / "base")
    recorded = lambda name: (tmp_path / "base", recording)
    model = tuned("gemma4", tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    adapters = load_adapter(tmp_path / "tuned", like=tmp_path / "base")
    layers = load_attention(tmp_path / "base")
    assert any(map(keys_are_values, layers.values()))
    calls = calls_of("gemma4", model, recorded)
    assert compared("gemma4", layers, adapters, calls) <= TOLERANCE
    save_adapter(tmp_path / "again", adapters, like=tmp_path / "base")
    same_arrays(tmp_path / "tuned", tmp_path / "again")


def test_a_module_that_calls_no_linear(recorded, tmp_path):
    """torch's own MultiheadAttention reads its output's kernel: an adapter there would be idle."""
    folder, _ = recorded("siglip")
    name = "vision_model.head.attention"
    config = load_attention(folder)[name].config
    lora = flax_mha.lora_params(
        jax.random.key(0), config, (1, 48), rank=2, which=["attention_output"]
    )
    with pytest.raises(ValueError, match=r"must have Linears of its own"):
        save_adapter(tmp_path / "out", {name: AttentionAdapter(lora, 1.0)}, like=folder)
    rules = peft.LoraConfig(target_modules=[name])
    model = peft.get_peft_model(base_model("siglip", folder), rules)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"arrays of an attention layer must be.*head.attention"):
        load_adapter(tmp_path / "tuned", like=folder)
