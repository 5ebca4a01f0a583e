"""The TPU kernel interpreted, as plain JAX on any platform: to test it or to look into it; slow."""

from flax_mha.attention.blockwise.attend import attend_by
from flax_mha.attention.blockwise.engine import Engine
from flax_mha.attention.contract import Inputs, Options, Output
from flax_mha.attention.pallas_tpu.engine import Kernels
from flax_mha.attention.pallas_tpu.sizes import refusal


def unsupported(inputs: Inputs, options: Options, platform: str | None) -> str | None:
    """What the kernel serves, wherever it runs."""
    return refusal(inputs, options)


def engine(inputs: Inputs, options: Options) -> Engine:
    return Kernels(interpret=True)


def attend(inputs: Inputs, options: Options) -> Output:
    """The kernel's own arithmetic, interpreted."""
    return attend_by(engine(inputs, options), inputs, options)
