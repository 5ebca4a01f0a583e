"""Keras weights and Keras files, in and out; Keras itself need not be installed.

Keras's arrays have the axes of `flax_mha.params.LETTERS`, so nothing is split or transposed. Files
need h5py: `pip install 'flax_mha[keras]'`. Guide: `python -m flax_mha guide porting`.
"""

from flax_mha.interop.adapters import AttentionAdapter as AttentionAdapter
from flax_mha.interop.keras.files import KerasLayer as KerasLayer
from flax_mha.interop.keras.files import list_keras_layers as list_keras_layers
from flax_mha.interop.keras.files import load_attention as load_attention
from flax_mha.interop.keras.files import load_keras_file as load_keras_file
from flax_mha.interop.keras.files import read_keras_arrays as read_keras_arrays
from flax_mha.interop.keras.files import save_keras_weights as save_keras_weights
from flax_mha.interop.keras.weights import from_keras_adapters as from_keras_adapters
from flax_mha.interop.keras.weights import from_keras_layer as from_keras_layer
from flax_mha.interop.keras.weights import from_keras_weights as from_keras_weights
from flax_mha.interop.keras.weights import to_keras_weights as to_keras_weights
from flax_mha.interop.loaded import AttentionLayer as AttentionLayer
