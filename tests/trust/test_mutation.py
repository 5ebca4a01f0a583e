"""The mutation check plants what it says it plants, and the same faults for the same seed."""

import ast
import importlib.util
import pathlib

import pytest

pytest.importorskip("cosmic_ray", reason="needs cosmic-ray", exc_type=ImportError)

import faults

SCRIPT = pathlib.Path(__file__).with_name("mutation.py")
SOURCE = '''"""A docstring."""

def mean(x, weights: list | None = None, *, axis=-1):
    if weights is None or len(x) < 2:
        return math.fsum(x) / len(x)
    total = x[0] * weights[0] + x[1] * weights[1] - 3.5
    return clip(total, -1, abs(total)), True
'''


@pytest.fixture(scope="module")
def mutation():
    spec = importlib.util.spec_from_file_location("mutation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every(kind):
    """What the lines become that have places of a kind."""
    found = [faults.mutate_code(SOURCE, op, i) for op, i in faults.places(SOURCE, kind)]
    planted = [faults.planted("x.py", kind, SOURCE, mutated) for mutated in found]
    return {fault.new for fault in planted if fault}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("operator", {"return math.fsum(x) * len(x)"}),
        ("comparison", {"if weights is not None or len(x) < 2:"}),
        ("comparison", {"if weights is None or len(x) <= 2:"}),
        ("boolean", {"if weights is None and len(x) < 2:"}),
        ("boolean", {"return clip(total, -1, abs(total)), False"}),
        ("sign", {"return clip(total, 1, abs(total)), True"}),
        ("dropped term", {"total = (x[0] * weights[0] - 3.5)"}),
        ("dropped term", {"total = (x[1] * weights[1] - 3.5)"}),
        ("dropped term", {"total = (x[0] * weights[0] + x[1] * weights[1])"}),
        ("dropped term", {"total = x[0] * weights[0] + (x[1]) - 3.5"}),
        ("dropped call", {"return ((x)) / len(x)", "return clip(total, -1, ((total))), True"}),
        ("swapped arguments", {"return (clip(-1, total, abs(total))), True"}),
    ],
)
def test_a_kind_of_fault_is_what_its_name_says(kind, expected):
    assert expected <= every(kind)


def test_a_constant_becomes_another():
    assert any("4.5" in new for new in every("constant"))
    assert any("x[1]" not in new for new in every("constant") if new.startswith("total"))


@pytest.mark.parametrize("kind", list(faults.KINDS))
def test_a_fault_is_one_line_that_python_understands_and_that_computes_something_else(kind):
    fault = faults.draw("x.py", SOURCE, kind, faults.random.Random(0))
    lines = SOURCE.splitlines()
    assert lines[fault.line - 1].strip() == fault.old != fault.new
    assert ast.dump(ast.parse(fault.source)) != ast.dump(ast.parse(SOURCE))
    assert fault.source.splitlines()[: fault.line - 1] == lines[: fault.line - 1]
    assert fault.source.splitlines()[fault.line :] == lines[fault.line :]


def test_annotations_are_no_place_for_a_fault():
    assert faults.draw("x.py", "x: int | None = None", "operator", faults.random.Random(0)) is None
    checked = "x: Annotated[int, above(0)] = 3"
    assert "above" in faults.draw("x.py", checked, "dropped call", faults.random.Random(0)).old


def test_a_seed_gives_the_same_faults_in_different_files():
    sources = {f"{i}.py": SOURCE + "#\n" * i for i in range(12)}
    found = faults.chosen(sources, 1, 10)
    assert found == faults.chosen(dict(reversed(sources.items())), 1, 10)
    assert found != faults.chosen(sources, 2, 10)
    assert len({fault.file for fault in found}) == 10
    assert {fault.kind for fault in found} == set(faults.KINDS)


def test_known_faults_are_still_where_they_were(mutation):
    for fault in mutation.known().values():
        assert faults.bare(fault.source) not in (
            None,
            faults.bare((mutation.ROOT / fault.file).read_text()),
        )


def test_every_test_file_is_asked_in_some_stage_and_the_mirror_first(mutation):
    stages = mutation.stages(mutation.ROOT, "flax_mha/positions/rotary.py")
    mirror = "tests/positions/test_positions.py"
    assert mirror in stages[2]
    assert mirror in stages[3]
    every = {
        file.relative_to(mutation.ROOT).as_posix()
        for file in mutation.ROOT.glob("tests/**/test_*.py")
    }
    assert {name for stage in stages for name in stage if name.startswith("tests/")} == every
    assert mutation.stages(mutation.ROOT, "flax_mha/linen.py")[0][0] == "tests/test_linen.py"
