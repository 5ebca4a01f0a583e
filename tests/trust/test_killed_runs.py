"""Runs of the demo that are killed, or lose disk or data: nothing that was saved is lost.

The processes are real ones, of the command line; each step takes a few milliseconds more than it
needs, so that a kill finds it at any place: in a step, in a save, in a record.
"""

import logging
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from demo_helpers import Run
from run_figures import figures, final_state, last_state

from flax_mha.demo import checkpoint, cli
from flax_mha.demo.directory import Records, RunDirectory

KILLS, STEPS, BETWEEN_SAVES = 20, 400, 4
SETTINGS = [
    "--set=train.log_every=1",
    f"--set=train.checkpoint_every={BETWEEN_SAVES}",
    "--set=train.eval_every=20",
    "--set=model.dropout=0.2",
    f"--steps={STEPS}",
    "--no-plots",
]
# Runs the command line; says when it has come to its first step.
SLOWED = """
import sys, time
from flax_mha.demo import checkpoint, train
from flax_mha.demo.cli import main

fit = train.fit

def slowed(*arguments):
    for step, state in fit(*arguments):
        print("at step", step, file=sys.stderr, flush=True)
        time.sleep(0.005)
        yield step, state

train.fit = slowed
# What a test has to say of it.
EXTRA
raise SystemExit(main(sys.argv[1:]))
"""
# In place of a save that hangs, as on a disk of another machine.
HANGS = """
def hanging(*_):
    print("saving", file=sys.stderr, flush=True)
    time.sleep(600)

checkpoint.save = hanging
"""


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax counts steps in int32 and raises floats to that power."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, "language")


def started(arguments, extra=""):
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [sys.executable, "-c", SLOWED.replace("EXTRA", extra), *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def awaited(process, words):
    """The first line of what it says that has these words."""
    return next((line for line in process.stderr if words in line), "")


def killed(arguments, moment):
    """Starts a process; SIGKILL that long after its first steps, or, below 0, after its start."""
    process = started(arguments)
    if moment >= 0:  # a first save takes seconds more: it imports orbax
        assert awaited(process, "at step" if arguments[0] == "resume" else "at step 9")
    time.sleep(abs(moment))
    process.kill()
    process.communicate()
    return process.returncode


def command_for(run):
    """What a person types: `resume`, or the same `train` again where nothing was saved yet."""
    if RunDirectory(run.out).last_step is None:
        return run.train(*SETTINGS)
    return ["resume", str(run.out), "--no-plots"]


def check_after_a_kill(run, before):
    """Every listed checkpoint is whole, and no more is lost than the steps since the last one."""
    directory = RunDirectory(run.out)
    step = directory.last_step or 0
    assert step >= before
    if step:
        assert last_state(run.out)[1] == step
        recorded = [row["step"] for row in Records(directory).of("train")]
        assert recorded == list(range(1, len(recorded) + 1))
        assert step <= recorded[-1] <= step + BETWEEN_SAVES
    return step


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(run):
    whole = run.out.with_name("whole")
    assert cli.main(run.train(*SETTINGS, "--out", str(whole))) == 0
    draw, step, ends = random.Random(20), 0, []
    for i in range(KILLS):
        moment = -draw.uniform(0, 3) if i % 5 == 4 else draw.uniform(0, 0.7)
        ends.append(killed(command_for(run), moment))
        step = check_after_a_kill(run, step)
    assert ends == [-signal.SIGKILL] * KILLS
    assert 0 < step < STEPS
    assert cli.main(["resume", str(run.out), "--no-plots"]) == 0
    assert figures(run, run.out) == figures(run, whole)
    jax.tree.map(np.testing.assert_array_equal, final_state(run.out), final_state(whole))
    assert {path.name for path in run.out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_the_run_goes_on(run):
    """The first one waits for a save that hangs; what was saved before it stays."""
    assert killed(run.train(*SETTINGS), 0.2) == -signal.SIGKILL
    step = RunDirectory(run.out).last_step
    process = started(["resume", str(run.out), "--no-plots"], HANGS)
    assert awaited(process, "at step")
    process.send_signal(signal.SIGINT)
    assert awaited(process, "saving")
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - asked < 20  # not the save's 600; the machine may be busy
    assert process.returncode == 130
    assert told.strip().endswith(f"continue with: python -m flax_mha.demo resume {run.out}")
    assert f"interrupted at step {step};" in told
    assert "Traceback" not in told
    assert killed(["resume", str(run.out), "--no-plots"], 0.5) == -signal.SIGKILL
    check_after_a_kill(run, step)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, which `resized` makes smaller or larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        said = mounted.stderr.strip()
        pytest.skip(reason=f"a small disk must be mounted, which root may: {said}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def told(capsys):
    """The one line of an error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(run, small_disk):
    """Wherever it is full: in orbax's first file of a checkpoint, in the last, in a record."""
    run.out, often, found = small_disk / "run", [*SETTINGS[:-2], "--steps=12", "--no-plots"], set()
    for kilobytes in (60, 150, 330, 420, 600):
        resized(small_disk, f"size={kilobytes}k")
        process = started(run.train(*often, "--overwrite"))
        said = process.communicate()[1]
        line = "".join(line for line in said.splitlines(True) if not line.startswith("at step"))
        if process.returncode == 0:
            break
        assert process.returncode == 2
        assert re.fullmatch(r"\s*error: cannot write the run's files: .*No space left .*\n", line)
        directory = RunDirectory(run.out)
        found.add(step := directory.last_step)
        if step is not None:
            assert line.rstrip().endswith(
                f"at step {step}; continue with: {directory.resume_command}"
            )
            assert last_state(run.out)[1] == step
    assert {None, 4} <= found
    resized(small_disk, "size=40M")
    assert cli.main([*command_for(run)[:2], "--no-plots"]) == 0
    assert RunDirectory(run.out).is_finished


def resized(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_takes_no_more_ends_a_run_in_one_line(run, capsys, monkeypatch):
    """The same in one process: the second save fails as tensorstore says it."""
    make, often = checkpoint._checkpointer, ["--set=train.checkpoint_every=2", "--steps=4"]

    class Full:
        def save(self, target, state):
            raise ValueError('RESOURCE_EXHAUSTED: Error writing\nlocal file "x": No space left')

        def close(self):
            pass

    def checkpointer():
        return Full() if checkpoint.steps(run.out / "checkpoints") else make()

    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checkpointer", checkpointer)
        assert cli.main(run.train(*often, "--no-plots")) == 2
    line = told(capsys)
    assert 'RESOURCE_EXHAUSTED: Error writing local file "x": No space left; interrupted' in line
    assert line.endswith(f"at step 2; continue with: python -m flax_mha.demo resume {run.out}")
    assert cli.main(["resume", str(run.out), "--no-plots"]) == 0
    assert checkpoint.steps(run.out / "checkpoints") == [2, 4]


@pytest.mark.slow
def test_a_disk_that_is_read_only_is_told(run, small_disk, capfd):
    run.out, few = small_disk / "run", ["--no-plots", "--steps", "2"]
    assert cli.main(run.train(*few)) == 0
    (run.out / "UNFINISHED").write_text("")
    resized(small_disk, "ro")
    commands = {
        "train": run.train(*few, "--overwrite"),
        "resume": ["resume", str(run.out), "--no-plots"],
        "inspect": ["inspect", str(run.out), "--no-plots"],
    }
    for command in commands.values():
        capfd.readouterr()
        assert cli.main(command) == 2
        assert "Read-only file system" in told(capfd)
        assert last_state(run.out)[1] == 2


@pytest.mark.slow
def test_data_that_cannot_be_read_are_told(run, capsys):
    few = ["--no-plots", "--steps", "2"]
    text = run.text.read_bytes()
    for damage in (pathlib.Path.unlink, pathlib.Path.mkdir):  # gone; a folder in its place
        damage(run.text)
        assert cli.main(run.train(*few)) == 2
        assert "cannot read the text: " in told(capsys)
        assert not run.out.exists()
    run.text.rmdir()
    run.text.write_bytes(text)
    assert cli.main(run.train(*few)) == 0
    (run.out / "UNFINISHED").write_text("")
    run.text.unlink()
    capsys.readouterr()
    assert cli.main(["resume", str(run.out), "--no-plots"]) == 2
    assert "cannot read the text: " in told(capsys)
    assert checkpoint.steps(run.out / "checkpoints") == [2]
