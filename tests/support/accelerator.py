"""The machine that `tests/accelerators` runs on; its files are skipped where it has no accelerator.

python -m pytest tests/accelerators                         # with jax, flax and pytest alone
FLAX_MHA_REHEARSAL=1 python -m pytest tests/accelerators    # the code of the tests, on a CPU
"""

import os

import jax
import pytest

PLATFORM = jax.default_backend()  # gpu or tpu; cpu in a rehearsal
if PLATFORM == "cpu" and not os.environ.get("FLAX_MHA_REHEARSAL"):
    pytest.skip(
        "JAX has no accelerator here. Where there is one: `python -m pytest tests/accelerators`, "
        "on its own; FLAX_MHA_REHEARSAL=1 before it runs these tests on a CPU.",
        allow_module_level=True,
    )
