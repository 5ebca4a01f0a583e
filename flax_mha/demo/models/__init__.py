"""The models of the tasks, each built on `flax_mha.MultiHeadAttention`."""
