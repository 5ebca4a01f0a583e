"""What every test of the demo needs."""

import jax
import pytest
from demo_helpers import Run


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax counts steps in int32 and raises floats to that power."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def run_of(tmp_path):
    """A tiny run of a task."""
    return lambda task: Run(tmp_path, task)
