"""A Pallas kernel for TPU: the whole contract, forward and backward, in memory O(T + S)."""

from flax_mha.attention.pallas_tpu.attend import attend as attend
from flax_mha.attention.pallas_tpu.attend import engine as engine
from flax_mha.attention.pallas_tpu.attend import unsupported as unsupported
