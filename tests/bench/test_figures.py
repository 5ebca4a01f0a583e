"""Cases, rounds, targets and the crossover: arithmetic on made-up numbers."""

import os
import sys

import pytest
from bench_helpers import SMALL

from flax_mha.bench import environment, timing
from flax_mha.bench.cases import SETS, Case
from flax_mha.bench.crossover import PAIR, crossovers
from flax_mha.bench.masks import allowed
from flax_mha.bench.memory import long_sequences
from flax_mha.bench.pairs import Pair, pairs_of
from flax_mha.bench.results import LayerResult, Row, Run
from flax_mha.bench.targets import targets

# --- cases and rounds ---------------------------------------------------------------------------


def test_a_label_is_the_text_of_its_case():
    for case in (case for cases in SETS.values() for case in cases):
        assert Case.parse(case.label) == case
    assert Case.parse(" 2 x 5 x 21 x 3 FB ") == Case(2, 5, 21, 3, gradient=True)
    texts = {case.label for case in SETS["readme"]}
    assert {"8x512x512x8 FB dropout=0.1", "64x8x512x8 F", "1x8192x512x8 FB window=256"} <= texts
    assert len(texts) == len(SETS["readme"])


@pytest.mark.parametrize(
    "variant", ["F", "F causal", "F window=3", "F causal window=3", "F window=9"]
)
def test_pairs_are_those_of_the_mask(variant):
    case = Case.parse(f"{SMALL} {variant}")
    mask = allowed(case)
    assert case.pairs == (25 if mask is None else int(mask.sum()))


def test_operations_are_counted_by_hand():
    projections = 4 * 2 * (2 * 5) * 21 * 21
    products = 2 * 2 * 2 * 3 * 15 * 7
    assert Case.parse(f"{SMALL} F causal").flops == projections + products
    assert Case.parse(f"{SMALL} FB causal").flops == 3 * (projections + products)


def test_rounds_adapt_to_the_seconds():
    estimates = {"fast": 0.5, "close": 0.7, "slow": 2.0, "slower": 4.0, "slowest": 9.0}
    plans = timing.make_plans(estimates, seconds=5.0)
    assert [plan.rounds for plan in plans.values()] == [5, 5, 3, 2, 1]
    plans = timing.make_plans(estimates, seconds=50.0)
    assert [plan.rounds for plan in plans.values()] == [20, 14, 5, 2, 1]
    assert {p.rounds for p in timing.make_plans(estimates, 50.0, rounds=7).values()} == {7}
    (quick,) = timing.make_plans({"quick": 0.001}, seconds=1000.0).values()
    assert quick == timing.Plan(rounds=25, calls=10, warm=True)


@pytest.mark.slow
def test_rounds_are_interleaved_and_begin_in_turns():
    order = list(timing.schedule({"a": 4, "b": 4, "c": 2}))
    assert order == ["a", "b", "c", "b", "a", "c", "a", "b", "a", "b"]
    calls = []
    plans = {"a": timing.Plan(2, 3, warm=False), "b": timing.Plan(1, 1, warm=True)}
    contenders = {name: timing.Call(lambda name=name: calls.append(name)) for name in plans}
    names = [name for name, seconds in timing.interleave(contenders, plans) if seconds >= 0]
    assert names == ["a", "b", "a"]
    assert calls == ["a"] * 3 + ["b"] * 2 + ["a"] * 3


@pytest.mark.parametrize(
    ("before", "option", "torch", "after", "told"),
    [
        (None, None, False, "passive", "passive"),
        ("active", None, False, "active", "active (set by the user)"),
        ("passive", "active", False, "active", "active"),
        (None, None, True, None, "unset (torch was imported before, so it stays)"),
        ("passive", None, True, "passive", "passive (set by the user)"),
    ],
)
def test_openmp_policy(monkeypatch, before, option, torch, after, told):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if before is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    modules = {name: module for name, module in sys.modules.items() if name != "torch"}
    monkeypatch.setattr(environment.sys, "modules", modules | ({"torch": None} if torch else {}))
    assert environment.set_omp_wait(option) == told
    assert os.environ.get("OMP_WAIT_POLICY") == after


# --- targets and crossover ----------------------------------------------------------------------


def _result(label, **milliseconds):
    """A case whose contenders took these times; a tuple is (minimum, median)."""
    families = {"keras": "jax", "linen": "jax", "sdpa": "torch", "mha": "torch"}
    rows = []
    for name, times in milliseconds.items():
        low, median = times if isinstance(times, tuple) else (times, times)
        samples = [low / 1e3, median / 1e3, 3 * median / 1e3]
        rows.append(Row(name, families.get(name, "ours"), samples=samples))
    return LayerResult(Case.parse(label), rows, [1e11])


def _found(*results, **fields):
    run = Run({}, {}, list(results), **fields)
    return {target.name: target for target in targets(run)}


def test_targets_of_speed_on_made_up_numbers():
    found = _found(
        _result(
            "1x4096x8x2 FB causal", ours=(90, 100), keras=(390, 390), linen=(380, 500), sdpa=80
        ),
        _result("1x4096x8x2 FB", ours=200, keras=500, sdpa=250, mha=190),
        _result("8x512x8x2 FB", ours=100, keras=90, linen=120),
        _result("1x128x8x2 FB window=4 alone", ours=21),
    )
    expected = {
        "1x4096x8x2 FB causal: time over the fastest JAX layer's": (100 / 390, "met"),
        "8x512x8x2 FB: time over the fastest JAX layer's": (100 / 90, "missed"),
        "T=4096 FB causal: times faster than the fastest JAX layer": (3.9, "missed"),
        "T=4096 FB: times faster than the fastest JAX layer": (2.5, "met"),
        "T=4096 FB causal: times faster than torch's best": (0.8, "missed"),
        "T=4096 FB: times faster than torch's best": (0.95, "missed"),
        "T=4096 F: times faster than torch's best": (None, "not measured"),
    }
    for name, (value, verdict) in expected.items():
        assert found[name].verdict == verdict, name
        assert found[name].value == (None if value is None else pytest.approx(value)), name
    evidence = found["T=4096 FB causal: times faster than the fastest JAX layer"].evidence
    assert evidence == "keras; by minima 4.22"  # 380 / 90: each side's best
    assert "1x128x8x2 FB window=4 alone: time over the fastest JAX layer's" not in found


def _turns(part, above, below, times):
    samples = [[low / 1e3, median / 1e3, 3 * median / 1e3] for low, median in times]
    return Pair(part, Case.parse(above), Case.parse(below), *samples)


def test_targets_of_pairs_on_made_up_numbers():
    long = ("1x4096x8x2 FB causal", "1x4096x8x2 FB")
    dropped = ("8x512x8x2 FB dropout=0.1", "8x512x8x2 FB")
    shorter = ("8x256x8x2 FB dropout=0.1", "8x256x8x2 FB")
    windows = ("1x128x8x2 FB window=4", "1x64x8x2 FB window=4")
    found = _found(
        pairs=[
            _turns("layer", *long, [(60, 70), (90, 100)]),
            _turns("attention", *long, [(50, 50), (90, 100)]),
            _turns("layer", *dropped, [(120, 130), (100, 100)]),
            _turns("layer", *shorter, [(900, 900), (1, 1)]),
            _turns("layer", *windows, [(20, 21), (10, 10)]),
            _turns("layer", f"{windows[0]} causal", windows[0], [(9, 9), (9, 9)]),
            _turns("layer", f"{long[0]} window=4", f"{long[1]} window=4", [(9, 9), (9, 9)]),
        ]
    )
    expected = {
        "1x4096x8x2 FB causal, layer: over not causal": (0.7, "missed"),
        "1x4096x8x2 FB causal, attention: over not causal": (0.5, "met"),
        "T=4096 F: causal over not causal": (None, "not measured"),
        "8x512x8x2 FB dropout=0.1: over without": (1.3, "missed"),
        "1x128x8x2 FB window=4: over half the length": (2.1, "met"),
    }
    for name, (value, verdict) in expected.items():
        assert found[name].verdict == verdict, name
        assert found[name].value == (None if value is None else pytest.approx(value)), name
    evidence = found["1x4096x8x2 FB causal, layer: over not causal"].evidence
    assert evidence == "in turns; by minima 0.67"
    assert not any("8x256" in name for name in found)
    assert sum(": over not causal" in name for name in found) == 2
    assert sum("over half the length" in name for name in found) == 1


def test_pairs_are_of_cases_that_differ_in_one_thing():
    texts = ("F", "F causal", "F dropout=0.1", "FB dropout=0.1 causal", "FB dropout=0.1")
    cases = [Case.parse(f"1x64x8x2 {text}") for text in texts]
    cases += [Case.parse("1x32x8x2 FB window=4"), Case.parse("1x64x8x2 FB window=4 alone")]
    pairs = {(p.part, p.above.variant, p.below.variant, p.below.length) for p in pairs_of(cases)}
    assert pairs == {
        ("layer", "F causal", "F", 64),
        ("attention", "F causal", "F", 64),
        ("layer", "F dropout=0.1", "F", 64),
        ("layer", "FB causal dropout=0.1", "FB dropout=0.1", 64),
        ("layer", "FB window=4", "FB window=4", 32),
    }


def test_targets_of_memory_and_start_on_made_up_numbers():
    memory = {"layer, T=8192, 8 heads": 100_000_000, "layer, T=16384, 8 heads": 230_000_000}
    times = {"ours": [1.0, 5.0, 1.2], "linen": [1.0, 0.9, 3.0]}
    found = _found(memory=memory, compile_seconds=times, import_seconds=[0.3, 0.09, 0.08])
    layer = found["temporaries of FB causal: layer, T=16384, 8 heads"]
    assert (layer.value, layer.limit, layer.verdict) == (230, 256, "met")
    growth = found["temporaries of FB causal: T=16384 over T=8192"]
    assert (growth.value, growth.verdict) == (pytest.approx(2.3), "missed")
    unknown = found["temporaries of FB causal: attention, T=131072, 1 head"]
    assert (unknown.verdict, unknown.evidence) == ("not measured", "the compiler does not say")
    compilation = found["compilation of FB over linen's"]
    assert (compilation.value, compilation.verdict) == (pytest.approx(1.2), "met")
    start = found["`import flax_mha` after `import flax`"]
    assert (start.value, start.verdict) == (0.09, "met")
    nothing = _found()
    assert {target.verdict for target in nothing.values()} == {"not measured"}
    assert all(target.evidence for target in nothing.values())


def _pair(length, reference, blockwise):
    times = dict(zip(PAIR, (reference, blockwise)))
    return _result(f"1x{length}x8x2 F", **times)


def test_crossover_is_where_blockwise_stays_ahead():
    times = [(16, 1, 0.9), (64, 2, 3), (256, 9, 8), (128, 4, 5), (512, 40, 20)]
    found = crossovers(Run({}, {}, [_pair(*row) for row in times]))["F"]
    assert found.blockwise_from == 256
    assert found.chosen[64] == "reference"
    assert found.chosen[512] == "blockwise"
    assert found.lost == {16: pytest.approx(1 / 0.9), 128: pytest.approx(5 / 4)}
    slow = crossovers(Run({}, {}, [_pair(64, 1, 2), _pair(512, 1, 2)]))["F"]
    assert slow.blockwise_from is None
    assert crossovers(Run({}, {}, [_pair(64, 1, 2)])) == {}


@pytest.mark.slow
def test_memory_is_of_the_compiled_gradient():
    programs = {"small": (64, 2, 0.0, False), "large": (4096, 2, 0.0, False)}
    small, large = long_sequences(programs).values()
    assert 0 < small < large < 4096 * 4096 * 4  # below one matrix [T, S]
