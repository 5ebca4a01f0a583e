"""Whole runs of the language model, small: the files appear, the loss falls, mistakes are told."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from demo_helpers import TINY

from flax_mha.demo import cli, extras, train
from flax_mha.demo.compressors import compressed_bits_per_byte
from flax_mha.demo.config_file import settings_from
from flax_mha.demo.tasks import TASKS
from flax_mha.demo.terminal import Screen

FILES = {"metrics.jsonl", "settings.json", "sample.txt", "checkpoints"}
PICTURES = {"loss.png", "attention.html", "attention-layer-0-self-attention.png"}


@pytest.fixture
def run(run_of):
    return run_of("language")


def task_with(run, train_table, **tables):
    """The task of a tiny run, with other settings."""
    tiny = TINY["language"]
    tables = {**tiny, **tables, "train": {**tiny["train"], **train_table}}
    return TASKS["language"](settings_from({**tables, "data": {"file": str(run.text)}}))


def trained(task):
    """The parameters after all steps."""
    *_, (_, last) = train.fit(task, train.initial_state(task))
    return last.params


@pytest.mark.slow
def test_a_run_leaves_its_files_and_learns(run, capsys):
    assert cli.main(run.train("--set", "train.eval_every=30")) == 0
    assert {path.name for path in run.out.iterdir()} == FILES | PICTURES
    for name in PICTURES:
        magic = b"\x89PNG" if name.endswith("png") else b"<!doctype html>"
        assert (run.out / name).read_bytes().startswith(magic)
    steps = run.records("train")
    assert [row["step"] for row in steps] == [10, 20, 30, 40, 50, 60]
    assert steps[0]["bits_per_byte"] > 4 > 1.5 > steps[-1]["bits_per_byte"]
    assert steps[-1]["bits_per_byte"] == pytest.approx(steps[-1]["loss"] / np.log(2))
    assert [row["step"] for row in run.records("held_out")] == [30, 60]
    short, result = run.records("result")
    assert (short["bytes"], result["bytes"]) == (80, 320)
    text_bytes = b"abcdefgh" * 40
    for row in (short, result):
        compressed = compressed_bits_per_byte(text_bytes[: row["bytes"]])
        assert {name: row[name] for name in compressed} == compressed
    assert 0 < result["model"] < 1.5
    printed = capsys.readouterr().out
    for name in ("model", "lzma", "bz2", "zlib"):
        assert f"{result[name]:.3f}" in printed
    sample = (run.out / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("def ")
    assert len(sample) <= 28
    assert json.loads((run.out / "settings.json").read_text())["train"]["sample_bytes"] == 24


def test_a_run_generates(run, capsys):
    assert cli.main(run.train("--no-plots")) == 0
    capsys.readouterr()
    call = ["generate", str(run.out), "--prompt", "abcdef", "--bytes", "20"]
    assert cli.main([*call, "--temperature", "0.05"]) == 0
    printed = capsys.readouterr().out
    assert "abcdefghabcdefghabcdef" in printed
    assert re.search(r"[\d,]+ bytes per second with the cache, [\d,]+ without", printed)
    (run.out / "UNFINISHED").write_text("")
    assert cli.main(call) == 0
    assert "is not finished: this is step 60 of 60." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--top-k", "-1"], "must be a whole number >= 0 and below 2**31, not '-1'"),
        (["--temperature", "0"], "must be a number above 0"),
        (["--bytes", "0"], "must be a whole number >= 1"),
    ],
)
def test_bad_options_of_generate(option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "runs", *option])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_recent_loss_is_the_mean_since_the_last_record(run):
    task = task_with(run, {"steps": 7, "log_every": 4})
    every = {}
    for step, state in train.fit(task, train.initial_state(task)):
        every[step] = float(state.losses[step % 4])
        recent = list(every.values())[4 * ((step - 1) // 4) :]
        assert train.recent_loss(state, step) == pytest.approx(np.mean(recent), rel=1e-6)
    assert len(set(every.values())) == 7


@pytest.mark.parametrize(
    "attention",
    [
        {"num_heads": 4, "num_kv_heads": 2, "dropout": 0.2, "use_gate": True, "sliding_window": 5},
        {"num_heads": 2, "kernel_constraint": "non_neg", "value_dim": 5},
    ],
)
@pytest.mark.slow
def test_options_of_the_layer_take_part(run, attention):
    model_table = {**TINY["language"]["model"], "dropout": 0.1, "tied_head": False}
    train_table = {"steps": 4, "weight_decay": 0}
    params = trained(task_with(run, train_table, model=model_table, attention=attention))
    layer = params["block_0"]["attention"]
    assert ("gate" in layer) == attention.get("use_gate", False)
    if "kernel_constraint" in attention:
        assert min(float(layer[name]["kernel"].min()) for name in layer) >= 0
        assert float(params["block_0"]["mlp"]["up"]["kernel"].min()) < 0


@pytest.mark.slow
def test_regularizers_are_part_of_the_gradient(run):
    def norm_after(regularizer):
        attention = {"num_heads": 2, "kernel_regularizer": regularizer}
        params = trained(task_with(run, {"steps": 20}, attention=attention))
        return float(np.linalg.norm(params["block_0"]["attention"]["query"]["kernel"]))

    strong = {"class_name": "L2", "config": {"l2": 10.0}}
    assert norm_after(strong) < 0.7 * norm_after(None)


def test_learning_rate_rises_and_falls(run):
    schedule = train.learning_rate(task_with(run, {}).settings.train)
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
        (["--set", "task.name=vision"], "error: unknown task: 'vision'. Valid: language"),
    ],
)
def test_mistakes_are_told_without_a_traceback(run, capsys, arguments, message):
    assert cli.main(run.train(*arguments)) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not run.out.exists()


def test_a_file_in_the_place_of_the_run(run, capsys):
    run.out.write_text("precious")
    assert cli.main(run.train()) == 2
    assert "error: cannot write the run's files" in capsys.readouterr().err
    assert run.out.read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_without_an_optional_package(run, capsys, monkeypatch, package):
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    assert cli.main(run.train("--steps", "2")) == 2
    errors = capsys.readouterr().err
    assert f"{package} is needed for the " in errors
    assert "Run `pip install 'flax_mha[demo]'`" in errors
    assert not run.out.exists()
    without_pictures = cli.main(run.train("--steps", "2", "--no-plots"))
    assert without_pictures == (0 if package == "matplotlib" else 2)


@pytest.mark.slow
def test_the_command_line_helps():
    command = [sys.executable, "-m", "flax_mha.demo", "train", "--help"]
    helped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "SECTION.KEY=VALUE" in helped.stdout
    assert "configs/python_lm.toml" in helped.stdout


def test_what_a_model_writes_does_not_steer_the_terminal(capsys):
    Screen().say("a\x1b[31m[bold]b[/bold]\r\nc")
    assert capsys.readouterr().out == "a\\x1b[31m[bold]b[/bold]\\r\nc\n"
