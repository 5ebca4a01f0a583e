"""Attention over blocks of queries and keys: memory O(T + S), in every derivative."""

from flax_mha.attention.blockwise.attend import attend as attend
from flax_mha.attention.blockwise.attend import engine as engine
from flax_mha.attention.blockwise.attend import unsupported as unsupported
