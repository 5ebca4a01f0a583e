"""A byte-level language model on `MultiHeadAttention`: `python -m flax_mha.demo train CONFIG`."""
