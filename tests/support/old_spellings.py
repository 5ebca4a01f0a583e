"""config.json as transformers 4 wrote it: a rotary base alone, and `rope_scaling` beside it."""

from typing import Any

_FLAT = ("rope_theta", "partial_rotary_factor")


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, its rotary positions in the words of old."""
    parts = {k: old_spelling(v) for k, v in config.items() if k.endswith("_config") and v}
    config = {**config, **parts}
    rope = config.pop("rope_parameters", None)
    if rope is None or config["model_type"] == "gemma4_text":  # which no older one knew
        return config if rope is None else {**config, "rope_parameters": rope}
    if config["model_type"] in _OWN_WORDS:
        return _OWN_WORDS[config["model_type"]](config, rope)
    flat = {name: rope[name] for name in _FLAT if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in _FLAT}
    scaling["type"] = scaling.pop("rope_type")
    if scaling["type"] == "default":
        return {**config, **flat, "rope_scaling": None}
    return {**config, **flat, "rope_scaling": scaling}


def _gpt_neox(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    return {
        **config,
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": rope["partial_rotary_factor"],
    }


def _gemma3(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    return {
        **config,
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
    }


def _modernbert(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    return {
        **config,
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
    }


def _qwen2_vl(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    sections = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return {**config, "rope_theta": rope["rope_theta"], "rope_scaling": sections}


_OWN_WORDS = {
    "qwen2_vl_vision": lambda config, rope: config,
    "gpt_neox": _gpt_neox,
    "gemma3_text": _gemma3,
    "modernbert": _modernbert,
    "qwen2_vl_text": _qwen2_vl,
}
