"""Every test runs strictly: no implicit promotion, warnings are errors, 8 virtual CPU devices.

Those of `tests/accelerators`, run alone, have the machine's own devices. Compiled programs are kept
in `.pytest_cache`, for all workers and for the next run. They are compiled without LLVM's
optimization, which would take two thirds of a test's time; with OPTIMIZED in the environment as a
user's are.
"""

import os
import pathlib

os.environ["KERAS_BACKEND"] = "jax"
os.environ["MPLBACKEND"] = "agg"

import hypothesis
import jax
import pytest
from residence import Programs
from thinning import singles, tables, unlike

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# By default few examples, the same ones everywhere; `--hypothesis-profile=long` draws anew until it
# has found something, has drawn as many as EXAMPLES allows (`fewer` in drawn_calls), or is stopped.
# A first call is compiled, which is slow and no ill health.
PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", max_examples=10, derandomize=True, **PATIENT)
MANY = int(os.environ.get("EXAMPLES", 100_000))
hypothesis.settings.register_profile("long", max_examples=MANY, print_blob=True, **PATIENT)
hypothesis.settings.load_profile("default")

TESTS = pathlib.Path(__file__).parent
# Wrong uses, for type checkers; and what needs cosmic-ray where it is imported.
collect_ignore = ["support/example_project", "support/faults.py", "trust/mutation.py"]
CACHE = TESTS.parent / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# In these files, of a function with 2 cases or more one in so many runs by default; the others are
# slow.
THINNED = {
    "attention/context/test_collectives.py": 6,
    "attention/context/test_edges.py": 5,
    "attention/context/test_groups.py": 3,
    "attention/context/test_kernels_lowered.py": 4,
    "attention/context/test_pair_functions_context.py": 40,
    "attention/context/test_strategies.py": 6,
    "attention/test_attention.py": 44,
    "attention/test_blockwise.py": 12,
    "attention/test_cudnn.py": 20,
    "attention/test_cut.py": 3,
    "attention/test_derivatives.py": 104,
    "attention/test_dropout.py": 8,
    "attention/test_lanes.py": 15,
    "attention/test_merge.py": 8,
    "attention/test_order.py": 3,
    "attention/test_pair_calls.py": 14,
    "attention/test_pair_errors.py": 10,
    "attention/test_pair_functions.py": 74,
    "attention/test_pair_functions_meshes.py": 14,
    "attention/test_pair_traces.py": 10,
    "attention/test_pallas_edges.py": 3,
    "attention/test_pallas_lowered.py": 4,
    "attention/test_pallas_pairs.py": 3,
    "attention/test_pallas_tiles.py": 12,
    "attention/test_pallas_tpu.py": 3,
    "attention/test_shifts.py": 99,
    "attention/test_static_band.py": 6,
    "attention/test_tiles.py": 8,
    "bench/aot/test_programs.py": 18,
    "bench/test_contenders.py": 4,
    "core/pairs/test_expression.py": 4,
    "core/pairs/test_intervals.py": 96,
    "demo/test_dates.py": 2,
    "demo/test_inspect.py": 9,
    "demo/test_measures.py": 3,
    "demo/test_mesh.py": 6,
    "demo/test_resume.py": 9,
    "interop/flax/test_attention_fn.py": 10,
    "interop/flax/test_weights.py": 3,
    "interop/huggingface/test_adapters.py": 3,
    "interop/keras/test_archives.py": 3,
    "interop/keras/test_files.py": 3,
    "interop/keras/test_hub_archives.py": 8,
    "interop/keras/test_lora.py": 8,
    "interop/keras/test_other_classes.py": 8,
    "interop/keras/test_quantized.py": 12,
    "interop/keras/test_save.py": 2,
    "interop/keras/test_weights.py": 6,
    "interop/test_jax_nn.py": 10,
    "interop/torch/test_beside.py": 8,
    "interop/torch/test_weights.py": 6,
    "keras/test_constraints.py": 16,
    "keras/test_initializers.py": 16,
    "keras/test_regularizers.py": 16,
    "layer/test_bad_cache.py": 8,
    "layer/test_bad_transformations.py": 2,
    "layer/test_caches.py": 8,
    "layer/test_chunks.py": 14,
    "layer/test_context.py": 6,
    "layer/test_debugging.py": 12,
    "layer/test_dropout.py": 6,
    "layer/test_every_transformation.py": 8,
    "layer/test_explicit_meshes.py": 18,
    "layer/test_flags.py": 8,
    "layer/test_int8_cache.py": 56,
    "layer/test_int8_weights.py": 56,
    "layer/test_keras_parity.py": 34,
    "layer/test_latent.py": 14,
    "layer/test_lora.py": 8,
    "layer/test_neighborhood_layer.py": 14,
    "layer/test_norms.py": 6,
    "layer/test_oracle.py": 51,
    "layer/test_pair_decoding.py": 39,
    "layer/test_pair_masks.py": 14,
    "layer/test_pair_meshes.py": 4,
    "layer/test_transformations.py": 12,
    "positions/test_axes.py": 4,
    "positions/test_grid_bias.py": 4,
    "positions/test_positions.py": 8,
    "positions/test_scores.py": 8,
    "sharding/test_linen_boxes.py": 2,
    "sharding/test_nnx_names.py": 2,
    "test_decoding.py": 6,
    "test_linen.py": 8,
    "test_masks_garbage.py": 10,
    "test_masks_ids.py": 8,
    "test_masks_semantics.py": 8,
    "test_masks_traced.py": 8,
    "test_neighborhood.py": 52,
    "test_nnx.py": 6,
    "test_params.py": 6,
    "test_persistence.py": 8,
    "training/test_updates.py": 8,
    "trust/test_extremes.py": 3,
}
PROGRAMS = Programs()
LEFT = pytest.StashKey[int]()
# Of the slow cases of a function one in so many run, chosen to be unlike others, and in these files
# fewer; with EVERY_ROW in the environment all of them do.
RARE_ELSEWHERE = 8
RARE = {
    "attention/context/test_pair_functions_context.py": 18,
    "attention/test_attention.py": 18,
    "attention/test_derivatives.py": 18,
    "attention/test_order.py": 18,
    "attention/test_pair_functions.py": 18,
    "attention/test_pallas_tpu.py": 18,
    "attention/test_shifts.py": 24,
    "attention/test_tiles.py": 18,
    "core/pairs/test_intervals.py": 18,
    "demo/test_mesh.py": 18,
    "demo/test_processes.py": 18,
    "layer/test_collectives.py": 18,
    "layer/test_every_transformation.py": 24,
    "layer/test_explicit_meshes.py": 18,
    "layer/test_keras_parity.py": 18,
    "layer/test_oracle.py": 18,
    "layer/test_pair_decoding.py": 18,
    "test_decoding.py": 18,
    "test_neighborhood.py": 18,
    "test_readme.py": 1,
    "trust/test_extremes.py": 18,
    "trust/test_hygiene.py": 24,
    "trust/test_random_calls.py": 1,
}
# Tables that `--thin` leaves whole: each of their cases is another part of JAX.
WHOLE = {
    "layer/test_every_transformation.py",
    "layer/test_explicit_meshes.py",
    "layer/test_transformations.py",
}


def pytest_addoption(parser):
    parser.addoption(
        "--thin",
        type=int,
        default=1,
        metavar="N",
        help="of each function with 2 cases or more run one in N, chosen to be unlike each other,"
        " and of a file's other functions every second, from N = 15 on one in N / 5; others of both"
        " where N is negative",
    )


def pytest_terminal_summary(terminalreporter, config):
    if (n := config.getoption("thin")) != 1:
        told = f"--thin={n}: of each function with 2 cases or more one in {abs(n)} ran, and of the"
        told += f" others of a file one in {max(2, abs(n) // 5)}"
        terminalreporter.write_line(told)
    if (count := config.stash.get(LEFT, 0)) and "not slow" not in config.getoption("markexpr"):
        told = f"{count} slow cases of large tables did not run: with EVERY_ROW=1 they do"
        terminalreporter.write_line(told)


def pytest_configure(config):
    """Before any device is asked for: the CPU, unless the accelerators' tests are all there is."""
    files = [config.invocation_params.dir / path.partition("::")[0] for path in config.args]
    if all(path.resolve().is_relative_to(TESTS / "accelerators") for path in files):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    if "OPTIMIZED" not in os.environ:
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
        if jax.__version_info__ < (0, 11):  # newer ones do not know the flag
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    jax.config.update("jax_platforms", "cpu")


def pytest_runtest_logfinish():
    """After a test: two workers with every program of the slow tests took 14 GB at half of them."""
    PROGRAMS.drop_if_many()


def file_of(item):
    return item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""


def is_slow(item):
    return item.get_closest_marker("slow") is not None


def is_fast(item):
    return not is_slow(item)


def left_out(items, n):
    """What `--thin` leaves out."""
    thinned = [cases for cases in tables(items, is_fast) if file_of(cases[0]) not in WHOLE]
    others = [] if n == 1 else singles(items, is_fast)
    step = max(2, abs(n) // 5)
    fewer = {case for cases in others for i, case in enumerate(cases) if i % step != (n < 0)}
    return fewer | {case for cases in thinned for case in set(cases) - set(unlike(cases, n))}


def rare(items):
    """The slow cases that run with EVERY_ROW alone."""
    slow = tables(items, is_slow)
    kept = [unlike(cases, RARE.get(file_of(cases[0]), RARE_ELSEWHERE)) for cases in slow]
    return {case for cases, some in zip(slow, kept) for case in set(cases) - set(some)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items, config):
    for cases in tables(items, is_fast):
        for i, item in enumerate(cases):
            if i % THINNED.get(file_of(item), 1):
                item.add_marker(pytest.mark.slow)
    out = left_out(items, config.getoption("thin"))
    if "EVERY_ROW" not in os.environ:
        config.stash[LEFT] = len(some := rare(items))
        out |= some
    config.hook.pytest_deselected(items=[item for item in items if item in out])
    items[:] = [item for item in items if item not in out]
    # The longest first: at the end one process would run them and the others would wait.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture
def peers_promote():
    """The peers' code promotes dtypes and ranks; see the strict tests/conftest.py."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
