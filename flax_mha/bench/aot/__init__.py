"""What the TPU's compiler says of every implementation: `python -m flax_mha.bench aot`.

No TPU is needed: libtpu compiles ahead of time on any machine.
"""
