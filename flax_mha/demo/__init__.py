"""Models built on `MultiHeadAttention`, one a task: `python -m flax_mha.demo train CONFIG`.

Guide: `python -m flax_mha guide demo`.
"""
