"""The guides, read by `python -m flax_mha guide`; nothing here is public to code."""
