"""PyTorch's weights and masks, in and out; torch itself is needed for none of it.

    from_torch_state_dict, to_torch_state_dict   torch.nn.MultiheadAttention, BERT, Llama, GPT-2
    from_linear_layers, to_linear_layers         any model that keeps separate Linear layers
    from_torch_module                            config and weights of a torch.nn.MultiheadAttention
    load_safetensors                             arrays of a file, without torch and pickle
    mask_from_torch, mask_to_torch               True = masked out <-> True = may attend

Weights are carried as they are. What else a model does to its queries and keys is not in them: a
Llama rotates both (its checkpoints on the Hugging Face hub have each head's features in two halves,
`[first of all pairs, second of all pairs]`, not interleaved), a T5 does not scale the logits.

Guide: `python -m flax_mha guide porting`.
"""

from flax_mha.interop.torch.masks import mask_from_torch as mask_from_torch
from flax_mha.interop.torch.masks import mask_to_torch as mask_to_torch
from flax_mha.interop.torch.safetensors import load_safetensors as load_safetensors
from flax_mha.interop.torch.weights import from_linear_layers as from_linear_layers
from flax_mha.interop.torch.weights import from_torch_module as from_torch_module
from flax_mha.interop.torch.weights import from_torch_state_dict as from_torch_state_dict
from flax_mha.interop.torch.weights import to_linear_layers as to_linear_layers
from flax_mha.interop.torch.weights import to_torch_state_dict as to_torch_state_dict
