"""`python -m flax_mha.bench aot`: its words, its tables, and the figures that are kept."""

import importlib.util
import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from flax_mha.bench import cli
from flax_mha.bench.aot import compile as compiling
from flax_mha.bench.aot import kept, plots, report
from flax_mha.bench.aot.figures import Figure, Part
from flax_mha.bench.command import BenchError

NO_LIBTPU = "libtpu is not installed: pip install 'jax[tpu]'"


def part(cycles, entries=512 * 512, source="schedule", name="kernel"):
    use = {"MXU": 0.75, "VALU": 0.5} if source == "schedule" else {}
    return Part(name, source, cycles, entries, 2, use)


def figure(contender, cycles, case="causal", gradient=False, **fields):
    parts = [part(cycles)] if cycles else []
    return Figure("v5e:2x2", case, contender, gradient, parts=parts, **fields)


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cases", "acausal"], "no case 'acausal'. There are: causal, full"),
        (["--contenders", "splash"], "no contender 'splash'. There are: reference, blockwise"),
        (["--check", "/no/such/file"], "/no/such/file holds no kept figures"),
    ],
)
def test_a_mistake_is_said_before_anything_is_compiled(capsys, words, said):
    assert cli.main(["aot", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1000", "0", "a"])
def test_a_length_is_a_multiple_of_the_largest_block(capsys, text):
    with pytest.raises(SystemExit):
        cli.main(["aot", "--lengths", text])
    assert "--lengths" in capsys.readouterr().err


def test_it_says_what_it_compiles_where_no_bar_can(capsys, monkeypatch):
    """In a log, as in a terminal: a run of every case takes long."""
    from flax_mha.bench.aot import cli as aot

    monkeypatch.setattr(aot, "figures", lambda settings, say: [say("v5e:2x2 causal")] and FOUND[:1])
    kept_until_now = []
    found = aot._measured(
        None, Console(file=io.StringIO()), lambda x: kept_until_now.append(len(x))
    )
    assert (found, kept_until_now) == (FOUND[:1], [1])
    assert capsys.readouterr().err == "compiling v5e:2x2 causal\n"


def test_without_libtpu_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["aot"]) == 2
    error = capsys.readouterr().err
    assert "needs libtpu" in error
    assert "pip install 'jax[tpu]'" in error
    assert "Python 3.12" in error


def test_the_process_that_compiles_dumps_and_looks_for_no_chip(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--own=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/kept")
    found = compiling.environment("/dump")
    assert found["LIBTPU_INIT_ARGS"].startswith("--own=1 --xla_jf_dump_to=/dump ")
    assert found["JAX_ENABLE_COMPILATION_CACHE"] == "false"  # a kept program leaves no schedule
    assert (found["JAX_PLATFORMS"], found[compiling.DUMP]) == ("cpu", "/dump")


@pytest.fixture
def compiles(monkeypatch):
    """The process that compiles, with a libtpu that says its version."""
    for module in ("cli", "kept"):
        monkeypatch.setattr(f"flax_mha.bench.aot.{module}.libtpu_version", lambda: "3")
    monkeypatch.setenv(compiling.DUMP, "/dump")


@pytest.mark.usefixtures("compiles")
def test_a_file_in_the_place_of_the_run_is_said_before_anything_is_compiled(tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    assert cli.main(["aot", "--no-plots", "--out", str(tmp_path / "out")]) == 2
    assert "error: cannot write the run's files" in capsys.readouterr().err


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("waits", [False, True])
def test_of_two_processes_that_are_interrupted_one_says_so(tmp_path, capsys, monkeypatch, waits):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flax_mha.bench.aot.cli._measured", interrupted)
    monkeypatch.setattr(subprocess, "run", interrupted)
    if waits:
        monkeypatch.delenv(compiling.DUMP)
    assert cli.main(["aot", "--no-plots", "--out", str(tmp_path)]) == 130
    told = "\ninterrupted: aot.json holds the figures until now\n"
    assert capsys.readouterr().err == ("" if waits else told)


# --- tables --------------------------------------------------------------------------------------

FOUND = [
    figure("blockwise", [3000, 3300]),
    figure("splash 512", [1200]),
    figure("splash 1024", [1100]),
    figure("splash fused", [900]),
    figure("blockwise", [6000, 6600], case="bias"),
    figure("splash 512", None, case="bias", status="unserved", reason="it has no bias"),
    figure("other", None, case="bias", status="refused", reason="no room"),
]


def printed(show, *arguments):
    console = Console(file=io.StringIO(), width=120)
    show(console, *arguments)
    return console.file.getvalue()


def test_the_table_holds_every_figure_beside_splash_at_its_best():
    text = printed(report.print_cycles, "v5e:2x2", FOUND)
    rows = [line.split() for line in text.splitlines()]
    assert ["causal", "F", "blockwise", "3000", "3300", "2.73", "1.00", "75%", "50%", "0"] in rows
    assert ["bias", "F", "blockwise", "6000", "6600", "-", "2.00", "75%", "50%", "0"] in rows
    assert "bias: splash 512: unserved: it has no bias" in text
    assert "bias: other: refused: no room" in text


def test_a_case_is_held_against_the_contenders_own_plain_one():
    assert report.plain(FOUND[4], [FOUND[4], *FOUND[1:3], FOUND[0]]) == 3000
    assert report.plain(FOUND[4], FOUND[1:]) is None


def test_estimates_are_marked_and_kernels_stand_below_their_program():
    parts = [part([1000]), part([2000], name="dkv")]
    estimate = [part([5000, 5500], source="estimate")]
    found = [
        Figure("v5e:2x2", "causal", "blockwise", True, parts=estimate, outside=8000),
        Figure("v5e:2x2", "causal", "splash 512", True, parts=parts),
    ]
    rows = [line.split() for line in printed(report.print_cycles, "v5e:2x2", found).splitlines()]
    line = ["causal", "FB", "blockwise", "~5000", "~5500", "1.67", "1.00", "-", "-", "8"]
    assert line in rows
    assert ["dkv", "2000", "2000", "75%", "50%"] in rows


def test_contenders_of_one_case_and_pass_stand_beside_each_other():
    gradients = [figure(x.contender, [1], x.case, gradient=True) for x in FOUND]
    found = [x for pair in zip(FOUND, gradients) for x in pair]
    told = [(x.case, x.gradient) for x in report.by_case(found)]
    order = [("causal", False), ("causal", True), ("bias", False), ("bias", True)]
    assert list(dict.fromkeys(told)) == order
    assert [told.count(x) for x in order] == [4, 4, 3, 3]


def test_a_figure_that_was_not_read_is_said():
    odd = Figure("v5e:2x2", "causal", "own", False, parts=[part([9], entries=None, name="odd")])
    text = printed(report.print_cycles, "v5e:2x2", [odd])
    assert "causal F: own: not read: the matrix products of odd are not those" in text


def test_memory_is_told_by_length_and_what_does_not_fit_by_its_reason():
    extra = {4096: 3 << 20, 8192: "Ran out of memory on HBM"}
    found = [figure("own", [1], gradient=True, extra_bytes=extra, largest_buffer={4096: "f32[7]"})]
    text = printed(report.print_memory, "v5e:2x2", found)
    assert ["causal", "own", "3", "refused", "f32[7]"] in [x.split() for x in text.splitlines()]
    assert "causal: own: refused at T = 8192: Ran out of memory on HBM" in text
    assert printed(report.print_memory, "v6e:2x2", found) == ""


def test_it_says_that_no_device_ran():
    assert "No device ran" in printed(report.print_notes)


def test_the_picture_is_drawn_with_missing_cases_and_estimates(tmp_path):
    pytest.importorskip("matplotlib")
    estimates = Figure(
        "v5e:2x2", "causal", "reference", True, parts=[part([9999], source="estimate")]
    )
    plots.plot([*FOUND, estimates], tmp_path / "aot.png")
    assert (tmp_path / "aot.png").read_bytes().startswith(b"\x89PNG")
    plots.plot(FOUND[-2:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- kept figures --------------------------------------------------------------------------------


@pytest.fixture
def compilers(monkeypatch):
    versions = {"jax": "1", "jaxlib": "1", "libtpu": "2"}
    monkeypatch.setattr(kept, "compilers", lambda: dict(versions))
    return versions


def test_what_is_kept_comes_back(tmp_path, compilers):
    path = tmp_path / "kept.json"
    kept.write(FOUND, path)
    before = kept.read(path)
    assert before["compilers"] == compilers
    assert before["cycles"]["v5e:2x2|causal|blockwise|F"] == [3000, 3300]
    assert len(before["cycles"]) == 5
    assert kept.wanted(before) == {
        "topology": ["v5e:2x2"],
        "case": ["causal", "bias"],
        "contender": ["blockwise", "splash 512", "splash 1024", "splash fused"],
    }
    assert kept.other_compiler(before) is None
    assert list(kept.changes(before, FOUND)) == []


@pytest.mark.parametrize(
    ("cycles", "told"),
    [
        ([3151, 3300], [("whole: 3151 cycles, 1.050 x the 3000 kept, at most 1.05", True)]),
        ([3150, 3465], []),
        ([3000, 3466], [("masked: 3466 cycles", True)]),
        ([2800, 3300], [("whole: 2800 cycles, 0.933 x the 3000 kept: write the file anew", False)]),
        (None, [("cannot be read any more", True)]),
    ],
)
def test_growth_beyond_a_twentieth_is_a_failure(tmp_path, compilers, cycles, told):
    kept.write(FOUND[:1], tmp_path / "kept.json")
    found = list(kept.changes(kept.read(tmp_path / "kept.json"), [figure("blockwise", cycles)]))
    assert len(found) == len(told)
    for (line, failure), (words, expected) in zip(found, told):
        assert words in line
        assert failure is expected


def test_figures_of_another_compiler_are_not_compared(tmp_path, compilers, capsys, monkeypatch):
    path = tmp_path / "kept.json"
    kept.write(FOUND[:1], path)
    compilers["libtpu"] = "3"
    assert "libtpu 2, this is jax 1, jaxlib 1, libtpu 3" in kept.other_compiler(kept.read(path))
    monkeypatch.setenv(compiling.DUMP, str(tmp_path))
    monkeypatch.setattr("flax_mha.bench.aot.cli.libtpu_version", lambda: "3")
    assert cli.main(["aot", "--check", str(path)]) == 3
    assert "not compared: another compiler counts otherwise" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"cycles": {}}',
        '{"cycles": {}, "compilers": {}}',
        '{"cycles": 3, "compilers": {}}',
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "kept.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="holds no kept figures"):
        kept.read(path)


# --- the compiler itself -------------------------------------------------------------------------


def run(*words):
    command = [sys.executable, "-m", "flax_mha.bench", "aot", *words]
    clean = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, env=clean, capture_output=True, text=True)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=NO_LIBTPU)


@needs_libtpu
@pytest.mark.slow
def test_splash_is_read_as_its_block_sizes_say(tmp_path):
    """The entries that the products tell are the blocks that splash was given."""
    words = ["--contenders", "splash 512,splash 1024,splash fused", "--cases", "causal,H=64,H=256"]
    out = ["--out", str(tmp_path), "--no-plots", "--lengths", "4096"]
    result = run(*words, *out, "--topology", "v5e:2x2", "--topology", "v6e:2x2")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "aot.json").read_text())["figures"]
    assert len(found) == 2 * 3 * 3 * 2
    for figure in found:
        block = 512 if figure["contender"] == "splash 512" else 1024
        assert [part["entries"] for part in figure["parts"]] == [block**2] * len(figure["parts"])
        products = {"splash fused": [2, 5]}.get(figure["contender"], [2, 3, 4])
        expected = products if figure["gradient"] else [2]
        assert sorted(part["products"] for part in figure["parts"]) == expected
