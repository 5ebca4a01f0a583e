"""A run over real processes: the losses of one, whatever ends it; and which do not begin."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import distributed

from flax_mha.demo import cli, processes
from flax_mha.demo.settings import DemoError

EVERY = {"checkpoint": 10, "log": 10, "eval": 30}
SOONER = [f"--set=train.{name}_every={n}" for name, n in EVERY.items()]
# The command line, in which one of the processes sends a signal to itself, or to the process that
# was called, at a step. The child runs this file under another name, and then has another `fit`.
SIGNALLED = """
import os, sys, time
from flax_mha.demo.cli import main

number, target, step, *arguments = sys.argv[1:]

def signalled(*given):
    for done, state in fit(*given):
        if done == int(step):
            os.kill({"child": os.getpid(), "command": os.getppid()}[target], int(number))
            time.sleep(3)
        yield done, state

if __name__ == "__main__":
    raise SystemExit(main(arguments))
if int(number):
    from flax_mha.demo import train
    train.fit, fit = signalled, train.fit
"""


class Processes:
    """The processes of one command, each with 2 virtual devices."""

    def __init__(self, directory, count, arguments, signals=None, changes=None):
        script = directory / "signalled.py"
        script.write_text(SIGNALLED)
        cache = {
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environment = {**os.environ, **cache}
        environment.pop("XLA_FLAGS", None)
        self.coordinator = f"127.0.0.1:{free_port()}"
        self.running = []
        for i in range(count):
            how = map(str, (signals or {}).get(i, (0, "child", 0)))
            place = ["--coordinator", self.coordinator, "--process", f"{i}/{count}"]
            more = [*place, "--virtual-devices", "2", "--no-plots", *(changes or {}).get(i, [])]
            command = [sys.executable, str(script), *how, *arguments, *more]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.running.append(subprocess.Popen(command, env=environment, **pipes))

    def ended(self, within=150):
        """(exit code, seconds from the first end to its own, what it printed) of each."""
        times, until = {}, time.monotonic() + within
        while len(times) < len(self.running) and time.monotonic() < until:
            for i, process in enumerate(self.running):
                if process.poll() is not None:
                    times.setdefault(i, time.monotonic())
            time.sleep(0.05)
        for process in self.running:
            process.kill()
        printed = [process.communicate()[0] for process in self.running]
        assert len(times) == len(self.running), printed
        first = min(times.values())
        codes = [process.returncode for process in self.running]
        return [(codes[i], times[i] - first, printed[i]) for i in range(len(codes))]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def curve(run, out):
    """What was recorded, but for how fast."""
    names = ("step", "loss", "bits_per_byte")
    rows = [row for event in ("train", "held_out") for row in run.records(event, out)]
    return [[row[name] for name in names if name in row] for row in rows]


def assert_same_curve(run, out, other):
    a, b = curve(run, out), curve(run, other)
    assert len(a) == len(b) == 8
    for row, right in zip(a, b):
        np.testing.assert_allclose(row, right, rtol=1e-3)


def assert_lost(processes, ended, lost, run):
    """Every process but the one that is gone says so, and how to go on."""
    count = len(ended)
    for i, (code, seconds, printed) in enumerate(ended):
        if i == lost:
            continue
        assert code == 3, printed
        assert seconds < 30
        command = f"resume {run.out} --coordinator {processes.coordinator} --process {i}/{count}"
        assert re.search(rf"error: process {i} of {count} .*another process is gone", printed)
        assert re.search(rf"again, from step [12]0 on, each .*{re.escape(command)}\n", printed)
        assert (
            f"or go on on other devices: python -m flax_mha.demo resume {run.out} --set" in printed
        )


SAME = [*SOONER, "--no-plots", "--set=train.sample_bytes=0", "--set=model.dropout=0.1"]


def killed_and_resumed(run, tmp_path, count, lost, target, mesh):
    """The directories of three runs: whole, gone on over the same processes, and still broken."""
    whole, broken = run.out.with_name("whole"), run.out.with_name("broken")
    assert cli.main(run.train(*SAME, "--out", str(whole))) == 0
    kill = {lost: (int(signal.SIGKILL), target, 27)}
    killed = Processes(tmp_path, count, run.train(*SAME, *mesh), kill)
    ended = killed.ended()
    assert_lost(killed, ended, lost, run)
    code, _, printed = ended[lost]
    if target == "command":
        assert code == -signal.SIGKILL
    else:
        assert code == 3
        assert f"error: process {lost} of {count} was ended by SIGKILL" in printed
    shutil.copytree(run.out, broken)
    for code, _, printed in Processes(tmp_path, count, ["resume", str(run.out)]).ended():
        assert code == 0, printed
    assert not (run.out / "UNFINISHED").exists()
    return whole, run.out, broken


@pytest.mark.slow
def test_killed_in_mid_step_and_resumed(run_of, tmp_path):
    """The losses of one process, through a SIGKILL."""
    run, mesh = run_of("language"), ["--set=mesh.data=2", "--set=mesh.heads=2"]
    whole, resumed, _ = killed_and_resumed(run, tmp_path, 2, 1, "child", mesh)
    assert_same_curve(run, resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "lost", "target", "mesh"),
    [
        (4, 2, "command", ["--set=mesh.data=4", "--set=mesh.heads=2"]),
        (4, 0, "child", ["--set=mesh.data=2", "--set=mesh.context=4"]),
    ],
)
def test_resumed_on_the_same_mesh_and_on_another(
    run_of, tmp_path, capsys, count, lost, target, mesh
):
    run = run_of("language")
    whole, resumed, broken = killed_and_resumed(run, tmp_path, count, lost, target, mesh)
    assert_same_curve(run, resumed, whole)
    capsys.readouterr()
    other = ["--set=mesh.data=1", "--set=mesh.heads=1", "--set=mesh.context=2", "--no-plots"]
    assert cli.main(["resume", str(broken), *other]) == 0
    assert re.search(r"Resuming after step [12]0 of 60", capsys.readouterr().out)
    assert_same_curve(run, broken, whole)


@pytest.mark.slow
def test_processes_that_disagree_train_nothing(run_of, tmp_path):
    run = run_of("language")
    changes = {1: ["--set", "train.steps=70", "--set", "attention.num_heads=1"]}
    mesh = ["--set=mesh.data=4"]
    for code, _, printed in Processes(tmp_path, 2, run.train(*mesh), changes=changes).ended():
        assert code == 2, printed
        assert "error: all processes of a run must have the same settings, data and JAX" in printed
        steps = r"train.steps is (70|60) in process [01] and (60|70) in process [01]"
        assert re.search(steps, printed)
        assert re.search("attention.num_heads is [12] in process [01] and [12] in", printed)
        assert "Start all of them by the same command" in printed
        assert "gone" not in printed
    assert not run.out.exists()


@pytest.mark.slow
def test_processes_that_disagree_on_how_many_they_are(run_of, tmp_path):
    run = run_of("language")
    changes = {1: ["--process", "1/3"]}
    for code, seconds, printed in Processes(tmp_path, 2, run.train(), changes=changes).ended():
        assert code == 2, printed
        assert seconds < 30
        assert re.search("the N of --process I/N is [23] in process [01] and [32] in", printed)


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_without_a_part(run_of, tmp_path):
    run = run_of("language")
    for code, _, printed in Processes(tmp_path, 2, run.train("--set=mesh.data=2")).ended():
        assert code == 2, printed
        assert "must be the number of devices. Received: 2 data x 1 heads x 1 context" in printed
        assert "= 2, and 4 devices of 2 processes" in printed


@pytest.mark.slow
@pytest.mark.parametrize("target", ["child", "command"])
def test_ctrl_c_of_one_is_heard_by_all_and_saves(run_of, tmp_path, target):
    """At the next record of the loss; the command hands it on to its child, once."""
    run = run_of("language")
    signals = {1: (int(signal.SIGINT), target, 23)}
    arguments = run.train(*SOONER, "--set=mesh.data=4")
    for i, (code, _, printed) in enumerate(Processes(tmp_path, 2, arguments, signals).ended()):
        assert code == 130, printed
        command = f"continue with: python -m flax_mha.demo resume {run.out} --coordinator"
        assert f"interrupted at step 30; {command}" in printed
        assert printed.rstrip().endswith(f"--process {i}/2")


def test_the_place_of_a_process(run_of, capsys):
    run = run_of("language")
    assert cli.main(run.train("--coordinator", "localhost:7000")) == 2
    assert "--coordinator HOST:PORT and --process I/N need each other" in capsys.readouterr().err
    assert cli.main(run.train("--process", "0/2")) == 2
    assert "need each other: one says where the processes meet" in capsys.readouterr().err
    for option, value in [("process", "2/2"), ("process", "1"), ("process", "-1/2")]:
        with pytest.raises(SystemExit):
            cli.main(run.train(f"--{option}={value}"))
        assert "must be I/N with 0 <= I < N, as 0/2, not" in capsys.readouterr().err
    for value in ("localhost", "localhost:", ":7000", "localhost:70000"):
        with pytest.raises(SystemExit):
            cli.main(run.train(f"--coordinator={value}"))
        assert "must be HOST:PORT, as 10.0.0.1:7000, not" in capsys.readouterr().err


def test_what_agrees_and_what_does_not():
    mine = {"a": 1, "b": None, "c": [1, 2]}
    assert processes.differences(mine, dict(mine), 0, 1) == []
    told = processes.differences(mine, {"a": 1, "c": [1, 3], "d": 4}, 2, 0)
    assert told == [
        "c is [1, 3] in process 0 and [1, 2] in process 2",
        "d is 4 in process 0 and None in process 2",
    ]


class Store:
    """JAX's store of strings, in which the other process has written; who waits, and how long."""

    def __init__(self, theirs):
        self.values, self.waited = {"demo/1": json.dumps(theirs)}, []

    def key_value_set(self, name, text):
        self.values[name] = text

    def blocking_key_value_get(self, name, milliseconds):
        self.waited.append(milliseconds)
        return self.values[name]

    def wait_at_barrier(self, name, milliseconds):
        self.waited.append(milliseconds)


@pytest.mark.parametrize("seed", [0, 1])
def test_processes_wait_a_minute_for_each_other_before_any_of_them_ends(monkeypatch, seed):
    """One that is still loading its data is late by seconds; who goes first takes it along."""
    store = Store({processes._COUNT: 2, "seed": seed})
    monkeypatch.setattr(distributed.global_state, "client", store)
    place = processes.Place("127.0.0.1:1", 0, 2)
    if seed:
        with pytest.raises(DemoError, match=r"seed is 1 in process 1 and 0 in process 0\. Start"):
            processes.agree(place, {"seed": 0})
    else:
        processes.agree(place, {"seed": 0})
    assert store.waited == [60_000] * 3
