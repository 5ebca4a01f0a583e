"""A Pallas kernel for TPU: the whole contract, forward and backward, in memory O(T + S).

Its arithmetic is that of the blocks of plain JAX, tile by tile; so are the derivatives of every
order but the first gradient, which run by those blocks.

References: Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135; the splash attention of
jax, whose masks are spans of tiles as well.
"""

import jax

from flax_mha.attention.blockwise.attend import attend_by
from flax_mha.attention.blockwise.engine import Engine
from flax_mha.attention.contract import Inputs, Options, Output
from flax_mha.attention.pallas_tpu.engine import Kernels
from flax_mha.attention.pallas_tpu.sizes import refusal

OLDER = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of VMEM; those before v4 multiply no bfloat16 so


def unsupported(inputs: Inputs, options: Options, platform: str | None) -> str | None:
    """All but the weights, on TPU, in float32 and bfloat16."""
    if platform not in (None, "tpu"):
        return f"it is a kernel for TPU, and this is for {platform}"
    return _of_chip() or refusal(inputs, options)


def _of_chip() -> str | None:
    """Of the chips at hand; what a program is compiled for elsewhere is not known here."""
    kind = jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""
    if kind.startswith(OLDER):
        return f"its tiles need the VMEM of a TPU v5 or newer, 64 MiB, and this is a {kind}"
    return None


def engine(inputs: Inputs, options: Options) -> Engine:
    return Kernels()


def attend(inputs: Inputs, options: Options) -> Output:
    """context = dropout(softmax(scale query . key + bias)) . value, tile by tile."""
    return attend_by(engine(inputs, options), inputs, options)
