"""What transformers' config classes have where a field is absent, of those that rows read.

A line a model type; what follows it, indented, goes on with it. Fields that have no such value are
None, which is 0 and false, too.
"""

import json
from typing import Any

_TABLE = """
llama hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 num_hidden_layers=32
    rope_theta=10000.0
mistral hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32
    num_hidden_layers=32 num_key_value_heads=8 rope_theta=10000.0 sliding_window=4096
mixtral hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32
    num_hidden_layers=32 num_key_value_heads=8 rope_theta=1000000.0
qwen2 hidden_size=4096 max_position_embeddings=32768 max_window_layers=28 num_attention_heads=32
    num_hidden_layers=32 num_key_value_heads=32 rope_theta=10000.0 sliding_window=4096
qwen2_moe hidden_size=2048 max_position_embeddings=32768 max_window_layers=28
    num_attention_heads=16 num_hidden_layers=24 num_key_value_heads=16 qkv_bias=true
    rope_theta=10000.0 sliding_window=4096
qwen3 head_dim=128 hidden_size=4096 max_position_embeddings=32768 max_window_layers=28
    num_attention_heads=32 num_hidden_layers=32 num_key_value_heads=32 rms_norm_eps=1e-06
    rope_theta=10000.0 sliding_window=4096
qwen3_moe hidden_size=2048 max_position_embeddings=32768 num_attention_heads=32
    num_hidden_layers=24 num_key_value_heads=4 rms_norm_eps=1e-06 rope_theta=10000.0
    sliding_window=4096
qwen3_next head_dim=256 hidden_size=2048 max_position_embeddings=32768 num_attention_heads=16
    num_hidden_layers=48 num_key_value_heads=2 rms_norm_eps=1e-06 rope_theta=10000.0
gemma head_dim=256 hidden_size=3072 max_position_embeddings=8192 num_attention_heads=16
    num_hidden_layers=28 num_key_value_heads=16 rope_theta=10000.0
gemma2 attn_logit_softcapping=50.0 head_dim=256 hidden_size=2304 max_position_embeddings=8192
    num_attention_heads=8 num_hidden_layers=26 num_key_value_heads=4 query_pre_attn_scalar=256
    rope_theta=10000.0 sliding_window=4096
gemma3_text head_dim=256 hidden_size=2304 max_position_embeddings=131072 num_attention_heads=8
    num_hidden_layers=26 num_key_value_heads=4 query_pre_attn_scalar=256 rms_norm_eps=1e-06
    sliding_window=4096
phi3 hidden_size=3072 max_position_embeddings=4096 num_attention_heads=32 num_hidden_layers=32
    original_max_position_embeddings=4096 rope_theta=10000.0
phi hidden_size=2048 layer_norm_eps=1e-05 max_position_embeddings=2048 num_attention_heads=32
    num_hidden_layers=24 rope_theta=10000.0
stablelm hidden_size=2560 layer_norm_eps=1e-05 max_position_embeddings=4096 num_attention_heads=32
    num_hidden_layers=32 num_key_value_heads=32 rope_theta=10000.0
cohere hidden_size=8192 layer_norm_eps=1e-05 max_position_embeddings=8192 num_attention_heads=64
    num_hidden_layers=40 rope_theta=500000.0
cohere2 hidden_size=8192 max_position_embeddings=8192 num_attention_heads=64 num_hidden_layers=40
    rope_theta=10000.0 sliding_window=4096
glm attention_bias=true head_dim=128 hidden_size=4096 max_position_embeddings=131072
    num_attention_heads=32 num_hidden_layers=40 num_key_value_heads=2 rope_theta=10000.0
glm4 attention_bias=true head_dim=128 hidden_size=4096 max_position_embeddings=131072
    num_attention_heads=32 num_hidden_layers=40 num_key_value_heads=2 rope_theta=10000.0
nemotron hidden_size=6144 max_position_embeddings=4096 num_attention_heads=48 num_hidden_layers=32
    rope_theta=10000.0
smollm3 hidden_size=2048 max_position_embeddings=32768 no_rope_layer_interval=4
    num_attention_heads=16 num_hidden_layers=36 num_key_value_heads=4 rope_theta=2000000.0
granite attention_multiplier=1.0 hidden_size=4096 max_position_embeddings=2048
    num_attention_heads=32 num_hidden_layers=32 rope_theta=10000.0
exaone4 hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 num_hidden_layers=32
    num_key_value_heads=32 rms_norm_eps=1e-05 rope_theta=10000.0 sliding_window=4096
    sliding_window_pattern=4
gpt_oss attention_bias=true head_dim=64 hidden_size=2880 max_position_embeddings=131072
    num_attention_heads=64 num_hidden_layers=36 num_key_value_heads=8 rope_theta=150000.0
    sliding_window=128
olmo hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 num_hidden_layers=32
    rope_theta=10000.0
olmo2 hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 num_hidden_layers=32
    rms_norm_eps=1e-05 rope_theta=10000.0
olmo3 hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 num_hidden_layers=32
    rms_norm_eps=1e-05 rope_theta=500000.0 sliding_window=4096
bert attention_probs_dropout_prob=0.1 hidden_size=768 num_attention_heads=12 num_hidden_layers=12
roberta attention_probs_dropout_prob=0.1 hidden_size=768 num_attention_heads=12
    num_hidden_layers=12
electra attention_probs_dropout_prob=0.1 hidden_size=256 num_attention_heads=4
    num_hidden_layers=12
roformer attention_probs_dropout_prob=0.1 hidden_size=768 num_attention_heads=12
    num_hidden_layers=12
esm attention_probs_dropout_prob=0.1 hidden_size=768 max_position_embeddings=1026
    num_attention_heads=12 num_hidden_layers=12 position_embedding_type="absolute"
    rope_theta=10000.0
distilbert attention_dropout=0.1 hidden_size=768 num_attention_heads=12 num_hidden_layers=6
albert hidden_size=4096 inner_group_num=1 num_attention_heads=64 num_hidden_groups=1
    num_hidden_layers=12
modernbert hidden_size=768 local_attention=128 num_attention_heads=12 num_hidden_layers=22
vit hidden_size=768 num_attention_heads=12 num_hidden_layers=12 qkv_bias=true
dinov2 hidden_size=768 num_attention_heads=12 num_hidden_layers=12 qkv_bias=true
clip_text_model hidden_size=512 num_attention_heads=8 num_hidden_layers=12
clip_vision_model hidden_size=768 num_attention_heads=12 num_hidden_layers=12
siglip_text_model hidden_size=768 num_attention_heads=12 num_hidden_layers=12
siglip_vision_model hidden_size=768 num_attention_heads=12 num_hidden_layers=12
    vision_use_head=true
gpt2 attn_pdrop=0.1 hidden_size=768 num_attention_heads=12 num_hidden_layers=12
    scale_attn_weights=true
gpt_neo hidden_size=2048 num_attention_heads=16 num_hidden_layers=24 window_size=256
gpt_neox attention_bias=true hidden_size=6144 max_position_embeddings=2048 num_attention_heads=64
    num_hidden_layers=44 rope_theta=10000.0
gptj hidden_size=4096 num_attention_heads=16 num_hidden_layers=28 rotary_dim=64
opt enable_bias=true hidden_size=768 num_attention_heads=12 num_hidden_layers=12
bloom hidden_size=64 num_attention_heads=8 num_hidden_layers=2
mpt hidden_size=2048 num_attention_heads=16 num_hidden_layers=24
falcon hidden_size=4544 max_position_embeddings=2048 multi_query=true num_attention_heads=71
    num_hidden_layers=32 rope_theta=10000.0
t5 d_kv=64 d_model=512 dropout_rate=0.1 num_heads=8 num_layers=6
    relative_attention_max_distance=128 relative_attention_num_buckets=32
mt5 d_kv=64 d_model=512 dropout_rate=0.1 num_heads=6 num_layers=8
    relative_attention_max_distance=128 relative_attention_num_buckets=32
bart d_model=1024 decoder_attention_heads=16 decoder_layers=12 encoder_attention_heads=16
    encoder_layers=12
mbart d_model=1024 decoder_attention_heads=16 decoder_layers=12 encoder_attention_heads=16
    encoder_layers=12
marian d_model=1024 decoder_attention_heads=16 decoder_layers=12 encoder_attention_heads=16
    encoder_layers=12
pegasus d_model=1024 decoder_attention_heads=16 decoder_layers=12 encoder_attention_heads=16
    encoder_layers=12
whisper d_model=384 decoder_attention_heads=6 decoder_layers=4 encoder_attention_heads=6
    encoder_layers=4
swin depths=[2,2,6,2] embed_dim=96 num_heads=[3,6,12,24] qkv_bias=true window_size=7
beit hidden_size=768 image_size=224 num_attention_heads=12 num_hidden_layers=12 patch_size=16
dinov3_vit hidden_size=384 image_size=224 num_attention_heads=6 num_hidden_layers=12 patch_size=16
    proj_bias=true query_bias=true rope_theta=100.0 value_bias=true
qwen2_vl_text hidden_size=8192 max_position_embeddings=32768 max_window_layers=80
    num_attention_heads=64 num_hidden_layers=80 num_key_value_heads=8 rope_theta=1000000.0
    sliding_window=4096
qwen2_vl_vision depth=32 embed_dim=1280 num_heads=16
gemma4_text head_dim=256 hidden_size=2304 num_attention_heads=8 num_hidden_layers=30
    num_key_value_heads=4 rms_norm_eps=1e-06 sliding_window=512
llama4_text attention_chunk_size=8192 attn_scale=0.1 attn_temperature_tuning=true floor_scale=8192
    head_dim=128 hidden_size=5120 max_position_embeddings=131072 no_rope_layer_interval=4
    num_attention_heads=40 num_hidden_layers=48 num_key_value_heads=8 rms_norm_eps=1e-05
    rope_theta=500000.0 use_qk_norm=true
llama4_vision_model hidden_size=768 image_size=448 num_attention_heads=16 num_hidden_layers=34
    patch_size=14
deepseek_v3 hidden_size=7168 kv_lora_rank=512 max_position_embeddings=4096 num_attention_heads=128
    num_hidden_layers=61 num_key_value_heads=128 q_lora_rank=1536 qk_nope_head_dim=128
    qk_rope_head_dim=64 rope_interleave=true rope_theta=10000.0 v_head_dim=128
"""


def _parsed(table: str) -> dict[str, dict[str, Any]]:
    rows = [line.split() for line in table.replace("\n    ", " ").strip().splitlines()]
    pairs = {name: [entry.split("=") for entry in entries] for name, *entries in rows}
    return {name: {x: json.loads(y) for x, y in entries} for name, entries in pairs.items()}


DEFAULTS = _parsed(_TABLE)
