"""The layer's equation on canonical arrays, and what stands before it."""

from flax_mha.layer.caches import CrossCache as CrossCache
from flax_mha.layer.caches import KVCache as KVCache
from flax_mha.layer.equation import Activations as Activations
