"""Whatever ends a run, its checkpoints carry it on to the numbers of an uninterrupted one."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from demo_helpers import TINY
from run_figures import figures, final_state

from flax_mha.demo import checkpoint, cli, train
from flax_mha.demo.config_file import read_settings
from flax_mha.demo.directory import Records, RunDirectory
from flax_mha.demo.settings import DemoError
from flax_mha.demo.tasks import TASKS

SOONER = [f"--set=train.{name}=10" for name in ("checkpoint_every", "eval_every", "log_every")]
# Runs the command line, and sends itself a signal after so many steps.
SIGNALLED = """
import os, sys
from flax_mha.demo import train
from flax_mha.demo.cli import main

number, last = int(sys.argv[1]), int(sys.argv[2])
fit = train.fit

def signalled(*arguments):
    for step, state in fit(*arguments):
        if step == last:
            os.kill(os.getpid(), number)
        yield step, state

train.fit = signalled
raise SystemExit(main(sys.argv[3:]))
"""


def signalled(number, step, arguments):
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), str(step), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("task", TINY)
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(run_of, monkeypatch, task):
    run = run_of(task)
    whole = run.out.with_name("whole")
    changes = [*SOONER, "--no-plots", "--set", "model.dropout=0.2"]
    assert cli.main(run.train(*changes, "--out", str(whole))) == 0
    fit = train.fit

    def killed(*arguments):
        for step, state in fit(*arguments):
            if step == 27:
                raise MemoryError("killed")
            yield step, state

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", killed)
        with pytest.raises(MemoryError, match="killed"):
            cli.main(run.train(*changes))
    assert (run.out / "UNFINISHED").read_text().endswith(f"resume {run.out}\n")
    assert checkpoint.steps(run.out / "checkpoints") == [10, 20]
    with (run.out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 30, "loss": 0.0}\n{"event": "tra')
    assert cli.main(["resume", str(run.out), "--no-plots"]) == 0
    assert figures(run, run.out) == figures(run, whole)
    jax.tree.map(np.testing.assert_array_equal, final_state(run.out), final_state(whole))
    assert {path.name for path in run.out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_sigkill_and_ctrl_c_of_a_process(run_of, capsys):
    run = run_of("language")
    whole = run.out.with_name("whole")
    changes = [*SOONER, "--no-plots"]
    assert cli.main(run.train(*changes, "--out", str(whole))) == 0
    killed = signalled(signal.SIGKILL, 17, run.train(*changes))
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint.steps(run.out / "checkpoints") == [10]
    asked = signalled(signal.SIGINT, 35, ["resume", str(run.out), "--no-plots"])
    assert asked.returncode == 130
    command = f"continue with: python -m flax_mha.demo resume {run.out}"
    assert asked.stderr.strip() == f"interrupted at step 35; {command}"
    assert checkpoint.steps(run.out / "checkpoints") == [30, 35]
    assert (run.out / "UNFINISHED").exists()
    capsys.readouterr()
    assert cli.main(["resume", str(run.out), "--no-plots"]) == 0
    assert "Resuming after step 35 of 60." in capsys.readouterr().out
    assert not (run.out / "UNFINISHED").exists()
    assert figures(run, run.out) == figures(run, whole)
    assert cli.main(["resume", str(run.out)]) == 0
    assert "is finished: all 60 steps are done" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_after_the_training(run_of, capsys, monkeypatch):
    run = run_of("language")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TASKS["language"], "judge", interrupted)
        assert cli.main(run.train("--no-plots", "--steps", "3")) == 130
    assert "interrupted at step 3; continue with" in capsys.readouterr().err
    assert cli.main(["resume", str(run.out), "--no-plots"]) == 0
    assert len(run.records("result")) == 2


@pytest.mark.slow
def test_ctrl_c_before_the_first_checkpoint(run_of, capsys, monkeypatch):
    run = run_of("language")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", interrupted)
        assert cli.main(run.train("--no-plots")) == 130
    assert "interrupted before the first checkpoint" in capsys.readouterr().err
    assert cli.main(["resume", str(run.out)]) == 2
    assert "has no whole checkpoint yet: nothing was saved" in capsys.readouterr().err
    assert cli.main(run.train("--no-plots", "--steps", "2")) == 0


@pytest.mark.slow
def test_a_run_is_replaced_only_when_asked(run_of, capsys):
    run = run_of("language")
    quick = ["--no-plots", "--steps", "2"]
    assert cli.main(run.train(*quick)) == 0
    before = (run.out / "metrics.jsonl").read_text()
    assert cli.main(run.train(*quick)) == 2
    assert "holds a finished run already. Choose another place" in capsys.readouterr().err
    assert (run.out / "metrics.jsonl").read_text() == before
    (run.out / "UNFINISHED").write_text("")
    (run.out / "notes.md").write_text("mine")
    assert cli.main(run.train(*quick)) == 2
    assert "holds a run up to step 2 already" in capsys.readouterr().err
    assert cli.main(run.train("--no-plots", "--steps", "1", "--overwrite")) == 0
    assert checkpoint.steps(run.out / "checkpoints") == [1]
    assert (run.out / "notes.md").read_text() == "mine"


@pytest.mark.slow
def test_files_of_others_stay(run_of, capsys):
    run = run_of("language")
    theirs = [run.out / name for name in ("photo.png", "notes.txt", "checkpoints/best/weights")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert cli.main(run.train("--steps", "1", "--overwrite")) == 2
    assert "holds `checkpoints` that are no run's" in capsys.readouterr().err
    assert all(path.read_text() == "mine" for path in theirs)
    (run.out / "checkpoints").rename(run.out / "elsewhere")
    for _ in range(2):
        assert cli.main(run.train("--steps", "1", "--no-plots", "--overwrite")) == 0
    assert all(path.read_text() == "mine" for path in theirs[:2])


@pytest.mark.slow
def test_other_data_are_refused(run_of, capsys):
    run = run_of("language")
    assert cli.main(run.train("--no-plots", "--steps", "2")) == 0
    (run.out / "UNFINISHED").write_text("")
    run.text.write_bytes(b"hgfedcba" * 400)
    assert cli.main(["resume", str(run.out)]) == 2
    assert "the data are not those that" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_that_cannot_be_read(run_of, capsys):
    run = run_of("language")
    assert cli.main(["resume", str(run.out)]) == 2
    assert "is not a run: no settings.json. Train one" in capsys.readouterr().err
    assert cli.main(run.train("--no-plots", "--steps", "2")) == 0
    settings = (run.out / "settings.json").read_text()
    (run.out / "settings.json").write_text(settings.replace('"task"', '"tusk"'))
    assert cli.main(["resume", str(run.out)]) == 2
    assert "is a run of an older version: its settings name no task" in capsys.readouterr().err
    (run.out / "settings.json").write_text("{")
    assert cli.main(["generate", str(run.out)]) == 2
    assert "settings.json is not valid JSON" in capsys.readouterr().err
    (run.out / "settings.json").write_text("5")
    assert cli.main(["generate", str(run.out)]) == 2
    assert "settings.json holds no settings. Received: 5." in capsys.readouterr().err
    (run.out / "settings.json").write_text(settings)
    shutil.rmtree(run.out / "checkpoints" / "2" / "d")
    assert cli.main(["generate", str(run.out)]) == 2
    assert "2 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"\0\0\0\n", b"{\n", b"5\n", b"{}\n", b"\xff\n"])
def test_a_record_that_is_damaged_is_told(run_of, capsys, line):
    """A last line that was cut off is no fault: see the test of a run that was killed."""
    run = run_of("language")
    RunDirectory(run.out).begin(read_settings(run.config), overwrite=False)
    (run.out / "metrics.jsonl").write_bytes(b'{"event": "start"}\n' + line)
    with pytest.raises(DemoError, match=r"line 2 of .*metrics.jsonl is damaged.*Delete the line"):
        Records(RunDirectory(run.out))


def test_a_replacement_that_was_killed_leaves_no_old_records(run_of, monkeypatch):
    """Wherever the removal of the old run ends: the new one is trained by the same command."""
    run = run_of("language")
    directory, settings = RunDirectory(run.out), read_settings(run.config)
    unlink = pathlib.Path.unlink
    for last in range(3):
        directory.begin(settings, overwrite=True)
        for name in ("metrics.jsonl", "sample.txt"):
            (run.out / name).write_text('{"event": "old"}\n')
        left = iter(range(last))

        def killed(path, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            unlink(path)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                directory.begin(settings, overwrite=True)
        directory.begin(settings, overwrite=False)
        assert Records(directory).rows == []
        assert not (run.out / "sample.txt").exists()
