"""The tree of a layer's parameters: shapes, letters, first values, adapters, int8 kernels."""

from flax_mha.params.initial import init_params as init_params
from flax_mha.params.lora import lora_params as lora_params
from flax_mha.params.lora import merge_lora as merge_lora
from flax_mha.params.lora import split_lora as split_lora
from flax_mha.params.quantized import dequantize_params as dequantize_params
from flax_mha.params.quantized import quantize_params as quantize_params
from flax_mha.params.tree import param_shapes as param_shapes
