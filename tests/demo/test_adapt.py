"""Adapters of a run: they learn another text, its parameters stay, and what cannot be is told."""

import hashlib
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from demo_helpers import Run

from flax_mha.demo import adapters, cli, evaluate
from flax_mha.demo.directory import RunDirectory
from flax_mha.demo.run import opened

pytestmark = pytest.mark.slow
QUICK = ["--steps", "30", "--learning-rate", "0.02", "--rank", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run, with adapters `other` of another text; what the making of these printed."""
    run = Run(tmp_path_factory.mktemp("adapt"), "language")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main(run.train("--no-plots")) == 0
    run.other = run.out.parent / "other.txt"
    run.other.write_bytes(b"hgfedcba" * 400)
    run.before = sums(run.out)
    return run


@pytest.fixture
def copy(base, tmp_path):
    """A run that a test may change."""
    shutil.copytree(base.out, tmp_path / "run", ignore=shutil.ignore_patterns("adapters"))
    return tmp_path / "run"


def sums(folder):
    """The SHA-256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def adapt(out, data, *options):
    return cli.main(["adapt", str(out), "--data", str(data), *QUICK, *options])


def results_of(out, name):
    return json.loads((out / "adapters" / name / "adapter.json").read_text())["results"]


@pytest.fixture(scope="module")
def adapted(base):
    """The run once `other` is there."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert adapt(base.out, base.other) == 0
    return base


def test_adapters_learn_and_the_base_stays_bit_for_bit(copy, base, capsys):
    _, before, _ = opened(copy)
    assert adapt(copy, base.other, "--name", "mine") == 0
    printed = capsys.readouterr().out
    _, after, _ = opened(copy)
    assert adapters.fingerprint(before) == adapters.fingerprint(after)
    now = sums(copy)
    assert {name: now[name] for name in base.before} == base.before
    added = set(now) - set(base.before)
    assert {name.split("/")[1] for name in added if name.startswith("adapters/")} == {"mine"}
    results = results_of(copy, "mine")
    assert results["adapted"] < 0.5 * results["base"]
    for name in ("base", "adapted", "merged"):
        assert re.search(rf"{name} +│ +{results[name]:.3f} ", printed)
    assert f"{results['adapted']:.3f}" == f"{results['merged']:.3f}"
    # Four projections of 16 by 16, rank 4.
    total = sum(leaf.size for leaf in jax.tree.leaves(after)) + 512
    assert f"Trained 512 of {total:,} parameters" in printed
    size = sum((copy / name).stat().st_size for name in added)
    assert f"adapters/mine/, {size:,} bytes of files" in printed


def test_the_collection_lora_is_what_is_judged(adapted):
    """The figures, anew from the files: beside the parameters, by the linen module."""
    task, params, _ = opened(adapted.out)
    held = adapters.load(RunDirectory(adapted.out), task, params, "other")
    text = np.frombuffer(adapted.other.read_bytes()[-320:], np.uint8)
    assert set(held.arrays["block_0"]["attention"]) == set(task.settings.attention.projections)
    model = task.model.clone(lora=held.rule)
    beside = evaluate.bits_per_byte(model, params, text, 16, held.arrays)
    assert beside == pytest.approx(results_of(adapted.out, "other")["adapted"], rel=1e-5)
    none = jax.tree.map(np.zeros_like, held.arrays)
    without = evaluate.bits_per_byte(model, params, text, 16, none)
    assert without == pytest.approx(results_of(adapted.out, "other")["base"], rel=1e-5)


def test_generate_with_an_adapter_writes_its_text(adapted, capsys):
    call = ["generate", str(adapted.out), "--bytes", "12", "--temperature", "0.05"]
    call += ["--prompt", "hgfedcbahgfe"]
    assert cli.main([*call, "--adapter", "other"]) == 0
    assert "hgfedcbahgfedcbahgfedcba" in capsys.readouterr().out
    assert cli.main(call) == 0
    assert "hgfedcbahgfedcbahgfedcba" not in capsys.readouterr().out
    assert cli.main([*call, "--adapter", "other", "--weights", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "hgfedcbahgfedcbahgfedcba" in printed
    # Of the adapters' text, not of the run's.
    bits = float(re.search(r"bits per byte +│ +([\d.]+) ", printed)[1])
    assert bits < 0.5 * results_of(adapted.out, "other")["base"]


def test_an_adapter_that_is_not_there(adapted, capsys):
    for name in ("othr", "../adapters/other", ""):
        assert cli.main(["generate", str(adapted.out), "--adapter", name]) == 2
        message = f"has no adapters {name!r}. It has: other"
        assert message in capsys.readouterr().err


def test_the_same_name_twice(adapted, copy, capsys):
    shutil.copytree(adapted.out / "adapters", copy / "adapters", dirs_exist_ok=True)
    first = sums(copy)
    assert adapt(copy, adapted.other) == 2
    assert "has adapters 'other' already. Choose another name" in capsys.readouterr().err
    assert sums(copy) == first
    assert adapt(copy, adapted.other, "--overwrite", "--seed", "1", "--which", "query") == 0
    task, params, _ = opened(copy)
    held = adapters.load(RunDirectory(copy), task, params, "other")
    assert set(held.arrays["block_0"]["attention"]) == {"query"}


def test_a_full_disk_keeps_those_that_were_there(adapted, copy, capsys, monkeypatch):
    shutil.copytree(adapted.out / "adapters", copy / "adapters", dirs_exist_ok=True)
    first = sums(copy / "adapters" / "other")

    def full(file, text):
        if file.name == "adapter.json":
            raise OSError(28, "No space left on device")
        file.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr(adapters.checkpoint, "write_at_once", full)
        assert adapt(copy, adapted.other, "--overwrite", "--seed", "1") == 2
    assert "cannot write the adapters: [Errno 28]" in capsys.readouterr().err
    assert sums(copy / "adapters" / "other") == first
    assert adapters.names(RunDirectory(copy)) == ["other"]
    assert adapt(copy, adapted.other, "--overwrite", "--seed", "1") == 0
    assert sums(copy / "adapters" / "other") != first
    assert [path.name for path in (copy / "adapters").iterdir()] == ["other"]


def test_what_was_cut_off_is_written_anew(adapted, copy, capsys):
    """As many steps, and a whole checkpoint in the folder: it must not be kept."""
    shutil.copytree(adapted.out / "adapters", copy / "adapters", dirs_exist_ok=True)
    (copy / "adapters/other/adapter.json").unlink()
    assert adapters.names(RunDirectory(copy)) == []
    assert adapt(copy, adapted.other, "--seed", "1") == 2
    assert "a folder 'other' that holds no whole adapters. Choose" in capsys.readouterr().err
    assert adapt(copy, adapted.other, "--seed", "1", "--overwrite") == 0
    found = []
    for out in (copy, adapted.out):
        task, params, _ = opened(out)
        found.append(adapters.load(RunDirectory(out), task, params, "other").arrays)
    layers = [tree["block_0"]["attention"]["query"]["a"] for tree in found]
    assert not np.array_equal(*layers)


def test_of_another_run(adapted, run_of, capsys):
    """Of the same sizes, so that only the parameters tell."""
    run = run_of("language")
    assert cli.main(run.train("--no-plots", "--steps", "2")) == 0
    shutil.copytree(adapted.out / "adapters", run.out / "adapters")
    assert cli.main(["generate", str(run.out), "--adapter", "other"]) == 2
    assert "the adapters 'other' are not of the parameters that" in capsys.readouterr().err
    assert cli.main(run.train("--no-plots", "--steps", "2", "--overwrite")) == 0
    assert list((run.out / "adapters").iterdir()) == []


def test_damaged_adapters(adapted, copy, capsys):
    shutil.copytree(adapted.out / "adapters", copy / "adapters", dirs_exist_ok=True)
    folder = copy / "adapters" / "other"
    call = ["generate", str(copy), "--adapter", "other"]
    largest = max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert cli.main(call) == 2
    assert "is damaged" in capsys.readouterr().err
    bad = {
        "{": "is not valid JSON",
        99_999 * "[": "is not valid JSON",
        "{}": "must hold base, lora",
    }
    for text, message in bad.items():
        (folder / "adapter.json").write_text(text)
        assert cli.main(call) == 2
        assert message in capsys.readouterr().err


TEXTS = {
    "missing": (None, "cannot read the text"),
    "empty": (b"", "too little text in text.bin: 0 training and 0 held-out bytes"),
    "nothing held out": (b"abcdefghi", "too little text in text.bin: 9 training and 0 held-out"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_too_short(base, tmp_path, capsys, case):
    content, message = TEXTS[case]
    path = tmp_path / "text.bin"
    if content is not None:
        path.write_bytes(content)
    assert adapt(base.out, path, "--name", "never") == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (base.out / "adapters" / "never").exists()


def test_a_text_shorter_than_the_context(copy, base, tmp_path, capsys):
    settings = (copy / "settings.json").read_text()
    assert settings.count('"context": 16') == 1
    (copy / "settings.json").write_text(settings.replace('"context": 16', '"context": 40'))
    path = tmp_path / "short.txt"
    path.write_bytes(b"abcdefgh" * 5)
    assert adapt(copy, path) == 2
    told = "short.txt is too short: 36 bytes to learn from, of 40, hold no window of 41."
    assert told in capsys.readouterr().err


def test_a_folder_for_a_text(base, tmp_path, capsys):
    assert adapt(base.out, tmp_path) == 2
    assert "cannot read the text" in capsys.readouterr().err


def test_bytes_that_are_no_text(copy, tmp_path, capsys):
    """Neither UTF-8 nor printable, under a name that is no folder's."""
    path = tmp_path / "-- \x1b[31m ü.bin"
    path.write_bytes(bytes(range(256)) * 3)
    assert adapt(copy, path, "--steps", "3") == 0
    assert "\x1b[31m" not in capsys.readouterr().out
    assert adapters.names(RunDirectory(copy)) == ["31m"]
    assert cli.main(["generate", str(copy), "--adapter", "31m", "--bytes", "3"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "17"], "must be in [1, 16]"),
        (["--which", "query", "quarry"], "adapters are of this layer's projections, query, key"),
        (["--learning-rate", "1e30", "--steps", "9"], "diverged. Nothing was saved"),
    ],
)
def test_options_that_cannot_be(base, capsys, options, message):
    assert adapt(base.out, base.other, "--name", "never", *options) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (base.out / "adapters" / "never").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "must be a whole number >= 1 and below 2**31, not '0'"),
        (["--alpha", "-1"], "must be a number above 0"),
        (["--steps", "0"], "must be a whole number >= 1"),
        (["--name", "../../etc"], "must be letters, digits"),
        (["--name", ".."], "must be letters, digits"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["adapt", "runs", "--data", "x", *options])
    assert message in capsys.readouterr().err


def test_a_run_that_is_still_trained(copy, base, capsys):
    (copy / "UNFINISHED").write_text("")
    assert adapt(copy, base.other) == 2
    assert "is not finished: adapters would not fit" in capsys.readouterr().err


def test_other_tasks_and_no_run(run_of, base, tmp_path, capsys):
    run = run_of("digits")
    assert adapt(run.out, base.other) == 2
    assert "is not a run: no settings.json" in capsys.readouterr().err
    assert cli.main(run.train("--no-plots", "--steps", "1")) == 0
    assert adapt(run.out, base.other) == 2
    told = f"adapters are of language models, and {run.out} is one of digits"
    assert told in capsys.readouterr().err
    generate = ["generate", str(run.out)]
    for option, message in itertools.chain(
        [(["--adapter", "x"], told)],
        [([f"--{name}", "int8"], "does not generate text") for name in ("cache", "weights")],
    ):
        assert cli.main([*generate, *option]) == 2
        assert message in capsys.readouterr().err


def test_dropout_grouped_heads_and_a_gate(run_of):
    """Whatever the layer has gets an adapter; dropout draws from a key."""
    run = run_of("language")
    options = ["attention.use_gate=true", "attention.num_kv_heads=1", "attention.dropout=0.2"]
    changes = [f"--set={option}" for option in [*options, "model.dropout=0.1"]]
    assert cli.main(run.train("--no-plots", *changes)) == 0
    other = run.out.parent / "other.txt"
    other.write_bytes(b"hgfedcba" * 400)
    assert adapt(run.out, other) == 0
    results = results_of(run.out, "other")
    assert results["adapted"] < 0.7 * results["base"]
    assert f"{results['adapted']:.3f}" == f"{results['merged']:.3f}"
