"""Tiny random decoders of transformers' families: a row each."""

from typing import Any

from model_families import ABSENT, LOCAL, TOKENS, TWO_ROPES, WINDOW, Family, rope


def _lm(**changes: Any) -> dict[str, Any]:
    """4 heads of 16 features for 40 hidden ones, 2 of them for keys."""
    sizes = {
        "vocab_size": TOKENS,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 0.05,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": rope(),
    }
    return {k: v for k, v in {**sizes, **changes}.items() if v is not ABSENT}


def _like_llama(name: str, *parts: dict[str, Any], model: str = "", **changes: Any) -> Family:
    for part in parts:
        changes = {**part, **changes}
    return Family(model or f"{name}ForCausalLM", _lm(**changes), (f"{name}Attention",))


_OWN_HEAD_DIM = {"head_dim": ABSENT, "hidden_size": 64}  # hidden_size / num_attention_heads
_LAYER_NORM = {"rms_norm_eps": ABSENT, "layer_norm_eps": 0.05}
_PARTLY = {"rope_parameters": rope(partial_rotary_factor=0.5)}
_SLIDING = {"sliding_window": WINDOW, "layer_types": LOCAL}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 53.0,
    "factor": 3.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 60,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 53.0,
    "factor": 3.0,
    "beta_fast": 5.0,
    "beta_slow": 0.7,
    "original_max_position_embeddings": 40,
}
_FEW_PAIRS = {"beta_fast": 1.5, "beta_slow": 0.3}  # of 4 pairs, others would be cut to the same
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 53.0,
    "short_factor": [1.0, 1.2, 1.1, 1.6, 1.3, 2.1],
    "long_factor": [1.3, 1.1, 2.0, 1.7, 3.0, 2.5],
    "partial_rotary_factor": 0.75,
}
_ALIBI = {"vocab_size": TOKENS, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = {
    **_ALIBI,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_parameters": rope(),
}
_GPT = {"vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2}

DECODERS = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        {**_GPT, "n_positions": 140, "n_embd": 48, "n_layer": 2, "n_head": 4},
        ("GPT2Attention",),
        output="c_proj",
    ),
    "gpt-neo": Family(
        "GPTNeoForCausalLM",
        {
            **_GPT,
            "max_position_embeddings": 140,
            "hidden_size": 48,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "intermediate_size": 24,
            "window_size": WINDOW,
        },
        ("GPTNeoSelfAttention",),
        output="out_proj",
        gain=0.7,
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        _lm(
            **_OWN_HEAD_DIM,
            **_LAYER_NORM,
            num_key_value_heads=ABSENT,
            rope_parameters=rope(partial_rotary_factor=0.25),
        ),
        ("GPTNeoXAttention",),
        output="dense",
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        {
            **_GPT,
            "n_positions": 140,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 24,
            "rotary_dim": 8,
        },
        ("GPTJAttention",),
        output="out_proj",
    ),
    "opt": Family(
        "OPTForCausalLM",
        {
            **_GPT,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 140,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
            "pad_token_id": 0,
        },
        ("OPTAttention",),
        output="out_proj",
    ),
    "bloom": Family(
        "BloomForCausalLM",
        {**_ALIBI, "n_layer": 2, "n_head": 6},
        ("BloomAttention",),
        output="dense",
    ),
    "mpt": Family(
        "MptForCausalLM",
        {
            "vocab_size": TOKENS,
            "d_model": 48,
            "n_heads": 6,
            "n_layers": 2,
            "expansion_ratio": 1,
            "max_seq_len": 140,
            "attn_config": {"softmax_scale": 0.2, "clip_qkv": 1.1},
        },
        ("MptAttention",),
        output="out_proj",
    ),
    "falcon": Family(
        "FalconForCausalLM",
        {**_FALCON, "multi_query": True, "new_decoder_architecture": False},
        ("FalconAttention",),
        output="dense",
    ),
    "falcon-40b": Family(
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        ("FalconAttention",),
        output="dense",
    ),
    "falcon-rw": Family(
        "FalconForCausalLM",
        {**_FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        ("FalconAttention",),
        output="dense",
    ),
    "llama": _like_llama("Llama"),
    "llama-3.1": _like_llama("Llama", rope_parameters=_LLAMA3, attention_bias=True),
    "mistral": _like_llama("Mistral", sliding_window=WINDOW),
    "mixtral": _like_llama("Mixtral", _EXPERTS, sliding_window=WINDOW),
    "qwen2": _like_llama("Qwen2", _OWN_HEAD_DIM, _SLIDING, use_sliding_window=True),
    "qwen3": _like_llama("Qwen3", _SLIDING, use_sliding_window=True),
    "gemma": _like_llama("Gemma"),
    "gemma2": _like_llama("Gemma2", _SLIDING, query_pre_attn_scalar=5, attn_logit_softcapping=1.5),
    "gemma3": _like_llama(
        "Gemma3", _SLIDING, query_pre_attn_scalar=5, rope_parameters=TWO_ROPES
    )._replace(attends=("Gemma3Attention",)),
    "phi3": _like_llama("Phi3", _OWN_HEAD_DIM, sliding_window=WINDOW),
    "phi3-longrope": _like_llama(
        "Phi3",
        _OWN_HEAD_DIM,
        original_max_position_embeddings=64,
        rope_parameters=_LONGROPE,
    ),
    "phi2": _like_llama("Phi", _OWN_HEAD_DIM, _LAYER_NORM, _PARTLY)._replace(output="dense"),
    "stablelm": _like_llama("StableLm", _OWN_HEAD_DIM, _LAYER_NORM, _PARTLY, use_qkv_bias=True),
    "stablelm-qk-norm": _like_llama(
        "StableLm", _OWN_HEAD_DIM, _LAYER_NORM, _PARTLY, qk_layernorm=True
    ),
    "cohere": _like_llama("Cohere", _OWN_HEAD_DIM, _LAYER_NORM),
    "cohere-qk-norm": _like_llama("Cohere", _OWN_HEAD_DIM, _LAYER_NORM, use_qk_norm=True),
    "glm4": _like_llama("Glm4", _PARTLY, attention_bias=True),
    "nemotron": _like_llama("Nemotron", _PARTLY, rms_norm_eps=ABSENT, norm_eps=0.05),
    "smollm3": _like_llama("SmolLM3", _OWN_HEAD_DIM, no_rope_layers=[1, 0], attention_bias=True),
    "granite": _like_llama("Granite", _OWN_HEAD_DIM, attention_multiplier=0.6),
    "exaone4": _like_llama("Exaone4", _SLIDING, sliding_window_pattern=2),
    "gpt-oss": _like_llama(
        "GptOss", _SLIDING, _EXPERTS, rope_parameters={**_YARN, "truncate": False}
    ),
    "qwen3-next": _like_llama(
        "Qwen3Next",
        _PARTLY,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
    "olmo": _like_llama("Olmo", _OWN_HEAD_DIM, rms_norm_eps=ABSENT, clip_qkv=0.8),
    "olmo2": _like_llama("Olmo2", _OWN_HEAD_DIM),
    "gemma4": _like_llama(
        "Gemma4",
        _SLIDING,
        global_head_dim=24,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=TOKENS,
        rope_parameters={
            "sliding_attention": rope(23.0),
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 97.0,
            },
        },
    )._replace(attends=("Gemma4TextAttention",), gain=0.9),
    "llama4": _like_llama(
        "Llama4",
        _EXPERTS,
        intermediate_size_mlp=24,
        no_rope_layers=[1, 0],
        attention_chunk_size=24,
        floor_scale=9,
        attn_scale=0.4,
        moe_layers=[],
    )._replace(attends=("Llama4TextAttention",)),
    "deepseek-v3": _like_llama(
        "DeepseekV3",
        head_dim=ABSENT,
        num_key_value_heads=4,
        q_lora_rank=20,
        kv_lora_rank=14,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
        first_k_dense_replace=2,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        rope_parameters={**_YARN, **_FEW_PAIRS, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "qwen2-vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _lm(
                **_OWN_HEAD_DIM,
                rope_parameters=rope(mrope_section=[2, 3, 3]),
            ),
            "vision_config": {
                "depth": 2,
                "embed_dim": 48,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 1,
                "patch_size": 4,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
        ("Qwen2VLAttention", "VisionAttention"),
        output="o_proj|proj",
        inputs="text with images",
    ),
}
