"""Checkpoints of the transformers library, by their folder; that library is not needed.

    load_attention    every attention layer of a checkpoint: its config, arrays and call
    list_attention    what that will find, without reading an array
    save_attention    the checkpoint again, with these layers
    load_adapter      a LoRA adapter that PEFT saved, beside the layers of its base
    save_adapter      a folder that PEFT loads

Guides: `python -m flax_mha guide your_model`, and `lora` of adapters.
"""

from flax_mha.interop.adapters import AttentionAdapter as AttentionAdapter
from flax_mha.interop.huggingface.adapter_save import save_adapter as save_adapter
from flax_mha.interop.huggingface.adapters import load_adapter as load_adapter
from flax_mha.interop.huggingface.listing import AttentionList as AttentionList
from flax_mha.interop.huggingface.listing import AttentionRecord as AttentionRecord
from flax_mha.interop.huggingface.listing import list_attention as list_attention
from flax_mha.interop.huggingface.load import load_attention as load_attention
from flax_mha.interop.huggingface.save import save_attention as save_attention
from flax_mha.interop.loaded import AttentionLayer as AttentionLayer
