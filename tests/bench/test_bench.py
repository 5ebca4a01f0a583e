"""Whole runs, small: files appear, tables are printed, nothing is left out in silence."""

import json
import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest
from bench_helpers import SMALL, ours_but, run

from flax_mha.bench import cli, environment, peers, plots
from flax_mha.bench.command import BenchError

pytestmark = [
    pytest.mark.usefixtures("peers_promote"),
    pytest.mark.filterwarnings("ignore"),  # equinox, haiku and torch warn when imported
]


QUICK = ["--skip", "compile", "memory", "import", "--contenders"]


@pytest.mark.slow
def test_a_run_prints_tables_and_leaves_its_files(tmp_path, capsys, monkeypatch):
    absent = peers.Peer("haiku", "no_such_package", "no-such-package")
    monkeypatch.setitem(peers.CONTENDERS, "haiku", absent)
    labels = [f"{SMALL} F", f"{SMALL} F window=2 alone"]
    arguments = [word for label in labels for word in ("--case", label)]
    code, found = run(tmp_path, *arguments, *QUICK, "ours,linen,haiku")
    assert code == 0
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.png"}
    assert found["finished"]
    assert [case["case"] for case in found["cases"]] == labels
    statuses = [{row["name"]: row["status"] for row in c["contenders"]} for c in found["cases"]]
    assert statuses[0] == {"ours": "ok", "linen": "ok", "haiku": "absent"}
    assert statuses[1] == {"ours": "ok", "linen": "unserved", "haiku": "absent"}
    for row in found["cases"][0]["contenders"][:2]:
        assert len(row["samples"]) == 2
        assert row["median"] == pytest.approx(np.median(row["samples"]))
        assert row["minimum"] == min(row["samples"]) > 0
        assert row["compile_seconds"] > 0
        assert row["error"] < 1e-5
    assert len(found["cases"][0]["gemm_flops_per_second"]) == 2
    assert found["environment"]["versions"]["jax"] == jax.__version__
    assert found["environment"]["command"].startswith(
        "python -m flax_mha.bench --case '2x5x21x3 F'"
    )
    printed = capsys.readouterr().out
    assert "haiku: absent: not installed: pip install no-such-package" in printed
    assert "linen: unserved: left out: the case asks for our own growth with T" in printed
    assert "T=4096 F: times faster than torch's best: at least 1x (this run has no such" in printed
    assert f"{SMALL} F: time over the fastest JAX layer's: " in printed
    row = found["cases"][0]["contenders"][1]
    assert f"{1e3 * row['median']:.4g}" in printed


@pytest.mark.slow
def test_a_wrong_peer_is_named_and_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flax_mha.bench.peers.linen.build", ours_but(factor=1.01))
    arguments = ["--case", f"{SMALL} F", *QUICK, "ours,linen", "--no-plots"]
    code, found = run(tmp_path, *arguments)
    assert code == 1
    ours, linen = found["cases"][0]["contenders"]
    assert (ours["status"], linen["status"]) == ("ok", "wrong")
    assert ours["samples"]
    assert linen["samples"] == []
    printed = capsys.readouterr().out
    assert f"WRONG, and not timed: linen in {SMALL} F: its numbers are wrong" in printed


@pytest.mark.slow
def test_a_peer_that_fails_has_its_reason_and_the_others_their_times(tmp_path, monkeypatch):
    def build(case, data):
        raise jax.errors.JaxRuntimeError("INTERNAL: no program\nmore")

    monkeypatch.setattr("flax_mha.bench.peers.linen.build", build)
    code, found = run(tmp_path, "--case", f"{SMALL} F", *QUICK, "linen,ours", "--no-plots")
    assert code == 0
    linen, ours = found["cases"][0]["contenders"]
    assert (linen["status"], linen["reason"]) == ("failed", "INTERNAL: no program")
    assert ours["samples"]


def test_what_is_too_large_is_listed_and_not_run(tmp_path, capsys):
    arguments = ["--case", f"{SMALL} F", *QUICK, "linen", "--no-plots", "--max-gigabytes", "1e-9"]
    code, found = run(tmp_path, *arguments)
    assert code == 0
    (row,) = found["cases"][0]["contenders"]
    assert (row["status"], row["samples"]) == ("unserved", [])
    assert row["reason"].endswith("GB of temporaries, more than --max-gigabytes 1e-09")
    assert f"linen: unserved: {row['reason']}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_cases(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flax_mha.bench.run._extras", interrupted)
    code, found = run(tmp_path, "--case", f"{SMALL} F", *QUICK, "ours", "--no-plots")
    assert code == 130
    assert "interrupted: bench.json holds the cases until now" in capsys.readouterr().err
    assert not found["finished"]
    assert found["cases"][0]["contenders"][0]["samples"]


@pytest.mark.slow
def test_pairs_of_cases_are_timed_in_turns(tmp_path, capsys):
    labels = [f"{SMALL} F", f"{SMALL} F causal", f"{SMALL} F dropout=0.1"]
    arguments = [word for label in labels for word in ("--case", label)]
    code, found = run(tmp_path, *arguments, *QUICK, "ours", "--no-plots")
    assert code == 0
    told = [(pair["part"], pair["above"], pair["below"]) for pair in found["pairs"]]
    causal, dropped = (f"{SMALL} F causal", f"{SMALL} F"), (f"{SMALL} F dropout=0.1", f"{SMALL} F")
    assert told == [("layer", *causal), ("attention", *causal), ("layer", *dropped)]
    for pair in found["pairs"]:
        assert len(pair["above_samples"]) == len(pair["below_samples"]) == 2
        assert min(*pair["above_samples"], *pair["below_samples"]) > 0


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path):
    """With every extra measurement, and OpenMP's policy set before torch is imported."""
    command = [sys.executable, "-m", "flax_mha.bench", "--case", f"{SMALL} FB"]
    command += ["--contenders", "ours,linen", "--rounds", "1", "--compiles", "2"]
    variables = {name: v for name, v in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert "OMP_WAIT_POLICY: passive" in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["environment"]["variables"]["OMP_WAIT_POLICY"] == "passive"
    assert [len(times) for times in found["compile"]["seconds"].values()] == [2, 2]
    assert len(found["import_flax_mha_after_flax_seconds"]) == 5
    values = {target["name"]: target["value"] for target in found["targets"]}
    assert values["compilation of FB over linen's"] > 0
    assert 1.5 < values["temporaries of FB causal: T=16384 over T=8192"] < 2.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "8x512x512 F"], "error: A case must begin with BxTxDxN"),
        (["--case", "2x5x20x3"], "error: The features D must be a multiple of the heads N."),
        (["--case", "2x5x21x3 FBB"], "error: After the size a case may have: F, FB, causal"),
        (["--case", "2x5x21x3 dropout=1.5"], "error: After the size a case may have"),
        (["--contenders", "ours,tensorflow"], "error: no contender 'tensorflow'. There are: ours"),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path, capsys, arguments, message):
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_run(tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    assert cli.main(["--out", str(tmp_path / "out")]) == 2
    assert "error: cannot write the run's files" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'flax_mha\[bench\]'"):
        plots.require_matplotlib()


def test_the_processor_is_told_from_others_of_its_name(tmp_path, monkeypatch):
    lines = ["model name : AMD EPYC", "cpu family : 25", "model : 1", "model name : AMD EPYC"]
    (tmp_path / "cpuinfo").write_text("\n".join(lines))
    monkeypatch.setattr(environment, "Path", lambda path: tmp_path / "cpuinfo")
    assert environment.describe("", "")["processor"] == "AMD EPYC (family 25 model 1)"
    (tmp_path / "cpuinfo").write_text("processor : 0\nBogoMIPS : 50.00\n")  # an Arm's
    known = (platform.processor(), platform.machine())
    assert environment.describe("", "")["processor"] in known
