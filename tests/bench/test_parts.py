"""`--parts`: which products and passes a layer's call is made of, and how often it does each."""

import json

import jax
import numpy as np
import pytest

from flax_mha.bench import cli
from flax_mha.bench.cases import Case
from flax_mha.bench.masks import allowed
from flax_mha.bench.parts import part, projections, tiles


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(part, "SHORTEST_PROGRAM", 1.0)
    monkeypatch.setattr(part, "FEWEST_STEPS", 2)


def attention_parts(case):
    return list(tiles.parts_of(case, *tiles.plan_of(case)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "1x2048x64x2 F",
        "1x2048x64x2 F causal",
        "2x1500x64x2 F causal",
        "3x1024x64x2 F window=128",
        "1x4096x64x2 F causal window=300",
        "16x128x64x2 F causal",
    ],
)
def test_tiles_are_those_in_which_any_pair_may_attend(text):
    case = Case.parse(text)
    tiling, visits = tiles.plan_of(case)
    may = allowed(case)
    may_TS = np.ones((case.length,) * 2, bool) if may is None else np.asarray(may)
    rows, keys = range(0, case.length, tiling.t), range(0, case.length, tiling.s)
    cut = [may_TS[t : t + tiling.t, s : s + tiling.s] for t in rows for s in keys]
    assert visits.tiles == tiling.lanes * sum(tile.any() for tile in cut)
    whole = sum(tile.all() and tile.shape[1] == tiling.s for tile in cut)
    # One that holds less than a whole block of keys is masked, whatever it holds.
    assert visits.masked >= visits.tiles - tiling.lanes * whole
    assert visits.masked == 0 or may is not None or case.length % tiling.s


@pytest.mark.parametrize(("direction", "products"), [("F", 2), ("FB", 7)])
@pytest.mark.parametrize("size", ["1x2048x64x2", "8x512x128x4", "32x128x64x2"])
def test_the_products_of_all_tiles_are_the_layers(size, direction, products):
    case = Case.parse(f"{size} {direction}")
    B, T, D = case.batch, case.length, case.features
    assert sum(one.times * one.flops for one in attention_parts(case)) == (
        products * 2 * B * T * T * D
    )
    of_projections = sum(one.times * one.flops for one in projections.parts_of(case))
    assert of_projections == (3 if case.gradient else 1) * 4 * 2 * B * T * D * D


@pytest.mark.slow
def test_each_part_is_what_its_name_says():
    case = Case.parse("2x128x32x2 FB causal dropout=0.2")
    tiling, _ = tiles.plan_of(case)
    assert (tiling.b, tiling.k, tiling.t, tiling.s) == (2, 2, 128, 128)
    parts = {one.name: one for one in attention_parts(case)}
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 2, 2, 128, 16)).astype("float32")
    weights = random.uniform(size=(2, 2, 128, 128)).astype("float32")
    expected = {
        "query . key": ("bkrh,bksh->bkrs", query, key),
        "d_context . value": ("bkrh,bksh->bkrs", query, key),
        "weights . value": ("bkrs,bksh->bkrh", weights, key),
        "d_query": ("bkrs,bksh->bkrh", weights, key),
        "d_key": ("bkrh,bkrs->bkhs", query, weights),
        "d_value": ("bkrh,bkrs->bkhs", query, weights),
    }
    for name, (equation, *operands) in expected.items():
        product = np.einsum(equation, *operands)
        np.testing.assert_allclose(parts[name].function(*operands), product, 1e-5, 1e-4)
        assert parts[name].shapes == tuple(x.shape for x in operands)
    exp, total = parts["maximum, exp, sum"].function(weights)
    np.testing.assert_allclose(exp / total[..., None], jax.nn.softmax(weights), 1e-5)
    masked = np.asarray(parts["mask"].function(weights))
    assert (np.isneginf(masked) == ~np.tri(128, dtype=bool)).all()
    kept = np.asarray(parts["dropout's bits"].function(np.float32([1.0, 2.0])))
    assert kept.shape == weights.shape
    assert kept.mean() == pytest.approx(0.8, abs=0.02)


def test_long_rows_are_turned_before_the_products_that_want_them_so():
    """The same gradients of keys and values."""
    case = Case.parse("1x1024x64x2 FB")
    tiling, visits = tiles.plan_of(case)
    parts = {one.name: one for one in attention_parts(case)}
    turned = parts["queries turned"]
    assert (tiling.turns_queries, turned.times) == (True, 2 * visits.tiles)
    random = np.random.default_rng(0)
    query, weights = (
        random.normal(size=shape).astype("float32")
        for shape in (turned.shapes[0], parts["d_query"].shapes[0])
    )
    for name in ("d_key", "d_value"):
        operands = turned.function(query), weights
        assert tuple(x.shape for x in operands) == parts[name].shapes
        found, expected = parts[name].function(*operands), query.swapaxes(2, 3) @ weights
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_prints_tables_and_leaves_its_file(tmp_path, capsys):
    out = tmp_path / "out"
    cases = ["1x128x32x2 FB causal dropout=0.1", "2x16x32x2 F"]
    words = ["--parts", *(word for case in cases for word in ("--case", case))]
    assert cli.main([*words, "--rounds", "1", "--seconds", "0.01", "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "d_query 1x2x128x128, 1x2x128x16 1" in printed
    assert "attention by 'reference', of whole arrays" in printed
    tiled, whole = json.loads((out / "parts.json").read_text())["cases"]
    assert [tiled["case"], whole["case"]] == cases
    listed = tiled["parts"]["projections"] + tiled["parts"]["attention"]
    assert all(one["seconds"] > 0 for one in listed)
    total = sum(one["times"] * one["seconds"] for one in listed)
    assert tiled["sums"]["layer"] == pytest.approx(total)
    assert f"its parts, each timed alone: {1e3 * total:.4g} ms" in printed
    assert whole["parts"]["attention"] == []


@pytest.mark.parametrize("words", [["--contenders", "ours"], ["--set", "readme"]])
def test_there_is_nobody_to_compare_with(words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--parts", *words])
    assert exit.value.code == 2
    assert f"unrecognized arguments: {words[0]}" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_told_before_anything_is_timed(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    words = ["--parts", "--case", "1x128x32x2 F", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert "error: cannot write the run's files" in told.err
    assert "query . key" not in told.out
