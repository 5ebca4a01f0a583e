"""Whole runs, small: the files appear, the loss falls, mistakes are told and leave nothing."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import serialization

from flax_mha.demo import cli, plots, run, tasks, train
from flax_mha.demo.compressors import compressed_bits_per_byte
from flax_mha.demo.config_file import settings_from

TABLES = {
    "model": {"layers": 1, "features": 16, "context": 16},
    "attention": {"num_heads": 2},
    "train": {"steps": 60, "batch_size": 4, "warmup_steps": 5, "learning_rate": 0.02},
}
# optax counts steps in int32 and raises floats to that power.
pytestmark = pytest.mark.usefixtures("optax_promotes")

FILES = {"metrics.jsonl", "settings.json", "params.msgpack", "sample.txt"}
PICTURES = {"loss.png", "attention.png"}


@pytest.fixture
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def paths(tmp_path):
    """A config, a text that is trivial to learn, and a place for the run."""
    config, text = tmp_path / "tiny.toml", tmp_path / "text.txt"
    lines = [f"[{name}]\n" + _toml(table) for name, table in TABLES.items()]
    config.write_text("\n".join(lines))
    text.write_bytes(b"abcdefgh" * 400)
    return str(config), str(text), tmp_path / "out"


def _toml(table):
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def _records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_learns(paths, capsys):
    config, text, out = paths
    changes = ["--set", "train.eval_every=30", "--set", "train.sample_bytes=24"]
    assert cli.main(["train", config, "--data", text, "--out", str(out), *changes]) == 0
    assert {path.name for path in out.iterdir()} == FILES | PICTURES
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    rows = _records(out)
    steps = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in steps] == [10, 20, 30, 40, 50, 60]
    assert steps[0]["bits_per_byte"] > 4 > 1.5 > steps[-1]["bits_per_byte"]
    assert steps[-1]["bits_per_byte"] == pytest.approx(steps[-1]["loss"] / np.log(2))
    assert [row["step"] for row in rows if row["event"] == "held_out"] == [30, 60]
    *_, short, result = rows
    assert short["event"] == result["event"] == "result"
    assert (short["bytes"], result["bytes"]) == (80, 320)
    text_bytes = b"abcdefgh" * 40
    for row in (short, result):
        compressed = compressed_bits_per_byte(text_bytes[: row["bytes"]])
        assert {name: row[name] for name in compressed} == compressed
    assert 0 < result["model"] < 1.5
    printed = capsys.readouterr().out
    for name in ("model", "lzma", "bz2", "zlib"):
        assert f"{result[name]:.3f}" in printed
    assert (out / "sample.txt").read_text()[:4] == "def "
    assert len((out / "sample.txt").read_text(encoding="utf-8")) <= 28
    assert json.loads((out / "settings.json").read_text())["train"]["sample_bytes"] == 24


@pytest.mark.slow
def test_a_run_generates(paths, capsys):
    config, text, out = paths
    assert cli.main(["train", config, "--data", text, "--out", str(out), "--no-plots"]) == 0
    capsys.readouterr()
    call = ["generate", str(out), "--prompt", "abcdef", "--bytes", "20", "--temperature", "0.05"]
    assert cli.main(call) == 0
    printed = capsys.readouterr().out
    assert "abcdefghabcdefghabcdef" in printed
    assert re.search(r"[\d,]+ bytes per second with the cache, [\d,]+ without", printed)
    (out / "params.msgpack").write_bytes(b"\x81\xa5other\xc0")
    assert cli.main(call) == 2
    assert "holds no usable run" in capsys.readouterr().err
    assert cli.main(["generate", str(out / "nothing")]) == 2
    assert "is not a trained run: it has no settings.json. Train one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--top-k", "-1"], "must be a whole number >= 0, not '-1'"),
        (["--temperature", "0"], "must be a number above 0"),
        (["--bytes", "0"], "must be a whole number >= 1"),
    ],
)
def test_bad_options_of_generate(option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "runs", *option])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_saved_parameters_are_the_trained_ones_and_the_seed_decides(tmp_path):
    train_table = {**TABLES["train"], "steps": 3, "sample_bytes": 0}
    settings = settings_from({**TABLES, "train": train_table})
    text = np.frombuffer(b"abcdefgh" * 50, np.uint8)
    split = tasks.Split(text, text[:40], "letters")
    for name in ("first", "second"):
        run.run(settings, split, tmp_path / name, pictures=False)
    first, second = (
        (tmp_path / name / "params.msgpack").read_bytes() for name in ("first", "second")
    )
    assert first == second
    *_, last = train.fit(train.make_model(settings), settings, text)
    saved = serialization.from_bytes(jax.device_get(last.params), first)
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(last.params))


@pytest.mark.parametrize(
    "attention",
    [
        {"num_heads": 4, "num_kv_heads": 2, "dropout": 0.2, "use_gate": True, "sliding_window": 5},
        {"num_heads": 2, "kernel_constraint": "non_neg", "value_dim": 5},
    ],
)
@pytest.mark.slow
def test_options_of_the_layer_take_part(attention):
    model_table = {**TABLES["model"], "dropout": 0.1, "tied_head": False}
    train_table = {**TABLES["train"], "steps": 4, "weight_decay": 0}
    settings = settings_from({"model": model_table, "attention": attention, "train": train_table})
    text = np.frombuffer(b"abcdefgh" * 50, np.uint8)
    *_, last = train.fit(train.make_model(settings), settings, text)
    layer = last.params["block_0"]["attention"]
    assert ("gate" in layer) == attention.get("use_gate", False)
    if "kernel_constraint" in attention:
        assert min(float(layer[name]["kernel"].min()) for name in layer) >= 0
        assert float(last.params["block_0"]["mlp"]["up"]["kernel"].min()) < 0


@pytest.mark.slow
def test_regularizers_are_part_of_the_gradient():
    def norm_after(regularizer):
        attention = {"num_heads": 2, "kernel_regularizer": regularizer}
        tables = {**TABLES, "attention": attention, "train": {**TABLES["train"], "steps": 20}}
        settings = settings_from(tables)
        text = np.frombuffer(b"abcdefgh" * 50, np.uint8)
        *_, last = train.fit(train.make_model(settings), settings, text)
        return float(np.linalg.norm(last.params["block_0"]["attention"]["query"]["kernel"]))

    strong = {"class_name": "L2", "config": {"l2": 10.0}}
    assert norm_after(strong) < 0.7 * norm_after(None)


def test_learning_rate_rises_and_falls():
    schedule = train.learning_rate(settings_from(TABLES).train)
    rates = [float(schedule(step)) for step in (0, 5, 30, 60)]
    assert rates[0] == 0
    assert rates[1] == pytest.approx(0.02)
    assert rates[1] > rates[2] > rates[3] == pytest.approx(0.02 / 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "attention.num_head=4"], r"error: unknown key of [attention]: 'num_head'."),
        (["--steps", "ten"], "error: train.steps must be of type int. Received: 'ten'"),
        (["--data", "no/such/file"], "error: cannot read the text:"),
        (["--set", "model.context=5000"], "error: 2880 training bytes hold no window of 5001."),
        (["--set", "attention.implementation=fast"], "error: [attention] `implementation` must be"),
        (["--set", "attention.dtype=float64"], "error: [attention] "),
    ],
)
def test_mistakes_are_told_without_a_traceback(paths, capsys, arguments, message):
    config, text, out = paths
    assert cli.main(["train", config, "--data", text, "--out", str(out), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_a_file_in_the_place_of_the_run(paths, capsys):
    config, text, out = paths
    out.write_text("precious")
    assert cli.main(["train", config, "--data", text, "--out", str(out)]) == 2
    assert "error: cannot write the run's files" in capsys.readouterr().err
    assert out.read_text() == "precious"


def test_without_matplotlib(paths, capsys, monkeypatch):
    config, text, out = paths
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["train", config, "--data", text, "--out", str(out)]) == 2
    assert "pip install 'flax_mha[demo]'" in capsys.readouterr().err
    assert not out.exists()
    quick = ["--steps", "2", "--no-plots", "--set", "train.sample_bytes=0"]
    assert cli.main(["train", config, "--data", text, "--out", str(out), *quick]) == 0
    assert {path.name for path in out.iterdir()} == FILES - {"sample.txt"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing_of_its_own(paths, capsys, monkeypatch, earlier):
    config, text, out = paths
    if earlier:
        out.mkdir()
        (out / "metrics.jsonl").write_text("earlier")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_judge", interrupted)
    arguments = ["train", config, "--data", text, "--out", str(out), "--steps", "1"]
    assert cli.main(arguments) == 130
    assert "interrupted: nothing was saved" in capsys.readouterr().err
    left = {path.name: path.read_text() for path in out.iterdir()} if out.exists() else {}
    assert left == ({"metrics.jsonl": "earlier"} if earlier else {})


def test_the_command_line_helps():
    command = [sys.executable, "-m", "flax_mha.demo", "train", "--help"]
    helped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "SECTION.KEY=VALUE" in helped.stdout
    assert "configs/python_lm.toml" in helped.stdout


def test_attention_picture_shows_the_layers_weights():
    settings = settings_from({**TABLES, "attention": {"num_heads": 2, "dropout": 0.5}})
    model = train.make_model(settings)
    params = model.init(jax.random.key(0), np.zeros((1, 16), np.int32))["params"]
    scores_NTS = plots.attention_scores(model, params, b"abcdefg", layer=0)
    assert scores_NTS.shape == (2, 7, 7)
    np.testing.assert_allclose(scores_NTS.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(scores_NTS, np.tril(scores_NTS))


def test_snippet_starts_at_a_method():
    text = np.frombuffer(b"import x\n\nclass A:\n    def f(self):\n        pass\n", np.uint8)
    assert plots.snippet(text, limit=12) == b"    def f(se"
    assert plots.snippet(text[:8], limit=12) == b"import x"
