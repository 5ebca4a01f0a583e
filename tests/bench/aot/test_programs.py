"""The programs of the contenders: all can be traced, and compute the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha.bench.aot.cases import CASES
from flax_mha.bench.aot.contenders import CONTENDERS, program

WITHOUT = {"bias": "bias", "distance_bias": "bias", "dropout=0.1": "dropout", "f: ALiBi": "bias"}
BUILT_IN = {f"f: {name}": name for name in ("causal", "window=1023", "segments", "soft_cap")}


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True])  # which needs the forward pass
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_program_can_be_traced_or_says_why_not(name, case, gradient):
    contender, data = CONTENDERS[name], CASES[case].data(1024)
    reason = contender.unsupported(CASES[case], 1024)
    if name.startswith("splash") and case in WITHOUT:
        assert reason == f"splash attention has no {WITHOUT[case]}"
        return
    assert reason is None
    function, arguments = program(contender, CASES[case], 1024, gradient)
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(function, *arguments))
    floats = {name: x for name, x in data.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    of_floats = {name: x.shape for name, x in floats.items()}
    assert shapes == (of_floats if gradient else data["query"].shape)


def numbers(data):
    """Normal floats, two packed sequences, the last keys of which are padding."""
    generator = np.random.default_rng(0)
    arrays = {name: generator.standard_normal(x.shape) for name, x in data.items()}
    places = np.arange(256)[None]
    arrays |= {"ids": places // 100, "real": places < 200}
    return {name: jnp.asarray(arrays[name], x.dtype) for name, x in data.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_functions_compute_what_is_built_in(name):
    """Their figures are those of the same function, gradient included."""
    results = []
    for case in (CASES[name], CASES[BUILT_IN[name]]):
        case = dataclasses.replace(case, dtype="float32", N=2, K=2, window=case.window and 100)
        data = numbers(case.data(256))
        function, _ = program(CONTENDERS["blockwise"], case, 256, True)
        results.append(jax.jit(function)(data, data["query"]))
    for ours, built_in in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(ours, built_in, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["causal", "full", "window=1023", "segments", "padding", "soft_cap", "grouped"]
)
def test_splash_computes_what_ours_does(name):
    """In interpret mode: its figures are those of the same function, gradient included."""
    from jax.experimental.pallas import tpu as pltpu

    case = dataclasses.replace(CASES[name], dtype="float32", N=2, K=2 if name != "grouped" else 1)
    case = dataclasses.replace(case, window=case.window and 100)
    data = numbers(case.data(256))
    # A query that padding removes attends to removed keys there, and to none in ours.
    real = data.get("real", jnp.ones((1, 256), bool))[..., None, None]
    cotangent = jnp.where(real, data["query"], 0)
    results = []
    for contender in ("reference", "splash 512"):
        function, _ = program(CONTENDERS[contender], case, 256, True)
        with pltpu.force_tpu_interpret_mode():
            results.append(function(data, cotangent))
    for ours, theirs in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(theirs, ours, atol=2e-4)
