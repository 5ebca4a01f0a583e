"""The tree of a layer's parameters: its shapes, its letters, its first values, its adapters."""

from flax_mha.params.initial import init_params as init_params
from flax_mha.params.lora import lora_params as lora_params
from flax_mha.params.lora import merge_lora as merge_lora
from flax_mha.params.lora import split_lora as split_lora
from flax_mha.params.tree import param_shapes as param_shapes
