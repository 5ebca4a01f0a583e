"""What `python -m flax_mha NAME` does; which names there are stands in `__main__.py`."""
