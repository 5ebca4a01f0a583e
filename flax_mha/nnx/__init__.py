"""The flax.nnx module: `nnx.Param`s, rng streams and modes around the pure function."""

from flax_mha.nnx.layer import MultiHeadAttention as MultiHeadAttention
