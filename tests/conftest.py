"""Every test runs strictly: no implicit promotion, warnings are errors, 8 virtual CPU devices.

Compiled programs are kept in `.pytest_cache`, for all workers and for the next run.
"""

import os
import pathlib

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["MPLBACKEND"] = "agg"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Of these functions' cases one in so many runs by default; the others are slow.
THINNED = {
    "test_attention.py::test_gradients_are_the_oracle_s_slopes": 5,
    "test_attention.py::test_forward_is_the_oracle_s": 4,
    "test_attention.py::test_float64": 4,
    "test_attention.py::test_16_bits": 5,
    "test_oracle.py::test_gradient_float64": 6,
    "test_keras_parity.py::test_options": 5,
    "test_keras_parity.py::test_attention_axes": 5,
    "test_keras_parity.py::test_masks": 4,
    "test_keras_parity.py::test_fused_path": 4,
    "test_masks_garbage.py::test_garbage_in_padding_reaches_nothing": 4,
    "test_decoding.py::test_ragged_chunks_are_one_pass": 3,
    "test_updates.py::test_the_constraint_holds_after_every_update": 4,
    "test_tiles.py::test_spans_are_the_blocks_that_the_band_leaves": 4,
    "test_regularizers.py::test_jit_vmap_and_grad": 3,
    "test_initializers.py::test_jit_and_vmap": 4,
    "test_dropout.py::test_any_tile_holds_the_same_bits": 3,
    "test_merge.py::test_two_parts_are_the_whole": 3,
    "test_linen.py::test_apply_equals_the_function": 4,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    seen = dict.fromkeys(THINNED, 0)
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', '')}"
        if name in seen:
            if seen[name] % THINNED[name]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


@pytest.fixture
def peers_promote():
    """The peers' code promotes dtypes and ranks; see the strict tests/conftest.py."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
