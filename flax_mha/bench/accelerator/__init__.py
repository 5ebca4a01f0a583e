"""Attention of arrays on a GPU or TPU beside others': `python -m flax_mha.bench --set accelerator`.

Guide: `python -m flax_mha guide benchmarks`.
"""
