"""Speed and memory beside other frameworks' layers: `python -m flax_mha.bench`.

Guide: `python -m flax_mha guide benchmarks`.
"""
