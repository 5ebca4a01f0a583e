"""What every notebook keeps to, and how it is executed.

    python tests/notebook_rules.py notebooks/1_*.ipynb     executes files anew and stores them clean

Each rule is a function from a notebook to the list of its violations.
"""

import ast
import itertools
import os
import pathlib
import re
import sys
import tempfile
import tomllib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = PROJECT["urls"]["Source"]
COLAB = SOURCE.replace("https://github.com", "https://colab.research.google.com/github")
MAX_BYTES = 1_000_000
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
VARIES = "varies"  # the tag of a cell whose text differs from run to run, such as a timing
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|tmp|home|usr|var|opt|mnt|Users)/")
_NUMBER = re.compile(r"([-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?)")


# --- execution ----------------------------------------------------------------------------------


def executed(notebook):
    """A copy with the outputs of a fresh kernel that imports this checkout, on the CPU."""
    notebook = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=_environment(folder))
    return cleaned(notebook)


def _environment(folder):
    """This process's, without what the test suite sets for itself or a user for IPython."""
    ours = ("XLA_FLAGS", "MPLBACKEND", "KERAS_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    forced = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "IPYTHONDIR": folder}
    return environment | forced


def cleaned(notebook):
    """A copy with the metadata that a notebook may have, and no other."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    return notebook


# --- rules --------------------------------------------------------------------------------------


def badge_violations(name, notebook):
    """The first cell opens this very file in Colab."""
    first = notebook.cells[0]
    badge = f"https://colab.research.google.com/assets/colab-badge.svg)]({notebook_url(name)})"
    if first.cell_type == "markdown" and badge in first.source:
        return []
    return [f"the first cell is no markdown with the badge of {notebook_url(name)}"]


def notebook_url(name):
    return f"{COLAB}/blob/main/notebooks/{name}"


def install_violations(name, notebook):
    """The first code cell installs this repository on Colab, with extras that exist."""
    source = _code_cells(notebook)[0].source
    found = re.findall(r'"flax_mha(?:\[([\w,]+)\])? @ git\+([^"]+)"', source)
    if '"google.colab" in sys.modules' not in source or [url for _, url in found] != [SOURCE]:
        return [f"the first code cell does not install git+{SOURCE} on Colab, and there alone"]
    extras = [extra for extra in found[0][0].split(",") if extra]
    unknown = set(extras) - set(PROJECT["optional-dependencies"])
    return [f"the first code cell installs an unknown extra: {extra}" for extra in unknown]


def execution_violations(name, notebook):
    """All code cells ran once, in order, without an error; nothing is empty."""
    cells = _code_cells(notebook)
    found = [f"an empty cell: {cell.id}" for cell in notebook.cells if not cell.source.strip()]
    if [cell.execution_count for cell in cells] != [*range(1, len(cells) + 1)]:
        found.append("the cells were not executed once each, in order, in a fresh kernel")
    errors = [output for output in _outputs(notebook) if output.output_type == "error"]
    return found + [f"an error is stored: {error.ename}: {error.evalue}" for error in errors]


def output_violations(name, notebook):
    """What prints has printed, there are pictures, and nothing went to stderr."""
    found = []
    for cell in _code_cells(notebook):
        if _prints(cell.source) and not text_of(cell):
            found.append(f"a cell that prints has no output: {cell.source.splitlines()[0]}")
    if not any("image/png" in output.get("data", {}) for output in _outputs(notebook)):
        found.append("no picture is stored")
    stderr = [output.text for output in _outputs(notebook) if output.get("name") == "stderr"]
    return found + [f"something went to stderr: {text[:200]}" for text in stderr]


def privacy_violations(name, notebook):
    """No path of the machine that ran it in what the cells put out."""
    texts = [text for output in _outputs(notebook) for text in _texts(output)]
    return [f"a path of a machine: {t[:200]}" for t in texts if _MACHINE_PATH.search(t)]


def metadata_violations(name, notebook):
    """The kernel is python3, no cell has more than tags; no widgets, no times of execution."""
    found = []
    if notebook.metadata != METADATA:
        found.append(f"the metadata is not {METADATA}: {dict(notebook.metadata)}")
    for cell in notebook.cells:
        if not set(cell.metadata) <= {"tags"} or not set(cell.metadata.get("tags", ())) <= {VARIES}:
            found.append(f"cell {cell.id} has metadata besides the tag {VARIES!r}")
    return found


def size_violations(name, notebook):
    size = len(nbformat.writes(notebook).encode())
    return [f"{size} bytes are more than {MAX_BYTES}"] if size > MAX_BYTES else []


RULES = [
    badge_violations,
    install_violations,
    execution_violations,
    output_violations,
    privacy_violations,
    metadata_violations,
    size_violations,
]


def difference_violations(stored, fresh):
    """Every cell puts out what it did; the text may differ in a cell tagged as varying."""
    found = []
    for old, new in zip(_code_cells(stored), _code_cells(fresh)):
        first_line = old.source.splitlines()[0]
        kinds = [[sorted(output.get("data", {})) for output in cell.outputs] for cell in (old, new)]
        if kinds[0] != kinds[1]:
            found.append(f"{first_line}: put out {kinds[0]}, now {kinds[1]}")
            continue
        texts = text_of(old), text_of(new)
        if VARIES not in old.metadata.get("tags", ()) and not same_text(*texts):
            found.append(f"{first_line}: printed {texts[0]!r}, now {texts[1]!r}")
    return found


def same_text(stored, fresh):
    """Equal but for spaces and for one unit in the last decimal place that a number shows.

    Sums in another order, as another processor makes them, round another way. Whole numbers are
    counts and shapes: they are equal.
    """
    parts = [_NUMBER.split(text) for text in (stored, fresh)]  # word, number, word, ...
    words, numbers = ([part[start::2] for part in parts] for start in (0, 1))
    if len(words[0]) != len(words[1]) or not all(a.split() == b.split() for a, b in zip(*words)):
        return False
    return all(abs(float(a) - float(b)) <= _last_place(a) * 1.001 for a, b in zip(*numbers))


def _last_place(number):
    """The unit of the last decimal place: 0.01 of "3.14", 0 of "3" and of NumPy's "3."."""
    mantissa, _, exponent = number.partition("e")
    decimals = mantissa.partition(".")[2]
    return 10.0 ** (int(exponent or 0) - len(decimals)) if decimals else 0.0


# --- cells --------------------------------------------------------------------------------------


def _code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook):
    return [*itertools.chain(*(cell.outputs for cell in _code_cells(notebook)))]


def text_of(cell):
    """What a cell printed, and the texts of its values."""
    return "\n".join(text for output in cell.outputs for text in _texts(output)).strip()


def _texts(output):
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return output.traceback
    if any(kind.startswith("image/") for kind in output.data):
        return []  # the picture speaks; its text is its size in pixels
    return [str(value) for value in output.data.values()]


def _prints(source):
    """Whether a cell itself calls print, not only a function that it defines."""
    python = re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.MULTILINE)
    definitions = (ast.FunctionDef, ast.ClassDef)
    statements = [x for x in ast.parse(python).body if not isinstance(x, definitions)]
    names = [node.id for x in statements for node in ast.walk(x) if isinstance(node, ast.Name)]
    return "print" in names


def main(paths):
    for path in map(pathlib.Path, paths):
        notebook = executed(nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        found = [violation for rule in RULES for violation in rule(path.name, notebook)]
        print(f"{path.name}: {path.stat().st_size} bytes", *found, sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1:])
