"""Encoders of images whose attention sees rows and columns: Swin, BEiT, DINOv3."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_mha.interop.huggingface.families.layouts import LLAMA, linear, named, table
from flax_mha.interop.huggingface.family import Family, Index, Stack, fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import always, dropout, heads_by
from flax_mha.interop.huggingface.rope import head_dim
from flax_mha.positions import AxialRotary, GridBias

_TABLE = "relative_position_bias_table"
_DROPOUT = dropout("attention_probs_dropout_prob")
_HEADS = heads_by("num_attention_heads", "hidden_size")
_IMAGES = fields_set(
    "apply_layernorm drop_path_rate encoder_stride mlp_ratio num_channels reshape_hidden_states"
)
_FEW = 10_000  # stages and blocks, rows and columns; more are no model's


def grid(fields: Fields) -> tuple[int, int]:
    """Rows and columns of the patches of an image of `image_size`."""
    sides = [_pair(fields, name) for name in ("image_size", "patch_size")]
    (height, width), (down, across) = sides
    rows, columns = height // down, width // across
    if not 0 < rows * columns < _FEW**2:
        fields.fail("image_size", "some patches", fields.get("image_size"))
    return rows, columns


def _pair(fields: Fields, name: str) -> tuple[int, int]:
    """A field that is one number, or a list of two."""
    value = fields.get(name)
    numbers = value if isinstance(value, list) else [value, value]
    if len(numbers) != 2 or not all(isinstance(x, int) and 0 < x < 2**20 for x in numbers):
        fields.fail(name, "a positive integer, or two", value)
    return numbers[0], numbers[1]


# --- Swin ----------------------------------------------------------------------------------------


def _swin_layers(fields: Fields) -> list[Index]:
    depths = fields.entries("depths") or []
    if not all(isinstance(x, int) and 0 <= x < _FEW for x in depths) or sum(depths) > _FEW:
        fields.fail("depths", "a list of numbers of blocks", depths)
    return [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]


def _swin_features(fields: Fields, at: Index) -> int:
    return fields.size("embed_dim") * 2 ** at[0]


def _swin_heads(fields: Fields, at: Index) -> Mapping[str, Any]:
    N, D = fields.entry("num_heads", at[0]), _swin_features(fields, at)
    if not isinstance(N, int) or N < 1 or D % N:
        fields.fail("num_heads", f"a list of divisors of the features, here {D}", N)
    return {"num_heads": N, "key_dim": D // N}


def _swin_window(fields: Fields, at: Index) -> Mapping[str, Any]:
    size = fields.size("window_size")
    return {"position": GridBias(size, size)}


def _qkv_bias(fields: Fields, at: Index) -> Mapping[str, Any]:
    return {"use_bias": True if fields.flag("qkv_bias") else ("attention_output",)}


_SWIN = Stack(
    "encoder.layers.{}.blocks.{}.attention",
    linear(
        named("self.query", "self.key", "self.value", "output.dense"),
        table(f"self.{_TABLE}"),
        foreign=("self.relative_position_index",),
    ),
    (_swin_heads, _swin_window, _qkv_bias, _DROPOUT),
    {},
    layers=_swin_layers,
    features=_swin_features,
    remark="within windows, [B * windows, T, D]; every second block's are shifted: mask what meets",
)

# --- BEiT ----------------------------------------------------------------------------------------


def _beit_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    rows, columns = grid(fields)
    if not fields.flag("use_relative_position_bias"):
        return {}
    if rows != columns:
        # its tables are resized as if their rows were columns
        fields.refuse("image_size", "a learned bias of pictures that are not square")
    return {"position": GridBias(rows, columns, class_token=True)}


def _beit_layout(fields: Fields, at: Index) -> Any:
    bias = "attention.relative_position_bias"
    tables = [table(f"{bias}.{_TABLE}")] if fields.flag("use_relative_position_bias") else []
    names = named("attention.query", "attention.key", "attention.value", "output.dense")
    return linear(names, *tables, foreign=(f"{bias}.relative_position_index",))


_BEIT = Stack(
    "encoder.layer.{}.attention",
    _beit_layout,
    (_HEADS, _beit_position, always(use_bias=("query", "value", "attention_output")), _DROPOUT),
    {},
)

# --- DINOv3 --------------------------------------------------------------------------------------


def _dinov3_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    """Coordinates from -1 to 1 turn by 2 pi; half of the pairs are rows', half columns'."""
    H = head_dim(fields)
    if H % 4:
        fields.fail("num_attention_heads", "heads of a multiple of 4 features", H)
    sections = (H // 4, H // 4)
    base = fields.number("rope_theta")
    position = AxialRotary(base, sections=sections, layout="restarted", unit=2 * math.pi)
    return {"position": position}


def _dinov3_bias(fields: Fields, at: Index) -> Mapping[str, Any]:
    names = {
        "query": "query_bias",
        "key": "key_bias",
        "value": "value_bias",
        "attention_output": "proj_bias",
    }
    return {"use_bias": tuple(part for part, name in names.items() if fields.flag(name))}


def _dinov3_call(fields: Fields, at: Index) -> Mapping[str, Any]:
    """The centres of the patches, [2, 1, T], row by row, behind the tokens that are nowhere."""
    rows, columns = grid(fields)
    before = 1 + (fields.get("num_register_tokens") or 0)
    y, x = np.meshgrid(_centres(rows), _centres(columns), indexing="ij")
    places = np.stack([y.ravel(), x.ravel()])[:, None]
    return {"positions": np.pad(places, ((0, 0), (0, 0), (before, 0)))}


def _centres(number: int) -> np.ndarray:
    return (2 * (np.arange(number) + 0.5) / number - 1).astype("float32")


_DINOV3 = Stack(
    "layer.{}.attention",
    linear(LLAMA),
    (_HEADS, _dinov3_position, _dinov3_bias, dropout("attention_dropout")),
    _dinov3_call,
    remark="positions are those of image_size",
)

GRIDS = (
    Family(
        ("swin",),
        (_SWIN,),
        ignored=_IMAGES
        | fields_set(
            "hidden_size image_size num_layers patch_size path_norm use_absolute_embeddings"
        ),
    ),
    Family(
        ("beit",),
        (_BEIT,),
        refused={"use_shared_relative_position_bias": "one table for all, outside of the layers"},
        ignored=_IMAGES
        | fields_set(
            "add_fpn auxiliary_channels auxiliary_concat_input auxiliary_loss_weight "
            "auxiliary_num_convs layer_scale_init_value pool_scales semantic_loss_ignore_index "
            "use_absolute_position_embeddings use_auxiliary_head use_mask_token use_mean_pooling"
        ),
    ),
    Family(
        ("dinov3_vit",),
        (_DINOV3,),
        ignored=_IMAGES
        | fields_set(
            "layerscale_value pos_embed_jitter pos_embed_rescale pos_embed_shift use_gated_mlp "
            "return_class_token"
        ),
    ),
)
