"""Which implementations the tests can run here, for every table; one line for each new one.

The tests run on the CPU. `tests/accelerators` asks the machine itself.
"""

import pytest

from flax_mha import IMPLEMENTATIONS

# What needs another machine -> the regex with which it refuses every call here.
ELSEWHERE = {
    "pallas_tpu": r"'pallas_tpu' is a kernel for TPU\..*a program for cpu.*runs blockwise here",
    "cudnn": r"it is for NVIDIA GPUs, which jax asks while it traces, not for cpu",
}
# What runs here and takes long: its rows of a table are slow tests, all of them.
SLOW = {"pallas_interpreted"}

HERE = [name for name in IMPLEMENTATIONS if name not in ELSEWHERE]


def rows(names=HERE):
    """The implementations as parameters of a test."""
    return [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in names]
