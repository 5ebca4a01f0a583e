"""Speed and memory beside other frameworks' layers: `python -m flax_mha.bench`."""
